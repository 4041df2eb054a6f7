"""`surfw serve` as a service: its JSON log, systemd notifications, signals, and a restart under load."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from surfw.checkpoint import demo_checkpoint
from surfw.client import open_wire_source
from surfw.retry import RetryPolicy
from tests.cli.run import SURFW, environment, surfw
from tests.peers import bare_client, until, whole
from tests.server.test_http import fetch
from tests.services import warm
from tests.services.processes import free_port
from tests.stores import make_store, payload

TOKEN, PASSWORD = "a-token-of-ours", "a-password-of-ours"
PATIENCE_SECONDS = 120
"""Longer than a restart takes on a busy machine."""
MODEL_BYTES = sum(path.stat().st_size for path in demo_checkpoint().glob("*.safetensors"))


@contextmanager
def serving(home: Path, *options: str, port: int = 0, **variables: str) -> Iterator[tuple[warm.Process, str]]:
    """Run a server without a terminal; yields it and its address once it is ready."""
    process = warm.start(
        [SURFW, "serve", "--port", str(port), "--announce", *options], modules=warm.COMMANDS,
        env=environment(home, **variables), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        told = process.stdout.readline()
        assert told, process.communicate()
        yield process, json.loads(told)["url"]
    finally:
        process.kill()
        process.communicate()


def told(process: warm.Process) -> dict[str, Any]:
    """The next line of a JSON log."""
    assert process.stderr is not None
    line: dict[str, Any] = json.loads(process.stderr.readline())
    return line


def test_a_log_for_programs_and_a_service_manager(tmp_path: Path) -> None:
    make_store(tmp_path / "store", "a", [1000])
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    redis = f"redis://ann:{PASSWORD}@127.0.0.1:{free_port()}/0"
    options = ["--log-format", "json", "--token-file", str(tmp_path / "token"), "--redis-url", redis]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "manager"))
        manager.settimeout(60)
        with serving(tmp_path, *options, NOTIFY_SOCKET=str(tmp_path / "manager")) as (process, url):
            lines = [told(process), told(process)]
            assert manager.recv(100) == b"READY=1"
            make_store(tmp_path / "store", "b", [1000])
            process.send_signal(signal.SIGHUP)
            assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert manager.recv(100) == b"READY=1"
            while lines[-1]["kind"] != "reload":
                lines.append(told(process))
            asyncio.run(_be_refused(url))
            lines.append(told(process))
            process.terminate()
            assert manager.recv(100) == b"STOPPING=1"
            out, err = process.communicate(timeout=60)
            lines += [json.loads(line) for line in err.splitlines()]
            assert process.returncode == 0
    told_of_files = [line for line in lines if line["kind"] == "access"]
    assert [line["text"] for line in told_of_files] == ["the token file was read again: 1 token"]
    lines = [line for line in lines if line not in told_of_files]
    assert [(line["kind"], line["level"]) for line in lines] == [
        ("redis", "warning"), ("serving", "info"), ("models", "info"), ("reload", "info"), ("refused", "warning"),
        ("stopping", "info"),
    ]  # fmt: skip
    assert lines[1]["text"] == f"{url} serves {tmp_path / 'store'}"
    assert lines[2]["text"] == "1 model new in the store: b"
    assert lines[3]["text"] == "looked again: 2 models"
    assert "details" in lines[0]
    assert all(
        {"time", "level", "kind", "text"} <= set(line) <= {"time", "level", "kind", "text", "details"} for line in lines
    )
    for secret in (TOKEN, PASSWORD, "another-one"):
        assert secret not in json.dumps(lines) + out


async def _be_refused(url: str) -> None:
    with pytest.raises(Exception, match="refuses the token"):
        await open_wire_source(url, token="another-one")


def test_an_error_that_ends_it_is_a_line_of_the_log_too(tmp_path: Path) -> None:
    done = surfw(tmp_path, "serve", str(tmp_path), "--log-format", "json")
    line = json.loads(done.stderr)
    assert (done.returncode, line["kind"], line["level"]) == (1, "ended", "error")
    assert str(tmp_path) in line["text"]


def test_whatever_is_logged_is_one_object_a_line(tmp_path: Path) -> None:
    code = (
        "import logging, sys, warnings; from surfw.cli import logs, streams; streams.set_up()\n"
        "logs.set_up('json', logging.INFO)\n"
        "logging.getLogger('a.library').error('two\\nlines \\x1b[2J \\x7f \\u2028 of %s', 'it')\n"
        "warnings.warn('do not', stacklevel=1)\n"
        "from surfw.server.journal import Journal, Sparse\n"
        "sparse = Sparse(Journal(), 'refused', logging.WARNING)\n"
        "for at in range(3): sparse.note(f'client {at}', 'why', code='full')\n"
        "sparse.flush()\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError as exc: Journal().note('failed', 'a bug', level=logging.ERROR, trace=exc)\n"
    )
    ours, theirs = os.openpty()  # it wraps long lines for people
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, env=environment(tmp_path))
    os.close(theirs)
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert seen.isascii()
    assert "\x1b" not in seen
    assert "\x7f" not in seen
    library, warning, first, others, bug = (json.loads(line) for line in seen.splitlines())
    assert library["text"] == "two\nlines \x1b[2J \x7f \u2028 of it"
    assert (library["kind"], library["level"]) == ("log", "error")
    assert "do not" in warning["text"]
    assert {key: first[key] for key in ("kind", "text", "details")} == {
        "kind": "refused", "text": "client 0", "details": "why"
    }  # fmt: skip
    assert "more" not in first
    assert (others["text"], others["more"]) == ("client 2", 1)
    assert bug["trace"].endswith("ZeroDivisionError: division by zero")


def test_a_second_signal_waits_for_nobody(tmp_path: Path) -> None:
    manifest = make_store(tmp_path / "store", sizes=[9_000_000])
    chunk = manifest.chunks[0]
    with serving(tmp_path, "--drain-seconds", "1000") as (process, url):

        async def read_nothing() -> None:
            async with bare_client(url) as client:
                asked = {"model": manifest.name, "chunk": chunk.id, "form": "none", "start": 0}
                await client.say("get", id=0, stop=chunk.payload_bytes, **asked)
                await client.hear_text()  # the rest waits for credit
                process.terminate()
                while "in flight" not in await asyncio.to_thread(process.stderr.readline):  # type: ignore[union-attr]
                    pass
                assert process.poll() is None
                process.send_signal(signal.SIGINT)
                assert await asyncio.to_thread(process.wait, 60) == 130

        asyncio.run(read_nothing())


def test_a_terminal_that_is_closed_ends_the_server(tmp_path: Path) -> None:
    """Even if its log goes elsewhere. A SIGHUP from a process only reloads the server's files."""
    make_store(tmp_path / "store", "a", [1000])
    log = tmp_path / "log"
    ours, theirs = os.openpty()
    with log.open("w") as stderr:
        process = warm.start(
            [SURFW, "serve", "--port", "0"], modules=warm.COMMANDS, env=environment(tmp_path), stdin=theirs,
            stdout=subprocess.DEVNULL, stderr=stderr.fileno(), controls=True,
        )  # fmt: skip
    os.close(theirs)
    try:
        _wait_for(lambda: " serves " in log.read_text(), process)
        process.send_signal(signal.SIGHUP)
        _wait_for(lambda: "looked again" in log.read_text(), process)
        os.close(ours)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def _wait_for(is_so: Any, process: warm.Process) -> None:
    while not is_so():
        assert process.poll() is None
        time.sleep(0.01)


def test_a_restart_under_load_loses_no_token(tmp_path: Path) -> None:
    """The run reads every layer for every token, while other clients read and verify."""
    assert surfw(tmp_path, "chunk", str(demo_checkpoint()), "--name", "model").returncode == 0
    load = make_store(tmp_path / "store", "load", [2_000_000] * 4)
    right = {chunk.id: payload(tmp_path / "store", chunk) for chunk in load.chunks}
    run = ["--model", "model", "--cache-layers", "1", "--prompt-ids", "1,2,3", "--ignore-eos", "--max-new-tokens", "40"]
    expected = json.loads(surfw(tmp_path, "infer", *run, "--source", str(tmp_path / "store"), "--json").stdout)
    port, over, laps = free_port(), asyncio.Event(), [0, 0]

    async def stream(number: int, url: str) -> None:
        async with await open_wire_source(url, retry=RetryPolicy(restart_seconds=PATIENCE_SECONDS)) as source:
            while not over.is_set():
                for chunk in load.chunks:
                    read, memory = whole(chunk)
                    await source.fetch(load, [read])
                    assert bytes(memory) == right[chunk.id]
                laps[number] += 1
                await asyncio.sleep(0.05)  # the run needs this processor, too

    async def main() -> None:
        with serving(tmp_path, port=port) as (first, url):
            clients = [asyncio.create_task(stream(number, url)) for number in range(2)]
            infer = warm.start(
                [SURFW, "infer", *run, "--source", url, "--json"],
                env=environment(tmp_path, SURFW_RETRY_RESTART=str(PATIENCE_SECONDS)),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            while not await is_under_way(port) or not all(laps):
                assert infer.poll() is None, infer.communicate()
            first.terminate()
            assert await asyncio.to_thread(first.wait, 60) == 0
            assert "cut off" not in first.communicate()[1]
        assert infer.poll() is None, "it is in the middle of its run"
        before = list(laps)
        with serving(tmp_path, port=port) as (second, _):
            out, err = await asyncio.to_thread(infer.communicate, None, 120)
            assert infer.returncode == 0, err
            assert json.loads(out)["token_ids"] == expected["token_ids"]
            assert len(expected["token_ids"]) == 40
            await until(lambda: all(after > seen for after, seen in zip(laps, before, strict=True)))
            over.set()
            await asyncio.gather(*clients)
            second.terminate()
            assert second.communicate(timeout=60)[1].count(" joined") == 3, "it and both others went on with this one"

    asyncio.run(main())


async def is_under_way(port: int) -> bool:
    """Whether a server's client is generating, because it has read the model several times."""
    _, _, stats = await asyncio.to_thread(fetch, port, "/stats")
    return any(
        one["model"] == "model" and one["bytes_sent"] > 5 * MODEL_BYTES for one in json.loads(stats)["connections"]
    )
