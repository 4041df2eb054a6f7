"""The web page, and the events that update it."""

import asyncio
import base64
import hashlib
import http.client
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from surfw.client import open_wire_source
from surfw.manifest import Location
from surfw.server import WeightServer
from surfw.server import page as server_page
from surfw.server.heat import heat_of
from surfw.server.pages import Page
from tests.peers import serving, whole
from tests.stores import make_store
from tests.toys import toy_chunk


def get(port: int, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()
    finally:
        connection.close()


def events_in(text: str) -> list[dict[str, Any]]:
    return [json.loads(one.removeprefix("data: ")) for one in text.split("\n\n") if one.startswith("data: ")]


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_page, "_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(server_page, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(server_page, "_LONGEST_SECONDS", 0.3)


def test_the_page_is_one_file_that_asks_nobody_else(tmp_path: Path) -> None:
    make_store(tmp_path, sizes=[100])

    async def main() -> None:
        async with WeightServer(model_path=tmp_path, port=0, token="secret") as server:
            status, headers, page = await asyncio.to_thread(get, server.port, "/")
            assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
            assert not re.search(r"https?://|//[a-z]|@import|url\(", page), "another host"
            assert re.findall(r'fetch\("([^"]*)"', page) == ["/events"]
            assert "innerHTML" not in page, "texts from outside are texts"
            policy = headers["content-security-policy"]
            for tag in ("script", "style"):
                (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
                digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
                assert f"{tag}-src 'sha256-{digest}'" in policy
            assert "default-src 'none'" in policy
            assert "connect-src 'self'" in policy
            status, headers, _ = await asyncio.to_thread(get, server.port, "/events")
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            status, _, _ = await asyncio.to_thread(get, server.port, "/events?token=secret")
            assert status == 401, "a token in a URL is none"

    asyncio.run(main())


@pytest.mark.usefixtures("_short")
def test_events_are_the_statistics_as_they_change(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[100, 200])
    read, _ = whole(manifest.chunks[0])

    async def main() -> None:
        async with WeightServer(model_path=tmp_path, port=0, token="secret") as server:
            bearer = {"Authorization": "Bearer secret"}
            async with await open_wire_source(server.url, token="secret") as source:
                await source.fetch(manifest, [read])
                await source.fetch(manifest, [read])
                status, headers, text = await asyncio.to_thread(lambda: get(server.port, "/events", **bearer))
            assert (status, headers["content-type"]) == (200, "text/event-stream")
            assert text.startswith("retry: ")
            found = events_in(text)
            assert len(found) >= 2
            assert found[0]["bytes_sent"] == 200
            (heat,) = found[-1]["heat"]
            assert (heat["model"], heat["chunks"]) == (manifest.name, 2)
            assert heat["resident"] == [1, 0]
            assert heat["hits"] == [1, 0]
            assert [one["in_flight"] for one in found[-1]["connections"]] == [0]

    asyncio.run(main())


def test_heat_is_that_of_the_bytes_where_a_chunk_lies() -> None:
    chunk, _ = toy_chunk("a", [])
    places = [
        [Location("shard", 7, 107)],
        [Location("shard", 107, 207)],
        [Location("shard", 207, 257), Location("b", 0, 50)],
    ]
    chunks = tuple(
        replace(chunk, name=str(number), forms=(replace(chunk.forms[0], stored_bytes=100, locations=tuple(place)),))
        for number, place in enumerate(places)
    )
    manifest = SimpleNamespace(name="m", chunks=chunks)
    pages = SimpleNamespace(
        cache=[Page("shard", 107, 207), Page("shard", 7, 57), Page("b", 0, 50), Page("other", 7, 107)],
        hits=Counter({("shard", 7): 1, ("shard", 207): 2, ("b", 0): 3, ("gone", 0): 9}),
    )
    (found,) = heat_of(SimpleNamespace(known=lambda: [manifest]), pages)  # type: ignore[arg-type]
    assert found == {"model": "m", "chunks": 3, "resident": [0.5, 1.0, 0.5], "hits": [1, 0, 5]}


@pytest.mark.usefixtures("_short")
def test_a_token_for_some_models_sees_no_heat_of_others(tmp_path: Path) -> None:
    store = tmp_path / "store"
    first, second = make_store(store, "org/first", (100,)), make_store(store, "second", (200,), seed=1)
    (tmp_path / "tokens").write_text('[all]\ntoken = "every"\n[ci]\ntoken = "some"\nmodels = ["second"]\n')

    async def main() -> None:
        async with WeightServer(model_path=store, port=0, token_file=tmp_path / "tokens") as server:
            async with await open_wire_source(server.url, token="every") as source:
                for manifest in (first, second):
                    await source.manifest(manifest.name)
                    await source.fetch(manifest, [whole(manifest.chunks[0])[0]])
            bearer = {"Authorization": "Bearer some"}
            _, _, text = await asyncio.to_thread(lambda: get(server.port, "/events", **bearer))
            last = events_in(text)[-1]
            assert ([one["model"] for one in last["heat"]], last["models"], last["events"]) == (
                ["second"],
                ["second"],
                [],
            )

    asyncio.run(main())


def test_a_server_that_stops_does_not_wait_for_its_viewers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_page, "_LONGEST_SECONDS", 60)
    make_store(tmp_path, sizes=[100])

    async def main() -> None:
        async with serving(tmp_path) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert b"data: " in await reader.readuntil(b"}\n\n")
            async with asyncio.timeout(4):
                await server.stop()
            assert await reader.read() is not None
            writer.close()

    asyncio.run(main())
