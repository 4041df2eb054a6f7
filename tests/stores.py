"""Stores for tests, made without torch: random payloads with real headers and a matching manifest."""

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from surfw.manifest import Chunk, Form, Location, Manifest, ModelFile, TensorInfo, Use, digest_blocks, payload_digest
from surfw.storage import FilesystemBackend, Store
from surfw.storage.store import blob_key

PAYLOAD_AT = 4096
TOKENIZER = {"tokenizer.json": b'{"made": "for tests"}', "vocab.txt": b"one\ntwo\n"}


def make_store(
    path: Path,
    name: str = "toy/model",
    sizes: Sequence[int] = (3_000_000, 5_000_000),
    *,
    seed: int = 0,
    files: Mapping[str, bytes] = TOKENIZER,
    vocabulary: int = 9,
) -> Manifest:
    """Write a model with one chunk of random bytes per size to the store at `path`, which is created if missing.

    The chunks are `layers.0`, `layers.1`, …, each with one `U8` tensor. Several models may share a store. Do not call
    this inside an event loop.
    """
    store = Store(FilesystemBackend(path))
    asyncio.run(store.create())
    source = random.Random(f"{seed} {name}")
    chunks = tuple(write_chunk(path, f"layers.{index}", source.randbytes(size)) for index, size in enumerate(sizes))
    manifest = Manifest(
        name=name,
        class_name="ToyModel",
        dtype="uint8",
        config={"model_type": "toy", "vocab_size": vocabulary},
        generation_config=None,
        files=tuple(write_file(path, file, data) for file, data in files.items()),
        ties={},
        chunks=chunks,
        order=tuple(Use(chunk.name, (chunk.name,)) for chunk in chunks),
    )
    asyncio.run(store.publish(manifest))
    return manifest


def write_chunk(path: Path, name: str, payload: bytes) -> Chunk:
    """Write a blob with one tensor, and return its entry for the manifest."""
    tensor = TensorInfo(f"{name}.weight", "U8", (len(payload),), 0)
    entry = {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]}
    header = json.dumps({tensor.name: entry}).encode().ljust(PAYLOAD_AT - 8)
    digest, blocks = digest_blocks([payload])
    key = blob_key(digest, ".safetensors")
    blob = path / key
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(len(header).to_bytes(8, "little") + header + payload)
    location = Location(key, PAYLOAD_AT, PAYLOAD_AT + len(payload))
    form = Form("none", len(payload), digest, blocks, (location,))
    return Chunk(name, "layer", digest, len(payload), (tensor,), (form,))


def write_file(path: Path, name: str, data: bytes) -> ModelFile:
    """Write a tokenizer file."""
    digest = payload_digest(data)
    key = blob_key(digest, ".bin")
    blob = path / key
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    return ModelFile(name, len(data), digest, key)


def payload(path: Path, chunk: Chunk) -> bytes:
    """Return a chunk's payload from its blob."""
    location = chunk.forms[0].locations[0]
    return (path / location.object).read_bytes()[location.start : location.stop]
