"""Certificates from files: clients with no or a bad one get the reason; new ones are loaded while the server runs."""

import asyncio
import logging
import shutil
import socket
import ssl
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from surfw.client import open_wire_source, probe, read_stats
from surfw.config import TlsFiles
from surfw.errors import ConfigurationError, ConnectionFailedError
from surfw.retry import RetryPolicy
from surfw.server import reloading
from tests.certificates import Authority
from tests.peers import serving, until
from tests.stores import make_store


class World:
    """A store, and certificates by two authorities."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "store"
        make_store(self.store, sizes=[1000])
        self.ours, self.theirs = Authority(folder, "ours"), Authority(folder, "theirs")
        self.server, self.client = self.ours.issue("server"), self.ours.issue("client")
        self.expired = self.ours.issue("expired", days=0)
        self.stranger = replace(self.theirs.issue("stranger"), ca_certs=self.ours.pem)
        self.nobody = TlsFiles(ca_certs=self.ours.pem)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def files(world: World, tmp_path: Path) -> TlsFiles:
    """Copies of the server's files, to be replaced."""
    copies = {name: shutil.copy(getattr(world.server, name), tmp_path) for name in ("certfile", "keyfile", "ca_certs")}
    return TlsFiles(**copies)


REFUSALS = {
    "nobody": "wants a certificate of its clients; show one with --ssl-certfile (ssl=)",
    "stranger": "refuses the certificate of this client: unknown ca; show another with --ssl-certfile (ssl=)",
    "expired": "refuses the certificate of this client: certificate expired; show another with --ssl-certfile (ssl=)",
}


def test_clients_without_a_good_certificate_are_told_so(world: World) -> None:
    async def main() -> None:
        async with serving(world.store, ssl=world.server) as server:
            for name, said in REFUSALS.items():
                tls = getattr(world, name)
                for attempt in (open_wire_source(server.url, ssl=tls), probe(server.url, 5, ssl=tls),
                                asyncio.to_thread(read_stats, server.url, ssl=tls)):  # fmt: skip
                    with pytest.raises(ConnectionFailedError) as caught:
                        await attempt
                    assert str(caught.value) == f"{server.url} {said}"
                    assert not caught.value.transient
            async with await open_wire_source(server.url, ssl=world.client) as source:
                assert await source.models() == ["toy/model"]
            assert (await asyncio.to_thread(read_stats, server.url, ssl=world.client))["models"] == ["toy/model"]
            with pytest.raises(ConnectionFailedError, match=r"hung up before it said hello \(does it want wss://\?\)"):
                await probe(server.url.replace("wss", "ws"), 5)
            await until(lambda: len(server._newcomers) == 0)
            server._client_log.flush()
            told = [one["text"] for one in server.stats()["events"] if one["kind"] == "refused"]
            assert any("its certificate is not trusted" in text for text in told)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_whoever_talks_on_after_a_refusal_hears_why(world: World) -> None:
    def talk(port: int) -> str:
        context = ssl.create_default_context(cafile=str(world.ours.pem))
        with (
            socket.create_connection(("127.0.0.1", port), 10) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
        ):
            for _ in range(100):
                tls.sendall(bytes(10_000))
            with pytest.raises(ssl.SSLError) as caught:
                tls.recv(1)
            return str(caught.value.reason)

    async def main() -> None:
        async with serving(world.store, ssl=world.server) as server:
            assert "CERTIFICATE_REQUIRED" in await asyncio.to_thread(talk, server.port)
            await until(lambda: len(server._newcomers) == 0)
            assert await probe(server.url, 5, ssl=world.client)

    asyncio.run(main())


def test_a_client_with_tls_of_a_server_without(world: World) -> None:
    async def main() -> None:
        async with serving(world.store) as server:
            url = server.url.replace("ws", "wss", 1)
            for attempt in (
                open_wire_source(url, ssl=world.client, retry=RetryPolicy(attempts=1)),
                asyncio.to_thread(read_stats, url, ssl=world.client),
            ):
                with pytest.raises(ConnectionFailedError, match=r"does it want ws://\?"):
                    await attempt
            with pytest.raises(ConfigurationError, match=r"but certificates were given \(ssl=\); expected wss://"):
                await open_wire_source(server.url, ssl=world.client)

    asyncio.run(main())


def test_a_server_of_another_authority_is_not_trusted(world: World) -> None:
    async def main() -> None:
        async with serving(world.store, ssl=replace(world.server, ca_certs=None)) as server:
            for tls in (
                TlsFiles(ca_certs=world.theirs.pem),
                TlsFiles(certfile=world.client.certfile, keyfile=world.client.keyfile),
            ):
                with pytest.raises(ConnectionFailedError, match=r"is not trusted: .*with --ssl-ca-certs \(ssl=\) or"):
                    await open_wire_source(server.url, ssl=tls)
            async with await open_wire_source(server.url, ssl=world.nobody) as source:
                assert await source.models() == ["toy/model"], "such a server wants no certificate"
        async with serving(world.store, ssl=replace(world.expired, ca_certs=None)) as server:
            with pytest.raises(ConnectionFailedError, match="is not trusted: certificate has expired"):
                await open_wire_source(server.url, ssl=world.nobody)

    asyncio.run(main())


def test_new_files_are_taken_for_new_connections(
    world: World, files: TlsFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reloading, "POLL_SECONDS", 0.01)
    theirs = replace(world.stranger, ca_certs=world.theirs.pem)

    async def main() -> None:
        async with (
            serving(world.store, ssl=files) as server,
            await open_wire_source(server.url, ssl=world.client) as before,
        ):
            shutil.copy(str(world.stranger.certfile), str(files.certfile))
            await until(lambda: "is not that of the certificate" in caplog.text)
            assert await probe(server.url, 5, ssl=world.client), "half of a change changes nothing"
            shutil.copy(str(world.stranger.keyfile), str(files.keyfile))
            await until(lambda: "the certificate was read again: new connections see it" in caplog.text)
            shutil.copy(world.theirs.pem, str(files.ca_certs))
            assert await server.reload()
            assert await probe(server.url, 5, ssl=theirs)
            with pytest.raises(ConnectionFailedError, match="is not trusted"):
                await probe(server.url, 5, ssl=world.client)
            with pytest.raises(ConnectionFailedError, match="refuses the certificate of this client: unknown ca"):
                await probe(server.url, 5, ssl=replace(world.client, ca_certs=world.theirs.pem))
            assert await before.models() == ["toy/model"], "an open connection goes on"

    with caplog.at_level(logging.INFO, "surfw.server"):
        asyncio.run(main())


def encrypted(world: World) -> TlsFiles:
    key = world.folder / "locked.key"
    subprocess.run(
        ["openssl", "pkey", "-in", str(world.server.keyfile), "-aes256", "-passout", "pass:s3cret", "-out", str(key)],
        check=True,
    )
    return TlsFiles(certfile=world.server.certfile, keyfile=key)


def test_files_that_cannot_be_used(world: World, tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_text("-----BEGIN CERTIFICATE-----\njunk\n-----END CERTIFICATE-----\n-----BEGIN PRIVATE KEY-----\n")
    empty = tmp_path / "empty"
    empty.touch()
    certfile, keyfile = world.server.certfile, world.server.keyfile
    cases = {
        "the certificate .*absent cannot be read: No such file": TlsFiles(certfile=tmp_path / "absent"),
        "the certificate /dev/zero cannot be read: it is no regular file": TlsFiles(certfile="/dev/zero"),
        "server.key holds no certificate in PEM; name one that does with --ssl-certfile": TlsFiles(certfile=keyfile),
        "server.pem holds no private key in PEM; name the certificate's with --ssl-keyfile": TlsFiles(
            certfile=certfile
        ),
        "the private key .*client.key is not that of the certificate .*server.pem": TlsFiles(
            certfile=certfile, keyfile=world.client.keyfile
        ),
        "the private key .* cannot be used with the certificate": TlsFiles(certfile=junk),
        "locked.key has a passphrase, expected one without": encrypted(world),
        "server.key holds no certificates to trust in PEM": replace(world.server, ca_certs=keyfile),
        r"empty holds no certificates to trust in PEM \(it is empty\)": replace(world.server, ca_certs=empty),
    }

    async def main(tls: TlsFiles) -> None:
        async with serving(world.store, ssl=tls):
            raise AssertionError("it started")

    for said, tls in cases.items():
        with pytest.raises(ConfigurationError, match=said):
            asyncio.run(main(tls))
        with pytest.raises(ConfigurationError, match=said):
            asyncio.run(open_wire_source("wss://127.0.0.1:1", ssl=tls))
    with pytest.raises(ConfigurationError, match="a server with TLS has no certificate; name it with --ssl-certfile"):
        asyncio.run(main(world.nobody))
    with pytest.raises(ConfigurationError, match="has no certificate; name it with --ssl-certfile"):
        TlsFiles(keyfile=keyfile)
    with pytest.raises(ConfigurationError, match="ca_certs is 7, expected the path of a file, or None"):
        TlsFiles(ca_certs=7)  # type: ignore[arg-type]


def test_client_certificates_protect_a_server_as_a_token_does(world: World) -> None:
    async def main() -> None:
        async with serving(world.store, ssl=world.server, host="0.0.0.0") as server:
            url = f"wss://127.0.0.1:{server.port}"
            assert await probe(url, 5, ssl=world.client)
            with pytest.raises(ConnectionFailedError, match="wants a certificate"):
                await probe(url, 5, ssl=world.nobody)

    asyncio.run(main())
