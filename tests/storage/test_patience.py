"""A storage without progress is given up after `silence_timeout`, whatever it does instead."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from surfw.config import MIB, PROGRESS_BYTES
from surfw.errors import ConfigurationError, StorageError, SurfwError
from surfw.models import WeightClient
from surfw.storage import FsspecBackend, S3Backend, StorageBackend, open_backend
from surfw.storage.patience import Activity, ReadPatience, SilenceError
from tests.storage.test_far_reads import Told

pytestmark = pytest.mark.timeout(60)

SILENCE = 0.4
HANG = 20.0
"""No test takes this long unless something hangs."""

SIZE = 4 * MIB
HEAD = (
    f"HTTP/1.1 206 Partial Content\r\nContent-Length: {SIZE}\r\nContent-Range: bytes 0-{SIZE - 1}/{SIZE}\r\n"
    'ETag: "x"\r\n\r\n'
).encode()


def say_nothing(line: socket.socket, end: threading.Event) -> None:
    end.wait()


def drip_head(line: socket.socket, end: threading.Event) -> None:
    while not end.wait(0.05):
        line.sendall(HEAD[:1])


def drip_body(line: socket.socket, end: threading.Event) -> None:
    line.sendall(HEAD)
    while not end.wait(0.05):
        line.sendall(b"x")


def hang_up(line: socket.socket, end: threading.Event) -> None:
    del line, end


def stop_in_the_middle(line: socket.socket, end: threading.Event) -> None:
    line.sendall(HEAD + bytes(SIZE // 2))
    end.wait()


Behaviour = Callable[[socket.socket, threading.Event], None]
BAD = [say_nothing, drip_head, drip_body, stop_in_the_middle]


@contextlib.contextmanager
def served(behaviour: Behaviour) -> Iterator[str]:
    """A server that reads requests and then behaves in this way."""
    end = threading.Event()

    def answer(line: socket.socket) -> None:
        with line, contextlib.suppress(OSError):
            line.recv(65536)
            behaviour(line, end)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                line, _ = listening.accept()
                threading.Thread(target=answer, args=(line,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            end.set()
            listening.shutdown(socket.SHUT_RDWR)


def s3_at(url: str, silence: float = SILENCE) -> S3Backend:
    return S3Backend(
        "bucket", endpoint_url=url, aws_access_key_id="a", aws_secret_access_key="b", silence_timeout=silence
    )


def http_at(url: str, silence: float = SILENCE) -> FsspecBackend:
    return FsspecBackend(url, silence_timeout=silence)


Make = Callable[[str, float], StorageBackend]


@pytest.mark.parametrize("make", [http_at, s3_at])
@pytest.mark.parametrize("behaviour", BAD)
def test_a_storage_that_does_not_get_on_is_given_up(behaviour: Behaviour, make: Make) -> None:
    start = time.monotonic()

    async def read(url: str) -> None:
        backend = make(url, SILENCE)
        try:
            with pytest.raises(StorageError):
                await backend.load_capped("x", SIZE)
            with pytest.raises(StorageError):
                await backend.read_into("x", 0, memoryview(bytearray(SIZE)))
        finally:
            await backend.close()

    with served(behaviour) as url:
        asyncio.run(read(url))
    assert time.monotonic() - start < HANG


@pytest.mark.parametrize("make", [http_at, s3_at])
@pytest.mark.parametrize("behaviour", [say_nothing, drip_head])
def test_other_questions_have_a_bound_too(behaviour: Behaviour, make: Make) -> None:
    start = time.monotonic()

    async def ask(url: str) -> None:
        backend = make(url, SILENCE / 4)
        try:
            for question in (backend.revision, backend.size, backend.exists, backend.list):
                with pytest.raises(StorageError):
                    await question("x")
        finally:
            await backend.close()

    with served(behaviour) as url:
        asyncio.run(ask(url))
    assert time.monotonic() - start < 2 * HANG


@pytest.mark.parametrize("behaviour", [say_nothing, stop_in_the_middle])
def test_a_listing_by_http_that_hangs_is_given_up_after_one_silence(behaviour: Behaviour) -> None:
    said = rf"the storage was silent for {SILENCE:g} seconds; check it and the network"
    with served(behaviour) as url, pytest.raises(StorageError, match=said):
        asyncio.run(http_at(url).list())


@pytest.mark.parametrize("behaviour", [say_nothing, drip_head])
def test_a_client_gives_its_patience_to_a_store(behaviour: Behaviour) -> None:
    start = time.monotonic()
    with served(behaviour) as url, WeightClient(url, silence_timeout=SILENCE) as client, pytest.raises(SurfwError):
        client.models()
    assert time.monotonic() - start < HANG


def test_a_storage_that_gets_on_slowly_is_read_to_its_end() -> None:
    """The whole answer takes longer than the timeout, but each step takes only a part of it."""
    pieces = 8

    def slowly(line: socket.socket, end: threading.Event) -> None:
        line.sendall(HEAD)
        for _ in range(pieces):
            end.wait(SILENCE / 4)
            line.sendall(bytes(SIZE // pieces))

    with served(slowly) as url:
        assert asyncio.run(FsspecBackend(url, silence_timeout=SILENCE).load("x")) == bytes(SIZE)


class Clock:
    """Time that only a test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("surfw.storage.patience.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_only_progress_resets_patience(clock: Clock) -> None:
    patience = ReadPatience(30, Activity())
    patience.begin()
    clock.now += 20
    patience.arrived(PROGRESS_BYTES - 1)
    assert patience.left() == 10
    patience.arrived(1)
    assert patience.left() == 30
    clock.now += 1
    patience.arrived(1)
    assert patience.left() == 29


def test_who_waits_for_a_turn_has_patience_as_long_as_others_get_on(clock: Clock) -> None:
    activity = Activity()
    first, second = ReadPatience(30, activity), ReadPatience(30, activity)
    first.begin()
    for _ in range(10):
        clock.now += 29
        first.arrived(PROGRESS_BYTES)
    assert second.left() == 30
    second.begin()
    clock.now += 29
    first.progress()
    assert second.left() == 1


def test_tries_and_pauses_count_and_turns_do_not(clock: Clock) -> None:
    patience = ReadPatience(30, Activity())
    patience.begin()
    clock.now += 10
    patience.queue()
    clock.now += 10
    patience.begin()
    assert patience.left() == 20


def test_what_is_given_up_has_ended() -> None:
    ended = False

    async def work() -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended = True

    async def main() -> None:
        await ReadPatience(0.01, Activity()).hold(work(), "x in y")

    with pytest.raises(
        SilenceError, match=r"^x in y: the storage made no progress for 0\.01 seconds \(0 bytes arrived\); check"
    ):
        asyncio.run(main())
    assert ended


def test_where_patience_comes_from(tmp_path: Path) -> None:
    assert open_backend(tmp_path, silence_timeout=7).silence_timeout == 7
    assert open_backend("http://host/x", silence_timeout=7).silence_timeout == 7
    assert open_backend("http://host/x", {"silence_timeout": "9.5"}, silence_timeout=7).silence_timeout == 9.5
    assert open_backend("s3://bucket", silence_timeout=7).silence_timeout == 7
    assert Told("a", None).silence_timeout == 30
    for wrong in ("x", "0", -1, True, float("inf")):
        with pytest.raises(ConfigurationError, match=r"silence_timeout is .*, expected a number of seconds over 0"):
            open_backend("http://host/x", {"silence_timeout": wrong})
