"""A token admits a client, is never sent to another machine in clear text, and is never shown."""

import asyncio
import logging
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from surfw.client import open_wire_source, probe, read_stats
from surfw.errors import ConfigurationError, RefusedError
from surfw.wire import PROTOCOL
from tests.certificates import for_client, for_server, make_certificate
from tests.peers import serving, whole
from tests.stores import make_store, payload

TOKEN = "s3cret-of-the-house"

GIVE = "give the one it was started with (token_file, --token-file, SURFW_TOKEN)"


def test_the_right_token_is_admitted(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[1000])
    read, memory = whole(manifest.chunks[0])

    async def main() -> None:
        async with serving(tmp_path, token=TOKEN) as server:
            async with await open_wire_source(server.url, token=TOKEN) as source:
                await source.fetch(manifest, [read])
            assert await probe(server.url, 5, token=TOKEN)
            stats = await asyncio.to_thread(read_stats, server.url, token=TOKEN)
            assert stats["bytes_sent"] == 1000

    asyncio.run(main())
    assert bytes(memory) == payload(tmp_path, manifest.chunks[0])


def test_without_it_there_is_no_websocket(tmp_path: Path) -> None:
    make_store(tmp_path)

    async def main() -> None:
        async with serving(tmp_path, token=TOKEN) as server:
            with pytest.raises(RefusedError) as none:
                await open_wire_source(server.url)
            assert str(none.value) == f"the server at {server.url} wants a token; {GIVE}"
            assert none.value.code == "no-token"
            with pytest.raises(RefusedError) as other:
                await open_wire_source(server.url, token=TOKEN + "x")
            assert str(other.value) == f"the server at {server.url} refuses the token; {GIVE}"
            assert other.value.code == "another-token"
            with pytest.raises(RefusedError, match="wants a token"):
                await probe(server.url, 5)
            with pytest.raises(RefusedError, match="refuses the token"):
                await probe(server.url, 5, token="x")
            with pytest.raises(RefusedError, match="wants a token"):
                await asyncio.to_thread(read_stats, server.url)
            with pytest.raises(RefusedError, match="refuses the token"):
                await asyncio.to_thread(read_stats, server.url, token="x")
            assert server.stats()["requests"]["total"] == 0
            ready = await asyncio.to_thread(urlopen, server.url.replace("ws", "http", 1) + "/readyz", timeout=10)
            with ready:
                assert ready.status == 200  # readiness needs no token

    asyncio.run(main())


@pytest.mark.parametrize(
    "shown",
    [
        [], [TOKEN], [f"Basic {TOKEN}"], [f"Bearer {TOKEN[:-1]}"], [f"Bearer {TOKEN} {TOKEN}"], ["Bearer"], ["Bearer "],
        [f"Bearer {TOKEN}", f"Bearer {TOKEN}"], ["Bearer nönsense"],
    ],
)  # fmt: skip
def test_a_header_that_does_not_show_the_token(tmp_path: Path, shown: list[str]) -> None:
    make_store(tmp_path)

    async def main() -> None:
        async with serving(tmp_path, token=TOKEN) as server:
            headers = [("Authorization", value) for value in shown]
            with pytest.raises(InvalidStatus) as refused:
                await connect(server.url, subprotocols=[Subprotocol(PROTOCOL)], additional_headers=headers)
            response = refused.value.response
            assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert server.stats()["clients"] == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    "url", ["ws://192.0.2.1:8765", "ws://example.org", "ws://127.0.0.1.example.org", "ws://[2001:db8::1]:1"]
)
def test_a_token_is_not_sent_in_clear_text_beyond_this_machine(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"a token is not sent to .* in clear text") as caught:
        asyncio.run(open_wire_source(url, token=TOKEN))
    assert TOKEN not in str(caught.value)
    with pytest.raises(ConfigurationError, match="in clear text"):
        read_stats(url.replace("ws:", "http:"), token=TOKEN)


@pytest.mark.parametrize("token", ["", " ", "two words", "tab\t", "line\r\nX-Evil: 1", "ünïcode", "x" * 1025])
def test_invalid_tokens(tmp_path: Path, token: str) -> None:
    make_store(tmp_path)

    async def main() -> None:
        with pytest.raises(ConfigurationError, match=f"the token, of {len(token)} characters, cannot be used"):
            async with serving(tmp_path, token=token):
                raise AssertionError("it started")
        async with serving(tmp_path) as server:
            with pytest.raises(ConfigurationError, match="cannot be used") as caught:
                await open_wire_source(server.url, token=token)
            assert not token.strip() or token not in str(caught.value)

    asyncio.run(main())


def test_a_user_in_the_address_and_a_token_do_not_go_together() -> None:
    with pytest.raises(ConfigurationError, match=r"^ws://\*\*\*@127\.0\.0\.1:1 has a user and a token was given too"):
        asyncio.run(open_wire_source("ws://me:word@127.0.0.1:1", token=TOKEN))


def test_nothing_shows_the_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = make_store(tmp_path / "store", sizes=[1000])
    certificate = make_certificate(tmp_path)
    shown: list[Any] = []

    async def main() -> None:
        async with serving(tmp_path / "store", token=TOKEN, ssl=for_server(certificate)) as server:
            tls = for_client(certificate)
            async with await open_wire_source(server.url, token=TOKEN, ssl=tls) as source:
                await source.fetch(manifest, [whole(manifest.chunks[0])[0]])
                shown.extend([repr(source), repr(source._link)])
            with pytest.raises(RefusedError) as caught:
                await open_wire_source(server.url, token=f"{TOKEN}-wrong", ssl=tls)
            shown.extend([str(caught.value), repr(server), repr(server._listening), server.stats()])
            shown.append(await server.health())
            shown.append(await asyncio.to_thread(read_stats, server.url, token=TOKEN, ssl=tls))

    with caplog.at_level(logging.DEBUG):
        asyncio.run(main())
    assert len(shown) == 8
    assert TOKEN not in str(shown)
    assert "is refused: another token" in caplog.text
    assert TOKEN not in caplog.text
