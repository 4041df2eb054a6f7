"""A good client beside clients that flood the server: its rate, and the time that a new client takes to connect.

The good client fetches and verifies chunks that fit in the server's cache, one after another. Beside it run the
flooders, 20 connections in one process of the lowest priority, each within the protocol. A new client counts as
connected once the hellos are exchanged; if it is refused, it retries at once.
"""

import asyncio
import itertools
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from surfw.bench.raw_peer import RawPeer, http_request, message, ping
from surfw.bench.result import Result, Row, describe_machine
from surfw.bench.wire import BENCH_MODEL, fetch_chunk, fetch_chunks, peer, serve_store, spawned, write_store
from surfw.client import WireSource, open_wire_source
from surfw.config import GB, MB
from surfw.manifest import Manifest

GOOD_SIZES = (16 * MB,) * 6
"""Sizes of the chunks that the good client fetches; they fit in the cache."""
OTHER_SIZES = (16 * MB,) * 24
"""Sizes of the other chunks, which do not fit."""

_CACHE_MB = 200
_FLOODERS = 20
_BATCH = 32
_NICE = 19
_PAUSE_SECONDS = 0.1
_PATIENCE_SECONDS = 20

Get = dict[str, Any]
RawRequest = tuple[str, dict[str, Any]]
Flood = Callable[[int, Sequence[Get], random.Random], None]


@contextmanager
def _open(port: int) -> Iterator[RawPeer]:
    with RawPeer(port) as opened:
        opened.shake_hands().greet()
        yield opened


def _sends(make: Callable[[Sequence[Get], random.Random], Iterator[bytes]]) -> Flood:
    """A flood that sends batches of messages and never reads."""

    def flood(port: int, gets: Sequence[Get], chance: random.Random) -> None:
        with _open(port) as opened:
            for batch in make(gets, chance):
                opened.send(batch)

    return flood


def _asks(make: Callable[[Sequence[Get], random.Random], RawRequest], *, singly: bool = False) -> Flood:
    """A flood that sends a batch of requests, reads all answers, and repeats; for `singly` see `_read_answers`."""

    def flood(port: int, gets: Sequence[Get], chance: random.Random) -> None:
        with _open(port) as opened:
            for first in itertools.count(0, _BATCH):
                asked = {first + index: make(gets, chance) for index in range(_BATCH)}
                opened.send(b"".join(message(kind, id=number, **rest) for number, (kind, rest) in asked.items()))
                _read_answers(opened, asked, singly=singly)

    return flood


def _read_answers(opened: RawPeer, asked: Mapping[int, RawRequest], *, singly: bool) -> None:
    """Read until every request is answered; send credit once at the end, or at once and byte by byte if `singly`."""
    unknown = 1 << 60  # until a `begin` says how much will come
    left = {
        number: rest["stop"] - rest["start"] if kind == "get" else unknown for number, (kind, rest) in asked.items()
    }
    current, taken = -1, 0
    while left:
        heard = opened.hear()
        if isinstance(heard, bytes):
            left[current] -= len(heard)
            if singly:
                opened.send(message("credit", bytes=1) * len(heard))
            else:
                taken += len(heard)
        elif heard["type"] in {"error", "models"}:
            left[heard["id"]] = 0
        elif heard["type"] == "begin":
            left[heard["id"]] = heard["size"]
        elif heard["type"] == "data":
            current = heard["id"]
        left = {number: size for number, size in left.items() if size}
    if taken:
        opened.send(message("credit", bytes=taken))


def _gets_and_cancels(gets: Sequence[Get], chance: random.Random) -> Iterator[bytes]:
    for number in itertools.count():
        yield message("get", id=number, **chance.choice(gets)) + message("cancel", id=number)


def _single_byte(gets: Sequence[Get], chance: random.Random, **more: bool) -> RawRequest:
    wanted = chance.choice(gets)
    start = chance.randrange(wanted["stop"])
    return "get", wanted | {"start": start, "stop": start + 1} | more


def _come_and_go(port: int, *_unused: object) -> None:
    while True:
        with _open(port):
            pass


def _half_open(port: int, *_unused: object) -> None:
    while True:
        with ExitStack() as held:
            for _ in range(_BATCH):
                held.enter_context(RawPeer(port))
            time.sleep(_PAUSE_SECONDS)


def _plain_http(port: int, _: Sequence[Get], chance: random.Random) -> None:
    while True:
        http_request(port, chance.choice(["/metrics", "/readyz", "/stats", "/nothing"]))


FLOODS: Mapping[str, Flood] = {
    "get, cancel, never read": _sends(_gets_and_cancels),
    "single bytes of many pages": _asks(_single_byte),
    "single bytes of one page": _asks(lambda gets, _: ("get", gets[0] | {"stop": 1})),
    "fresh bytes of the good client's pages": _asks(lambda gets, chance: _single_byte(gets, chance, fresh=True)),
    "credits of one byte": _asks(lambda gets, _: ("get", gets[0] | {"stop": 8}), singly=True),
    "manifests": _asks(lambda *_: ("manifest", {"model": BENCH_MODEL})),
    "lists of models": _asks(lambda *_: ("models", {})),
    "models that are not there": _asks(lambda _, chance: ("manifest", {"model": f"nothing-{chance.random()}"})),
    "digests that are not there": _asks(lambda gets, _: ("digests", {"model": BENCH_MODEL, "chunk": gets[0]["chunk"]})),
    "pings": _sends(lambda *_: itertools.repeat(ping() * 1000)),
    "come and go": _come_and_go,
    "half-open connections": _half_open,
    "plain HTTP": _plain_http,
}
"""The floods by name; each runs until it is stopped."""

_AT_THE_GOOD = {"fresh bytes of the good client's pages"}
"""Floods that request the good client's chunks; the others request those that do not fit in the cache."""


def bench_flood(*, seconds: float = 3.0, floods: Sequence[str] = tuple(FLOODS)) -> Result:
    """Run the benchmark.

    Args:
        seconds: how long the good client runs, both alone and beside each flood.
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
        await fetch_chunks(source, manifest, memory)
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
    """The good client's rate, in GB/s."""
    started, fetched = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < seconds or not fetched:
        for index, destination in enumerate(memory):
            await fetch_chunk(source, manifest, index, destination)
            fetched += len(destination)
            if (taken := time.perf_counter() - started) >= seconds:
                break
    return fetched / taken / GB


def _connect_again_and_again(port: int, seconds: float) -> float:
    """The longest time that a new client took to connect, in seconds."""
    ends, slowest = time.perf_counter() + seconds, 0.0
    while (started := time.perf_counter()) < ends:
        while time.perf_counter() < started + _PATIENCE_SECONDS:
            with suppress(OSError), _open(port):
                break
        slowest = max(slowest, time.perf_counter() - started)
        time.sleep(_PAUSE_SECONDS)
    return slowest


@contextmanager
def _flooding(port: int, name: str, manifest: Manifest) -> Iterator[None]:
    """Flood the server during the body, from a separate process."""
    good, other = manifest.chunks[: len(GOOD_SIZES)], manifest.chunks[len(GOOD_SIZES) :]
    gets = [
        {"model": manifest.name, "chunk": chunk.id, "form": "none", "start": 0, "stop": chunk.payload_bytes}
        for chunk in (good if name in _AT_THE_GOOD else other)
    ]
    with spawned(_flood, port, name, gets):
        time.sleep(1)  # until all flooders are running
        yield


def _flood(port: int, name: str, gets: Sequence[Get]) -> None:
    """Run the flooders; to be called in its own process."""
    os.nice(_NICE)

    def run(seed: int) -> None:
        while True:
            with suppress(OSError):
                FLOODS[name](port, gets, random.Random(seed))  # noqa: S311 - it only picks requests
            time.sleep(_PAUSE_SECONDS)

    threads = [threading.Thread(target=run, args=(seed,), daemon=True) for seed in range(_FLOODERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
