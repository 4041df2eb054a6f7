"""Clients without access are refused in one line with the reason, while other clients continue undisturbed."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from surfw.client import open_wire_source
from surfw.config import TlsFiles
from surfw.manifest import payload_digest
from tests.certificates import Authority
from tests.cli.run import complaint, surfw
from tests.peers import whole
from tests.servers import serve
from tests.stores import make_store

TOKENS = """
[good]
token = "good-s3cret"

[ci]
token = "ci-s3cret"
models = ["org/*"]

[late]
token = "late-s3cret"
expires = 2020-01-31
"""


@dataclass
class World:
    """A store, files of tokens, and certificates."""

    home: Path

    def __post_init__(self) -> None:
        self.store = self.home / "store"
        make_store(self.store, "org/open", [300_000])
        make_store(self.store, "closed", [300_000])
        self.tokens = self.write("tokens.toml", TOKENS)
        ours, theirs = Authority(self.home, "ours"), Authority(self.home, "theirs")
        self.server, self.client = ours.issue("server"), ours.issue("client")
        self.expired, self.stranger = ours.issue("expired", days=0), theirs.issue("stranger")

    def write(self, name: str, text: str) -> Path:
        file = self.home / name
        file.write_text(text)
        file.chmod(0o600)
        return file

    def options(self, token: str = "good", tls: TlsFiles | None = None, *, ca: str = "ours.pem") -> list[str]:
        """The options of a client, with one mistake."""
        tls = tls or self.client
        shown = ["--token-file", str(self.write("token", f"{token}-s3cret"))] if token else []
        if tls.certfile is not None:
            shown += ["--ssl-certfile", str(tls.certfile), "--ssl-keyfile", str(tls.keyfile)]
        return [*shown, "--ssl-ca-certs", str(self.home / ca)]


class GoodClients:
    """Eight clients in a thread that fetch a chunk again and again."""

    def __init__(self, world: World, url: str) -> None:
        self._world, self._url = world, url
        self._rounds, self._stop = [0] * 8, threading.Event()
        self._executor = ThreadPoolExecutor(1)
        self._running = self._executor.submit(lambda: asyncio.run(self._fetch_all()))

    async def _fetch_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(len(self._rounds)):
                group.create_task(self._fetch(number))

    async def _fetch(self, number: int) -> None:
        async with await open_wire_source(self._url, token="good-s3cret", ssl=self._world.client) as source:
            manifest = await source.manifest("closed")
            while not self._stop.is_set():
                read, memory = whole(manifest.chunks[0])
                await source.fetch(manifest, [read])
                assert payload_digest(bytes(memory)) == manifest.chunks[0].id
                self._rounds[number] += 1
                await asyncio.sleep(0.1)

    def go_on(self) -> None:
        """Wait until each has fetched another chunk."""
        before = list(self._rounds)
        while not all(now > then for now, then in zip(self._rounds, before, strict=True)):
            assert not self._running.done(), self._running.result()
            time.sleep(0.01)

    def __enter__(self) -> Self:
        self.go_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._executor.shutdown()
        self._running.result()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("access"))


def test_strangers_are_refused_while_good_clients_go_on(world: World) -> None:
    tls = world.server
    options = ["--token-file", world.tokens, "--ssl-certfile", tls.certfile, "--ssl-keyfile", tls.keyfile,
               "--ssl-ca-certs", tls.ca_certs]  # fmt: skip
    with serve(world.store, *map(str, options)) as server, GoodClients(world, server.url) as good:
        url = server.url
        assert url.startswith("wss://")

        def refused(*arguments: str) -> str:
            said = complaint(surfw(world.home, *arguments))
            assert "s3cret" not in said
            good.go_on()
            return said

        at = f"the server at {url}"
        wants = f"{at} wants a token; give the one it was started with (token_file, --token-file, SURFW_TOKEN)"
        assert refused("stats", url, *world.options("")) == wants
        assert refused("stats", url, *world.options("bad")).startswith(f"{at} refuses the token; give")
        assert refused("stats", url, *world.options("late")).startswith(f"{at} refuses the token, which has expired")
        infer = ("infer", "--source", url, "--model", "closed", "--prompt-ids", "1", *world.options("ci"))
        assert refused(*infer) == f"{url}: token 'ci' may not read model 'closed'; it may read org/open"
        assert refused("stats", url, *world.options(tls=TlsFiles())) == (
            f"{url} wants a certificate of its clients; show one with --ssl-certfile"
        )
        for stranger, why in ((world.stranger, "unknown ca"), (world.expired, "certificate expired")):
            assert refused("stats", url, *world.options(tls=stranger)) == (
                f"{url} refuses the certificate of this client: {why}; show another with --ssl-certfile"
            )
        assert "is not trusted" in refused("stats", url, *world.options(ca="theirs.pem"))
        plain = url.replace("wss", "ws")
        assert "does it want wss://?" in refused("stats", plain)
        wrong = surfw(world.home, "stats", plain, "--ssl-ca-certs", str(world.home / "ours.pem"))
        assert f"--ssl-ca-certs is for a server with TLS, and {plain} is none; expected wss://" in wrong.stderr
        assert wrong.returncode == 2

        world.write("new.toml", TOKENS.replace("ci-s3cret", "other-s3cret")).replace(world.tokens)
        while surfw(world.home, "stats", url, *world.options("other")).returncode:
            pass
        assert refused("stats", url, *world.options("ci")).startswith(f"{at} refuses the token; give")
        assert '"models": ["org/open"]' in surfw(world.home, "stats", url, "--json", *world.options("other")).stdout


def test_a_client_with_tls_of_a_plain_server(world: World) -> None:
    with serve(world.store) as server:
        url = server.url.replace("ws", "wss")
        said = complaint(surfw(world.home, "stats", url, *world.options()))
        assert "does it want ws://?" in said


def test_certificates_and_tokens_by_variables_and_a_file(world: World) -> None:
    file = world.home / "surfw.toml"
    tls = world.server
    file.write_text(
        f"[tool.surfw]\nssl_certfile = '{tls.certfile}'\nssl_keyfile = '{tls.keyfile}'\n"
        f"ssl_ca_certs = '{tls.ca_certs}'\ntoken_file = '{world.write('tokens.toml', TOKENS)}'"
    )
    shown = json.loads(surfw(world.home, "config", "--config", str(file), "--json").stdout)
    assert shown["token"] == {"value": "set", "from": "token_file"}
    with serve(world.store, "--config", str(file)) as server:
        done = surfw(
            world.home, "stats", server.url, "--json", SURFW_SSL_CA_CERTS=str(tls.ca_certs),
            SURFW_SSL_CERTFILE=str(world.client.certfile), SURFW_SSL_KEYFILE=str(world.client.keyfile),
            SURFW_TOKEN="good-s3cret",
        )  # fmt: skip
        assert '"org/open"' in done.stdout, done.stderr
        said = complaint(surfw(world.home, "stats", server.url, "--config", str(file)))
        assert said.endswith("holds a server's tokens, expected one; put the one to show in a file alone")
