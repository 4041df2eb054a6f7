"""`wss://` works: bytes are received in place over TLS, as over plain TCP."""

import asyncio
from functools import partial
from pathlib import Path

import pytest

from surfw.client import open_wire_source, probe
from surfw.errors import ConfigurationError, ConnectionFailedError
from tests.certificates import for_client, for_server, make_certificate
from tests.peers import pass_on, serving, tcp_server, whole
from tests.stores import make_store, payload


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return make_certificate(tmp_path)


def test_a_chunk_arrives_through_tls(tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_store(tmp_path / "store", sizes=[9_000_001])
    read, memory = whole(manifest.chunks[0])
    tls = for_server(certificate)

    async def main() -> None:
        async with serving(tmp_path / "store") as server, tcp_server(partial(pass_on, server.port), tls) as url:
            with pytest.raises(ConnectionFailedError, match="is not trusted: self-signed certificate; trust"):
                await open_wire_source(url)
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            async with await open_wire_source(url) as source:
                await source.fetch(manifest, [read])

    asyncio.run(main())
    assert bytes(memory) == payload(tmp_path / "store", manifest.chunks[0])


def test_a_chunk_arrives_from_a_server_with_tls_of_its_own(tmp_path: Path, certificate: Path) -> None:
    manifest = make_store(tmp_path / "store", sizes=[20_000_001])
    read, memory = whole(manifest.chunks[0])

    async def main() -> None:
        async with serving(tmp_path / "store", ssl=for_server(certificate)) as server:
            assert server.url == f"wss://127.0.0.1:{server.port}"
            with pytest.raises(ConnectionFailedError, match="is not trusted: self-signed certificate; trust"):
                await open_wire_source(server.url)
            with pytest.raises(ConnectionFailedError, match=r"hung up before it said hello \(does it want wss://\?\)"):
                await open_wire_source(server.url.replace("wss", "ws"), connect_timeout=5)
            async with await open_wire_source(server.url, ssl=for_client(certificate)) as source:
                await source.fetch(manifest, [read])
            assert await probe(server.url, 5, ssl=for_client(certificate))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert bytes(memory) == payload(tmp_path / "store", manifest.chunks[0])


def test_an_ssl_context_is_not_for_an_address_without_tls(certificate: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"ws://127\.0\.0\.1:1 is an address without TLS.*expected wss://"):
        asyncio.run(open_wire_source("ws://127.0.0.1:1", ssl=for_client(certificate)))
