"""What a shell offers on Tab."""

import socket
from pathlib import Path

import pytest

from tests.cli.test_mistakes import run
from tests.servers import serve
from tests.stores import make_store


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose default store has two models."""
    home = tmp_path_factory.mktemp("home")
    make_store(home / "store", "org/first", (5000, 6000))
    make_store(home / "store", "second", (7000,), seed=1)
    make_store(home / "other", "third", (700,), seed=2)
    return home


def complete(home: Path, line: str, **extra: str) -> list[str]:
    """Return what is offered at the end of a line."""
    words = {"_SURFW_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = run(home, "", **words, **extra)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("surfw inf", ["infer"]),
        ("surfw show ", ["org/first", "second"]),
        ("surfw rm o", ["org/first"]),
        ("surfw verify --store other ", ["third"]),
        ("surfw infer ", ["org/first", "second"]),
        ("surfw infer --model s", ["second"]),
        ("surfw infer --source other --model ", ["third"]),
        ("surfw infer --dtype b", ["bfloat16", "bf16"]),
        ("surfw chunk --dtype float3", ["float32"]),
        ("surfw infer --live gemma ", []),
        ("surfw infer --policy ", ["auto", "lru"]),
        ("surfw list --store nowhere --js", ["--json"]),
        ("surfw show --store nowhere ", []),
        ("surfw infer --source 127.0.0.1:1 --model ", []),
        ("surfw infer --source s3:/typo --model ", []),
    ],
)
def test_words_are_offered(line: str, offered: list[str], home: Path) -> None:
    assert complete(home, line, SURFW_PORT="1") == offered


def test_a_server_offers_its_models(home: Path) -> None:
    with serve(home / "other") as served:
        assert complete(home, "surfw infer ", SURFW_PORT=served.url.rpartition(":")[2]) == ["third"]
        address = served.url.removeprefix("ws://")
        assert complete(home, "surfw infer --model ", SURFW_SOURCE=address) == ["third"]


def test_a_source_that_does_not_answer_offers_nothing(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        words = {"_SURFW_COMPLETE": "complete_bash", "COMP_WORDS": "surfw infer ", "COMP_CWORD": "2"}
        done = run(home, "", **words, SURFW_SOURCE=url)
    assert (done.stdout.strip(), done.stderr) == ("", "")
