"""A checkpoint as a model in a store without copying: its chunks are byte ranges of the checkpoint's own shards.

Invariants:

- No weight byte is written.
- A chunk's payload equals that in a copy, and so does its id once its digests are known. The exception is a checkpoint
  whose precision differs from the dtype that the model is built with: its precision is kept, and converted on arrival.
- Tensors that are not a byte range of a shard (converted ones, `.bin`) are refused.
- Every object is pinned to the revision it had when its header was read.

As a program (`python -m surfw.chunking.in_place`), this module creates a private store for a checkpoint that a server
serves in place. It runs in a separate process because the server never loads torch. It reads a JSON object from
standard input (`place`, `options`, `stores`), so that no secret appears in the process list, and writes one to standard
output: `store`, or `error` and `text`.
"""

import asyncio
import json
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from surfw.checkpoint import Checkpoint
from surfw.checkpoint.layout import read_small
from surfw.checkpoint.reader import folder_name
from surfw.checkpoint.shard import check_unchanged
from surfw.chunking.plan import PlannedChunk, PlannedTensor, arrange
from surfw.chunking.prepare import PreparedModel, prepare_model
from surfw.chunking.remote import plain_name
from surfw.chunking.write import Progress
from surfw.config import DEFAULT_SILENCE_SECONDS, FILE_BYTES, display_url
from surfw.errors import CheckpointError, ConfigurationError, SurfwError, UnsupportedModelError
from surfw.manifest import Chunk, Form, Location, Manifest, ModelFile, Origin, Pin, payload_digest
from surfw.storage import StorageBackend, Store, open_backend
from surfw.storage.origins import PlacedOptions, is_local_url, private_store
from surfw.storage.store import MARKER, manifest_key
from surfw.storage.store_source import StorageSource

_CONVERTED = frozenset({"F64", "F32", "F16", "BF16"})
_INSTEAD = "run surfw chunk without --in-place, which writes a copy that is"


def check_reach(model: str, backend: StorageBackend) -> None:
    """Check that a store may refer to the files of a checkpoint; `model` is as for `prepare_model`.

    Raises:
        ConfigurationError: the store is remote, but the checkpoint is local.
    """
    if is_local_url(model) and backend.local_path(MARKER) is None:
        raise ConfigurationError(
            f"{display_url(backend.url)} is a remote store, which cannot point at local files ({model}); leave out "
            "--in-place, or use a local --store"
        )


async def build_manifest(prepared: PreparedModel) -> Manifest:
    """Build the manifest of a prepared model whose chunks lie in its checkpoint; their digests are not known yet.

    Raises:
        UnsupportedModelError: a tensor is not a byte range of the checkpoint.
        CheckpointError: the checkpoint changed since it was opened, or its storage does not report changes.
    """
    checkpoint = prepared.checkpoint
    planned = [_as_stored(prepared, chunk) for chunk in prepared.plan.chunks]
    places = [_locations(prepared, chunk) for chunk in planned]
    origin = Origin(checkpoint.url, await _pins(checkpoint, {at.object for chunk in places for at in chunk}))
    files = [await asyncio.to_thread(_file, *file) for file in sorted(checkpoint.files.items())]
    chunks = [_chunk(one, at, origin) for one, at in zip(planned, places, strict=True)]
    return prepared.manifest(chunks, files, origin)


def _as_stored(prepared: PreparedModel, chunk: PlannedChunk) -> PlannedChunk:
    """Return the chunk with floats in the checkpoint's precision; they are converted on arrival."""

    def stored(tensor: PlannedTensor) -> PlannedTensor:
        recipe = prepared.loading.recipes[tensor.info.name]
        if recipe.converter is not None or not {prepared.facts[recipe.sources[0]][0], tensor.info.dtype} <= _CONVERTED:
            return tensor
        dtype = prepared.facts[recipe.sources[0]][0]
        return replace(tensor, info=replace(tensor.info, dtype=dtype), copy_of=recipe.sources[0])

    return replace(chunk, tensors=arrange([stored(tensor) for tensor in chunk.tensors]))


def _chunk(planned: PlannedChunk, locations: Sequence[Location], origin: Origin) -> Chunk:
    size = planned.payload_bytes
    form = Form("none", size, "" if size else payload_digest(b""), b"", tuple(locations))
    return planned.chunk(origin.provisional_id(locations) if size else form.digest, form)


def _locations(prepared: PreparedModel, chunk: PlannedChunk) -> list[Location]:
    """Return the locations of a chunk's payload, in order; adjacent ranges are merged."""
    found: list[Location] = []
    for tensor in chunk.tensors:
        recipe = prepared.loading.recipes[tensor.info.name]
        sources = recipe.joined or ((tensor.copy_of,) if tensor.copy_of is not None else ())
        if not sources:
            if not recipe.sources:
                why = "transformers computes it"
            elif recipe.converter is None:
                why = f"it is converted from {prepared.facts[recipe.sources[0]][0]} to {tensor.info.dtype}"
            else:
                why = f"transformers makes it of {len(recipe.sources)} tensors such as {recipe.sources[0]}"
            raise UnsupportedModelError(
                f"{prepared.name} cannot be served in place: {tensor.info.name} is not in its checkpoint as it is "
                f"used, {why}; {_INSTEAD}"
            )
        for name in sources:
            source = prepared.checkpoint.tensors[name]
            if source.start is None:
                raise UnsupportedModelError(
                    f"{prepared.name} cannot be served in place: {source.file.name} is no safetensors file; {_INSTEAD}"
                )
            start = source.start + recipe.start
            stop = start + tensor.info.nbytes if len(recipe.joined) == 1 else source.start + source.nbytes
            file = source.file.relative_to(prepared.checkpoint.path).as_posix()
            at = Location(file, start, stop)
            if found and (found[-1].object, found[-1].stop) == (at.object, at.start):
                at = Location(at.object, found.pop().start, at.stop)
            if at.start < at.stop:
                found.append(at)
    return found


async def _pins(checkpoint: Checkpoint, shards: set[str]) -> Mapping[str, Pin]:
    names = sorted(shards | set(checkpoint.files))
    if checkpoint.pins is not None:
        return {name: checkpoint.pins[name] for name in names}
    backend, pins = open_backend(checkpoint.url), {}
    for name in names:
        revision = await backend.revision(name)
        if revision is None:
            raise CheckpointError(f"{checkpoint.path / name} vanished while it was read; download it again")
        pins[name] = Pin(await backend.size(name), revision)
    for shard in checkpoint.shards:  # it may have changed between reading its header and pinning it
        await asyncio.to_thread(check_unchanged, shard.path, None, shard.identity)
    return pins


def _file(name: str, path: Path) -> ModelFile:
    data = read_small(path, FILE_BYTES)
    return ModelFile(name, len(data), payload_digest(data), name)


async def write_in_place(
    prepared: PreparedModel,
    backend: StorageBackend,
    *,
    origin_options: PlacedOptions | None = None,
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Publish a prepared model in a store without copying it, after reading it once to compute its digests.

    Raises:
        ManifestError: the store is remote, but the checkpoint is local.
        UnsupportedModelError: a tensor is not a byte range of the checkpoint.
        StorageError: the store cannot be written, or the checkpoint cannot be read. Nothing is visible then.
    """
    manifest = await build_manifest(prepared)
    source = StorageSource(backend, owned=False, origin_options=origin_options)
    try:
        mounted = source.store.objects.mount(manifest, where=source.url)
        await source.store.create()
        manifest = manifest.with_digests(await source.digest_all(mounted, progress=progress))
        await source.store.publish(manifest)
    finally:
        await source.close()
    return manifest


async def publish_place(
    place: str,
    options: Mapping[str, Any] | None = None,
    *,
    silence_timeout: float = DEFAULT_SILENCE_SECONDS,
    stores: Path | None = None,
) -> Path:
    """Publish the checkpoint at a folder or storage URL as the only model of a private store, without digests.

    Args:
        place: the folder or URL.
        options: storage options for it.
        silence_timeout: seconds without progress after which access to a remote storage fails.
        stores: the folder of private stores; default: `private_stores()`.

    Returns:
        The folder of the store.

    Raises:
        SurfwError: it cannot be served in place.
    """
    folder = private_store(place, options or {}, stores)
    name = None
    if "://" not in place:
        name = "/".join(map(plain_name, folder_name(Path(place)).split("/")))
    prepared = await asyncio.to_thread(
        prepare_model, place, name=name, storage_options=options, silence_timeout=silence_timeout
    )
    try:
        manifest = await build_manifest(prepared)
    finally:
        await asyncio.to_thread(prepared.close)
    store = Store(open_backend(folder))
    await store.create()
    await store.publish(manifest)
    for name in await store.models():  # of an earlier checkpoint at this place
        if name != manifest.name:
            await store.backend.remove(manifest_key(name))
    return folder


def main() -> None:
    """Create the private store requested on standard input."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    warnings.simplefilter("ignore")
    request = json.load(sys.stdin)
    try:
        store = asyncio.run(publish_place(request["place"], request["options"], stores=Path(request["stores"])))
        reply = {"store": str(store)}
    except SurfwError as exc:
        reply = {"error": type(exc).__name__, "text": str(exc)}
    json.dump(reply, sys.stdout)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the waiting server was interrupted as well
        sys.exit(130)
