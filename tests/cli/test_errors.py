"""Every failure gives one clear line and exit code 1, and leaves no partial output."""

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from surfw.manifest import decode_line
from tests.checkpoints import save_llama
from tests.cli.run import SURFW, complaint, environment, surfw
from tests.conftest import require
from tests.servers import serve
from tests.services import warm


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA."""
    return save_llama(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def visible(store: Path) -> list[str]:
    """All files of a store except work in progress."""
    return sorted(str(p.relative_to(store)) for p in store.rglob("*") if p.is_file() and "partial" not in p.parts)


def rewrite_header(shard: Path, change: dict[str, list[int]]) -> None:
    """Change the offsets of tensors in a shard's header."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, offsets in change.items():
        header[name]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def change_config(checkpoint: Path, **changes: object) -> None:
    """Change config.json."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_unknown_model(tmp_path: Path) -> None:
    said = complaint(surfw(tmp_path, "chunk", "no-such-org/no-such-model"))
    assert "no-such-org/no-such-model" in said
    assert not (tmp_path / "store").exists()
    assert "./nowhere" in complaint(surfw(tmp_path, "chunk", "./nowhere"))


def test_truncated_shard(broken: Path, tmp_path: Path) -> None:
    shard = broken / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)
    said = complaint(surfw(tmp_path, "chunk", str(broken)))
    assert "model.safetensors" in said
    assert "truncated" in said
    assert not (tmp_path / "store").exists()


def test_overlapping_offsets(broken: Path, tmp_path: Path) -> None:
    shard = broken / "model.safetensors"
    data = shard.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    norms = [name for name in header if name.endswith("input_layernorm.weight")]
    rewrite_header(shard, {norms[1]: header[norms[0]]["data_offsets"]})
    assert "model.safetensors" in complaint(surfw(tmp_path, "chunk", str(broken)))
    assert not (tmp_path / "store").exists()


def test_absurd_header_length(broken: Path, tmp_path: Path) -> None:
    shard = broken / "model.safetensors"
    shard.write_bytes((1 << 62).to_bytes(8, "little") + shard.read_bytes()[8:])
    assert "model.safetensors" in complaint(surfw(tmp_path, "chunk", str(broken)))
    assert not (tmp_path / "store").exists()


def test_unsupported_checkpoint(broken: Path, tmp_path: Path) -> None:
    (broken / "model.safetensors").rename(broken / "model.gguf")
    assert "model.gguf" in complaint(surfw(tmp_path, "chunk", str(broken)))


def test_missing_weights(broken: Path, tmp_path: Path) -> None:
    change_config(broken, num_hidden_layers=5)
    assert "model.layers.4" in complaint(surfw(tmp_path, "chunk", str(broken)))
    assert not (tmp_path / "store").exists()


def test_config_that_asks_for_a_kernel_repository(broken: Path, tmp_path: Path) -> None:
    change_config(broken, attn_implementation="evil-org/evil-kernel")
    said = complaint(surfw(tmp_path, "chunk", str(broken)))
    assert "evil-org/evil-kernel" in said
    assert "attn_implementation" in said
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 10**9}, {"hidden_size": 10**15}, {"hidden_size": 10**9}, {"vocab_size": 10**11}],
)
def test_absurd_sizes(changes: dict[str, int], broken: Path, tmp_path: Path) -> None:
    change_config(broken, **changes)
    complaint(surfw(tmp_path, "chunk", str(broken)))
    assert not (tmp_path / "store").exists()


def test_bad_name(checkpoint: Path, tmp_path: Path) -> None:
    assert "'../x'" in complaint(surfw(tmp_path, "chunk", str(checkpoint), "--name", "../x"))
    assert not (tmp_path / "store").exists()


def test_no_server_at_the_address(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{free.getsockname()[1]}"
    for arguments in (["infer", "--source", url, "--prompt", "a"], ["stats", url]):
        said = complaint(surfw(tmp_path, *arguments))
        assert url in said
        assert "surfw serve" in said


def test_something_else_at_the_address(tmp_path: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        answering = threading.Thread(target=other.serve_forever)
        answering.start()
        try:
            url = f"ws://127.0.0.1:{other.server_port}"
            assert "not a surfw server" in complaint(surfw(tmp_path, "infer", "--source", url, "--prompt", "a"))
            assert "not a surfw server" in complaint(surfw(tmp_path, "stats", url))
        finally:
            other.shutdown()
            answering.join()


def test_port_in_use(checkpoint: Path, tmp_path: Path) -> None:
    assert surfw(tmp_path, "chunk", str(checkpoint)).returncode == 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = complaint(surfw(tmp_path, "serve", "--port", port))
    assert port in said
    assert "in use" in said


def test_beyond_loopback_needs_insecure(checkpoint: Path, tmp_path: Path) -> None:
    assert surfw(tmp_path, "chunk", str(checkpoint)).returncode == 0
    assert "--insecure" in complaint(surfw(tmp_path, "serve", "--host", "0.0.0.0", "--port", "0"))


def test_a_store_that_is_not_a_store(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"miau")
    for arguments in (
        ["serve", "--store", str(other), "--port", "0"],
        ["infer", "--source", str(other), "--prompt", "a"],
        ["chunk", str(checkpoint), "--store", str(other)],
    ):
        assert str(other) in complaint(surfw(tmp_path, *arguments)), arguments
    assert [path.name for path in other.rglob("*")] == ["cat.jpg"]
    nowhere = str(tmp_path / "nowhere")
    for arguments in (
        ["serve", nowhere],
        ["serve", "--store", nowhere],
        ["infer", "--source", nowhere, "--prompt", "a"],
    ):
        assert complaint(surfw(tmp_path, *arguments)).startswith(f"there is no folder {nowhere}; name that of a checkp")
    assert not (tmp_path / "nowhere").exists()


def test_unknown_model_name_lists_the_known_ones(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("one", "org/two"):
        assert surfw(tmp_path, "chunk", str(checkpoint), "--name", name).returncode == 0
    with serve(tmp_path / "store") as served:
        for source in (str(tmp_path / "store"), served.url):
            for choice in (["--model", "three"], []):
                said = complaint(surfw(tmp_path, "infer", "--source", source, "--prompt", "a", *choice))
                assert "one, org/two" in said
            done = surfw(tmp_path, "infer", "--source", source, "--prompt", "a", "--model", "two", "--json")
            assert json.loads(done.stdout)["model"] == "org/two"


def test_a_server_that_dies_during_a_fetch(tmp_path: Path) -> None:
    big = save_llama(tmp_path / "big", layers=8, hidden=512)
    assert surfw(tmp_path, "chunk", str(big)).returncode == 0
    with serve(tmp_path / "store") as served:
        command = [SURFW, "infer", "--source", served.url, "--cache-layers", "1", "--prompt-ids", "1,2,3"]
        client = warm.start(
            [*command, "--max-new-tokens", "100000", "--ignore-eos"],
            env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert client.stdout is not None
        first = client.stdout.read(8)
        served.process.send_signal(signal.SIGKILL)
        out, err = client.communicate(timeout=60)
    *before, summary, _ = err.splitlines()
    assert summary.startswith("surfw: stopped after "), "what there was stays, and so do its figures"
    assert (first + out).endswith("\n")
    lines = "\n".join([*before, err.splitlines()[-1]])
    said = complaint(subprocess.CompletedProcess(command, client.returncode, out, lines))
    assert said.startswith((f"the server at {served.url} ", f"no surfw server at {served.url}: ")), "by what came last"
    assert said.count("; ") - said.count("; the last attempt: ") == 1, "one piece of advice"


def test_full_disk(checkpoint: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        require("mounting a small tmpfs needs root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], check=True)
    try:
        said = complaint(surfw(tmp_path, "chunk", str(checkpoint), "--store", str(small / "store")))
        assert "has no space for tiny: 745.7 kB (745728 bytes) are to be written" in said
        assert not list((small / "store").rglob("models/*"))
        assert not list(small.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        assert surfw(tmp_path, "chunk", str(checkpoint), "--store", str(small / "store")).returncode == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_an_interruption_is_said_with_what_becomes_of_the_work(tmp_path: Path) -> None:
    big = save_llama(tmp_path / "big", layers=24, hidden=512)
    writer = warm.start(
        [SURFW, "chunk", str(big)], env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not list((tmp_path / "store" / "blobs").rglob("*.safetensors")):
        assert writer.poll() is None, "it ended before it could be interrupted"
    writer.send_signal(signal.SIGINT)
    out, err = writer.communicate(timeout=60)
    assert (out, err) == ("", "surfw: interrupted; the same command goes on where it stopped\n")
    assert writer.returncode == 130
    assert not list((tmp_path / "store").rglob("models/*"))


def test_kill_in_the_middle_of_chunk(checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert surfw(tmp_path, "chunk", str(checkpoint), "--name", "first").returncode == 0
    before = visible(store / "models")
    big = save_llama(tmp_path / "big", layers=24, hidden=512)
    command = [SURFW, "chunk", str(big), "--name", "second"]
    writer = warm.start(command, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    blobs = len(list((store / "blobs").rglob("*.safetensors")))
    while len(list((store / "blobs").rglob("*.safetensors"))) < blobs + 3:
        assert writer.poll() is None, "it ended before it could be killed"
    writer.kill()
    writer.wait()
    assert visible(store / "models") == before == ["first.json"]
    (journal,) = (store / "partial").rglob("journal.jsonl")
    whole_lines = journal.read_bytes().split(b"\n")[:-1]  # the last one may be cut off
    done = [decode_line(line)["forms"][0]["digest"] for line in whole_lines if line]
    finished = {path: path.stat().st_ino for path in (store / "blobs").rglob("*.safetensors") if path.stem in done}
    assert len(finished) >= 2
    assert surfw(tmp_path, "chunk", str(big), "--name", "second").returncode == 0
    assert visible(store / "models") == ["first.json", "second.json"]
    assert {path: path.stat().st_ino for path in finished} == finished, "finished blobs are not written again"
    left = [path for path in (store / "partial").rglob("*") if path.suffix != ".tmp"]
    assert not left, "of the killed one, at most the file stays that it was writing, until it is old enough to prune"
    arguments = ["--source", str(store), "--model", "second", "--prompt", "a", "--max-new-tokens", "2"]
    assert surfw(tmp_path, "infer", *arguments, "-q").returncode == 0
