"""Peers run in separate processes on the same work; comparisons that are impossible give an error."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from surfw.bench.cap import LEAST_BYTES, memory_group
from surfw.bench.comparison import Comparison
from surfw.bench.infer import bench_infer
from surfw.bench.infer_result import InferResult
from surfw.bench.peers import PEERS
from surfw.bench.peers.accelerate import place_modules
from surfw.bench.peers.gguf_file import check_gguf, write_gguf
from surfw.chunking.library import ModelChunker
from surfw.cli.app import app
from surfw.codec import stored_codecs
from surfw.errors import ConfigurationError
from surfw.storage import Store, open_backend
from tests.checkpoints import save_bert, save_llama
from tests.cli.run import SURFW, environment, surfw
from tests.exactness.families import MIXTURES
from tests.servers import serve
from tests.services import warm
from tests.skeleton.models import skeleton_of

TOKENS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA."""
    return save_llama(tmp_path_factory.mktemp("infer") / "tiny", layers=8)


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    """The checkpoint in a store."""
    ModelChunker(checkpoint, checkpoint.parent / "store").chunk_model_sync()
    return checkpoint.parent / "store"


def compare(checkpoint: Path, *against: str, **options: object) -> InferResult:
    """Run one round of a few tokens with a given bandwidth, because measuring it takes seconds."""
    given: dict[str, object] = {"rounds": 1, "new_tokens": TOKENS, "bandwidth_bytes": 100_000_000} | options
    return bench_infer(Comparison(model_dir=str(checkpoint), against=against, **given))  # type: ignore[arg-type]


def refused(checkpoint: Path, *against: str, **options: object) -> str:
    """Return the error of an impossible comparison."""
    with pytest.raises(ConfigurationError) as caught:
        compare(checkpoint, *against, **options)
    return str(caught.value)


def test_all_of_them_generate_the_same_tokens_and_the_json_says_what_it_took(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work").mkdir()
    names = ["resident", "accelerate"]
    command = [
        "bench", "infer", str(checkpoint), "--against", ",".join(names), "--new-tokens", str(TOKENS), "--rounds", "1",
        "--prompt-tokens", "5", "--dir", str(tmp_path / "work"), "--memory-budget", "650kB", "--json",
    ]  # fmt: skip
    app(command, standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"benchmark", "machine", "work", "bandwidth_bytes_per_second", "rows", "notes"}
    assert found["work"] == {
        "model": "tiny", "source": None, "prompt_tokens": 5, "new_tokens": TOKENS, "rounds": 1, "cap_bytes": None,
        "memory_budget": "650kB",
    }  # fmt: skip
    assert [row["name"] for row in found["rows"]] == ["surfw", *names]
    ours = found["rows"][0]
    for row in found["rows"]:
        assert row.keys() == {
            "name", "value", "unit", "low", "high", "surfw_ratio", "decode_value", "streamed_bytes_per_token",
            "ceiling", "share", "ttft_seconds", "peak_rss_bytes", "peak_group_bytes", "new_tokens", "token_ids",
            "same_tokens", "failed",
        }  # fmt: skip
        assert 0 < row["low"] == row["value"] == row["high"]
        assert row["surfw_ratio"] == pytest.approx(ours["value"] / row["value"])
        assert row["token_ids"] == ours["token_ids"]
        assert (row["new_tokens"], row["same_tokens"], row["failed"]) == (TOKENS, True, None)
        assert row["peak_group_bytes"] is None
        assert 0 < row["ttft_seconds"] < TOKENS / row["low"]
    assert ours["streamed_bytes_per_token"] > 0
    assert ours["share"] == pytest.approx(ours["decode_value"] / ours["ceiling"])
    assert found["bandwidth_bytes_per_second"] > 0
    assert found["rows"][1]["streamed_bytes_per_token"] is None
    assert "all that ran gave the same tokens" in found["notes"]
    assert not list((tmp_path / "work").iterdir()), "what was written for the measurement is gone"


def test_what_people_see(checkpoint: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "bench", "infer", str(checkpoint), "--against", "resident", "--new-tokens", "2", "--rounds", "1",
        "--store", str(store), "--memory-budget", "650kB",
    ]  # fmt: skip
    app(command, standalone_mode=False)
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"surfw: tiny is in {store} already",
        *(f"surfw: round 1 of 1: {what}" for what in ("reads of the store", "surfw", "reads of the store", "resident")),
    ]
    heading, ours, theirs = said.out.splitlines()[:3]
    assert heading.split() == ["tok/s", "surfw", "is", "TTFT", "memory"]
    assert ours.startswith("surfw ")
    assert theirs.startswith("resident ")
    assert "streamed per token" in said.out
    assert "- all that ran gave the same tokens" in said.out
    assert "transformers" in said.out.splitlines()[-1]


def test_a_server_is_read_instead_of_a_store_and_its_link_is_the_ceiling(checkpoint: Path, store: Path) -> None:
    with serve(store) as served:
        found = compare(checkpoint, "resident", source=served.url, bandwidth_bytes=10_000_000, memory_budget="900kB")
        unknown = compare(checkpoint, source=served.url, bandwidth_bytes=None, memory_budget="900kB")
        assert served.stats()["bytes_sent"] > 0
    (ours, resident), (unlimited,) = found.rows, unknown.rows
    assert ours.token_ids == resident.token_ids
    assert found.bandwidth_bytes_per_second == 10_000_000
    assert ours.streamed_bytes_per_token is not None
    assert ours.ceiling == pytest.approx(10_000_000 / ours.streamed_bytes_per_token)
    assert (unlimited.ceiling, unknown.bandwidth_bytes_per_second) == (None, None)
    assert any(note.startswith("no ceiling") for note in unknown.notes)


def test_experts_become_stacks_of_llama_cpps(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    MIXTURES["qwen3-moe"].build().save_pretrained(tmp_path / "mixture")
    file = write_gguf(tmp_path / "mixture", tmp_path / "mixture.gguf")
    tensors = {one.name: one for one in gguf.GGUFReader(file).tensors}
    stored = load_file(tmp_path / "mixture" / "model.safetensors")
    for index in range(8):
        whole = gguf.quants.dequantize(tensors["blk.1.ffn_up_exps.weight"].data, gguf.GGMLQuantizationType.BF16)
        expert = stored[f"model.layers.1.mlp.experts.{index}.up_proj.weight"]
        assert torch.equal(torch.from_numpy(whole[index]), expert.bfloat16().float())
    query = gguf.quants.dequantize(tensors["blk.1.attn_q.weight"].data, gguf.GGMLQuantizationType.BF16)
    plain = stored["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(torch.from_numpy(query), plain.bfloat16().float()), "its pairs are halves, as in transformers"


def test_llama_cpp_generates_as_many(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    if reason := PEERS["llama.cpp"].installed() or check_gguf(str(checkpoint)):
        pytest.skip(reason)
    gguf = write_gguf(checkpoint, tmp_path / "tiny.gguf")
    names = ["llama.cpp", "llama.cpp-q8_0"]
    for row in compare(checkpoint, *names, gguf=str(gguf), store=str(store)).rows[1:]:
        assert row.name == names.pop(0)
        assert (row.failed, row.new_tokens) == (None, TOKENS)
        assert (row.value or 0) > 0
    assert not names


def test_airllm_generates_the_same_few(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    if reason := PEERS["airllm"].installed():
        pytest.skip(reason)
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    found = compare(checkpoint, "airllm", airllm_dir=str(copy), store=str(store), new_tokens=5)
    ours, row = found.rows
    assert (row.failed, row.new_tokens, row.same_tokens) == (None, 4, True)
    assert row.token_ids == (ours.token_ids or [])[:4]
    assert "airllm generated 4 tokens, not 5, because it is slow" in found.notes


def test_the_cap_holds_for_every_peer_and_who_is_killed_stops_nobody(checkpoint: Path, store: Path) -> None:
    try:
        with memory_group(LEAST_BYTES):
            pass
    except ConfigurationError as exc:
        pytest.skip(str(exc))
    roomy = compare(checkpoint, cap_bytes=1_000_000_000, store=str(store))
    assert [row.failed for row in roomy.rows] == [None]
    assert all(0 < (row.peak_group_bytes or 0) <= 1_000_000_000 for row in roomy.rows)
    assert "every process could have 1.0 GB, its page cache included" in roomy.notes
    tight = compare(checkpoint, "resident", cap_bytes=LEAST_BYTES, store=str(store), rounds=2, bandwidth_bytes=None)
    killed = "was killed: a cap of 128.0 MB is too small for it"
    assert [(row.name, row.value, row.failed) for row in tight.rows] == [
        ("surfw", None, killed), ("resident", None, killed),
    ]  # fmt: skip
    assert f"resident: {killed}" in tight.notes
    assert (tight.bandwidth_bytes_per_second or 0) > 0, "the reads need less"


def test_a_peer_that_is_not_installed_is_named(
    checkpoint: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("airllm", "llama_cpp", "accelerate"):
        monkeypatch.setitem(sys.modules, module, None)  # a name without a module
    found = compare(checkpoint, "airllm", "accelerate", airllm_dir=str(tmp_path), store=str(store), new_tokens=2)
    assert [row.name for row in found.rows] == ["surfw"]
    assert "not compared with airllm: airllm is not installed; 'pip install airllm' does it" in found.notes
    assert any(note.startswith("not compared with accelerate: ") for note in found.notes)


def test_without_names_all_run_that_can_and_the_others_are_named(
    checkpoint: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("accelerate", "llama_cpp"):
        monkeypatch.setitem(sys.modules, module, None)
    given = {"rounds": 1, "new_tokens": 2, "memory_budget": "650kB", "bandwidth_bytes": 100_000_000}
    found = bench_infer(Comparison(model_dir=str(checkpoint), store=str(store), **given))  # type: ignore[arg-type]
    assert [row.name for row in found.rows] == ["surfw", "resident", "lru"]
    ours, _, lru = found.rows
    assert (lru.failed, lru.token_ids, lru.same_tokens) == (None, ours.token_ids, True)
    assert all((row.streamed_bytes_per_token or 0) > 0 for row in (ours, lru))
    absent = {note.partition(":")[0] for note in found.notes if note.startswith("not compared with")}
    assert absent == {f"not compared with {name}" for name in ("accelerate", "airllm", "llama.cpp")}


def test_a_quantised_form_is_stored_for_who_reads_it(checkpoint: Path, tmp_path: Path) -> None:
    found = compare(checkpoint, "int4", store=str(tmp_path / "store"))
    assert [(row.name, row.failed) for row in found.rows] == [("surfw", None), ("int4", None)]
    manifest = asyncio.run(Store(open_backend(str(tmp_path / "store"))).manifest("tiny"))
    assert stored_codecs(manifest) == ("none", "int4")


def test_a_model_that_fails_in_its_process_says_why_in_its_row(tmp_path: Path) -> None:
    found = compare(save_bert(tmp_path / "bert"), "resident", new_tokens=2)
    assert "does not generate" in (found.rows[0].failed or "")
    assert found.rows[1].failed


def test_who_takes_too_long_is_stopped(checkpoint: Path, store: Path) -> None:
    found = compare(checkpoint, "resident", store=str(store), patience_seconds=0.001)
    assert {row.failed for row in found.rows} == {"was stopped after 0.001 seconds; give it more time, or less to do"}


def test_what_cannot_be_compared_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    assert refused(checkpoint, "vllm", "resident") == (
        "'vllm' is no peer; there are resident, accelerate, airllm, llama.cpp, llama.cpp-q8_0, llama.cpp-q4_0, lru, "
        "none, lossless, int8, int4"
    )
    assert "convert_hf_to_gguf.py" in refused(save_bert(tmp_path / "bert"), "llama.cpp")
    assert "the gguf file /no.gguf is not there" in refused(checkpoint, "llama.cpp", gguf="/no.gguf")
    assert "name a copy of it" in refused(checkpoint, "airllm")
    assert "name a copy of it" in refused(checkpoint, "airllm", airllm_dir=str(checkpoint))
    assert f"{tmp_path} is no checkpoint in a local directory" in refused(tmp_path, "resident")
    assert "a cap of 1.0 MB is too small" in refused(checkpoint, "resident", cap_bytes=1_000_000)
    assert "store and source exclude each other" in refused(checkpoint, "resident", store="a", source="b")
    assert "size 'much' is not understood" in refused(checkpoint, "resident", memory_budget="much")


def test_the_command_says_it_in_a_line(checkpoint: Path, tmp_path: Path) -> None:
    unknown = surfw(tmp_path, "bench", "infer", str(checkpoint), "--against", "vllm")
    assert unknown.returncode == 2
    assert "\nError: Invalid value for --against: 'vllm' is no peer; there are resident, " in unknown.stderr
    wrong = surfw(tmp_path, "bench", "infer", str(checkpoint), "--cap", "x")
    assert wrong.returncode == 2
    assert wrong.stderr.endswith("\nError: --cap is 'x', expected a size such as 1.2GB\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(
    number: signal.Signals, code: int, checkpoint: Path, store: Path, tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    running = warm.start(
        [SURFW, "bench", "infer", str(checkpoint), "--against", "resident", "--dir", str(tmp_path / "work"),
         "--bandwidth", "100MB"],
        env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert running.stderr is not None
    assert any("round 1 of 3: surfw" in line for line in running.stderr), "it is about to start a peer, or has"
    children = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(number)
    running.communicate(timeout=60)
    assert running.returncode == code
    assert psutil.wait_procs(children, timeout=30)[1] == [], "whatever ran for it has ended"
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_accelerate_gets_a_place_for_every_weight_and_the_disk_for_layers(family: str) -> None:
    model = skeleton_of(family).model
    places = place_modules(model)
    assert set(places.values()) == {"cpu", "disk"}
    layers = {unit.path for unit in skeleton_of(family).units if unit.kind == "layer"}
    assert {path for path, place in places.items() if place == "disk"} == layers
    for name, _ in model.named_parameters(remove_duplicate=False):
        assert sum(name == path or name.startswith(f"{path}.") for path in places) == 1, name
