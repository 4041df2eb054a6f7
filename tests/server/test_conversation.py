"""A server's messages, one by one: windows, turns, cancellation, refusals."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from surfw.client import open_wire_source
from surfw.config import KIB, MIB, WireLimits
from surfw.manifest import Manifest
from surfw.server.connection import Connection
from tests.peers import BareClient, bare_client, serving, until, whole
from tests.server.backends import GatedBackend
from tests.stores import make_store, payload

FRAME = 128 * KIB
SMALL = WireLimits(frame_bytes=FRAME, run_bytes=FRAME, window_bytes=4 * FRAME)


def wanting(manifest: Manifest, index: int = 0, start: int = 0, stop: int | None = None, **more: Any) -> dict[str, Any]:
    """The fields of a `get`."""
    chunk = manifest.chunks[index]
    stop = chunk.payload_bytes if stop is None else stop
    return {"model": manifest.name, "chunk": chunk.id, "form": "none", "start": start, "stop": stop} | more


async def runs(client: BareClient, count: int) -> list[tuple[int, int, int]]:
    """The ids, starts and stops of the next runs; their bytes are dropped."""
    found: list[tuple[int, int, int]] = []
    while len(found) < count:
        message = await client.hear_text()
        assert message["type"] == "data", message
        found.append((message["id"], message["start"], message["stop"]))
    return found


def test_a_client_that_never_credits_gets_the_window_and_costs_the_others_nothing(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[3_000_000])

    async def main() -> None:
        async with serving(tmp_path, limits=SMALL) as server, bare_client(server.url) as miser:
            await miser.say("get", id=0, **wanting(manifest))
            assert await runs(miser, 4) == [(0, at * FRAME, (at + 1) * FRAME) for at in range(4)]
            async with await open_wire_source(server.url, limits=SMALL) as source:
                read, memory = whole(manifest.chunks[0])
                await source.fetch(manifest, [read])
            assert bytes(memory) == payload(tmp_path, manifest.chunks[0])
            assert server.stats()["requests"]["in_flight"] == 1
            await miser.say("credit", bytes=FRAME)
            assert await runs(miser, 1) == [(0, 4 * FRAME, 5 * FRAME)]

    asyncio.run(main())


def test_equals_take_turns_and_lower_priorities_go_first(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[3_000_000])

    async def main() -> None:
        async with serving(tmp_path, limits=SMALL) as server, bare_client(server.url) as client:
            await client.say("get", id=0, **wanting(manifest, stop=4 * FRAME))
            assert [run[0] for run in await runs(client, 4)] == [0] * 4
            await client.say("get", id=1, **wanting(manifest, stop=2 * FRAME, priority=5))
            await client.say("get", id=2, **wanting(manifest, stop=2 * FRAME, priority=5))
            await client.say("get", id=3, **wanting(manifest, stop=2 * FRAME, priority=-1))
            (connection,) = server._connections
            await until(lambda: len(connection._sender._waiting) == 3)
            order = []
            for _ in range(6):
                await client.say("credit", bytes=FRAME)
                order += [run[0] for run in await runs(client, 1)]
            assert order == [3, 3, 1, 2, 1, 2]

    asyncio.run(main())


def test_cancel_ends_a_transfer_and_frees_its_place(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[3_000_000])

    async def main() -> None:
        async with serving(tmp_path, limits=SMALL) as server, bare_client(server.url) as client:
            await client.say("get", id=0, **wanting(manifest))
            await runs(client, 4)
            await client.say("cancel", id=0)
            ended = await client.hear_text()
            assert (ended["type"], ended["id"], ended["code"]) == ("error", 0, "cancelled")
            await client.say("cancel", id=0)
            await client.say("credit", bytes=4 * FRAME)
            await client.say("get", id=1, **wanting(manifest, start=1, stop=2))
            assert await runs(client, 1) == [(1, 1, 2)]
            assert server.stats()["requests"]["in_flight"] == 0

    asyncio.run(main())


def test_cancel_while_the_storage_is_read(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[3_000_000])

    async def main() -> None:
        backend = GatedBackend(tmp_path)
        async with serving(backend) as server, bare_client(server.url) as client:
            await client.say("get", id=0, **wanting(manifest))
            await backend.reading.wait()
            await client.say("cancel", id=0)
            assert (await client.hear_text())["code"] == "cancelled"
            backend.gate.set()
            await client.say("get", id=1, **wanting(manifest))
            assert (await runs(client, 1))[0][0] == 1
            assert backend.reads == 1, "the read went on, for the next who asks"

    asyncio.run(main())


def test_what_a_client_that_leaves_has_asked_for_is_not_read(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[100 + index for index in range(10)])

    async def main() -> None:
        backend = GatedBackend(tmp_path)
        async with serving(backend, cache_size_mb=0) as server, bare_client(server.url) as stays:
            async with bare_client(server.url) as leaves:
                for index in range(9):
                    await leaves.say("get", id=index, **wanting(manifest, index))
                await until(lambda: len(server._served.pages.reads) == 9)
            await until(lambda: server.stats()["clients"] == 1)
            assert len(server._served.pages.reads) == 2, "what has begun goes on, and the queue is gone"
            await stays.say("get", id=0, **wanting(manifest, 9))
            await until(lambda: len(server._served.pages.reads) == 3)
            backend.gate.set()
            assert await runs(stays, 1) == [(0, 0, 109)]
            await until(lambda: not server._served.pages.reads)
            assert backend.reads == 3

    asyncio.run(main())


def test_two_clients_share_one_read(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[1_000_000])

    async def main() -> None:
        backend = GatedBackend(tmp_path)
        async with serving(backend) as server, bare_client(server.url) as one, bare_client(server.url) as two:
            for client in (one, two):
                await client.say("get", id=0, **wanting(manifest))
            await until(lambda: server.stats()["cache"]["coalesced"] == 1)
            backend.gate.set()
            for client in (one, two):
                assert await runs(client, 1) == [(0, 0, 1_000_000)]
            assert backend.reads == 1
            assert server.stats()["cache"]["misses"] == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("kind", "asked", "code"),
    [
        ("manifest", {"model": "nope"}, "unknown-model"),
        ("file", {"model": "toy/model", "path": "nope.json"}, "unknown-file"),
        ("file", {"model": "other", "path": "vocab.txt"}, "unknown-file"),
        ("get", {"chunk": "0" * 64}, "unknown-chunk"),
        ("get", {"chunk": "layers.0"}, "unknown-chunk"),
        ("get", {"model": "other"}, "unknown-chunk"),
        ("get", {"form": "lossless"}, "unknown-form"),
        ("get", {"start": 5, "stop": 4}, "bad-range"),
        ("get", {"stop": 101}, "bad-range"),
        ("get", {"start": 2**53, "stop": 2**53}, "bad-range"),
    ],
)
def test_refusals(tmp_path: Path, kind: str, asked: dict[str, Any], code: str) -> None:
    manifest = make_store(tmp_path, sizes=[100])
    make_store(tmp_path, "other", [50], files={})

    async def main() -> None:
        async with serving(tmp_path) as server, bare_client(server.url) as client:
            await client.say(kind, **({"id": 0} | (wanting(manifest) if kind == "get" else {}) | asked))
            answer = await client.hear_text()
            assert (answer["type"], answer["id"], answer["code"]) == ("error", 0, code)
            assert str(tmp_path) not in answer["message"]
            await client.say("get", id=1, **wanting(manifest))
            assert await runs(client, 1) == [(1, 0, 100)]

    asyncio.run(main())


def test_what_the_storage_says_stays_at_home(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[100])

    async def main() -> None:
        backend = GatedBackend(tmp_path)
        backend.gate.set()
        backend.failing = True
        async with serving(backend) as server, bare_client(server.url) as client:
            await client.say("get", id=0, **wanting(manifest))
            answer = await client.hear_text()
            assert (answer["type"], answer["code"]) == ("error", "storage")
            assert "secret" not in answer["message"]
            assert not server.stats()["storage"]["healthy"]

    asyncio.run(main())


def test_a_manifest_crosses_without_locations(tmp_path: Path) -> None:
    manifest = make_store(tmp_path)

    async def main() -> None:
        async with serving(tmp_path) as server, bare_client(server.url) as client:
            await client.say("manifest", id=0, model=manifest.name)
            begin, data, body = [await client.hear() for _ in range(3)]
            assert begin == {"type": "begin", "id": 0, "size": len(body), "digest": manifest.digest}
            assert data == {"type": "data", "id": 0, "start": 0, "stop": len(body)}
            assert body == manifest.public().encode()
            assert b"blobs" not in body

    asyncio.run(main())


def test_fresh_bytes_are_read_from_the_storage_again(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[1_000_000])
    location = manifest.chunks[0].forms[0].locations[0]

    async def main() -> None:
        backend = GatedBackend(tmp_path)
        backend.gate.set()
        async with serving(backend) as server, bare_client(server.url) as client:
            for number, (fresh, reads) in enumerate([({}, 1), ({}, 1), ({"fresh": True}, 2), ({"fresh": False}, 2)]):
                await client.say("get", id=number, **wanting(manifest, stop=5, **fresh))
                assert await runs(client, 1) == [(number, 0, 5)]
                assert backend.reads == reads
            blob = tmp_path / location.object
            blob.write_bytes(blob.read_bytes()[: location.start] + bytes(1_000_000))
            await client.say("get", id=9, **wanting(manifest, stop=5, fresh=True))
            assert (await client.hear_text())["id"] == 9
            assert await client.hear() == bytes(5)

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["get", "file"])
def test_a_client_that_waits_for_the_storage_hears_that_it_gets_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("surfw.server.connection.PROGRESS_SECONDS", 0.001)
    manifest = make_store(tmp_path, sizes=[1_000_000])
    asked = {
        "get": wanting(manifest),
        "file": {"model": manifest.name, "path": "vocab.txt"},
    }[kind]

    async def main() -> None:
        backend = GatedBackend(tmp_path)
        async with (
            serving(backend) as server,
            bare_client(server.url, greet=False) as knows,
            bare_client(server.url) as older,
        ):
            await knows.hear_text()
            await knows.say("hello", client="bare", window_bytes=8 * MIB, progress=True)
            for client in (older, knows):
                await client.say(kind, id=7, **asked)
            await backend.reading.wait()
            if kind == "file":
                assert (await knows.hear_text())["type"] == "begin"
            for number in (1, 2):  # as if other reads before it in the queue ran
                await until(lambda: len(list(server._served.pages.reads.running())) == 1)
                ((_, own),) = server._served.pages.reads.running()
                own.read_bytes += number
                heard = await knows.hear_text()
                assert heard == {"type": "progress", "id": 7, "bytes": number * (number + 1) // 2}
            backend.gate.set()
            assert (await knows.hear_text())["type"] in {"data", "begin", "progress"}
            assert (await older.hear_text())["type"] in {"data", "begin"}, "no progress for a client that knows none"

    asyncio.run(main())


def test_manifests_of_others_are_progress_in_line_and_none_for_one_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surfw.server.connection.PROGRESS_SECONDS", 0.001)
    for name in ("a", "b", "c"):
        make_store(tmp_path, name, sizes=[10])

    async def main() -> None:
        backend = GatedBackend(tmp_path)
        async with serving(backend) as server, bare_client(server.url, greet=False) as client:
            catalog = server._served.catalog
            monkeypatch.setattr(catalog._store, "manifest_bytes", waiting(server, backend))
            await client.hear_text()
            await client.say("hello", client="bare", window_bytes=8 * MIB, progress=True)
            for number, name in enumerate(("a", "b", "c")):
                await client.say("manifest", id=number, model=name)
            await until(lambda: len(catalog._reads) == 3)
            for count in (1, 3):  # as if other reads before it in the queue ran
                catalog._reads.read_bytes += 1 if count == 1 else 2
                assert await client.hear_text() == {"type": "progress", "id": 2, "bytes": count}
            backend.gate.set()
            while (heard := await client.hear_text())["type"] != "begin" or heard["id"] != 2:
                assert heard["type"] != "progress" or heard["id"] == 2
                if heard["type"] == "data":
                    await client.hear()

    asyncio.run(main())


def test_nothing_of_a_connection_runs_on_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path, sizes=[100])
    left: list[set[Any]] = []
    serve = Connection.serve

    async def noted(self: Connection) -> None:
        before = asyncio.all_tasks()
        await serve(self)
        left.append({task for task in asyncio.all_tasks() - before if "Connection" in task.get_coro().__qualname__})

    monkeypatch.setattr(Connection, "serve", noted)

    async def main() -> None:
        async with serving(tmp_path) as server, bare_client(server.url):
            await until(lambda: len(server._connections) == 1)

    asyncio.run(main())
    assert left == [set()]


def test_lines_that_clients_cause_are_sparse_whatever_kind_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_store(tmp_path, sizes=[100])
    caplog.set_level("INFO", "surfw.server")

    async def main() -> None:
        backend = GatedBackend(tmp_path)
        backend.gate.set()
        backend.failing = True
        async with serving(backend) as server:
            for _ in range(2):  # no other client's line is counted again
                async with bare_client(server.url) as client:
                    for number in range(20):
                        await client.say("get", id=number, **wanting(manifest))
                        assert (await client.hear_text())["code"] == "storage"
            for _ in range(30):
                async with bare_client(server.url) as client:
                    await client.websocket.send("garbage")
                    await client.closed()

    asyncio.run(main())
    assert sum("cannot be answered" in line for line in caplog.messages) == 2
    assert sum("is closed" in line for line in caplog.messages) == 2
    assert sum("joined" in line or "left" in line for line in caplog.messages) == 4, (
        "the thirty never asked for anything"
    )


def waiting(server: Any, backend: GatedBackend) -> Any:
    """A load of a manifest that waits for the gate."""
    load = server._served.catalog._store.manifest_bytes

    async def wait(model: str) -> bytes:
        backend.reading.set()
        await backend.gate.wait()
        return bytes(await load(model))

    return wait


def test_refused_requests_of_a_client_write_a_line_now_and_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_store(tmp_path, sizes=[100])
    caplog.set_level("INFO", "surfw.server")

    async def main() -> None:
        async with serving(tmp_path) as server, bare_client(server.url) as client:
            for number in range(50):
                await client.say("manifest", id=number, model=f"nope {number}")
                assert (await client.hear_text())["code"] == "unknown-model"

    asyncio.run(main())
    lines = [line for line in caplog.messages if "nope" in line]
    assert len(lines) == 2, "the first, and what came of the others when it left"
    assert "nope 49" in lines[1]
    assert "48 times more" in lines[1]
