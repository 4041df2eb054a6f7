"""A good client beside clients that flood the server: what rate it keeps, and how long a new one takes to connect.

The good client fetches and verifies chunks that fit the server's cache, one after the other. Beside it run the
flooders, 20 connections in one process with the least priority, each within the protocol. A new client has connected
when the hellos are exchanged; it tries again at once where it is refused.
"""

import asyncio
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from surfw.bench.raw_peer import RawPeer, http_request, message, ping
from surfw.bench.result import Result, Row, describe_machine
from surfw.bench.wire import BENCH_MODEL, fetch_chunk, peer, serve_store, write_store
from surfw.client import WireSource, open_wire_source
from surfw.config import GB, MB
from surfw.manifest import Manifest

GOOD_SIZES = (16 * MB,) * 6
"""What the good client fetches; it fits the cache."""
OTHER_SIZES = (16 * MB,) * 24
"""What else there is, which does not."""

_CACHE_MB = 200
_FLOODERS = 20
_BATCH = 32
_NICE = 19
_PAUSE_SECONDS = 0.1
_PATIENCE_SECONDS = 20

Get = dict[str, Any]
Flood = Callable[[int, Sequence[Get], random.Random], None]


@contextmanager
def _open(port: int) -> Iterator[RawPeer]:
    with RawPeer(port).shake_hands() as opened:
        opened.greet()
        yield opened


def _never_read(port: int, batches: Iterator[bytes]) -> None:
    with _open(port) as opened:
        for batch in batches:
            opened.send(batch)


def _get_and_cancel(port: int, gets: Sequence[Get], chance: random.Random) -> None:
    def batches() -> Iterator[bytes]:
        number = 0
        while True:
            wanted = chance.choice(gets)
            yield message("get", id=number, **wanted) + message("cancel", id=number)
            number += 1

    _never_read(port, batches())


def _ask(port: int, make: Callable[[], tuple[str, dict[str, Any]]], *, singly: bool = False) -> None:
    """Ask for many things at once, take all answers in, and go on."""
    with _open(port) as opened:
        number = 0
        while True:
            asked = [make() for _ in range(_BATCH)]
            opened.send(b"".join(message(kind, id=number + index, **rest) for index, (kind, rest) in enumerate(asked)))
            number += _BATCH
            open_answers, taken = {number - 1 - index: 1 << 60 for index in range(_BATCH)}, 0
            current = -1
            while open_answers:
                heard = opened.hear()
                if isinstance(heard, bytes):
                    taken += len(heard)
                    open_answers[current] -= len(heard)
                    if singly:
                        opened.send(message("credit", bytes=1) * len(heard))
                        taken -= len(heard)
                elif heard["type"] in {"error", "models"}:
                    open_answers[heard["id"]] = 0
                elif heard["type"] == "begin":
                    open_answers[heard["id"]] = heard["size"]
                elif heard["type"] == "data":
                    current = heard["id"]
                    kind, rest = asked[current - number + _BATCH]
                    if kind == "get" and open_answers[current] == 1 << 60:
                        open_answers[current] = rest["stop"] - rest["start"]
                open_answers = {one: left for one, left in open_answers.items() if left}
            if taken:
                opened.send(message("credit", bytes=taken))


def _single_bytes(port: int, gets: Sequence[Get], chance: random.Random, **more: bool) -> None:
    def make() -> tuple[str, Get]:
        wanted = chance.choice(gets)
        start = chance.randrange(wanted["stop"])
        return "get", wanted | {"start": start, "stop": start + 1} | more

    _ask(port, make)


def _same_bytes(port: int, gets: Sequence[Get], chance: random.Random) -> None:
    del chance
    _ask(port, lambda: ("get", gets[0] | {"stop": 1}))


def _fresh_bytes(port: int, gets: Sequence[Get], chance: random.Random) -> None:
    _single_bytes(port, gets, chance, fresh=True)


def _small_credits(port: int, gets: Sequence[Get], chance: random.Random) -> None:
    del chance
    _ask(port, lambda: ("get", gets[0] | {"stop": 8}), singly=True)


def _manifests(port: int, gets: Sequence[Get], chance: random.Random) -> None:
    del gets, chance
    _ask(port, lambda: ("manifest", {"model": BENCH_MODEL}))


def _models(port: int, gets: Sequence[Get], chance: random.Random) -> None:
    del gets, chance
    _ask(port, lambda: ("models", {}))


def _unknown_models(port: int, gets: Sequence[Get], chance: random.Random) -> None:
    del gets
    _ask(port, lambda: ("manifest", {"model": f"nothing-{chance.random()}"}))


def _unknown_digests(port: int, gets: Sequence[Get], chance: random.Random) -> None:
    del chance
    _ask(port, lambda: ("digests", {"model": BENCH_MODEL, "chunk": gets[0]["chunk"]}))


def _pings(port: int, gets: Sequence[Get], chance: random.Random) -> None:
    del gets, chance
    _never_read(port, iter(lambda: ping() * 1000, b""))


def _come_and_go(port: int, gets: Sequence[Get], chance: random.Random) -> None:
    del gets, chance
    while True:
        with _open(port):
            pass


def _half_open(port: int, gets: Sequence[Get], chance: random.Random) -> None:
    del gets, chance
    while True:
        with ExitStack() as held:
            for _ in range(_BATCH):
                held.enter_context(RawPeer(port))
            time.sleep(_PAUSE_SECONDS)


def _plain_http(port: int, gets: Sequence[Get], chance: random.Random) -> None:
    del gets
    while True:
        http_request(port, chance.choice(["/metrics", "/readyz", "/stats", "/nothing"]))


FLOODS: Mapping[str, Flood] = {
    "get, cancel, never read": _get_and_cancel,
    "single bytes of many pages": _single_bytes,
    "single bytes of one page": _same_bytes,
    "fresh bytes of the good client's pages": _fresh_bytes,
    "credits of one byte": _small_credits,
    "manifests": _manifests,
    "lists of models": _models,
    "models that are not there": _unknown_models,
    "digests that are not there": _unknown_digests,
    "pings": _pings,
    "come and go": _come_and_go,
    "half-open connections": _half_open,
    "plain HTTP": _plain_http,
}
"""What the flooders do, each until it is ended."""

_AT_THE_GOOD = {"fresh bytes of the good client's pages"}
"""The floods that ask for the chunks of the good client; the others ask for those that do not fit the cache."""


def bench_flood(*, seconds: float = 3.0, floods: Sequence[str] = tuple(FLOODS)) -> Result:
    """Measure.

    Args:
        seconds: how long the good client runs, alone and beside each flood.
        floods: names of `FLOODS`.
    """
    with tempfile.TemporaryDirectory(prefix="surfw-bench-") as place:
        manifest = asyncio.run(write_store(Path(place), (*GOOD_SIZES, *OTHER_SIZES)))
        with peer(serve_store, place, _CACHE_MB) as server:
            rows = asyncio.run(_measure(server.port, manifest, seconds, floods))
    return Result(benchmark="flood", machine=describe_machine(), rows=tuple(rows))


async def _measure(port: int, manifest: Manifest, seconds: float, floods: Sequence[str]) -> list[Row]:
    memory = [memoryview(bytearray(size)) for size in GOOD_SIZES]
    rows = []
    async with await open_wire_source(f"ws://127.0.0.1:{port}") as source:
        for index, destination in enumerate(memory):
            await fetch_chunk(source, manifest, index, destination)
        for name in floods:
            alone = await _rate(source, manifest, memory, seconds)
            with _flooding(port, name, manifest):
                newcomers = asyncio.create_task(asyncio.to_thread(_connect_again_and_again, port, seconds))
                beside = await _rate(source, manifest, memory, seconds)
                slowest = await newcomers
            rows.append(Row(name=name, value=beside, unit="GB/s", baseline=alone, ratio=beside / alone, verified=True))
            rows.append(Row(name=f"{name}: a new client, at worst", value=slowest, unit="s"))
    return rows


async def _rate(source: WireSource, manifest: Manifest, memory: Sequence[memoryview], seconds: float) -> float:
    """What the good client gets, in GB/s."""
    started, fetched = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < seconds or not fetched:
        for index, destination in enumerate(memory):
            await fetch_chunk(source, manifest, index, destination)
            fetched += len(destination)
            if (taken := time.perf_counter() - started) >= seconds:
                break
    return fetched / taken / GB


def _connect_again_and_again(port: int, seconds: float) -> float:
    """The longest that a new client took, in seconds."""
    ends, slowest = time.perf_counter() + seconds, 0.0
    while (started := time.perf_counter()) < ends:
        while not _connect(port) and time.perf_counter() < started + _PATIENCE_SECONDS:
            pass
        slowest = max(slowest, time.perf_counter() - started)
        time.sleep(_PAUSE_SECONDS)
    return slowest


def _connect(port: int) -> bool:
    try:
        with RawPeer(port).shake_hands() as newcomer:
            newcomer.greet()
    except OSError:
        return False
    return True


@contextmanager
def _flooding(port: int, name: str, manifest: Manifest) -> Iterator[None]:
    """Flood during the body, in a process of its own."""
    good, other = manifest.chunks[: len(GOOD_SIZES)], manifest.chunks[len(GOOD_SIZES) :]
    gets = [
        {"model": manifest.name, "chunk": chunk.id, "form": "none", "start": 0, "stop": chunk.payload_bytes}
        for chunk in (good if name in _AT_THE_GOOD else other)
    ]
    process = multiprocessing.get_context("spawn").Process(target=_flood, args=(port, name, gets), daemon=True)
    process.start()
    time.sleep(1)  # until all of them are at it
    try:
        yield
    finally:
        process.kill()
        process.join()


def _flood(port: int, name: str, gets: Sequence[Get]) -> None:
    """Run the flooders; in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICE)

    def run(seed: int) -> None:
        while True:
            with suppress(OSError):
                FLOODS[name](port, gets, random.Random(seed))  # noqa: S311 - it decides what is asked for
            time.sleep(_PAUSE_SECONDS)

    threads = [threading.Thread(target=run, args=(seed,), daemon=True) for seed in range(_FLOODERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
