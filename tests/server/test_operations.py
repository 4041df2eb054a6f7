"""A server that is told to finish or reload while clients are connected, and its metrics meanwhile."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from surfw.client import open_wire_source
from surfw.errors import ConnectionFailedError, StorageError
from surfw.manifest import Manifest
from surfw.retry import RetryPolicy
from surfw.server import AdvancedWeightServer, WeightServer
from surfw.server import http as server_http
from surfw.server.operations import GOODBYE
from tests.peers import BareClient, bare_client, serving, until, whole
from tests.server.backends import GatedBackend
from tests.server.test_http import fetch
from tests.server.test_journal import told
from tests.services.processes import free_port
from tests.stores import make_store, payload

ONCE = RetryPolicy(attempts=1)


async def ask(client: BareClient, number: int, manifest: Manifest) -> None:
    """Request all of the first chunk."""
    chunk = manifest.chunks[0]
    await client.say(
        "get", id=number, model=manifest.name, chunk=chunk.id, form="none", start=0, stop=chunk.payload_bytes
    )


def metrics(server: WeightServer) -> dict[tuple[str, ...], float]:
    """A server's metrics, by the name of the sample and its labels."""
    families = text_string_to_metric_families(server.metrics().decode())
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_what_is_in_flight_is_finished_and_nothing_new_is_begun(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[700_000])

    async def main() -> None:
        backend = GatedBackend(tmp_path)
        async with serving(backend) as server, bare_client(server.url) as client, bare_client(server.url) as idle:
            await ask(client, 0, manifest)
            await backend.reading.wait()
            draining = asyncio.create_task(server.drain(60))
            await until(lambda: server.is_draining)
            assert metrics(server)["surfw_draining",] == 1
            await ask(client, 1, manifest)
            await until(lambda: metrics(server).get(("surfw_events_total", "stopping", "refused")) == 1)
            assert await asyncio.to_thread(fetch, server.port, "/readyz") == (
                503,
                "text/plain; charset=utf-8",
                f"{GOODBYE}\n",
            )
            assert (await asyncio.to_thread(fetch, server.port, "/livez"))[0] == 200
            with pytest.raises(ConnectionFailedError, match=f"takes no more clients: {GOODBYE}; try again") as raised:
                await open_wire_source(server.url, retry=ONCE)
            assert raised.value.transient
            assert not draining.done()
            backend.gate.set()
            assert await draining == 0
            assert await client.hear_text() == {"type": "data", "id": 0, "start": 0, "stop": 700_000}
            received = [await client.hear(), await client.hear()]
            assert b"".join(part for part in received if isinstance(part, bytes)) == payload(
                tmp_path, manifest.chunks[0]
            )
            assert client.websocket.state.name == idle.websocket.state.name == "OPEN", "until there is another server"
            stopping = asyncio.create_task(server.stop())
            assert [await client.closed(), await idle.closed()] == [(1001, GOODBYE)] * 2
            await stopping
            first, second = told(server, "stopping")
            assert first == "stopping: 1 request in flight, for which there are 60 s"
            assert re.fullmatch(r"1 request finished after \d\.\d s", second)

    asyncio.run(main())


def test_what_takes_too_long_is_cut_off(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[100])

    async def main() -> None:
        backend = GatedBackend(tmp_path)
        server = WeightServer(backend, port=0)
        await server.start()
        async with bare_client(server.url) as client:
            await ask(client, 0, manifest)
            await backend.reading.wait()
            assert await server.drain(0.01) == 1
            assert told(server, "stopping")[1] == "1 request of 1 took longer than 0.01 s: cut off"
            await server.stop()
            assert await client.closed() == (1001, GOODBYE)
        backend.gate.set()
        async with server, await open_wire_source(server.url) as source:
            assert not server.is_draining, "the next start takes clients again"
            assert await source.models() == [manifest.name]

    asyncio.run(main())


def test_a_server_without_clients_has_nothing_to_wait_for(tmp_path: Path) -> None:
    make_store(tmp_path, sizes=[100])

    async def main() -> None:
        async with serving(tmp_path) as server, bare_client(server.url):
            assert await server.drain(60) == 0
            assert told(server, "stopping") == ["stopping"]

    asyncio.run(main())


def test_a_reload_finds_what_is_new_and_keeps_what_cannot_be_read(tmp_path: Path) -> None:
    store = tmp_path / "store"
    make_store(store, "a", [10])
    made = store / "models" / "a.json"

    async def main() -> None:
        async with serving(store) as server, await open_wire_source(server.url) as source:
            before = await source.manifest("a")
            await asyncio.to_thread(make_store, store, "b", [20])
            await asyncio.to_thread(make_store, store, "a", [30], seed=1)
            assert await server.reload()
            assert told(server, "reload") == ["looked again: 2 models"]
            assert server.stats()["models"] == ["a", "b"]
            catalog, right = server._served.catalog, made.read_bytes()
            assert (await catalog.entry("a")).manifest.chunks[0].payload_bytes == 30 != before.chunks[0].payload_bytes
            made.write_bytes(right[:-9])
            assert not await server.reload()
            assert (await catalog.entry("a")).manifest.chunks[0].payload_bytes == 30
            store.rename(tmp_path / "elsewhere")
            assert not await server.reload()
            assert server.stats()["models"] == ["a", "b"]
            kept = "the models cannot be read again, and stay as they were"
            assert told(server, "reload") == ["looked again: 2 models", kept, kept]
            (tmp_path / "elsewhere").rename(store)
            made.write_bytes(right)
            assert await server.reload()
            seen = metrics(server)
            assert seen["surfw_reloads_total", "done"] == seen["surfw_reloads_total", "failed"] == 2

    asyncio.run(main())


def test_one_thing_that_is_broken_keeps_no_other_from_being_looked_at(tmp_path: Path) -> None:
    make_store(tmp_path, "a", [10])

    async def break_() -> str:
        raise StorageError("the file of tokens is not TOML")

    async def main() -> None:
        async with serving(tmp_path) as server:
            server._reloads._all = {"the tokens": break_} | server._reloads._all
            assert not await server.reload()
            texts = [event["text"] for event in server.stats(details=True)["events"]]
            assert texts == [
                "the tokens cannot be read again, and stay as they were: the file of tokens is not TOML",
                "looked again: 1 model",
            ]

    asyncio.run(main())


def test_tokens_that_cannot_be_used_are_a_failed_reload(tmp_path: Path) -> None:
    make_store(tmp_path / "store", "a", [10])
    file = tmp_path / "tokens.toml"
    file.write_text('[ci]\ntoken = "one"\n')

    async def main() -> None:
        async with serving(tmp_path / "store", token_file=file) as server:
            file.write_text("[ci]\nmodels = 3\n")
            assert not await server.reload()
            assert told(server, "reload") == ["looked again: 1 model"]
            seen = metrics(server)
            assert (seen["surfw_reloads_total", "done"], seen["surfw_reloads_total", "failed"]) == (0, 1)
            async with await open_wire_source(server.url, token="one") as source:
                assert await source.models() == ["a"], "by the tokens before"

    asyncio.run(main())


def test_metrics_count_what_is_refused_and_where_bytes_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_store(tmp_path, sizes=[1_000_000])
    monkeypatch.setattr(server_http, "KEPT_SECONDS", 0)

    async def main() -> None:
        async with serving(tmp_path, clients=3) as server, await open_wire_source(server.url) as source:
            for _ in range(3):
                await source.fetch(manifest, [whole(manifest.chunks[0])[0]])
            await source.announce(manifest, manifest.chunks, [])
            await until(lambda: metrics(server)["surfw_schedules",] == 1)
            names = set(metrics(server))
            async with bare_client(server.url) as client:
                for number in range(30):
                    await client.say("manifest", id=number, model=f"model {number}")
                    assert (await client.hear_text())["code"] == "unknown-model"
                await client.websocket.send("garbage")
                assert (await client.closed())[0] == 1002
            await until(lambda: server.stats()["clients"] == 1)
            assert (await asyncio.to_thread(fetch, server.port, "/stats", Host="evil.example"))[0] == 421
            seen = metrics(server)
            new = {name: seen[name] for name in set(seen) - names}
            assert new == {
                ("surfw_events_total", "unknown-model", "refused"): 30,
                ("surfw_events_total", "host", "refused"): 1,
                ("surfw_events_total", "1002", "closed"): 1,
            }, "however many names clients try"
            assert seen["surfw_source_bytes_total", "storage"] == 1_000_000
            assert seen["surfw_source_bytes_total", "cache"] == 2_000_000
            assert seen["surfw_connections_total",] == 2
            assert seen["surfw_clients_limit",] == 3
            assert (seen["surfw_cache_policy", "schedule"], seen["surfw_cache_policy", "lru"]) == (1, 0)
            assert seen["surfw_request_seconds_count",] == 3
            assert seen["surfw_events_total", "", "joined"] == 2
            assert seen["surfw_events_total", "", "failed"] == 0

    asyncio.run(main())


def test_metrics_say_while_redis_is_bypassed(tmp_path: Path) -> None:
    make_store(tmp_path, sizes=[100])

    async def main() -> None:
        options: dict[str, Any] = {"port": 0}
        async with AdvancedWeightServer(tmp_path, f"redis://127.0.0.1:{free_port()}/0", **options) as server:
            seen = metrics(server)
            assert (seen["surfw_redis_bypassed",], seen["surfw_redis_reachable",]) == (1, 0)
            assert seen["surfw_redis_bypassed_seconds",] > 0
            assert seen["surfw_redis_bypasses_total",] == 0, "it was never used"
            assert (seen["surfw_page_wait_seconds", "redis"], seen["surfw_source_bytes_total", "redis"]) == (0, 0)

    asyncio.run(main())
