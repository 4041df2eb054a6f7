"""Rates hold over time, clients share a common rate equally, and clients that read nothing are closed."""

import asyncio
from pathlib import Path

import pytest

from surfw.client import open_wire_source
from surfw.config import KIB, MB, MIB, WireLimits
from surfw.errors import ConfigurationError
from surfw.server import WeightServer
from surfw.server.fairness import Account
from surfw.server.pacing import Bucket, Pacing
from tests.peers import bare_client, serving, until, whole
from tests.stores import make_store, payload


def test_a_bucket_lets_through_its_rate_and_no_more_after_a_rest() -> None:
    now = 0.0
    bucket = Bucket(10 * MB, lambda: now)
    sent = 0
    while now < 10:
        now += bucket.wait()
        bucket.take(bucket.slice_bytes)
        sent += bucket.slice_bytes
    assert 0 <= sent - 100 * MB <= 2 * bucket.slice_bytes
    now += 1000
    assert bucket.wait() == 0
    bucket.take(2 * bucket.slice_bytes)
    assert bucket.wait() == pytest.approx(bucket.slice_bytes / bucket.rate), "a rest saves up one slice"


@pytest.mark.parametrize(("rate", "slice_bytes"), [(1 * MB, 64 * KIB), (100 * MB, 5 * MB)])
def test_a_slice_is_a_moment_of_the_rate(rate: int, slice_bytes: int) -> None:
    assert Bucket(rate).slice_bytes == slice_bytes
    assert Pacing(rate).client().most_bytes == Pacing(None, rate).client().most_bytes == slice_bytes
    assert Pacing(2 * rate, rate).client().most_bytes == slice_bytes
    assert Pacing().client().most_bytes is None


def test_a_common_rate_is_shared_by_bytes_and_what_is_needed_now_comes_first() -> None:
    async def main() -> None:
        pacing, order = Pacing(1000 * MB), list[str]()
        large, small, ahead = Account(), Account(), Account()

        async def send(name: str, account: Account, size: int, priority: int) -> None:
            await pacing.turn(account, size, priority)
            order.append(name)

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(send("a", ahead, 1000, 1))
                group.create_task(send("l", large, 3000, 0))
                group.create_task(send("s", small, 1000, 0))
        assert "".join(order[-4:]) == "aaaa"
        assert "".join(order[:5]) in {"lsssl", "slssl"}, "three small ones cost as much as a large one"

    asyncio.run(main())


def test_who_gives_up_takes_nothing() -> None:
    async def main() -> None:
        pacing, account = Pacing(1000 * MB), Account()
        left = asyncio.create_task(pacing.turn(account, 10**12, 0))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait([left])
        async with asyncio.timeout(5):
            await pacing.turn(account, 1, 0)

    asyncio.run(main())


@pytest.mark.parametrize("name", ["max_bytes_per_second", "max_client_bytes_per_second"])
def test_a_limited_server_sends_the_same_in_small_runs(tmp_path: Path, name: str) -> None:
    manifest = make_store(tmp_path, sizes=[3 * MIB])
    chunk = manifest.chunks[0]
    read, memory = whole(chunk)

    async def main() -> None:
        async with serving(tmp_path, **{name: 20 * MB}) as server, bare_client(server.url) as client:
            await client.say(
                "get", id=0, model=manifest.name, chunk=chunk.id, form="none", start=0, stop=chunk.payload_bytes
            )
            runs = [await client.hear_text() for _ in range(4)]
            assert max(run["stop"] - run["start"] for run in runs) == MB
            assert server.stats()["sending"] == {"slow_clients": 0, name: 20 * MB}
            async with await open_wire_source(server.url) as source:
                await source.fetch(manifest, [read])
        assert bytes(memory) == payload(tmp_path, chunk)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_bytes_per_second", MB - 1),
        ("max_client_bytes_per_second", float("nan")),
        ("max_bytes_per_second", "fast"),
        ("slow_client_timeout", 0),
    ],
)
def test_what_cannot_be_a_limit_is_refused(tmp_path: Path, name: str, value: object) -> None:
    make_store(tmp_path, sizes=[10])
    with pytest.raises(ConfigurationError, match=name):
        WeightServer(None, tmp_path, **{name: value})  # type: ignore[arg-type]


def test_a_client_that_gives_no_credit_is_closed_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surfw.server.connection.PROGRESS_SECONDS", 0.02)
    manifest = make_store(tmp_path, sizes=[9 * MIB])

    async def main() -> None:
        async with serving(tmp_path, slow_client_timeout=0.2) as server, bare_client(server.url) as idle:
            async with bare_client(server.url, window_bytes=MIB) as client:
                chunk = {"model": manifest.name, "chunk": manifest.chunks[0].id, "form": "none"}
                await client.say("get", id=0, **chunk, start=0, stop=9 * MIB)
                assert await client.closed() == (1013, "it took nothing of what it asked for in 0.2 seconds")
            assert server.stats()["sending"]["slow_clients"] == 1
            assert [event["kind"] for event in server.stats()["events"]].count("closed") == 1
            await idle.say("models", id=0)
            assert (await idle.hear_text())["type"] == "models", "who asks for nothing is not slow"

    asyncio.run(main())


def test_a_client_that_was_closed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surfw.server.connection.PROGRESS_SECONDS", 0.02)
    manifest = make_store(tmp_path, sizes=[40 * MIB])
    read, memory = whole(manifest.chunks[0])
    limits = WireLimits(window_bytes=4 * MIB)

    async def main() -> None:
        async with (
            serving(tmp_path, slow_client_timeout=0.2) as server,
            await open_wire_source(server.url, limits=limits) as source,
        ):
            fetching = asyncio.create_task(source.fetch(manifest, [read]))
            await until(lambda: server.stats()["bytes_sent"] > 0)
            transport = source._link._connection.transport  # type: ignore[union-attr]
            transport.pause_reading()
            await until(lambda: server.stats()["sending"]["slow_clients"] == 1)
            transport.resume_reading()
            await fetching
        assert bytes(memory) == payload(tmp_path, manifest.chunks[0])

    asyncio.run(main())
