"""The floods follow the protocol, and what well-behaved clients get is measured beside each of them."""

import asyncio
import random
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from surfw.bench.flood import FLOODS, bench_flood
from surfw.bench.wire import BENCH_MODEL
from surfw.server.connection import Connection
from surfw.server.reception import FairConnection
from tests.peers import serving, until
from tests.stores import make_store


def test_it_measures_what_it_says() -> None:
    found = bench_flood(seconds=0.2, floods=["get, cancel, never read", "single bytes of one page"])
    assert [row.name for row in found.rows] == [
        "get, cancel, never read",
        "get, cancel, never read: a new client, at worst",
        "single bytes of one page",
        "single bytes of one page: a new client, at worst",
    ]
    for rate, newcomer in (found.rows[:2], found.rows[2:]):
        assert rate.unit == "GB/s"
        assert rate.baseline is not None
        assert rate.ratio == rate.value / rate.baseline > 0
        assert (newcomer.unit, rate.verified) == ("s", True)
        assert newcomer.value > 0


CONNECTIONS = {"come and go", "half-open connections", "plain HTTP"}
"""The floods that open connections; the others use one connection."""


@pytest.mark.parametrize("name", FLOODS)
def test_each_flood_goes_on_and_breaks_no_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    manifest = make_store(tmp_path, BENCH_MODEL, sizes=[10_000, 20_000])
    gets = [
        {"model": manifest.name, "chunk": chunk.id, "form": "none", "start": 0, "stop": chunk.payload_bytes}
        for chunk in manifest.chunks
    ]
    heard: Counter[str] = Counter()
    take, made, updated = Connection._take, FairConnection.connection_made, FairConnection.buffer_updated

    def took(self: Connection, message: Any) -> None:
        heard[getattr(message, "type", "")] += 1
        take(self, message)

    def opened(self: FairConnection, transport: asyncio.BaseTransport) -> None:
        heard["connections"] += 1
        made(self, transport)

    def read(self: FairConnection, nbytes: int) -> None:
        heard["bytes"] += nbytes
        updated(self, nbytes)

    monkeypatch.setattr("surfw.server.listening._CLOSE_SECONDS", 0.1)  # most of them do not say goodbye
    monkeypatch.setattr(Connection, "_take", took)
    monkeypatch.setattr(FairConnection, "connection_made", opened)
    monkeypatch.setattr(FairConnection, "buffer_updated", read)
    failed: list[Exception] = []

    def flood(port: int) -> None:
        with suppress(OSError):  # the server is gone
            try:
                FLOODS[name](port, gets, random.Random(0))
            except ValueError as exc:
                failed.append(exc)

    def goes_on() -> bool:
        if name in CONNECTIONS:
            return heard["connections"] > 64
        if name == "pings":
            return heard["bytes"] > 10_000
        return heard.total() - heard["bytes"] - heard["connections"] - heard["credit"] > 96

    async def main() -> None:
        async with serving(tmp_path) as server:
            flooder = threading.Thread(target=flood, args=(server.port,), daemon=True)
            flooder.start()
            await until(goes_on)
            assert heard["connections"] == 1 or name in CONNECTIONS
        await asyncio.to_thread(flooder.join, 10)
        assert not flooder.is_alive()

    asyncio.run(main())
    assert not failed
    assert not [line for line in caplog.messages if "is closed" in line or "bug" in line]
