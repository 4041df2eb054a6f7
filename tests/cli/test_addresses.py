"""How all commands interpret an address."""

import asyncio
import http.server
import socket
import threading
from pathlib import Path

import pytest

from surfw import WeightServer
from surfw.cli.addresses import Address, Mistake, is_on_this_machine, read_address, read_server, read_source
from tests.stores import make_store

HERE = {"store", "here/model", "photos:80"}


@pytest.mark.parametrize(
    ("text", "kind", "url"),
    [
        ("ws://127.0.0.1:8765", "server", "ws://127.0.0.1:8765"),
        ("WSS://host", "server", "wss://host"),
        ("127.0.0.1:8765", "server", "ws://127.0.0.1:8765"),
        ("localhost:8765/", "server", "ws://localhost:8765"),
        ("[::1]:9000", "server", "ws://[::1]:9000"),
        ("photos:80", "folder", "photos:80"),
        ("http://host:8765", "web", "http://host:8765"),
        ("https://host/", "web", "https://host/"),
        ("https://host/models", "storage", "https://host/models"),
        ("http://host?x=1", "storage", "http://host?x=1"),
        ("http://[broken", "storage", "http://[broken"),
        ("S3://bucket/prefix", "storage", "s3://bucket/prefix"),
        ("hf://org/name", "storage", "hf://org/name"),
        ("file:///store", "storage", "file:///store"),
        ("my.package.Backend://place", "storage", "my.package.Backend://place"),
        ("store", "folder", "store"),
        ("here/model", "folder", "here/model"),
        ("./org/name", "folder", "./org/name"),
        ("../name", "folder", "../name"),
        ("~/name", "folder", "~/name"),
        ("/org/name", "folder", "/org/name"),
        ("org/name/", "folder", "org/name/"),
        ("a/b/c", "folder", "a/b/c"),
        ("org/name", "hub", "hf://org/name"),
        ("gpt2", "folder", "gpt2"),
        (".", "folder", "."),
    ],
)
def test_an_address_is_read(text: str, kind: str, url: str) -> None:
    assert read_address(text, exists=HERE.__contains__) == Address(kind, url)  # type: ignore[arg-type]


def test_the_address_of_a_server_may_be_written_in_five_ways() -> None:
    for text in ("ws://host:80", "host:80", "http://host:80", "http://host:80/", "WS://host:80"):
        assert read_server(text) == "ws://host:80"
    assert read_server("https://host") == "wss://host"
    assert read_server("localhost") == "ws://localhost"
    for text in ("./store", "s3://bucket", "org/name", "https://host/models"):
        with pytest.raises(Mistake, match="is not the address of a server; expected HOST:PORT or ws://HOST:PORT"):
            read_server(text)


def test_a_web_server_is_asked_whether_it_is_a_surfw_server(tmp_path: Path) -> None:
    make_store(tmp_path, "toy", (5000,))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as other:
        answering = threading.Thread(target=other.serve_forever)
        answering.start()
        try:
            url = f"http://127.0.0.1:{other.server_port}"
            assert read_source(url, seconds=5) == url
        finally:
            other.shutdown()
            answering.join()

    async def ask(token: str | None) -> None:
        async with WeightServer(model_path=tmp_path, port=0, token=token) as server:
            web = server.url.replace("ws://", "http://")
            assert await asyncio.to_thread(read_source, web, seconds=5) == server.url

    for token in (None, "a-secret-of-some-length"):
        asyncio.run(ask(token))


def test_an_address_of_this_machine_is_known_without_asking_anybody() -> None:
    for here in (
        "ws://127.0.0.1:1",
        "ws://localhost:1",
        "wss://[::1]:1",
        "ws://0.0.0.0",
        f"ws://{socket.gethostname()}",
    ):
        assert is_on_this_machine(here), here
    for elsewhere in ("ws://203.0.113.7:1", "ws://h:1", "ws://", "ws://[1:1"):
        assert not is_on_this_machine(elsewhere), elsewhere
