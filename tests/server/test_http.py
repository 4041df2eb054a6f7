"""Health, statistics and metrics over plain HTTP."""

import asyncio
import http.client
import json
import shutil
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from surfw.client import open_wire_source
from surfw.storage import FilesystemBackend
from tests.peers import serving, whole
from tests.stores import make_store


def fetch(port: int, path: str) -> tuple[int, str, str]:
    """Status, content type and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
    finally:
        connection.close()


def ask(store: Path, *paths: str) -> list[tuple[int, str, str]]:
    """What a server of the store answers, after one fetch."""
    manifest = make_store(store, sizes=[100])
    read, _ = whole(manifest.chunks[0])

    async def main() -> list[tuple[int, str, str]]:
        async with serving(store) as server:
            async with await open_wire_source(server.url) as source:
                await source.fetch(manifest, [read])
            return [await asyncio.to_thread(fetch, server.port, path) for path in paths]

    return asyncio.run(main())


def test_alive_and_ready(tmp_path: Path) -> None:
    assert [(status, body) for status, _, body in ask(tmp_path, "/livez", "/readyz")] == [(200, "ok\n")] * 2


def test_stats_are_json(tmp_path: Path) -> None:
    ((status, kind, body),) = ask(tmp_path, "/stats?pretty")
    assert (status, kind) == (200, "application/json")
    assert json.loads(body)["bytes_sent"] == 100


def test_metrics_can_be_scraped(tmp_path: Path) -> None:
    ((status, kind, body),) = ask(tmp_path, "/metrics")
    assert status == 200
    assert kind.startswith("text/plain")
    found = {sample.name: sample.value for family in text_string_to_metric_families(body) for sample in family.samples}
    assert found["surfw_sent_bytes_total"] == 100
    assert found["surfw_requests_total"] == 1
    assert found["surfw_cache_misses_total"] == 1
    assert found["surfw_storage_healthy"] == 1
    assert "surfw_request_latency_seconds" in found


def test_other_requests_are_told_where_they_are(tmp_path: Path) -> None:
    (root, nowhere) = ask(tmp_path, "/", "/models/../surfw.json")
    assert root[0] == 426
    assert nowhere[0] == 404
    for _, _, body in (root, nowhere):
        assert "surfw server" in body
        assert "/metrics" in body


def test_not_ready_while_the_storage_is_away(tmp_path: Path) -> None:
    store = tmp_path / "store"
    make_store(store, sizes=[100])

    async def main() -> None:
        async with serving(store) as server:
            shutil.move(store, tmp_path / "elsewhere")
            status, _, _ = await asyncio.to_thread(fetch, server.port, "/readyz")
            assert (status, server.stats()["storage"]["healthy"]) == (503, False)
            assert (await asyncio.to_thread(fetch, server.port, "/livez"))[0] == 200
            shutil.move(tmp_path / "elsewhere", store)
            assert (await asyncio.to_thread(fetch, server.port, "/readyz"))[0] == 200

    asyncio.run(main())


def test_a_storage_that_hangs_is_not_ready(tmp_path: Path) -> None:
    make_store(tmp_path, sizes=[100])

    class Hanging(FilesystemBackend):
        hangs = False

        async def load(self, key: str) -> bytes:
            if self.hangs:
                await asyncio.Event().wait()
            return await super().load(key)

    async def main() -> None:
        backend = Hanging(tmp_path)
        async with serving(backend) as server:
            backend.hangs = True
            status, _, body = await asyncio.to_thread(fetch, server.port, "/readyz")
            assert (status, body) == (503, "the storage cannot be reached\n")

    asyncio.run(main())
