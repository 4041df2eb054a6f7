"""`surfw pull`, `list --cached`, `rm --cached` and `infer --offline`, with a real server that becomes unreachable."""

import json
from pathlib import Path

import pytest

from surfw.checkpoint import demo_checkpoint
from tests.checkpoints import save_llama
from tests.cli.run import complaint, surfw
from tests.servers import serve
from tests.test_signing import OTHER, private_pem, public_pem


def test_a_model_is_pulled_and_runs_when_its_server_is_gone(tmp_path: Path) -> None:
    private, public = private_pem(tmp_path / "key.pem"), public_pem(tmp_path / "key.pub")
    chunked = surfw(tmp_path, "chunk", str(demo_checkpoint()), "--name", "toy", "--sign", private, "--json")
    assert chunked.returncode == 0
    pin = f"toy@b3:{json.loads(surfw(tmp_path, 'show', 'toy', '--json').stdout)['identity']}"
    with serve(tmp_path / "store") as server:
        other = complaint(surfw(tmp_path, "pull", server.url, "--verify-key", public_pem(tmp_path / "other", OTHER)))
        assert f"toy in {server.url} is signed with key" in other
        wrong = complaint(surfw(tmp_path, "pull", "--source", server.url, "--model", f"toy@b3:{'0' * 64}"))
        assert f"expected b3:{'0' * 64}" in wrong
        infer = ("infer", "--source", server.url, "--prompt", "Weight streaming is", "--max-new-tokens", "3", "-q")
        kept = ("--disk-cache", "1GB")
        wrong = complaint(surfw(tmp_path, *infer, *kept, "--model", f"toy@b3:{'0' * 64}", "--no-offline"))
        assert f"expected b3:{'0' * 64}" in wrong
        other = complaint(surfw(tmp_path, *infer, *kept, "--verify-key", str(tmp_path / "other"), HF_HUB_OFFLINE="0"))
        assert f"toy in {server.url} is signed with key" in other
        small = complaint(surfw(tmp_path, "pull", server.url, "--disk-cache", "1MB"))
        assert "may take 1.0 MB, and toy takes" in small
        assert "0 models" in surfw(tmp_path, "list", "--cached").stdout, "what was refused is not there offline"
        pulled = json.loads(surfw(tmp_path, "pull", server.url, "--json", "--verify-key", public).stdout)
        again = json.loads(surfw(tmp_path, "pull", "--source", server.url, "--model", pin, "--json").stdout)
    assert pulled["model"] == "toy"
    assert pulled["fetched_bytes"] == pulled["stored_bytes"] == again["stored_bytes"] > 0
    assert again["fetched_bytes"] == 0

    (listed,) = json.loads(surfw(tmp_path, "list", "--cached", "--json").stdout)["models"]
    facts = listed["model"], listed["digest"], listed["sources"], listed["pinned"], listed["complete"]
    assert facts == ("toy", pulled["digest"], [server.url], True, True)
    shown = surfw(tmp_path, "list", "--cached").stdout
    assert "toy" in shown
    assert "all, pinned" in shown

    near = surfw(tmp_path, "infer", "--source", str(tmp_path / "store"), *infer[3:])
    assert near.stdout.strip()
    for offline in ("--offline", "--disk-cache=1GB"):  # HF_HUB_OFFLINE is set here
        done = surfw(tmp_path, *infer, offline, "--verify-key", public)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", near.stdout)
    assert "no surfw server at" in complaint(surfw(tmp_path, *infer, "--retry-attempts", "1"))

    assert json.loads(surfw(tmp_path, "rm", "toy", "--cached", "--json").stdout)["freed_bytes"] > 0
    assert "0 models, 0 B in" in surfw(tmp_path, "list", "--cached").stdout
    assert f"holds no model of {server.url}, and nothing is fetched offline" in complaint(
        surfw(tmp_path, *infer, "--offline")
    )


def test_rows_of_a_pulled_table_are_read_offline(tmp_path: Path) -> None:
    """Only the coded form of the embedding table is cached, and the budget has no room for the whole table."""
    save_llama(tmp_path / "wide", layers=12, hidden=512, vocab_size=8192)
    assert surfw(tmp_path, "chunk", str(tmp_path / "wide"), "--name", "wide", "--dtype", "bfloat16").returncode == 0
    pin = f"wide@b3:{json.loads(surfw(tmp_path, 'show', 'wide', '--json').stdout)['identity']}"
    infer = ("infer", "--prompt", "Weight streaming is", "--max-new-tokens", "5", "--ignore-eos", "--json", "--explain")
    expected = json.loads(surfw(tmp_path, *infer, "--source", str(tmp_path / "store")).stdout)
    with serve(tmp_path / "store") as server:
        pulled = json.loads(surfw(tmp_path, "pull", server.url, "--json").stdout)
    assert pulled["stored_bytes"] < expected["explain"]["pinned_bytes"], "as coded forms"
    offline = (*infer, "--offline", "--source", server.url)
    least = json.loads(surfw(tmp_path, *offline).stdout)["explain"]["least_budget_bytes"]
    for more in ((), ("--codec", "lossless"), ("--model", pin)):
        done = surfw(tmp_path, *offline, "--memory-budget", str(least), *more)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["token_ids"] == expected["token_ids"]
        assert answer["explain"]["by_rows"]


def test_a_form_that_was_not_pulled_is_missed_before_torch_is_imported(tmp_path: Path) -> None:
    assert surfw(tmp_path, "chunk", str(demo_checkpoint()), "--name", "toy", "--codec", "none,int8").returncode == 0
    with serve(tmp_path / "store") as server:
        assert surfw(tmp_path, "pull", server.url, "--codec", "none").returncode == 0
    for form in (("--codec", "int8"), ("--draft", "self:int8")):
        said = complaint(surfw(tmp_path, "infer", server.url, "Weight streaming is", "--offline", "--no-live", *form))
        assert said.startswith("toy as int8 is not in the disk cache in ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("infer", "--disk-cache", "20", "--prompt", "x"), "--disk-cache is 20, which is 20 bytes; did you mean 20GB?"),
        (("pull", "./here"), "./here is on this machine, which needs no disk cache"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = surfw(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())
