"""Clients that break the protocol are closed with a reason, reach no storage, and cost other clients nothing."""

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from surfw.client import open_wire_source
from surfw.config import KIB, MIB, WireLimits
from surfw.server import WeightServer
from tests.peers import bare_client, serving, until, whole
from tests.server.backends import RecordingBackend
from tests.stores import make_store, payload

SMALL = WireLimits(frame_bytes=128 * KIB, run_bytes=128 * KIB, window_bytes=512 * KIB)

PATHS = [
    "../canary",
    "../../canary",
    "models/../../canary",
    "/etc/passwd",
    "",
    ".",
    "a\0b",
    "..%2fcanary",
    "surfw.json",
    "blobs",
    "~",
    "C:\\canary",
    "x" * 256,
]
"""Values that a client might send instead of a name."""


@pytest.mark.parametrize("path", PATHS)
def test_no_path_from_the_wire_reaches_the_storage(tmp_path: Path, path: str) -> None:
    canary = tmp_path / "canary"
    canary.write_text("sings")
    (tmp_path / "canary.json").write_text("{}")
    manifest = make_store(tmp_path / "store", sizes=[100])
    own = {"surfw.json", "models/", "models/toy/model.json"}

    async def main() -> None:
        backend = RecordingBackend(tmp_path / "store")
        chunk = {"form": "none", "start": 0, "stop": 10}
        async with serving(backend) as server, bare_client(server.url) as client:
            attempts: list[tuple[str, dict[str, Any]]] = [
                ("manifest", {"model": path}),
                ("file", {"model": path, "path": "vocab.txt"}),
                ("file", {"model": manifest.name, "path": path}),
                ("get", {"model": path, "chunk": manifest.chunks[0].id} | chunk),
                ("get", {"model": manifest.name, "chunk": path} | chunk),
                ("get", {"model": manifest.name, "chunk": manifest.chunks[0].id} | chunk | {"form": path}),
            ]
            for number, (kind, attempt) in enumerate(attempts):
                await client.say(kind, id=number, **attempt)
                answer = await client.hear_text()
                assert (answer["type"], answer["code"].partition("-")[0]) == ("error", "unknown"), attempt
                assert "sings" not in json.dumps(answer)
        assert set(backend.asked) <= own

    asyncio.run(main())


GARBAGE: list[tuple[list[str | bytes], int]] = [
    (["not json"], 1002),
    (["[]"], 1002),
    (["{}"], 1002),
    (['{"type":"dance"}'], 1002),
    (['{"type":"models"}'], 1002),
    (['{"type":"models","id":-1}'], 1002),
    (['{"type":"models","id":0}', '{"type":"models","id":0}'], 1002),
    (['{"type":"hello","client":"again","window_bytes":8388608}'], 1002),
    (['{"type":"credit","bytes":1}'], 1002),
    (['{"type":"credit","bytes":-1}'], 1002),
    (['{"type":"credit","bytes":1e999}'], 1002),
    (['{"type":"get","id":0,"model":7}'], 1002),
    ([b"binary"], 1003),
    ([b""], 1003),
    (["x" * (MIB + 1)], 1009),
    (["[" * 100_000], 1002),
    (['{"type":"begin","id":0,"size":1,"digest":""}'], 1002),
]


@pytest.mark.parametrize(("messages", "code"), GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_closes_the_connection_with_a_reason(tmp_path: Path, messages: list[str | bytes], code: int) -> None:
    make_store(tmp_path, sizes=[100])

    async def main() -> None:
        async with serving(tmp_path) as server, bare_client(server.url) as client:
            for message in messages:
                await client.websocket.send(message)
            closed, reason = await client.closed()
            assert closed == code
            assert reason
            await until(lambda: server.stats()["clients"] == 0)

    asyncio.run(main())


@pytest.mark.parametrize(
    "first", ['{"type":"models","id":0}', "hi", b"\0", '{"type":"hello","client":"c","window_bytes":5}']
)
def test_the_first_message_is_hello(tmp_path: Path, first: str | bytes) -> None:
    make_store(tmp_path, sizes=[100])

    async def main() -> None:
        async with serving(tmp_path) as server, bare_client(server.url, greet=False) as client:
            await client.websocket.send(first)
            code, reason = await client.closed()
            assert code in {1002, 1003, 1008}
            assert reason

    asyncio.run(main())


def test_too_many_requests_at_a_time(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[9 * MIB])
    chunk = manifest.chunks[0]

    async def main() -> None:
        async with serving(tmp_path) as server, bare_client(server.url, window_bytes=MIB) as client:
            for number in range(65):
                await client.say(
                    "get", id=number, model="toy/model", chunk=chunk.id, form="none", start=0, stop=9 * MIB
                )
            assert await client.closed() == (1008, "more than 64 requests at a time")

    asyncio.run(main())


def test_garbage_of_one_client_does_not_disturb_a_fetch_of_another(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[20_000_000])
    read, memory = whole(manifest.chunks[0])

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            fetching = asyncio.create_task(source.fetch(manifest, [read]))
            for garbage, _ in GARBAGE:
                async with bare_client(server.url) as rude:
                    for message in garbage:
                        await rude.websocket.send(message)
                    await rude.closed()
            await fetching
            assert bytes(memory) == payload(tmp_path, manifest.chunks[0])

    asyncio.run(main())


def test_a_client_that_asks_and_never_reads_is_not_listened_to_for_long(tmp_path: Path) -> None:
    for number in range(60):
        make_store(tmp_path, f"{'x' * 190}{number}", [1], files={})
    answer_bytes = len(json.dumps({"models": [f"{'x' * 190}{number}" for number in range(60)]}))

    async def main() -> None:
        async with serving(tmp_path, limits=SMALL) as server, bare_client(server.url) as client:
            client.websocket.transport.pause_reading()
            (connection,) = server._connections
            asked = 0
            while asked * answer_bytes < 100_000_000:
                for _ in range(32):
                    await client.say("models", id=asked)
                    asked += 1
                try:
                    await asyncio.wait_for(until(partial(all_answered, server, asked)), timeout=1)
                except TimeoutError:
                    break
            assert asked * answer_bytes < 100_000_000, "it was listened to although it did not read"
            assert connection._websocket.transport.get_write_buffer_size() < SMALL.window_bytes + 64 * answer_bytes
            client.websocket.transport.abort()

    asyncio.run(main())


def all_answered(server: WeightServer, asked: int) -> bool:
    """Whether the server has received and answered all requests."""
    requests = server.stats()["requests"]
    return bool(requests["total"] == asked and requests["in_flight"] == 0)
