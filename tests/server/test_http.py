"""Health, statistics and metrics over plain HTTP."""

import asyncio
import http.client
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from surfw.client import open_wire_source
from surfw.errors import ConfigurationError
from surfw.server import WeightServer
from surfw.server import http as server_http
from surfw.storage import FilesystemBackend
from tests.peers import serving, whole
from tests.server.backends import RecordingBackend
from tests.stores import make_store


def fetch(port: int, path: str, **headers: str) -> tuple[int, str, str]:
    """Return status, content type and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
    finally:
        connection.close()


def ask(store: Path, *paths: str) -> list[tuple[int, str, str]]:
    """Return a server's answer after one fetch."""
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
    (nowhere,) = ask(tmp_path, "/models/../surfw.json")
    assert nowhere[0] == 404
    assert "surfw server" in nowhere[2]
    assert "/metrics" in nowhere[2]


def test_not_ready_while_the_storage_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_http, "KEPT_SECONDS", 0)
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


def test_health_that_is_asked_for_often_is_looked_at_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path, sizes=[100])

    async def main() -> None:
        backend = RecordingBackend(tmp_path)
        async with serving(backend) as server:
            before = len(backend.asked)
            with ThreadPoolExecutor(20) as callers:
                paths = ("/readyz", "/stats") * 10
                calls = [asyncio.wrap_future(callers.submit(fetch, server.port, path)) for path in paths]
                assert {status for status, _, _ in await asyncio.gather(*calls)} == {200}
            looked = len(backend.asked) - before
            monkeypatch.setattr(server_http, "KEPT_SECONDS", 0)
            await asyncio.to_thread(fetch, server.port, "/readyz")
            assert len(backend.asked) - before == 2 * looked, "twenty answers cost what one does"

    asyncio.run(main())


HOSTS = [
    ("127.0.0.1", 200),
    ("localhost:1", 200),
    ("[::1]:80", 200),
    ("Known.example.:80", 200),
    ("evil.example", 421),
    ("", 421),
]


@pytest.mark.parametrize(("host", "status"), HOSTS)
def test_a_server_without_a_token_answers_to_its_own_names(tmp_path: Path, host: str, status: int) -> None:
    make_store(tmp_path, sizes=[100])

    async def main() -> None:
        async with serving(tmp_path, allowed_hosts=["known.example"]) as server:
            for path in ("/livez", "/stats"):
                seen, _, body = await asyncio.to_thread(fetch, server.port, path, Host=host)
                assert seen == status
                assert ("--allowed-host" in body) == (status == 421)
            seen, _, _ = await asyncio.to_thread(fetch, server.port, "/", Host=host, Upgrade="websocket")
            assert (seen == 421) == (status == 421)

    asyncio.run(main())


def test_a_token_decides_alone(tmp_path: Path) -> None:
    make_store(tmp_path, sizes=[100])

    async def main() -> None:
        async with serving(tmp_path, token="t") as server:
            shown = {"Host": "any.example", "Authorization": "Bearer t"}
            assert (await asyncio.to_thread(fetch, server.port, "/stats", **shown))[0] == 200

    asyncio.run(main())


@pytest.mark.parametrize("names", ["a.example", ["a b"], [""], [7], ["http://x"]])
def test_names_that_cannot_be_names_are_refused(tmp_path: Path, names: Any) -> None:
    with pytest.raises(ConfigurationError, match="allowed_hosts has"):
        WeightServer(FilesystemBackend(tmp_path), allowed_hosts=names)


def test_requests_that_are_refused_write_a_line_now_and_then(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_store(tmp_path, sizes=[100])

    async def main() -> None:
        async with serving(tmp_path, token="t") as server:
            for _ in range(20):
                assert (await asyncio.to_thread(fetch, server.port, "/stats"))[0] == 401

    asyncio.run(main())
    first, counted = [line for line in caplog.messages if "no token" in line]
    assert first.endswith(" is refused: no token")
    assert counted.endswith(" is refused: no token (and 18 times more before)"), "told at the end"


def test_what_is_no_frame_behind_a_request_ends_the_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_store(tmp_path, sizes=[100])

    async def main() -> bytes:
        async with serving(tmp_path) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET /stats HTTP/1.1\r\n\r\nHost: [::1]\r\n")
            answer = await reader.read()
            writer.close()
            return answer

    assert asyncio.run(main()) == b""
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
