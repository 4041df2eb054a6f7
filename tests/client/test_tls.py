"""`wss://` works: what is placed directly on plain TCP is placed just as well behind TLS."""

import asyncio
import contextlib
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from surfw.client import open_wire_source
from surfw.errors import ConnectionFailedError
from tests.peers import serving, whole
from tests.stores import make_store, payload

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A key and a self-signed certificate for 127.0.0.1, in one file."""
    key, found, both = tmp_path / "key.pem", tmp_path / "cert.pem", tmp_path / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(found)],
        check=True, capture_output=True,
    )  # fmt: skip
    both.write_bytes(key.read_bytes() + found.read_bytes())
    return both


@contextlib.asynccontextmanager
async def terminating_tls(port: int, certificate: Path) -> AsyncIterator[str]:
    """A TLS server that passes everything on to a port, as a reverse proxy would; its address."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    tasks = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        tasks.update(asyncio.create_task(copy(*ends)) for ends in ((reader, inner_writer), (inner_reader, writer)))

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    try:
        yield f"wss://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await asyncio.gather(*tasks)


def test_a_chunk_arrives_through_tls(tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_store(tmp_path / "store", sizes=[9_000_001])
    read, memory = whole(manifest.chunks[0])

    async def main() -> None:
        async with serving(tmp_path / "store") as server, terminating_tls(server.port, certificate) as url:
            with pytest.raises(ConnectionFailedError, match="certificate verify failed"):
                await open_wire_source(url)
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            async with await open_wire_source(url) as source:
                await source.fetch(manifest, [read])

    asyncio.run(main())
    assert bytes(memory) == payload(tmp_path / "store", manifest.chunks[0])
