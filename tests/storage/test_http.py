"""A store on a web server: read-only, in ranges, from a real server."""

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
import pytest

from surfw.config import BLOCK_BYTES, MIB
from surfw.errors import NotFoundError, StorageError
from surfw.models import StreamingModel
from surfw.retry import RetryPolicy
from surfw.storage import FsspecBackend, StorageBackend, fsspec_backend, open_backend
from surfw.storage.ranges import ObjectRange
from surfw.testing import OBJECTS, ReadOnlyStorageBackendSuite
from tests.certificates import for_client, for_server, make_certificate
from tests.services.http import http_server
from tests.services.processes import free_port
from tests.services.proxy import PASS, proxy_to
from tests.storage.dict_backend import DictBackend
from tests.storage.own_suite import check_pieces


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the server offers."""
    return tmp_path_factory.mktemp("offered")


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with http_server(folder, tmp_path_factory.mktemp("log") / "http.log") as running:
        yield running


class TestHttp(ReadOnlyStorageBackendSuite):
    @pytest.fixture
    def backend(self, folder: Path, url: str) -> StorageBackend:
        for key, data in OBJECTS.items():
            file = folder / "objects" / key
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        return FsspecBackend(f"{url}/objects")


class TestDict(ReadOnlyStorageBackendSuite):
    """The suite for read-only backends, with a backend that has the four methods, one of which refuses."""

    @pytest.fixture
    def backend(self) -> StorageBackend:
        class Frozen(DictBackend):
            async def save(self, key: str, data: object) -> None:
                raise StorageError("this dictionary is frozen")

        return Frozen(dict(OBJECTS))


def test_a_changed_file_is_an_error(folder: Path, url: str) -> None:
    (folder / "x").write_bytes(b"first")
    backend = FsspecBackend(url)
    pinned = asyncio.run(backend.revision("x"))
    (folder / "x").write_bytes(b"seconds")
    with pytest.raises(StorageError, match=rf"^x in {url} was changed: its revision is .* now, expected "):
        asyncio.run(backend.read_into("x", 0, memoryview(bytearray(3)), revision=pinned))


def test_writing_says_that_it_can_only_be_read(url: str, tmp_path: Path) -> None:
    backend = open_backend(f"{url}/objects")
    (tmp_path / "file").write_bytes(b"1")
    for work in (backend.save("new", b"1"), backend.adopt("new", tmp_path / "file")):
        with pytest.raises(StorageError, match=rf"^new cannot be written to {url}/objects: it can only be read; write"):
            asyncio.run(work)
    assert (tmp_path / "file").exists()


def test_removing_says_that_it_can_only_be_read(folder: Path, url: str) -> None:
    (folder / "kept").write_bytes(b"1")
    with pytest.raises(StorageError, match=rf"^{url} can only be read, and nothing be removed there; do that in the f"):
        asyncio.run(FsspecBackend(url).remove("kept"))
    assert (folder / "kept").exists()


class Ignoring(SimpleHTTPRequestHandler):
    """Python's own server, which ignores ranges."""

    def log_message(self, *args: object) -> None:
        """Log nothing."""


class TaggingRanges(Ignoring):
    """Answers ranges, and sends an ETag only with them, optionally without the total length."""

    protocol_version = "HTTP/1.1"
    size = "*"

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        start, dash, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if dash and not data:
            self.send_response(416)
        elif dash:
            self.send_response(206)
            data = data[int(start) : int(last) + 1]
            self.send_header("ETag", '"of a range"')
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(data) - 1}/{self.size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class TaggingRangesOfAll(TaggingRanges):
    size = "9"


@contextlib.contextmanager
def offered_by(kind: type[Ignoring], folder: Path, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The URL of a server of this kind."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(kind, directory=str(folder))) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        try:
            yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            serving.join()


def test_a_server_without_ranges_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(256)) * 20)
    with offered_by(Ignoring, tmp_path) as url:
        backend = FsspecBackend(url)
        assert asyncio.run(backend.load("x")) == bytes(range(256)) * 20
        assert asyncio.run(backend.size("x")) == 5120
        for start in (0, 4096):
            said = (
                rf"^x in {url}: the server does not answer ranges as it should: asked for 8 bytes from byte {start} on"
            )
            with pytest.raises(StorageError, match=f"{said}, it sends 5120 from byte 0 on; use one that does, such"):
                asyncio.run(backend.load_range("x", start, start + 8))


@pytest.mark.parametrize("kind", [TaggingRanges, TaggingRangesOfAll])
def test_a_revision_is_compared_with_one_of_the_same_kind(kind: type[Ignoring], tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"some text")
    (tmp_path / "empty").touch()
    with offered_by(kind, tmp_path) as url:
        backend = FsspecBackend(url)
        assert (asyncio.run(backend.size("x")), asyncio.run(backend.size("empty"))) == (9, 0)
        pinned = asyncio.run(backend.revision("x"))
        assert pinned == '"of a range"'
        memory = bytearray(4)
        asyncio.run(backend.read_into("x", 5, memoryview(memory), revision=pinned))
        assert memory == b"text"


def test_pieces_of_memory_are_filled_in_order(tmp_path: Path) -> None:
    data = bytes(range(251)) * (2 * BLOCK_BYTES // 251)
    (tmp_path / "x").write_bytes(data)
    with offered_by(TaggingRanges, tmp_path) as url:
        backend = FsspecBackend(url)
        assert backend.run_bytes("x") == backend.range_bytes
        check_pieces(backend, "x", data)


def test_a_server_that_cannot_be_reached_is_no_missing_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec_backend, "RANGE_RETRIES", RetryPolicy(attempts=2, first_delay_seconds=0.01))
    backend = FsspecBackend(f"http://127.0.0.1:{free_port()}")
    for work in (backend.load("x"), backend.exists("x"), backend.size("x"), backend.revision("x")):
        with pytest.raises(
            StorageError, match=r"^x in http.*: the server cannot be reached .*; check the address"
        ) as got:
            asyncio.run(work)
        assert not isinstance(got.value, NotFoundError)


def test_an_answer_that_is_cut_off_is_asked_for_again(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec_backend, "RANGE_RETRIES", RetryPolicy(attempts=3, first_delay_seconds=0.01))
    (folder / "y").write_bytes(bytes(range(256)) * 4096)
    with proxy_to(url) as proxy:
        cut = iter([0, 99_999])
        proxy.judge = lambda head: next(cut, PASS)
        assert asyncio.run(FsspecBackend(proxy.endpoint).load("y")) == bytes(range(256)) * 4096
        assert len(proxy.heads) == 3


def test_what_was_verified_before_a_cut_is_not_asked_for_again(
    folder: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsspec_backend, "RANGE_RETRIES", RetryPolicy(attempts=3, first_delay_seconds=0.01))
    data, memory, seen = bytes(range(256)) * (5 << 12), bytearray(5 * MIB), list[int]()
    (folder / "z").write_bytes(data)
    with proxy_to(url) as proxy:
        cut = iter([PASS, MIB - 1, 3 * MIB + 5])
        proxy.judge = lambda head: next(cut, PASS)
        backend = FsspecBackend(proxy.endpoint, max_concurrency="2")
        assert asyncio.run(backend.load_range("z", 0, 1)) == b"\0"
        part = ObjectRange("z", 0, 5 * MIB)
        asyncio.run(backend.read_range(part, memoryview(memory), lambda at, piece: seen.append(at)))
        asked = [line.partition("=")[2] for head in proxy.heads for line in head.split("\r\n") if "bytes=" in line]
    assert memory == data
    assert asked == ["0-0", "0-5242879", "0-5242879", "3145728-5242879"]
    assert sorted(seen) == [0, 3 * MIB]


def test_a_model_is_run_from_a_web_server(folder: Path, url: str) -> None:
    import torch

    from surfw.chunking import prepare_model, write_model
    from tests.checkpoints import save_llama

    save_llama(folder / "llama")
    with prepare_model(str(folder / "llama")) as prepared:
        asyncio.run(write_model(prepared, open_backend(folder / "store")))
    ids = torch.tensor([[5, 9, 77, 3, 120]])
    answers = []
    for place in (str(folder / "store"), f"{url}/store"):
        with StreamingModel.open(place, "llama", cache_size=1) as model:
            answers.append(model(input_ids=ids).logits)
    assert torch.equal(*answers)


def sending_to(target: str, *headers: str) -> type[Ignoring]:
    """A server that redirects all requests, with these headers."""

    class Sending(Ignoring):
        def do_GET(self) -> None:
            self.send_response(302)
            for name in headers or ("Location",):
                self.send_header(name, f"{target}{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Sending


def test_what_has_moved_is_followed_but_not_with_headers_to_another_server(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"text")
    with offered_by(Ignoring, tmp_path) as there, offered_by(sending_to(there), tmp_path) as here:
        assert asyncio.run(FsspecBackend(here).load("x")) == b"text"
        telling = FsspecBackend(here, headers={"X-Api-Key": "secret"})
        for question in (telling.load("x"), telling.list("x")):
            with pytest.raises(StorageError, match=r"^127\.0\.0\.1 sends to http://127.*, which must not see"):
                asyncio.run(question)


def test_what_moves_without_end_is_an_error(tmp_path: Path) -> None:
    with (
        offered_by(sending_to(""), tmp_path) as url,
        pytest.raises(StorageError, match="sends elsewhere more than 5 time"),
    ):
        asyncio.run(FsspecBackend(url).load("x"))


@pytest.mark.parametrize("headers", [("URI",), ("Location", "Location"), ("Location", "URI")])
def test_whatever_names_the_other_server_it_does_not_see_headers(headers: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"text")
    asked: list[str | None] = []

    class Listening(Ignoring):
        def do_GET(self) -> None:
            asked.append(self.headers.get("X-Api-Key"))
            super().do_GET()

    async def main(url: str) -> None:
        own = {"trace_configs": [aiohttp.TraceConfig()]}
        telling = FsspecBackend(url, headers={"X-Api-Key": "secret"}, client_kwargs=own)
        for question in (telling.load("x"), telling.size("x"), telling.list("x")):
            with pytest.raises(StorageError, match=r"127\.0\.0\.1 sends "):
                await question
        plain = FsspecBackend(url)
        if headers == ("Location", "URI"):
            assert await plain.load("x") == b"text"
        else:
            with pytest.raises(
                StorageError, match=r"^127\.0\.0\.1 sends elsewhere with [02] headers Location, expected"
            ):
                await plain.load("x")

    with offered_by(Listening, tmp_path) as there, offered_by(sending_to(there, *headers), tmp_path) as here:
        asyncio.run(main(here))
    assert asked == [None] * (headers == ("Location", "URI"))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("http://127.0.0.1:1", r"127\.0\.0\.1 sends to http://127\.0\.0\.1:1, which is not encrypted; name an addr"),
        ("//[", r"127\.0\.0\.1 sends to '//\[/x?', which is no URL"),
    ],
)
def test_nobody_is_sent_to_where_others_can_listen(target: str, said: str, tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    with offered_by(sending_to(target), tmp_path, for_server(certificate)) as url:
        backend = FsspecBackend(url, ssl=for_client(certificate))
        for question in (backend.load("x"), backend.list("x")):
            with pytest.raises(StorageError, match=said):
                asyncio.run(question)
