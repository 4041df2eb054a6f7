"""Clients of a real server announce their reads: its cache keeps what they need soonest."""

import asyncio
from pathlib import Path

import pytest

from surfw.bench.cache import bench_recorded
from surfw.client import open_wire_source
from surfw.config import MIB, CachePolicy
from surfw.errors import ConfigurationError
from surfw.manifest import Manifest
from surfw.server.futures import Part
from surfw.server.journal import Journal
from surfw.server.recording import Recording
from surfw.wire import MOST_SCHEDULED
from tests.peers import bare_client, pretending, serving, until, whole
from tests.stores import make_store, payload

CHUNKS, PASSES = 24, 4


async def misses(store: Path, manifest: Manifest, policy: CachePolicy, record: Path) -> int:
    """The misses of three clients at different places, each keeping one chunk; the cache has 2/3 of the model."""
    async with serving(store, cache_size_mb=17, cache_policy=policy, record=record) as server:
        sources = [await open_wire_source(server.url) for _ in range(3)]
        for index, source in enumerate(sources):
            await source.announce(manifest, manifest.chunks, [manifest.chunks[index]])
        for step in range(CHUNKS * (PASSES + 1)):
            for index, source in enumerate(sources):
                at = step - index * CHUNKS // 3
                if at >= 0 and (at < CHUNKS or at % CHUNKS != index):
                    chunk = manifest.chunks[at % CHUNKS]
                    read, memory = whole(chunk)
                    await source.fetch(manifest, [read], priority=index)
                    assert memory == payload(store, chunk)
        stats = server.stats()
        assert stats["cache"]["policy"] == policy
        assert stats["cache"]["bytes"] <= stats["cache"]["capacity_bytes"]
        assert stats["bytes_read"] == stats["cache"]["misses"] * MIB
        for source in sources:
            await source.close()
        await until(lambda: not len(server._served.pages.futures))
        return stats["cache"]["misses"]


def test_three_clients_out_of_step_read_less_from_storage_than_with_lru(tmp_path: Path) -> None:
    manifest, recorded = make_store(tmp_path, sizes=[MIB] * CHUNKS), tmp_path / "recorded.jsonl"
    lru = asyncio.run(misses(tmp_path, manifest, "lru", recorded))
    schedule = asyncio.run(misses(tmp_path, manifest, "schedule", recorded))
    assert lru > 300, "of 324 uses"
    assert schedule < 120, "108 is the least that is possible"
    (row,) = bench_recorded(recorded, cache_share=16 / CHUNKS).rows
    assert row.value == pytest.approx(100 - schedule / 3.24), "the trace has what happened"
    assert row.baseline == pytest.approx(100 - lru / 3.24)
    assert row.ceiling == pytest.approx(100 - 108 / 3.24)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read: No such file"),
        ("[]\n", "no event of a recording in line 1; expected a file that surfw serve"),
        ('{"client": 1}\n{"client": 1, "model": "m", "start": 0, "stop": 1, "size": 0}\n', "in line 2"),
        ("é", "in line 1"),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, content: str | None, why: str) -> None:
    path = tmp_path / "recorded"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=why):
        bench_recorded(path)


def test_a_recording_that_cannot_be_written_is_refused_or_ends(tmp_path: Path) -> None:
    make_store(tmp_path, sizes=[10])
    with pytest.raises(ConfigurationError, match="cannot be written: Is a directory; record to another file"):
        Recording(tmp_path, Journal())
    journal = Journal()
    full = Recording(Path("/dev/full"), journal)
    for _ in range(2):
        full.left(1)
        full.close()
    assert [one["text"] for one in journal.recent(details=True)] == [
        "the recording ends: /dev/full: No space left on device"
    ]


def test_a_schedule_is_announced_again_over_a_new_connection_and_taken_back(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[MIB] * 2)
    first, second = (Part(chunk.id, 0.0, 1.0) for chunk in manifest.chunks)

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            futures = server._served.pages.futures
            await source.announce(manifest, manifest.chunks, manifest.chunks[1:])
            await source.fetch(manifest, [whole(manifest.chunks[0])[0]])
            assert futures.next_use(second) < futures.next_use(first) < float("inf")
            assert source._link is not None
            source._link.abort()
            await until(lambda: not len(futures))
            await source.fetch(manifest, [whole(manifest.chunks[1])[0]])
            assert len(futures) == 1
            assert futures.next_use(second) == float("inf"), "it is kept, and the first pass is over"
            await source.announce(manifest, manifest.chunks * MOST_SCHEDULED, ())
            await source.models()
            assert not len(futures), "what is too long to be announced is taken back"

    asyncio.run(main())


def test_a_server_that_takes_no_schedules_is_told_none_and_one_takes_a_few_of_each_client(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[MIB])
    heard: list[str | bytes] = []

    async def main() -> None:
        async with pretending(hear) as url, await open_wire_source(url) as source:
            await source.announce(manifest, manifest.chunks, ())
        async with serving(tmp_path) as server, bare_client(server.url) as client:
            for number in range(9):
                await client.say("schedule", model=str(number), cycle=["nothing"], kept=["nowhere"])
            await client.say("models", id=0)
            assert (await client.hear_text())["models"] == [manifest.name]
            assert len(server._served.pages.futures) == 2
            for number in range(1):
                await client.say("schedule", model=str(number), cycle=[], kept=[])
            await client.say("get", id=1, model=manifest.name, chunk="nothing", form="none", start=0, stop=1)
            assert (await client.hear_text())["code"] == "unknown-chunk"
            assert len(server._served.pages.futures) == 1

    async def hear(websocket: object) -> None:
        async for message in websocket:  # type: ignore[attr-defined]
            heard.append(message)

    asyncio.run(main())
    assert heard == []
