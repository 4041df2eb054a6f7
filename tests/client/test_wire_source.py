"""A server as a source: fetched bytes are right and verified, and nothing else is written."""

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from surfw.client import open_wire_source
from surfw.config import DAMAGE_RETRIES, KIB, MIB, WireLimits
from surfw.errors import IntegrityError, RefusedError, UnknownModelError
from surfw.source import Read, check_blocks
from tests.peers import pretending, serving, until, whole
from tests.server.backends import GatedBackend
from tests.stores import TOKENIZER, make_store, payload


def test_models_manifest_and_files(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, "org/a", [10])
    make_store(tmp_path, "b", [10], files={"empty.txt": b""})

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            assert source.url == server.url
            assert await source.models() == ["b", "org/a"]
            assert await source.resolve("a") == "org/a"
            found = await source.manifest("org/a")
            assert found == manifest.public()
            assert {file.path: await source.file(found, file.path) for file in found.files} == TOKENIZER
            assert await source.file(await source.manifest("b"), "empty.txt") == b""
            with pytest.raises(UnknownModelError, match=r"has no model 'nope'; it has: b, org/a") as caught:
                await source.manifest("nope")
            assert caught.value.known == ["b", "org/a"]

    asyncio.run(main())


SIZES = [1, 4096, MIB - 1, MIB, MIB + 1, 3 * MIB + 5, 9 * MIB + 4096]


@pytest.mark.parametrize("frame", [128 * KIB, 512 * KIB])
def test_chunks_arrive_whole_all_at_once(tmp_path: Path, frame: int) -> None:
    manifest = make_store(tmp_path, sizes=SIZES)
    limits = WireLimits(frame_bytes=frame, run_bytes=frame, window_bytes=2 * frame, requests_in_flight=3)

    async def main() -> None:
        async with serving(tmp_path, limits=limits) as server, await open_wire_source(server.url) as source:
            found = await source.manifest(manifest.name)
            reads, memories = zip(*(whole(chunk) for chunk in found.chunks), strict=True)
            await source.fetch(found, reads)
            for chunk, memory in zip(manifest.chunks, memories, strict=True):
                assert bytes(memory) == payload(tmp_path, chunk)
            assert source.fetched_bytes == server.stats()["bytes_sent"] - len(manifest.public().encode()) == sum(SIZES)

    asyncio.run(main())


@pytest.mark.parametrize(("start", "stop"), [(0, MIB), (MIB, 3 * MIB), (9 * MIB, 9 * MIB + 4096), (5 * MIB, 5 * MIB)])
def test_a_range_arrives_and_nothing_around_it_is_touched(tmp_path: Path, start: int, stop: int) -> None:
    manifest = make_store(tmp_path, sizes=SIZES)
    chunk = manifest.chunks[-1]
    memory = bytearray(b"?") * (stop - start + 20)

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            destination = memoryview(memory)[10 : len(memory) - 10]
            await source.fetch(manifest, [Read(chunk, chunk.forms[0], start, stop, destination)])

    asyncio.run(main())
    assert memory == b"?" * 10 + payload(tmp_path, chunk)[start:stop] + b"?" * 10


def flip(store: Path, key: str, at: int) -> None:
    """Damage one byte of an object."""
    blob = store / key
    data = bytearray(blob.read_bytes())
    data[at] ^= 1
    blob.write_bytes(data)


@pytest.mark.parametrize("at", [0, 5 * MIB + 3, 9 * MIB + 4095])
def test_a_flipped_byte_is_found(tmp_path: Path, at: int) -> None:
    manifest = make_store(tmp_path, sizes=SIZES)
    chunk = manifest.chunks[-1]
    location = chunk.forms[0].locations[0]
    flip(tmp_path, location.object, location.start + at)

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            read, _ = whole(chunk)
            with pytest.raises(IntegrityError, match=rf"layers\.6 from ws://.* block {at // MIB} "):
                await source.fetch(manifest, [read])
            assert source.fetched_bytes == 0
            good, memory = whole(manifest.chunks[0])
            await source.fetch(manifest, [good])
            assert bytes(memory) == payload(tmp_path, manifest.chunks[0])

    asyncio.run(main())


def test_a_damaged_file_is_found(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[10])
    flip(tmp_path, manifest.files[1].object, 0)

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            with pytest.raises(IntegrityError, match=r"vocab\.txt of toy/model from ws://"):
                await source.file(manifest, "vocab.txt")

    asyncio.run(main())


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_blob_that_is_not_whole_is_a_clear_error(tmp_path: Path, damage: str) -> None:
    manifest = make_store(tmp_path, sizes=[10 * MIB])
    blob = tmp_path / manifest.chunks[0].forms[0].locations[0].object
    blob.write_bytes(blob.read_bytes()[:-1]) if damage == "truncated" else blob.unlink()

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            read, _ = whole(manifest.chunks[0])
            with pytest.raises(RefusedError, match="could not read it from its storage") as caught:
                await source.fetch(manifest, [read])
            assert caught.value.code == "storage"

    asyncio.run(main())


def test_a_chunk_of_another_model_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path, "a", [10])
    other = make_store(tmp_path, "b", [20])

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            read, memory = whole(other.chunks[0])
            with pytest.raises(RefusedError, match="a has no chunk"):
                await source.fetch(await source.manifest("a"), [read])
            assert bytes(memory) == bytes(20)

    asyncio.run(main())


def test_one_damaged_chunk_fails_the_fetch_of_several(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=SIZES)
    location = manifest.chunks[3].forms[0].locations[0]
    flip(tmp_path, location.object, location.start)

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            with pytest.raises(IntegrityError, match=r"layers\.3"):
                await source.fetch(manifest, [whole(chunk)[0] for chunk in manifest.chunks])
            await until(lambda: server.stats()["requests"]["in_flight"] == 0)

    asyncio.run(main())


def test_after_a_cancelled_fetch_nothing_is_written_and_others_go_on(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[40 * MIB, 5 * MIB])

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            for bytes_before in (1, 3 * MIB, 11 * MIB):
                read, memory = whole(manifest.chunks[0])
                sent = server.stats()["bytes_sent"]
                fetching = asyncio.create_task(source.fetch(manifest, [read]))
                await until(lambda sent=sent, more=bytes_before: server.stats()["bytes_sent"] >= sent + more)
                fetching.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await fetching
                seen = bytes(memory)
                assert seen != payload(tmp_path, manifest.chunks[0])
                other, arrived = whole(manifest.chunks[1])
                await source.fetch(manifest, [other])
                assert bytes(arrived) == payload(tmp_path, manifest.chunks[1])
                assert bytes(memory) == seen
                read.destination.release()
                memory.clear()  # fails if another reference exists
                await until(lambda: server.stats()["requests"]["in_flight"] == 0)
                assert server.stats()["bytes_sent"] - sent < 40 * MIB  # both are read, the first one not completely

    asyncio.run(main())


def test_a_fetch_that_is_cancelled_within_a_frame_is_cancelled_there_too(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[MIB])
    heard: list[dict[str, Any]] = []

    async def answer(websocket: ServerConnection) -> None:
        await websocket.recv()
        await websocket.send(json.dumps({"type": "data", "id": 0, "start": 0, "stop": 256 * KIB}))
        websocket.transport.write(b"\x82\x7f" + (256 * KIB).to_bytes(8) + b"!" * 100_000)
        while not heard or heard[-1]["type"] != "models":
            heard.append(json.loads(await websocket.recv()))
        websocket.transport.write(b"?" * (256 * KIB - 100_000))
        await websocket.send(json.dumps({"type": "error", "id": 0, "code": "cancelled", "message": "given up"}))
        await websocket.send(json.dumps({"type": "models", "id": 1, "models": ["a"]}))
        await websocket.wait_closed()

    async def main() -> None:
        async with pretending(answer) as url, await open_wire_source(url) as source:
            read, memory = whole(manifest.chunks[0])
            fetching = asyncio.create_task(source.fetch(manifest, [read]))
            await until(lambda: memory[99_999] != 0)
            fetching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetching
            assert await source.models() == ["a"]
            assert memory == b"!" * 100_000 + bytes(MIB - 100_000)
            read.destination.release()
            memory.clear()  # fails if another reference exists

    asyncio.run(main())
    assert [message["type"] for message in heard] == ["cancel", "models"]


def test_a_fetch_ends_when_nobody_reads_its_memory_however_often_it_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_store(tmp_path, sizes=[8 * MIB])
    gates = [threading.Event(), threading.Event()]
    looking: list[int] = []
    looked: list[int] = []

    def check_when_told(read: Read, first: int, data: memoryview) -> dict[int, str]:
        looking.append(first)
        assert gates[first // 4].wait(60)
        found = check_blocks(read, first, data)
        looked.append(first)
        return found

    monkeypatch.setattr("surfw.client.downloads.check_blocks", check_when_told)

    async def goes_on(fetching: "asyncio.Task[None]") -> None:
        for _ in range(50):
            await asyncio.sleep(0)
        assert not fetching.done()

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            fetching = asyncio.create_task(source.fetch(manifest, [whole(manifest.chunks[0])[0]]))
            await until(lambda: len(looking) == 2)
            for _ in range(2):
                fetching.cancel()
                await goes_on(fetching)
            gates[0].set()
            await until(lambda: bool(looked))
            await goes_on(fetching)
            gates[1].set()
            with pytest.raises(asyncio.CancelledError):
                await fetching

    asyncio.run(main())
    assert looked == [0, 4]


def test_digests_are_no_longer_than_their_blocks_make_them(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[2 * MIB])
    chunk = manifest.chunks[0]
    read, _ = whole(replace(chunk, forms=(replace(chunk.forms[0], digest="", blocks=b""),)))
    heard: list[str] = []

    async def answer(websocket: ServerConnection) -> None:
        for number in range(1 + DAMAGE_RETRIES):
            asked = json.loads(await websocket.recv())
            begin = {"type": "begin", "id": number, "size": 2000, "digest": "0" * 64}
            await websocket.send(json.dumps(begin))
            heard.extend([asked["type"], json.loads(await websocket.recv())["type"]])
            failed = {"type": "error", "id": number, "code": "cancelled", "message": "given up"}
            await websocket.send(json.dumps(failed))
        await websocket.wait_closed()

    async def main() -> None:
        async with pretending(answer) as url, await open_wire_source(url, silence_timeout=5) as source:
            with pytest.raises(IntegrityError, match=r"of chunk layers\.0 has 2000 bytes, expected at most 1152; "):
                await source.fetch(manifest, [read])

    asyncio.run(main())
    assert heard == ["digests", "cancel"] * 3


def test_a_fetch_that_is_cancelled_before_it_begins_asks_for_nothing(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[10, 20, 30])
    limits = WireLimits(requests_in_flight=1)

    async def main() -> None:
        backend = GatedBackend(tmp_path)
        async with serving(backend, limits=limits) as server, await open_wire_source(server.url) as source:
            reads, memories = zip(*(whole(chunk) for chunk in manifest.chunks), strict=True)
            fetches = [asyncio.create_task(source.fetch(manifest, [read])) for read in reads]
            await backend.reading.wait()
            fetches[1].cancel()
            backend.gate.set()
            done = await asyncio.gather(*fetches, return_exceptions=True)
            assert [type(one) for one in done] == [type(None), asyncio.CancelledError, type(None)]
            assert [any(memory) for memory in memories] == [True, False, True]
            assert server.stats()["requests"]["total"] == 2

    asyncio.run(main())


def test_closing_ends_threads_and_connection(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[5 * MIB])

    before = set(threading.enumerate())  # other tests' models may end at any time

    def started() -> set[str]:
        return {thread.name.partition("_")[0] for thread in set(threading.enumerate()) - before}

    async def main() -> None:
        async with serving(tmp_path) as server:
            source = await open_wire_source(server.url)
            await source.fetch(manifest, [whole(manifest.chunks[0])[0]])
            assert "surfw-verify" in started()
            await source.close()
            await source.close()
            assert not any(name.startswith("surfw") for name in started())
            await until(lambda: server.stats()["clients"] == 0)

    asyncio.run(main())
