"""Parsers of files and folders: checkpoints, GGUF, keys, the disk cache, stores, prompts and recordings."""

import asyncio
import json
import struct
from contextlib import suppress
from dataclasses import replace
from typing import BinaryIO

from surfw.errors import (
    CheckpointError,
    ConfigurationError,
    NotAStoreError,
    StorageError,
    UnsupportedModelError,
)
from tests.fuzz import samples
from tests.fuzz.folder import folder
from tests.fuzz.parser import Parser, PromiseError


def config() -> Parser:
    """`config.json`, `generation_config.json` and an index of shards, a line each."""
    from surfw.checkpoint.companions import module_folders
    from surfw.checkpoint.layout import read_config, read_generation_config, read_weights
    from surfw.skeleton.sanitise import sanitise, sanitise_config, tag_floats, untag_floats

    place = folder("config")
    index = "model.safetensors.index.json"

    def parse(data: bytes) -> None:
        for name, line in zip(("config.json", "generation_config.json", index), data.split(b"\n"), strict=False):
            (place / name).write_bytes(line)
        module_folders(data)
        read_weights(place, index)
        found, generation = read_config(place, may_be_quantised=True), read_generation_config(place)
        clean = sanitise(found, generation, where="config.json").config
        assert sanitise_config(clean) == (clean, []), "nothing is left to be taken out"
        assert json.dumps(untag_floats(tag_floats(clean)), sort_keys=True) == json.dumps(
            untag_floats(clean), sort_keys=True
        )

    model = {
        "model_type": "llama", "num_hidden_layers": 2, "architectures": ["LlamaForCausalLM"], "rope_theta": 1e4,
        "attn_implementation": "kernels/x", "auto_map": {"AutoModel": "a.B"}, "time_step_limit": [0.0, float("inf")],
        "text_config": {"hidden_size": 8, "_experts_implementation": "eager"}, "scale": {"__float__": "NaN"},
        "quantization_config": {"quant_method": "fp8"}, "id2label": {"0": "a"},
    }  # fmt: skip
    settings = {"eos_token_id": [1, 2], "temperature": 0.5, "num_beam_groups": 1, "cache_implementation": "static"}
    promised = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "x/y.safetensors"}}
    seed = b"\n".join(json.dumps(one).encode() for one in (model, settings, promised))
    return Parser(
        parse=parse,
        errors=(CheckpointError, UnsupportedModelError),
        seeds=[
            seed,
            b'{"model_type":"bert","layers":[1,2.5,null]}\n{"eos_token_id":2}\n' + json.dumps(promised).encode(),
        ],
    )


def gguf() -> Parser:
    """The header of a GGUF file."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from numpy import zeros

    from surfw.checkpoint.gguf import GgufShard

    file = folder("gguf") / "model.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float32("eps", 0.5)
    writer.add_tensor("token_embd.weight", zeros((2, 32), dtype="float32"))
    writer.add_tensor("q", zeros((2, 34), dtype="uint8"), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    seed = file.read_bytes()

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        shard = GgufShard(file)
        try:
            assert all(
                tensor.start is not None and tensor.start + tensor.nbytes <= len(data) for tensor in shard.tensors
            )
            assert set(shard.stored) == {tensor.name for tensor in shard.tensors}
        finally:
            shard.close()

    endless = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 1 << 60)
    return Parser(
        parse=parse,
        errors=(CheckpointError, UnsupportedModelError),
        seeds=[seed, endless],
        words=[b"general.architecture", b"split.count", b"general.alignment", b"\xff" * 8, struct.pack("<Q", 1 << 32)],
    )


def key_file() -> Parser:
    """A file with a key for encrypted models, and one with a token."""
    from surfw.encryption.keys import read_key
    from surfw.settings import read_token

    file = folder("key") / "key"
    file.touch(mode=0o600)

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        try:
            token = read_token(str(file))
            assert token is not None
            assert token.isprintable()
            assert token.isascii()
        except ConfigurationError as exc:
            if len(data) > 12 and data.decode("latin-1") in str(exc):
                raise PromiseError("an error shows what the file holds") from exc
        assert len(bytes.fromhex(read_key(file).id)) == 16

    return Parser(
        parse=parse,
        errors=(ConfigurationError,),
        seeds=[
            bytes(range(32)).hex().encode(),
            b"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n",
            b"token",
            b"[ci]\nx=1\n",
        ],
    )


def disk_cache() -> Parser:
    """The folder of a disk cache: a manifest, a log of digests, and the marks of a blob, in parts."""
    from surfw.manifest import digest_blocks, encode_line
    from surfw.sources.disk import CacheFolder

    cut = b"\n====\n"
    place = folder("cache")
    manifest = list(samples.manifests())[1].public()
    key, (chunk,) = manifest.digest, manifest.chunks
    learned = digest_blocks([bytes(chunk.payload_bytes)])
    form = replace(chunk.forms[0], digest=learned.digest, blocks=learned.blocks)
    cache = CacheFolder(place, 1 << 20)
    cache.create()
    cache.keep_model(manifest, "s3://bucket")
    opened = cache.open_blob(form, create=True)
    assert opened is not None
    opened.close()
    stored, blob = (place / "models" / f"{key}.manifest").read_bytes(), opened.path

    def parse(data: bytes) -> None:
        head, _, rest = data.partition(cut)
        log, _, flags = rest.partition(cut)
        (place / "models" / f"{key}.manifest").write_bytes(head or stored)
        (place / "models" / f"{key}.log").write_bytes(log)
        blob.write_bytes(bytes(form.stored_bytes) + flags[:3])
        again = CacheFolder(place, form.stored_bytes + 4)
        for model in again.models():
            assert model.manifest == manifest, "a manifest proves itself"
            assert 0 <= model.held_bytes <= form.stored_bytes
        assert set(again._removable(again._sizes())) <= {blob.name}

    log = encode_line({"source": "ws://a"}) + encode_line({"chunk": chunk.id} | learned.document())
    return Parser(
        parse=parse, errors=(), seeds=[stored + cut + log + cut + b"\1", cut + log + cut + b"\0", cut + b"\n{}"]
    )


class _Objects:
    """A minimal backend."""

    url = "memory"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    async def load(self, key: str) -> bytes:
        return self.objects[key]

    async def save(self, key: str, data: bytes | BinaryIO) -> None:
        self.objects[key] = data if isinstance(data, bytes) else data.read()

    async def exists(self, key: str) -> bool:
        return key in self.objects

    async def list(self, prefix: str = "") -> list[str]:
        return [key for key in self.objects if key.startswith(prefix)]


def store() -> Parser:
    """A store's files other than manifests and weights: its marker, and the leases of writers and pruners."""
    from surfw.storage import StorageBackend, Store
    from surfw.storage.custom import adapt_backend
    from surfw.storage.housekeeping.leases import read_leases

    class Backend(_Objects, StorageBackend):
        """A backend in memory."""

    objects = Backend()
    backend, loop = adapt_backend(objects), asyncio.new_event_loop()

    async def read(data: bytes) -> None:
        marker, _, lease = data.partition(b"\n")
        objects.objects = {"leases/a.json": lease or b"{}", "prunes/b.json": lease, "surfw.json": marker}
        try:
            await Store(objects).check()
        except NotAStoreError:
            if marker.startswith(b"{"):
                raise
        for prefix in ("leases/", "prunes/"):
            for found in await read_leases(backend, prefix):
                assert len(str(found).splitlines()) == 1
                assert found.over or found.at_work or found.holds or found.age_seconds > 0

    lease = {
        "format": "surfw.notice", "version": 1, "host": "h", "pid": 9, "kernel": "k", "renewed": 1.5, "over": False,
        "model": "org/m", "objects": ["blobs/aa/b"],
    }  # fmt: skip
    seed = b'{"format":"surfw.store","version":1}\n' + json.dumps(lease).encode()
    return Parser(parse=lambda data: loop.run_until_complete(read(data)), errors=(StorageError,), seeds=[seed])


def prompts() -> Parser:
    """Lines of prompts, answers of an earlier run, and the history of a chat."""
    from surfw.cli.chat_prompt import _parse as parse_entry
    from surfw.cli.infer_many import _LineError, _read_answers, _read_line, _read_settings

    file = folder("prompts") / "answers.jsonl"

    def parse(data: bytes) -> None:
        parse_entry(data.decode("utf-8", "replace"))
        file.write_bytes(data)
        with suppress(ConfigurationError):
            _read_answers(file)
        for number, line in enumerate(data.splitlines()):
            found = _read_line(line)
            _read_settings(found.pop("id", number), found)

    seeds = [
        b'{"id":"a","prompt":"Once","max_new_tokens":5,"stop":["."]}\n{"prompt_ids":[1,2]}\n',
        b'{"id":1,"text":"b"}\n{"id":2,"error":"x"}\n',
    ]
    return Parser(parse=parse, errors=(_LineError,), seeds=seeds)


def recording() -> Parser:
    """The recording of a server's clients, which `surfw bench cache` reads."""
    from surfw.bench.cache import read_trace
    from surfw.config import PAGE_BYTES

    file = folder("recording") / "trace.jsonl"

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        most = 1 + (1 << 36) // PAGE_BYTES
        assert len(read_trace(file)) <= most * (1 + data.count(b"{"))

    line = {"client": 1, "model": "m", "chunk": "a", "form": "none", "size": 9_000_000, "start": 0, "stop": 9_000_000}
    announced = {"client": 1, "model": "m", "cycle": ["a"], "kept": []}
    return Parser(
        parse=parse,
        errors=(ConfigurationError,),
        seeds=[b"\n".join(json.dumps(one).encode() for one in (announced, line, {"client": 1}))],
    )
