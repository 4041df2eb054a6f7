"""Exponents are coded for the transfer to a device if that saves time; the bits are those of the resident model.

On the simulated device, decoding is as late as copies, and memory is garbage until then.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from surfw.cli.explain_view import explanation_rows
from surfw.config import CodecChoice
from surfw.models import StreamingModel
from surfw.models.client import WeightClient
from surfw.runtime import exponents
from surfw.runtime.device_engine import DeviceEngine
from surfw.runtime.plan import Limit
from surfw.runtime.simulated import SimulatedDevice
from surfw.settings import SettingOrigin
from tests.checkpoints import save_llama

LAYERS = 8


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA in bfloat16, with layers of 0.7 MB."""
    path = save_llama(tmp_path_factory.mktemp("llama"), layers=LAYERS, hidden=192)
    LlamaForCausalLM.from_pretrained(path).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split a layer into six pieces, so that the two buffers are reused; coding takes the memory of one layer."""
    monkeypatch.setattr(exponents, "PIECE_WORDS", 64 << 10)
    monkeypatch.setattr(exponents, "_STEP_WORDS", 4 << 10)


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[tuple[StreamingModel, DeviceEngine, SimulatedDevice]]:
    """A model on a simulated device, which leaves nothing behind."""
    with WeightClient(path) as client:
        with StreamingModel.open(client, device="simulated", **options) as streaming:
            engine = streaming._engine
            assert isinstance(engine, DeviceEngine)
            assert isinstance(engine.device, SimulatedDevice)
            yield streaming, engine, engine.device
        assert engine.device.in_use_bytes == 0, "nothing of it is left on the device"
        assert not engine.below.coded


def prompt(rows: int) -> torch.Tensor:
    return torch.tensor([[1, 17, 42, 101, 7], [1, 5, 80, 3, 200]])[:rows]


def outcome(model: Any, rows: int) -> torch.Tensor:
    """The logits of every step of a greedy generation, of shape (steps, rows, vocabulary)."""
    ids, found = prompt(rows).to(model.device), {"output_logits": True, "return_dict_in_generate": True}
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, **found}
    return torch.stack(model.generate(ids, attention_mask=torch.ones_like(ids), **options).logits)


def budgets(path: Path) -> tuple[int, int, int]:
    """The smallest budgets of the device and the host, and the size of a layer."""
    with opened(path, cache_size=1) as (streaming, engine, _):
        layer = max(engine.plan.sizes[one] for one in streaming.layers)
        return engine.least_budget_bytes, engine.below.least_budget_bytes, layer


@pytest.mark.parametrize("hosts_layers", [0, 3, None])
def test_coded_layers_give_the_bits_of_the_resident_model(llama: Path, hosts_layers: int | None) -> None:
    device_bytes, host_bytes, layer = budgets(llama)
    resident = LlamaForCausalLM.from_pretrained(llama).eval()
    expected = {rows: outcome(resident, rows) for rows in (1, 2)}
    options: dict[str, Any] = {"device_memory": device_bytes + 3 * layer}
    if hosts_layers is not None:
        options["memory_budget"] = host_bytes + hosts_layers * layer + layer // 4
    with opened(llama, **options) as (streaming, engine, device):
        for _ in range(2):
            for rows, want in expected.items():
                assert torch.equal(outcome(streaming, rows), want), f"{hosts_layers} layers in host memory"
        below, streamed = engine.below, set(engine.plan.streamed).intersection(streaming.layers)
        assert bool(engine.plan.coding_bytes) is (hosts_layers != 0), "or the source limits"
        assert device.peak_bytes <= (engine.limit.budget_bytes or 0)
        assert below.plan.peak_bytes <= (below.limit.budget_bytes or 0)
        assert below.resident_bytes + sum(one.capacity_bytes for one in below.coded.values()) <= below.plan.peak_bytes
        if hosts_layers is None:
            assert streamed.issubset(below.coded), "all that is streamed is coded"
            assert engine.copied_per_pass < 0.73 * engine.plan.bytes_per_pass
            assert below.plan.bytes_per_pass == 0
        elif hosts_layers:
            least = int(hosts_layers / 0.71)
            assert len(streamed.intersection(below.coded)) >= min(least, len(streamed)), "more layers than as they are"
        before, read = streaming.metrics.count("copied_bytes"), streaming.metrics.count("fetched_bytes")
        streaming(input_ids=prompt(1))
        assert streaming.metrics.count("copied_bytes") - before <= engine.copied_per_pass + 2 * layer, "and two ahead"
        if hosts_layers is None:
            assert streaming.metrics.count("fetched_bytes") == read, "nothing is read again"


def test_the_plan_may_change_while_layers_are_coded(llama: Path) -> None:
    device_bytes, _, layer = budgets(llama)
    resident = LlamaForCausalLM.from_pretrained(llama).eval()
    expected = outcome(resident, 1)
    with opened(llama, device_memory=device_bytes + 3 * layer) as (streaming, engine, _):
        for extra in (2, 4, 1, 40, 3):
            engine.relimit(Limit(budget_bytes=device_bytes + extra * layer, tier="device"))
            assert torch.equal(outcome(streaming, 1), expected), f"{extra} layers more"
            kept = engine.plan.pinned
            assert kept.isdisjoint(engine.below.coded), "what stays on the device takes no host memory"
        assert engine.below.coded
        engine.clear()
        assert not engine.below.coded
        assert torch.equal(outcome(streaming, 1), expected), "after everything was given back"


def test_it_pays_or_it_is_not_used(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device_bytes, _, layer = budgets(llama)
    enough = {"device_memory": device_bytes + 3 * layer}
    with opened(llama, **enough, codec="none") as (streaming, engine, _):
        expected = streaming(input_ids=prompt(1)).logits
        assert not engine.plan.coding_bytes, "as it was asked for"
    with opened(llama) as (_, engine, _), opened(llama, device_memory=device_bytes) as (_, least, _):
        assert not engine.plan.coding_bytes, "everything stays on the device"
        assert not least.plan.coding_bytes, "there is no memory for it"
    with monkeypatch.context() as patch:
        patch.setattr(SimulatedDevice, "computing_seconds", 9.0)
        with opened(llama, **enough) as (streaming, engine, _):
            assert torch.equal(streaming(input_ids=prompt(1)).logits, expected)
            assert not engine.below.coded, "decoding takes longer than it saves"
            assert engine.copied_per_pass == engine.plan.bytes_per_pass
            assert engine.below.plan.bytes_per_pass == 0
    with monkeypatch.context() as patch:
        patch.setattr(exponents, "MOST_SHARE", 0.6)
        with opened(llama, **enough) as (streaming, engine, _):
            assert torch.equal(streaming(input_ids=prompt(1)).logits, expected)
            assert not engine.below.coded, "they hardly get smaller"


def test_what_decodes_to_other_bits_is_not_used(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(coded: torch.Tensor, piece: exponents.Piece, into: torch.Tensor) -> None:
        exponents.decode(coded, piece, into)
        into[-1] ^= 1

    device_bytes, _, layer = budgets(llama)
    with opened(llama) as (streaming, _, _):
        expected = streaming(input_ids=prompt(1)).logits
    with opened(llama, device_memory=device_bytes + 3 * layer) as (streaming, engine, device):
        monkeypatch.setattr(device, "decoder", wrong)
        with caplog.at_level(logging.WARNING, "surfw.runtime"):
            assert torch.equal(streaming(input_ids=prompt(1)).logits, expected)
        assert not engine.below.coded
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "weights are copied to a simulated device as they are, since they cannot be coded there: what was coded "
        "comes back as other bits"
    )


def test_closing_while_a_layer_is_coded_leaves_nothing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device_bytes, _, layer = budgets(llama)
    begun, may_end = threading.Event(), threading.Event()

    def slow(coded: torch.Tensor, piece: exponents.Piece, into: torch.Tensor) -> None:
        begun.set()
        may_end.wait()
        exponents.decode(coded, piece, into)

    with opened(llama, device_memory=device_bytes + 3 * layer) as (streaming, _, device):
        monkeypatch.setattr(device, "decoder", slow)
        streaming._engine.warm()
        begun.wait()
        closing = threading.Thread(target=streaming.close)
        closing.start()
        may_end.set()
        closing.join()


def test_explaining_counts_what_is_coded(llama: Path) -> None:
    device_bytes, _, layer = budgets(llama)
    with opened(llama, device_memory=device_bytes + 3 * layer) as (streaming, engine, _):
        found = streaming.explain(prompt_tokens=4, new_tokens=2)
        streamed = len(set(streaming.layers) - engine.plan.pinned)
        assert (found.device, found.kept_layers) == ("a simulated device", LAYERS - streamed)
        assert found.host_kept_layers == found.host_coded_layers == streamed
        assert found.bus_bytes_per_pass == engine.copied_per_pass < 0.73 * engine.plan.bytes_per_pass
        assert found.bus_bytes_per_second
        assert found.bus_ceiling == found.bus_bytes_per_second / found.bus_bytes_per_pass
        assert found.bytes_per_pass == 0, "all of it waits in host memory"
        assert found.ceiling == min(one for one in (found.bus_ceiling, found.computing_ceiling) if one)
        assert found.host_peak_bytes is not None
        assert found.host_peak_bytes <= (found.host_budget_bytes or 0)
        rows = dict(explanation_rows(found, SettingOrigin("argument", "--device-memory")))
    assert rows["host memory"].endswith(f"{streamed} layers that the device lacks stay there, {streamed} of them coded")
    assert "(lossless) at " in rows["copied in a pass"]


@pytest.mark.parametrize("codec", ["none", "auto"])
def test_inference_mode_and_outside_of_it(llama: Path, codec: CodecChoice) -> None:
    device_bytes, _, layer = budgets(llama)
    expected = outcome(LlamaForCausalLM.from_pretrained(llama).eval(), 1)
    with opened(llama, device_memory=device_bytes + 3 * layer, codec=codec) as (streaming, _, _):
        with torch.inference_mode():
            assert torch.equal(outcome(streaming, 1), expected)
        assert torch.equal(outcome(streaming, 1), expected)


def test_an_error_in_a_hook_leaves_nothing_and_the_next_run_is_right(llama: Path) -> None:
    device_bytes, _, layer = budgets(llama)
    expected = outcome(LlamaForCausalLM.from_pretrained(llama).eval(), 1)
    with opened(llama, device_memory=device_bytes + 3 * layer) as (streaming, _, _):
        layers: Any = streaming.model.model.layers
        with layers[LAYERS // 2].register_forward_hook(fail), pytest.raises(ZeroDivisionError):
            streaming(input_ids=prompt(1))
        assert torch.equal(outcome(streaming, 1), expected)
        with layers[LAYERS // 2].register_forward_hook(fail), pytest.raises(ZeroDivisionError):
            streaming(input_ids=prompt(1))


def fail(*_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("codec", ["none", "auto"])
def test_on_a_card(llama: Path, codec: CodecChoice) -> None:
    resident: Any = LlamaForCausalLM.from_pretrained(llama).eval().to("cuda")
    expected = {rows: outcome(resident, rows) for rows in (1, 2)}
    before = torch.cuda.memory_allocated()
    with WeightClient(llama) as client:
        with StreamingModel.open(client, device="cuda", cache_size=1) as probe:
            engine: Any = probe._engine
            budget = engine.least_budget_bytes + 3 * max(engine.plan.sizes[one] for one in probe.layers)
        with StreamingModel.open(client, device="cuda", device_memory=budget, codec=codec) as streaming:
            for _ in range(2):
                for rows, want in expected.items():
                    assert torch.equal(outcome(streaming, rows), want)
            engine = streaming._engine
            assert engine.plan.streamed
            if codec == "none" or find_spec("triton") is None:
                assert not engine.below.coded
    assert torch.cuda.memory_allocated() == before
