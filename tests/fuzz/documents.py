"""Parsers of documents in memory: manifests, digests, headers, settings, tokens, statistics."""

import json
import re
import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from zlib import crc32

from surfw.errors import (
    CheckpointError,
    ConfigurationError,
    IntegrityError,
    ManifestError,
    RemoteProtocolError,
    UnsupportedModelError,
)
from tests.fuzz import samples
from tests.fuzz.parser import Parser


def manifest() -> Parser:
    """`parse_manifest`, and the functions that use an accepted manifest; in a store, the digest precedes it."""
    from surfw.manifest import encode_stored_manifest, parse_manifest, parse_stored_manifest

    def parse(data: bytes) -> None:
        if not data.startswith(b"{"):
            parse_stored_manifest(data, where="a store")
            return
        found = parse_manifest(data, where="a server")
        assert parse_stored_manifest(encode_stored_manifest(found), where="a store") == found
        public = found.public()
        assert parse_manifest(public.encode(), where="a server") == public
        assert found.digest == public.digest
        assert found.identity == public.identity
        assert found.weights_key
        assert len(found.by_name) == len(found.chunks)
        assert found.home.keys() == found.tensors.keys()

    seeds = [one.encode() for one in samples.manifests()]
    stored = encode_stored_manifest(next(samples.manifests()))
    return Parser(parse=parse, errors=(ManifestError,), seeds=[*seeds, stored])


def digests() -> Parser:
    """Digests of a chunk that a server sends, and lines of the logs of digests."""
    from surfw.manifest import Digester, decode_line, encode_line, parse_digests, read_digests

    digester = Digester()
    digester.update(bytes(1000))
    document = digester.result().document()

    def parse(data: bytes) -> None:
        known = {}
        for line in data.splitlines():
            try:
                entry = decode_line(line)
                known[entry["chunk"]] = read_digests(entry, 1000)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # as surfw.storage.digests does
        found = parse_digests(data, 1000, where="a server")
        assert parse_digests(json.dumps(found.document()).encode(), 1000, where="here") == found

    line = encode_line({"chunk": "0" * 64} | document)
    return Parser(parse=parse, errors=(ManifestError,), seeds=[json.dumps(document).encode(), line])


def safetensors() -> Parser:
    """The header of a safetensors file whose payload has the length in the header."""
    from surfw.checkpoint.shard import read_tensors
    from surfw.manifest import TensorInfo
    from surfw.safetensors_header import encode_header, is_header, parse_header

    def parse(data: bytes) -> None:
        file = len(data).to_bytes(8, "little") + data if data.startswith(b"{") else data
        ends = [int(number) for number in re.findall(rb"[\[,](\d{1,18})", data[-200:])]
        size = len(file) + (max(ends, default=0) if data.startswith(b"{") else 0)
        is_header(file, size)

        def read(start: int, into: memoryview) -> None:
            into[:] = file[start : start + len(into)].ljust(len(into))

        found = read_tensors(Path("model.safetensors"), size, read, where="a file")
        header = parse_header(file[8 : 8 + int.from_bytes(file[:8], "little")], size)
        assert len(header.tensors) == len(found)
        assert sum(tensor.stop - tensor.start for tensor in header.tensors) == sum(tensor.nbytes for tensor in found)

    tensors = [TensorInfo("a.weight", "BF16", (2, 3), 0), TensorInfo("b", "F32", (), 12)]
    written = encode_header(tensors)[8:].rstrip()
    described = b'{"__metadata__":{"format":"pt"},"x":{"dtype":"F4","shape":[0,2],"data_offsets":[0,0]}}'
    return Parser(
        parse=parse,
        errors=(CheckpointError, UnsupportedModelError),
        seeds=[
            written,
            described.replace(b"F4", b"U8"),
            described,
            len(written).to_bytes(8, "little") + written + bytes(16),
        ],
    )


def statistics() -> Parser:
    """A server's statistics, and the screen, the line and the rates that are derived from them."""
    from rich.console import Console

    from surfw.cli.server_view import ServerView, status_line
    from surfw.wire import parse_stats, rates_between
    from surfw.wire.reports import find_shortage

    before = parse_stats(samples.statistics())

    def parse(data: bytes) -> None:
        found = parse_stats(data)
        find_shortage(found, 10)
        rates = rates_between(before, found)
        assert len(status_line(found, rates).splitlines()) <= 1
        if crc32(data) % 64 == 0:  # it would take longer than all the rest
            view = ServerView(stats=found, rates=rates, live=True, where="h")
            Console(file=StringIO(), width=80, height=24).print(view)

    return Parser(parse=parse, errors=(RemoteProtocolError,), seeds=[samples.statistics()])


def tokens() -> Parser:
    """A server's file of tokens, the tokens' rights, and the token in a request."""
    from surfw.server.access import EVERYTHING, parse_tokens
    from surfw.wire import shown_token
    from surfw.wire.access import is_meant

    def parse(data: bytes) -> None:
        text = data.decode("latin-1")
        shown_token([text])
        is_meant(text, ["example.org"])
        for grant in parse_tokens(data, "token_file"):
            assert grant != EVERYTHING
            assert isinstance(grant.may_read("org/model"), bool)
            assert grant.choose(["demo", "org/model"]) in (["demo", "org/model"], ["demo"], ["org/model"], [])
            assert isinstance(grant.has_expired, bool)
            assert len(grant.shown.splitlines()) == 1

    table = b'[ci]\ntoken = "7GkAbc"\nmodels = ["org/*", "d[e-m]?o", "*a*b*"]\nexpires = 2027-01-31T18:00:00+01:00\n'
    return Parser(
        parse=parse,
        errors=(ConfigurationError,),
        seeds=[b"secret\n", table, table + b'["a b"]\ntoken = "two"\nexpires = 2027-01-31\n', b"Bearer x", b"[::1]:80"],
        words=[b"token", b"models", b"expires", b"0001-01-01", b"9999-12-31T23:59:59-23:59", b"'''", b'"""', b"[!]-a]"],
    )


def settings() -> Parser:
    """A file of settings, and variables; each setting is tried with the text of a variable."""
    from surfw.settings import SETTINGS, Settings, read_settings_file
    from tests.fuzz.folder import folder

    path = folder("settings") / "surfw.toml"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        Settings(**read_settings_file(path))

    def parse_variable(data: bytes) -> None:
        name, _, text = data.decode(errors="surrogateescape").partition("=")
        if name not in SETTINGS:
            return parse(data)
        return Settings(**{name: SETTINGS[name].parse(text, name)}).token and None

    names = "\n".join(f'{name} = "x"' for name in sorted(SETTINGS))
    return Parser(
        parse=parse_variable,
        errors=(ConfigurationError,),
        seeds=[
            b'[tool.surfw]\nport = 8000\nmemory_budget = "1.5GiB"\nsource = ["ws://a", "ws://b"]\nconnect_timeout=2\n',
            b'[tool.surfw.storage_options]\nkey = "x"\n',
            f"[tool.surfw]\n{names}\n".encode()[:4000],
            b"port=80", b"memory_budget=2GB", b'source=["ws://a","s3://b"]', b'storage_options={"a":1}',
        ],
        words=[f"\n{name} = ".encode() for name in SETTINGS],
    )  # fmt: skip


def adapter() -> Parser:
    """An adapter's settings, and the scaling of a module that follows from them."""
    from surfw.checkpoint.adapter import check_settings, is_saved, scaling_of

    def parse(data: bytes) -> None:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(document, dict):
            return
        found = check_settings(document, where="adapter_config.json")
        for module in ("model.layers.0.self_attn.q_proj", "lm_head"):
            rank, factor = scaling_of(found, module)
            assert 0 < rank < 1 << 20
            assert isinstance(factor, float)
            is_saved(found, module)

    document = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4, "layers.[0-9]+.mlp": 2},
        "alpha_pattern": {"^lm_head": 2.5}, "use_rslora": True, "lora_bias": False, "modules_to_save": ["lm_head"],
        "bias": "none", "init_lora_weights": True, "target_modules": ["q_proj"], "use_dora": False, "loftq_config": {},
    }  # fmt: skip
    return Parser(parse=parse, errors=(UnsupportedModelError,), seeds=[json.dumps(document).encode()])


def lossless() -> Parser:
    """A frame of the codec: its sizes are those of the manifest, the rest is untrusted."""
    from surfw.codec.lossless import FrameDecoder, encode_frame

    payload = bytes(range(256)) * 16 + bytes(4096)

    def parse(data: bytes) -> None:
        if len(data) < 18:
            return
        size, frame = int.from_bytes(data[:2], "little") + 1, bytearray(data[2:])
        struct.pack_into("<I", frame, 4, size)
        struct.pack_into("<I", frame, 12, len(frame))
        FrameDecoder(memoryview(frame), memoryview(bytearray(size)), [len(frame)]).decode(len(frame))

    frames = [bytes(encode_frame(memoryview(payload), item)) for item in (1, 2, 4, 8)]
    seeds = [(len(payload) - 1).to_bytes(2, "little") + frame for frame in frames if len(frame) < 4000]
    return Parser(parse=parse, errors=(IntegrityError,), seeds=seeds)


def seals() -> Parser:
    """A block and its seal, both untrusted."""
    from surfw.encryption.keys import EncryptionKey, WrongSealError
    from surfw.manifest import SEAL_BYTES

    key = EncryptionKey(bytes(32))
    plain = b"some plain text"
    block = memoryview(bytearray(len(plain)))
    seal = key.seal(plain, block)

    def parse(data: bytes) -> None:
        if len(data) < SEAL_BYTES:
            return
        opened = memoryview(bytearray(data[SEAL_BYTES:]))
        key.open(opened, data[:SEAL_BYTES])
        again = memoryview(bytearray(len(opened)))
        assert key.seal(bytes(opened), again) == data[:SEAL_BYTES], "only what this key sealed is opened"

    return Parser(parse=parse, errors=(WrongSealError,), seeds=[seal + bytes(block), bytes(SEAL_BYTES)])


def ranges() -> Parser:
    """The headers of an HTTP response to a range request, and the target of a redirect."""
    from types import SimpleNamespace

    from yarl import URL

    from surfw.errors import StorageError
    from surfw.retry import parse_redirect
    from surfw.storage.http_ranges import _response

    def parse(data: bytes) -> None:
        lines = [line.partition(": ") for line in data.decode("latin-1").split("\n")]
        headers: Mapping[str, str] = {name: value for name, _, value in lines}
        if target := headers.get("Location"):
            try:
                redirect = parse_redirect("https://host/a/b", target)
            except ValueError:
                return  # as documented
            assert redirect.leaves_origin or not redirect.loses_tls
            assert redirect.url.partition(":")[0].lower() in {"http", "https", "ws", "wss"}
        answer = SimpleNamespace(status=206 if data[:1] != b"2" else 200, headers=headers, url=URL("http://host/a"))
        found = _response(answer)  # type: ignore[arg-type] # as aiohttp's
        assert found.start >= 0
        assert found.size is None or found.size >= 0

    answer = b'Content-Length: 10\nContent-Range: bytes 0-9/100\nETag: "abc"\nLast-Modified: ' + (
        datetime(2026, 1, 1, tzinfo=UTC).strftime("%a, %d %b %Y %H:%M:%S GMT").encode()
    )
    return Parser(
        parse=parse,
        errors=(StorageError,),
        seeds=[
            answer,
            b"2\nContent-Length: 7",
            b"Location: //other:99/c?d#e",
            b"Location: wss://[::1]/\nContent-Length: 0",
        ],
        words=[b"Content-Encoding: gzip", b"bytes 0-9/*", b"Location: ", b"https://", b"[::1]", b"@"],
    )
