"""On a device, the bits are those of the resident model, whatever stays on the device and in host memory.

The device is simulated: results computed before a copy has arrived are garbage, and copies arrive as late as possible.
"""

import asyncio
import copy
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from surfw.chunking import prepare_model, write_model
from surfw.config import CodecChoice
from surfw.errors import ConfigurationError, SurfwError
from surfw.models import StreamingModel
from surfw.models.client import WeightClient
from surfw.runtime.device_engine import DeviceEngine
from surfw.runtime.device_tier import DeviceTier
from surfw.runtime.simulated import SimulatedDevice
from surfw.storage import open_backend
from tests.checkpoints import save_llama
from tests.exactness.families import FAMILIES
from tests.exactness.test_families import assert_equal, inputs, outputs


@pytest.mark.parametrize("name", ["llama", "llama-tied", "t5", "albert-shared-layers", "qwen3-experts"])
def test_streamed_to_a_device_equals_resident(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    FAMILIES[name].build().save_pretrained(tmp_path)
    resident = copy.deepcopy(getattr(transformers, FAMILIES[name].class_name).from_pretrained(tmp_path))
    given = [inputs(resident, batch) for batch in (1, 2)]
    expected = [outputs(resident, one) for one in given]
    with WeightClient(tmp_path) as client:
        with StreamingModel.open(client, device="simulated", cache_size=1) as probe:
            engine = device_engine(probe)
            layer = max(engine.plan.sizes[one] for one in probe.layers)
            part = engine.least_budget_bytes + layer + 50_000
            host = engine.below.least_budget_bytes
        everywhere: list[dict[str, Any]] = [
            {"cache_size": 1}, {"device_memory": part}, {}, {"device_memory": part, "memory_budget": host},
        ]  # fmt: skip
        for options in everywhere:
            with StreamingModel.open(client, device="simulated", **options) as streaming:
                engine = device_engine(streaming)
                for one, want in zip(given, expected, strict=True):
                    for _ in range(2):
                        assert_equal(outputs(streaming, one), want, f"{name} with {options}")
                device = engine.device
                assert isinstance(device, SimulatedDevice)
                assert device.peak_bytes <= (engine.limit.budget_bytes or engine.plan.peak_bytes), "within its budget"
                assert engine.below.resident_bytes <= engine.below.plan.peak_bytes, "and so is the host"
                is_whole = not options or name.startswith("albert")
                assert bool(engine.plan.streamed) is not is_whole, "all of it stays, or not"
            assert device.in_use_bytes == 0, "nothing of it is left on the device"


def device_engine(streaming: StreamingModel) -> DeviceEngine:
    """The engine for the device's memory."""
    engine = streaming._engine
    assert isinstance(engine, DeviceEngine)
    return engine


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_packed_forms_are_copied_packed_and_give_the_bits_of_the_cpu(codec: CodecChoice, tmp_path: Path) -> None:
    save_llama(tmp_path / "llama", layers=3, hidden=64)
    with prepare_model(str(tmp_path / "llama"), name="llama") as prepared:
        asyncio.run(write_model(prepared, open_backend(tmp_path / "store"), codecs=(codec,)))
    ids = torch.tensor([[1, 17, 42, 101, 7]])
    with WeightClient(str(tmp_path / "store")) as client:
        with StreamingModel.open(client, "llama", codec=codec) as here:
            expected = here(input_ids=ids).logits
        for options in ({"cache_size": 1}, {}):
            with StreamingModel.open(client, "llama", codec=codec, device="simulated", **options) as streaming:
                for _ in range(2):
                    assert torch.equal(streaming(input_ids=ids).logits, expected), f"{codec} with {options}"
                engine = device_engine(streaming)
                assert bool(engine.plan.streamed) is bool(options)
                layer = streaming.manifest.by_name[streaming.layers[0]]
                form = layer.form(codec)
                assert form is not None
                assert form.stored_bytes <= engine.plan.sizes[layer.name] < form.stored_bytes + 512, "packed"


def test_on_a_device_that_has_all_of_it_passes_are_counted_as_on_the_cpu(tmp_path: Path) -> None:
    save_llama(tmp_path, layers=3, hidden=64)
    ids, counted = torch.tensor([[1, 17, 42, 101, 7]]), []
    with WeightClient(tmp_path) as client:
        for device in ("cpu", "simulated"):
            with StreamingModel.open(client, device=device) as streaming:
                streaming.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
                cache = streaming.statistics()["cache"]
                counted.append((cache["hits"], cache["misses"]))
    chunks = len(streaming.manifest.chunks)
    assert counted == [(5 * chunks, chunks)] * 2


def test_memory_is_kept_for_each_stream_that_computed_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path, layers=2, hidden=64)
    streams, waited = iter(["one", "other"]), []
    monkeypatch.setattr(SimulatedDevice, "wait", lambda *_: next(streams))
    monkeypatch.setattr(SimulatedDevice, "wait_for_computing", lambda _, stream: waited.append(stream))
    with WeightClient(tmp_path) as client, StreamingModel.open(client, device="simulated") as streaming:
        engine = device_engine(streaming)
        for _ in range(2):
            engine.acquire(streaming.layers[0])
            engine.release(streaming.layers[0])
        engine.clear()
        assert sorted(waited) == ["one", "other"]


def test_a_copy_that_fails_leaves_nothing_and_the_next_run_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path, layers=3, hidden=64)
    ids = torch.tensor([[1, 17, 42, 101, 7]])
    with WeightClient(tmp_path) as client:
        with StreamingModel.open(client) as here:
            expected = here(input_ids=ids).logits
        with StreamingModel.open(client, device="simulated", cache_size=1) as streaming:
            engine, copied = device_engine(streaming), SimulatedDevice.copy
            with monkeypatch.context() as patch:

                def fail(*given: Any) -> Any:
                    copied(*given)
                    raise SurfwError("the bus is broken")

                patch.setattr(SimulatedDevice, "copy", fail)
                with pytest.raises(SurfwError, match="the bus is broken"):
                    streaming(input_ids=ids)
            tier = engine.host
            assert isinstance(tier, DeviceTier)
            while tier._unfinished:  # planned prefetches
                wait(list(tier._unfinished))
            assert not any(slot.users for slot in engine.below.table), "host memory is given back"
            assert torch.equal(streaming(input_ids=ids).logits, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_layers_and_bytes_of_the_same_memory_are_an_error(tmp_path: Path) -> None:
    save_llama(tmp_path)
    with WeightClient(tmp_path) as client, pytest.raises(ConfigurationError, match="exclude each other where there is"):
        StreamingModel.open(client, device="auto", cache_size=1, memory_budget="1GB")
