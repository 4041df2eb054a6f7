"""Models from the hub: only needed files are fetched, the cache works offline, and errors are one line.

Each case runs in a new process with an empty home, so that the hub library reads its settings as for users.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save

from checkpoint.fake_hub import COMMIT, MODEL, serve
from checkpoint.samples import CONFIG, arrays, write_sharded

_OPEN = """
import json, sys
from surfw.checkpoint import open_checkpoint
from surfw.errors import SurfwError
try:
    with open_checkpoint(sys.argv[1], revision=sys.argv[2] or None) as checkpoint:
        print(json.dumps([checkpoint.name, checkpoint.path.name, sorted(checkpoint.tensors), sorted(checkpoint.files)]))
except SurfwError as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""
_OPEN_ADAPTER = _OPEN.replace("open_checkpoint", "open_adapter").replace(
    "checkpoint import", "checkpoint.adapter import"
)
_DOWNLOAD = """
import sys
from surfw.checkpoint import open_checkpoint
open_checkpoint(sys.argv[1], show_progress=sys.argv[2] == "shown").close()
"""
_SINGLE = {
    "config.json": json.dumps(CONFIG).encode(),
    "generation_config.json": b'{"eos_token_id": 2}',
    "tokenizer.json": b"{}",
    "model.safetensors": save(arrays("a", "b")),
    "pytorch_model.bin": b"the same again",
    "consolidated.safetensors": b"the same again",
    "onnx/model.onnx": b"the same again",
    "onnx/config.json": b"not this one",
    "README.md": b"words",
}
_OPENED = [MODEL, COMMIT, ["a", "b"], ["tokenizer.json"]]


def open_in_process(
    home: Path, endpoint: str, model: str = MODEL, revision: str = "", script: str = _OPEN, **more: str
) -> object:
    settings = {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "*",
    } | more
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", script, model, revision]
    seen = subprocess.run(command, env=kept | settings, capture_output=True, text=True, check=False, timeout=120)
    assert seen.returncode == 0, seen.stderr
    return json.loads(seen.stdout)


@pytest.fixture
def nowhere():
    """An endpoint without a server."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_only_what_is_needed_is_fetched_and_the_cache_serves_without_a_hub(tmp_path, nowhere):
    with serve(_SINGLE) as hub:
        assert open_in_process(tmp_path, hub.url) == _OPENED
        assert sorted(hub.served) == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
        assert open_in_process(tmp_path, hub.url, revision="main") == _OPENED
        assert len(hub.served) == 4
    assert open_in_process(tmp_path, nowhere) == _OPENED
    assert open_in_process(tmp_path, nowhere, HF_HUB_OFFLINE="1") == _OPENED


@pytest.mark.parametrize("settings", [{}, {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}])
@pytest.mark.parametrize("wish", ["shown", "silent"])
def test_bars_are_drawn_only_where_they_are_asked_for(wish, settings, tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    kept |= {"HF_HOME": str(tmp_path), "NO_PROXY": "*", "TQDM_POSITION": "-1"} | settings  # -1: as in a terminal
    with serve(_SINGLE) as hub:
        command = [sys.executable, "-c", _DOWNLOAD, MODEL, wish]
        done = subprocess.run(
            command, env=kept | {"HF_ENDPOINT": hub.url}, capture_output=True, text=True, check=True, timeout=120
        )
    assert done.stdout == ""
    assert ("100%" in done.stderr) == (wish == "shown")
    assert ("it/s" in done.stderr or "B/s" in done.stderr) == (wish == "shown")


def test_shards_are_those_of_the_index(tmp_path):
    tensors = write_sharded(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with serve(files | {"model-00003-of-00002.safetensors": b"left over", "tokenizer.json": b"{}"}) as hub:
        assert open_in_process(tmp_path / "home", hub.url) == [MODEL, COMMIT, sorted(tensors), ["tokenizer.json"]]
        assert sorted(hub.served) == sorted([*files, "tokenizer.json"])


_ADAPTER = {
    "adapter_config.json": b'{"peft_type": "LORA", "r": 4}',
    "adapter_model.safetensors": save(arrays("base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight")),
    "adapter_model.bin": b"the same again",
    "tokenizer.json": b"{}",
    "checkpoint-500/adapter_model.safetensors": b"an earlier one",
    "optimizer.pt": b"not this one",
}


def test_of_an_adapter_too_only_what_is_needed_is_fetched_and_kept(tmp_path, nowhere):
    tensors = ["base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight"]
    opened = [MODEL, COMMIT, tensors, ["tokenizer.json"]]
    with serve(_ADAPTER) as hub:
        for revision in ("", "main"):
            assert open_in_process(tmp_path, hub.url, revision=revision, script=_OPEN_ADAPTER) == opened
            assert sorted(hub.served) == ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
        assert open_in_process(tmp_path, hub.url) == (
            f"UnsupportedModelError: hub model {MODEL} is an adapter (adapter_config.json), no whole model: chunk its "
            f"base first, and then the adapter over it, with surfw chunk {MODEL} --base NAME"
        )
    assert open_in_process(tmp_path, nowhere, script=_OPEN_ADAPTER) == opened
    absent = open_in_process(tmp_path, nowhere, "org/other", script=_OPEN_ADAPTER)
    assert absent == refusal("org/other", "ConnectError: [Errno 111] Connection refused")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (_SINGLE, " is no adapter: there is no adapter_config.json; name the folder that peft's save_pretrained wrote"),
        (
            {name: data for name, data in _ADAPTER.items() if not name.startswith("adapter_model")},
            " has no weights of an adapter: expected adapter_model.safetensors or adapter_model.bin, it has ",
        ),
        (
            _ADAPTER | {"adapter_config.json": b'{"peft_type": "VERA"}'},
            "/adapter_config.json is an adapter of the kind 'VERA' (peft_type), and surfw applies 'LORA' alone",
        ),
    ],
)
def test_what_is_no_adapter_that_is_applied_is_refused_before_its_weights_are_fetched(tmp_path, files, said):
    with serve(files) as hub:
        refused = open_in_process(tmp_path, hub.url, script=_OPEN_ADAPTER)
        assert f": hub model {MODEL}{said}" in refused
        assert not {"model.safetensors", "adapter_model.safetensors"}.intersection(hub.served)


def test_what_cannot_be_chunked_is_refused_before_its_weights_are_fetched(tmp_path):
    config = json.dumps(CONFIG | {"quantization_config": {"quant_method": "awq"}}).encode()
    with serve(_SINGLE | {"config.json": config}) as hub:
        refused = open_in_process(tmp_path, hub.url)
        assert "('awq'), and surfw makes dense ones of compressed-tensors, fp8" in refused
        assert "model.safetensors" not in hub.served


def test_a_repository_of_another_kind_is_refused_at_once(tmp_path):
    with serve({"tiny-Q4.gguf": b"GGUF", "README.md": b""}) as hub:
        refused = open_in_process(tmp_path, hub.url)
        assert refused.startswith(
            f"UnsupportedModelError: hub model {MODEL} has no weights that surfw reads: expected "
        )
        assert "it has tiny-Q4.gguf (GGUF weights, of which surfw chunk takes one file); save" in refused
        assert hub.served == []


def test_an_index_that_promises_too_much(tmp_path):
    index = json.dumps({"weight_map": {"a": "model-00009.safetensors"}}).encode()
    files = {"config.json": _SINGLE["config.json"], "model.safetensors.index.json": index}
    with serve(files) as hub:
        assert open_in_process(tmp_path, hub.url) == (
            f"CheckpointError: hub model {MODEL} is incomplete: its model.safetensors.index.json names "
            "model-00009.safetensors, which is not there; ask its owner"
        )


def refusal(model: str, reason: str, advice: str = "check the network and the name") -> str:
    return (
        f"CheckpointError: model '{model}' is neither a directory here nor a hub model that can be reached ({reason}); "
        f"{advice}, or give a local directory"
    )


def test_the_hub_says_no(tmp_path):
    with serve(_SINGLE) as hub:
        unknown = refusal("org/other", "the hub has no such model, or it is private", "check the name")
        assert open_in_process(tmp_path, hub.url, "org/other") == unknown
        revision = refusal(MODEL, "the model has no revision 'v9'", "check the name")
        assert open_in_process(tmp_path, hub.url, revision="v9") == revision


def test_a_gated_model_says_what_to_do(tmp_path):
    with serve(_SINGLE, gated=True) as hub:
        assert open_in_process(tmp_path, hub.url) == (
            f"CheckpointError: hub model {MODEL} could not be downloaded (access is restricted: ask for it on the "
            "model's page, then run 'hf auth login'); run again, what has arrived is kept"
        )


def test_no_hub_at_the_address(tmp_path, nowhere):
    refused = open_in_process(tmp_path, nowhere)
    assert refused == refusal(MODEL, "ConnectError: [Errno 111] Connection refused")


@pytest.mark.parametrize("model", ["tiny", "org/tiny"])
def test_offline(tmp_path, model):
    refused = open_in_process(tmp_path, "http://127.0.0.1:9", model, HF_HUB_OFFLINE="1")
    assert refused == refusal(model, "HF_HUB_OFFLINE is set")


@pytest.mark.parametrize("model", ["no such directory", "org/ti:ny", "-x", "a--b", "x" * 300])
def test_what_cannot_be_a_name_on_the_hub(tmp_path, model):
    refused = open_in_process(tmp_path, "http://127.0.0.1:9", model)
    assert refused == refusal(model, "it cannot be a hub id", "check the name")
