"""`serve` and `stats --watch`, on real terminals and in pipes, with a server that becomes unreachable and returns."""

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.run import SURFW, environment, surfw
from tests.cli.terminal import CTRL_C, terminal
from tests.servers import serve
from tests.services.processes import free_port
from tests.stores import make_store

READS = """
import asyncio, sys
from surfw.client import open_wire_source
from tests.peers import whole

async def main():
    async with await open_wire_source(sys.argv[1]) as source:
        manifest = await source.manifest("toy/model")
        await source.fetch(manifest, [whole(chunk)[0] for chunk in manifest.chunks])
        print("read", flush=True)
        sys.stdin.read()

asyncio.run(main())
"""
"""A client that reads a model and stays until its stdin is closed."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a model of 24 MB."""
    store = tmp_path_factory.mktemp("home") / "store"
    make_store(store, sizes=[8_000_000] * 3)
    return store


@pytest.fixture
def client() -> Iterator[list[subprocess.Popen[str]]]:
    """Start clients that are ended after the test."""
    clients: list[subprocess.Popen[str]] = []
    yield clients
    for one in clients:
        one.communicate()


def start_client(url: str) -> subprocess.Popen[str]:
    """Start a client, and wait until it has read everything."""
    root = Path(__file__).parent.parent.parent
    client = subprocess.Popen(
        [sys.executable, "-c", READS, url], cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "read\n"
    return client


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (200, 50), (46, 24)])
def test_serve(columns: int, lines: int, store: Path, client: list[subprocess.Popen[str]]) -> None:
    port = free_port()
    command = [SURFW, "serve", "--port", str(port), "--cache-mb", "17", "--store", str(store)]
    with terminal(store.parent, command, columns=columns, rows=lines, controls=True) as (window, process):
        window.wait_for_text("memory, CPU")
        assert window.seen.startswith(b"surfw: opening"), "the first sign of life"
        client.append(start_client(f"ws://127.0.0.1:{port}"))
        shown = window.wait_for_text("  the cache of ")
        assert shown[0].startswith("surfw ")
        assert (f"ws://127.0.0.1:{port}" in shown[0], "Ctrl-C stops" in shown[0]) == (columns > 46, True)
        text = " ".join(shown)
        assert "--cache-mb 50 would hold it." in text
        assert "toy/model" in text
        assert ("says it is" in text) == (columns > 46)
        assert len([line for line in shown if line[2:3] == line[5:6] == ":"]) == 2, "each event in a line"
        window.resize(60, 26)
        shown = window.wait_for(lambda lines: any(len(line) == 60 and line.endswith("…") for line in lines))
        assert sum(line.startswith("memory, CPU") for line in shown) == 1, "nothing is left of the other size"
        window.type(CTRL_C)
    assert process.returncode == 0
    assert window.seen.rindex(b"memory, CPU") > window.seen.rindex(b"\x1b[?1049l"), "the last figures stay"


def test_a_terminal_on_which_nothing_can_be_drawn_gets_lines(store: Path) -> None:
    command = [SURFW, "serve", "--port", "0", "--store", str(store)]
    with terminal(store.parent, command, controls=True, TERM="dumb") as (window, process):
        window.wait_for_text(" serves")
        assert b"\x1b" not in window.seen
        window.type(CTRL_C)
    assert process.returncode == 0


def test_watching_a_server_that_is_started_again(store: Path) -> None:
    port = str(free_port())
    with terminal(store.parent, [SURFW, "stats", f"127.0.0.1:{port}", "--watch"], controls=True) as (window, process):
        pass
    assert process.returncode == 1, "an address at which there never was a server is a mistake"
    assert b"connection refused" in window.seen
    with contextlib.ExitStack() as first:
        served = first.enter_context(serve(store, "--port", port))
        command = [SURFW, "stats", served.url, "--watch", "--every", "0.1"]
        with terminal(store.parent, command, controls=True) as (window, process):
            window.wait_for_text("0.0/s")
            first.close()
            away = window.wait_for_text("not reachable since")
            assert re.search(
                r"not reachable since \d\d:\d\d:\d\d, trying again \(.*connection refused\)", " ".join(away)
            )
            assert any(line.startswith("memory, CPU") for line in away), "the last figures stay meanwhile"
            with serve(store, "--port", port):
                window.wait_for(lambda lines: any("0.0/s" in line for line in lines) and "not reach" not in lines[1])
                window.type(CTRL_C)
                process.wait(60)
    assert process.returncode == 0
    assert b"interrupted" not in window.seen


def test_watching_into_a_pipe(store: Path) -> None:
    port = str(free_port())
    with serve(store, "--port", port) as served:
        watching = subprocess.Popen(
            [SURFW, "stats", served.url, "--watch", "--every", "0.1"], env=environment(store.parent), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert watching.stdout is not None
        assert watching.stderr is not None
        since_start, now = watching.stdout.readline(), watching.stdout.readline()
    with watching:
        said = watching.stderr.readline()
        assert re.fullmatch(
            rf"surfw: ws://127.0.0.1:{port} is not reachable since \S+, trying again \(.*connection refused\)\n", said
        )
        with serve(store, "--port", port):
            while " in 0 s: " not in watching.stdout.readline():
                pass
            assert " now: " in watching.stdout.readline()
            watching.send_signal(signal.SIGINT)
            rest, errors = watching.communicate(timeout=60)
    assert (watching.returncode, errors) == (0, "")
    pattern = r"\d\d:\d\d:\d\d {}: sent \S+ \S+, read .*, requests \S+, hits [^,]+, 0 clients\n"
    assert re.fullmatch(pattern.format(r"in \d+ s"), since_start)
    assert re.fullmatch(pattern.format("now"), now)
    assert all(re.fullmatch(pattern.format("now"), line) for line in rest.splitlines(keepends=True))


def test_watching_as_json_is_an_object_per_line(store: Path) -> None:
    with serve(store) as served:
        watching = subprocess.Popen(
            [SURFW, "stats", served.url, "--watch", "--every", "0.1", "--json"], env=environment(store.parent),
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert watching.stdout is not None
        with watching:
            for _ in range(3):
                assert json.loads(watching.stdout.readline())["models"] == ["toy/model"]
            watching.send_signal(signal.SIGINT)
            _, errors = watching.communicate(timeout=60)
    assert (watching.returncode, errors) == (0, "")


def test_a_cache_below_the_least_is_refused(tmp_path: Path) -> None:
    done = surfw(tmp_path, "serve", "--cache-mb", "5")
    assert done.returncode == 2
    assert "--cache-mb" in done.stderr
    assert "17" in done.stderr
