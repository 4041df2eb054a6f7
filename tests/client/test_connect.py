"""Connecting: transient failures are retried, and redirects are followed if that is safe."""

import asyncio
import json
import re
from http import HTTPStatus
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection

from surfw.client import open_wire_source, probe
from surfw.config import WireLimits
from surfw.errors import ConnectionFailedError, RefusedError
from surfw.retry import TRANSIENT_STATUSES, RetryPolicy
from surfw.wire import ServerSession
from tests.certificates import for_client, for_server, make_certificate
from tests.peers import Talk, pass_on, pretending, serving, tcp_server
from tests.stores import make_store

AT_ONCE = RetryPolicy(attempts=3, first_delay_seconds=0)
ONCE = RetryPolicy(attempts=1)


def answers(status: int, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", "Content-Length: 5", *headers]
    return "\r\n".join([*lines, "", "sorry"]).encode()


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        *((answers(status), f"answers with status {status}, as proxies do") for status in sorted(TRANSIENT_STATUSES)),
        (answers(503, "Server: nginx", "Server: cloud"), "answers with status 503, as proxies do"),
        (b"", "hung up before it said hello"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgr", "hung up before it said hello"),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 500\r\n\r\nso", "hung up before it said hello"),
    ],
)
def test_a_proxy_whose_server_is_away_is_tried_again(tmp_path: Path, said: bytes, complaint: str) -> None:
    make_store(tmp_path)
    asked = []
    ports: list[int] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(head)
        if len(asked) % 3:
            writer.write(said)
            writer.close()
        else:
            await pass_on(ports[0], reader, writer, head)

    async def main() -> None:
        async with serving(tmp_path) as server, tcp_server(talk) as url:
            ports.append(server.port)
            async with await open_wire_source(url, retry=AT_ONCE) as source:
                assert await source.models() == ["toy/model"]
            with pytest.raises(ConnectionFailedError, match=complaint) as caught:
                await open_wire_source(url, retry=ONCE)
            assert (caught.value.transient, caught.value.absent) == (True, False)

    asyncio.run(main())
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("said", "complaint", "absent"),
    [
        *((answers(status), "answers, but is not a surfw server", True) for status in (200, 301, 400, 404, 426)),
        *((answers(status), f"refuses the connection with status {status}", False) for status in (401, 403, 407)),
        (answers(400, "Server: nginx", "Server: cloud"), "answers, but is not a surfw server", True),
        (answers(418, "Server: nginx", "Server: surfw/9"), "the server at .* refuses the connection .* 418", False),
        (answers(101, "Server: surfw/9"), "the server at .* cannot be used: .*; run the same version", False),
    ],
)
def test_another_answer_is_not_tried_again(said: bytes, complaint: str, absent: bool) -> None:
    asked = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(said)

    async def main() -> None:
        async with tcp_server(talk) as url:
            with pytest.raises(ConnectionFailedError, match=complaint) as caught:
                await open_wire_source(url, retry=AT_ONCE)
            assert (caught.value.transient, caught.value.absent) == (False, absent)
            if absent:
                assert not await probe(url)
            else:
                with pytest.raises(ConnectionFailedError, match=complaint):
                    await probe(url)

    asyncio.run(main())
    assert len(asked) == 2


@pytest.mark.parametrize(("said", "absent"), [("surfw.v2", False), ("chat.v1", True)])
def test_a_server_that_speaks_another_protocol(said: str, absent: bool) -> None:
    hello = json.loads(ServerSession(WireLimits(), server="surfw/9").hello()) | {"protocol": said}

    async def answer(websocket: ServerConnection) -> None:
        await websocket.send(json.dumps(hello))
        await websocket.wait_closed()

    async def main() -> None:
        async with pretending(answer, greet=False) as url:
            with pytest.raises(ConnectionFailedError, match=rf"hello for {said}, expected surfw\.v1; ") as caught:
                await open_wire_source(url, retry=AT_ONCE)
            assert (caught.value.transient, caught.value.absent) == (False, absent)

    asyncio.run(main())


@pytest.mark.parametrize("code", [None, 1001, 1011, 1012, 1013])
def test_a_server_that_leaves_before_it_says_hello_is_tried_again(code: int | None) -> None:
    connections: list[ServerConnection] = []

    async def answer(websocket: ServerConnection) -> None:
        connections.append(websocket)
        if code is None:
            websocket.transport.abort()
        else:
            await websocket.close(code, "later")

    async def main() -> None:
        async with pretending(answer, greet=False) as url:
            with pytest.raises(ConnectionFailedError, match="before it said hello") as caught:
                await open_wire_source(url, retry=AT_ONCE)
            assert caught.value.transient

    asyncio.run(main())
    assert len(connections) == 3


def redirecting(*locations: str, heads: list[str] | None = None, status: int = HTTPStatus.FOUND) -> Talk:
    """A server that redirects its first client to the first place, the next one to the second, …"""
    left = list(locations)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if heads is not None:
            heads.append(head.decode())
        writer.write(answers(status, f"Location: {left.pop(0) if len(left) > 1 else left[0]}"))

    return talk


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("scheme", ["ws", "http"])
def test_a_redirect_is_followed(tmp_path: Path, status: int, scheme: str) -> None:
    make_store(tmp_path)

    async def main() -> None:
        async with serving(tmp_path) as server:
            to = f"{scheme}://127.0.0.1:{server.port}/"
            talk = redirecting("/one", "two#here", "/three", "/four", to, status=status)
            async with tcp_server(talk) as url, await open_wire_source(url, retry=ONCE) as source:
                assert await source.models() == ["toy/model"]
                assert source.url == f"{url} (redirected to ws://127.0.0.1:{server.port}/)"

    asyncio.run(main())


def test_a_redirect_to_another_host_or_port_takes_no_token_along(tmp_path: Path) -> None:
    make_store(tmp_path)
    heads: list[str] = []

    async def main() -> None:
        async with serving(tmp_path, token="secret") as server:
            async with tcp_server(redirecting("/here", server.url, heads=heads)) as url:
                with pytest.raises(RefusedError, match=re.escape(f"{url} (redirected to {server.url}) wants")) as no:
                    await open_wire_source(url, token="secret", retry=ONCE)
            assert no.value.code == "no-token"
            assert server.stats()["clients"] == 0

    asyncio.run(main())
    assert ["Bearer secret" in head for head in heads] == [True, True]


@pytest.mark.parametrize(
    ("location", "complaint"),
    [
        ("/again", "after 5 other redirects"),
        ("ftp://127.0.0.1/x", "which is not the address of a server"),
        ("file:///etc/passwd", "which is not the address of a server"),
        ("ws://me:secret@127.0.0.1:1/", "with a user and a password that are not ours"),
        ("ws://[::", "which is not the address of a server"),
        ("ws://host:99999", "which is not the address of a server"),
    ],
)
def test_where_a_redirect_does_not_lead(location: str, complaint: str) -> None:
    async def main() -> None:
        async with tcp_server(redirecting(location)) as url:
            with pytest.raises(ConnectionFailedError, match=rf"^{url}.* redirects to .*{complaint}") as caught:
                await open_wire_source(url, retry=ONCE)
            assert "secret" not in str(caught.value)
            assert str(caught.value).isprintable()

    asyncio.run(main())


@pytest.mark.parametrize("scheme", ["ws", "http"])
def test_a_redirect_does_not_lead_away_from_tls(tmp_path: Path, scheme: str) -> None:
    make_store(tmp_path / "store")
    certificate = make_certificate(tmp_path)

    async def main() -> None:
        async with serving(tmp_path / "store") as plain:
            to = plain.url.replace("ws", scheme, 1)
            async with tcp_server(redirecting(to), for_server(certificate)) as url:
                with pytest.raises(ConnectionFailedError, match=rf"{url} redirects to {to}, where there is no TLS"):
                    await open_wire_source(url, ssl=for_client(certificate), retry=ONCE)
            assert plain.stats()["clients"] == 0

    asyncio.run(main())
