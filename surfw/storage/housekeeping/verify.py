"""Reading every byte of models in a store, and comparing every digest.

- What several models share is read once.
- Two pieces of 8 MiB are in memory: one is verified while the next is read.
- What is damaged or missing is a finding; a storage that does not answer is an error.
"""

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from blake3 import blake3

from surfw.config import BLOCK_BYTES, DAMAGE_RETRIES
from surfw.errors import ConfigurationError, ManifestError, NotFoundError, StorageError, UnknownModelError
from surfw.manifest import Form, Location, Manifest, block_digests, has_digest, nbytes
from surfw.source import locate_damage
from surfw.storage.housekeeping.prune import Steps
from surfw.storage.store import Store, segments
from surfw.threads import to_its_end

_PIECE_BYTES = 8 * BLOCK_BYTES
_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Something of a model that is not what its manifest promises.

    Attributes:
        model: the model's name; with what is shared, the first that has it.
        part: the chunk or the tokenizer file; empty if it is the manifest itself.
        objects: where it lies.
        complaint: what is wrong with it.
    """

    model: str
    part: str
    objects: tuple[str, ...]
    complaint: str


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What came of verifying.

    Attributes:
        store: where.
        models: the models that were looked at.
        parts: how many chunks and files were read; what is shared counts once.
        read_bytes: how many bytes.
        damage: what is damaged or missing; empty if all is well.
        undigested: the models whose manifests have no digest, as surfw 0.1.0 wrote them: damage to such a manifest is
            not seen. Chunking the model again gives it one.
    """

    store: str
    models: tuple[str, ...]
    parts: int
    read_bytes: int
    damage: tuple[Damage, ...]
    undigested: tuple[str, ...]


@dataclass
class _Part:
    """Bytes to be read, and what they should be."""

    model: str
    name: str
    locations: Sequence[Location]
    size: int
    digest: str
    blocks: bytes | None
    has_header: bool = False


@dataclass
class _Reading:
    """How far it is."""

    total: int
    progress: Steps
    done: int = 0
    damage: list[Damage] = field(default_factory=list)

    def add(self, count: int, name: str) -> None:
        self.done += count
        self.progress(self.done, self.total, name)


async def verify(store: Store, model: str | None, *, progress: Steps) -> Verified:
    """Read all of one model, or of all models there are.

    Raises:
        UnknownModelError: there is no such model.
        StorageError: the storage does not answer.
    """
    await store.check()
    names = await store.models() if model is None else [model]
    parts: dict[tuple[object, ...], _Part] = {}
    damage, undigested = [], []
    for name in names:
        try:
            manifest, is_digested = await store.read_manifest(name, partial(_parse, store, name))
        except UnknownModelError:
            if model is not None:
                raise
            continue  # removed since it was listed
        except (ConfigurationError, ManifestError, StorageError) as exc:
            await store.check()  # an error of its own, if the storage does not answer
            damage.append(Damage(model=name, part="", objects=(), complaint=str(exc)))
            continue
        if not is_digested:
            undigested.append(name)
        for part in _parts_of(await asyncio.to_thread(store.with_digests, manifest)):
            parts.setdefault((*part.locations, part.digest, part.blocks), part)
    reading = _Reading(sum(part.size for part in parts.values()), progress, damage=damage)
    for part in parts.values():
        before = reading.done
        complaint = await _verify(store, part, reading)
        reading.add(before + part.size - reading.done, part.name)
        if complaint:
            objects = tuple(dict.fromkeys(at.object for at in part.locations))
            damage.append(Damage(model=part.model, part=part.name, objects=objects, complaint=complaint))
    return Verified(
        store=store.url,
        models=tuple(names),
        parts=len(parts),
        read_bytes=reading.total,
        damage=tuple(damage),
        undigested=tuple(undigested),
    )


def _parse(store: Store, name: str, data: bytes) -> tuple[Manifest, bool]:
    """A manifest, and whether it is stored with a digest."""
    return store.parse_manifest(name, data), has_digest(data)


def _parts_of(manifest: Manifest) -> list[_Part]:
    """What there is to compare; of a model in place, the chunks that were read once."""
    forms: list[tuple[str, Form]] = [
        (chunk.name, form) for chunk in manifest.chunks for form in chunk.forms if form.is_known
    ]
    parts = [
        _Part(
            manifest.name, name, form.locations, form.stored_bytes, form.digest, form.blocks,
            has_header=manifest.origin is None and form.codec == "none" and len(form.locations) == 1,
        )
        for name, form in forms
    ]  # fmt: skip
    for file in manifest.files:
        location = Location(file.object, 0, file.size)
        parts.append(_Part(manifest.name, file.path, (location,), file.size, file.digest, None))
    return parts


async def _verify(store: Store, part: _Part, reading: _Reading) -> str:
    """What is wrong with a part; empty if nothing is."""
    if part.size and not part.locations:
        return "its manifest does not say where it lies"
    try:
        for location in part.locations:
            size = await store.objects.size(location.object)
            if size < location.stop or (part.blocks is None and size != location.stop):
                return f"{location.object} has {size} bytes, expected {location.stop}"
        complaint = await _compare(store, part, reading)
        return complaint or (await _check_header(store, part) if part.has_header else "")
    except NotFoundError:
        return "it is missing"
    except StorageError as exc:
        await store.check()  # an error of its own, if the storage does not answer
        return f"it cannot be read: {exc}"


async def _compare(store: Store, part: _Part, reading: _Reading) -> str:
    """What is damaged. What seems to be is read again first: it may have been damaged on its way."""
    tries = 1 if part.blocks is not None else 1 + DAMAGE_RETRIES  # blocks are read again one by one
    begun, seen = reading.done, list[str]()
    while len(seen) < tries:
        reading.done = begun
        complaint = await _read_through(store, part, reading)
        if not complaint:
            return ""
        seen.append(complaint)
        _forget(store, part.locations)
    return seen[-1] if len(set(seen)) == 1 else f"{seen[-1]}; {locate_damage(seen)}"


async def _check_header(store: Store, part: _Part) -> str:
    """What is damaged in the safetensors header before a chunk's payload, of which there is no digest.

    Names, dtypes and shapes are not compared: models share an equal payload behind the header of one of them.
    """
    (location,) = part.locations
    complaint = ""
    if location.start > 8 + _HEADER_BYTES:
        return (
            f"its payload begins at byte {location.start}, expected a header of at most {_HEADER_BYTES} bytes before it"
        )
    for _ in range(1 + DAMAGE_RETRIES):
        header = bytearray(location.start)
        await store.objects.read_into(location.object, 0, memoryview(header))
        complaint = await asyncio.to_thread(_find_header_damage, bytes(header), part.size)
        if not complaint:
            break
        _forget(store, part.locations)
    return complaint


def _find_header_damage(header: bytes, payload_bytes: int) -> str:
    length = int.from_bytes(header[:8], "little")
    if length != len(header) - 8:
        return f"the header of its file says that it has {length} bytes, expected {len(header) - 8}"
    end = 0
    try:
        document = json.loads(header[8:])
        document.pop("__metadata__", None)
        for entry in sorted(document.values(), key=lambda entry: entry["data_offsets"]):
            start, stop = entry["data_offsets"]
            if start != end or stop - start != nbytes(entry["dtype"], entry["shape"]):
                return f"the header of its file is damaged: a tensor lies at bytes {start} to {stop} of the payload"
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        return f"the header of its file is damaged ({type(exc).__name__})"
    return "" if end == payload_bytes else f"the header of its file ends at byte {end} of {payload_bytes}"


async def _read_through(store: Store, part: _Part, reading: _Reading) -> str:
    buffers = [memoryview(bytearray(min(part.size, _PIECE_BYTES))) for _ in range(2)]
    whole, damaged = blake3(), list[int]()
    checking: asyncio.Future[list[int]] | None = None
    before = 0, buffers[0]

    def check(start: int, piece: memoryview) -> list[int]:
        """The blocks that are not what they should be; a piece without any is digested."""
        found: list[int] = []
        if part.blocks is not None:
            known = part.blocks[start // BLOCK_BYTES * 32 :]
            seen = enumerate(_digests(block_digests(piece)))
            found = [index for index, digest in seen if digest != known[32 * index : 32 * index + 32]]
        if not found:
            whole.update(piece)
        return found

    async def finish() -> None:
        """See what came of the piece before, and read its damaged blocks again."""
        start, piece = before
        bad = await checking if checking else []
        for _ in range(DAMAGE_RETRIES):
            for index in bad:
                low = index * BLOCK_BYTES
                await _read(store, part, start + low, piece[low : low + BLOCK_BYTES], fresh=True)
            bad = bad and await asyncio.to_thread(check, start, piece)
        damaged.extend(start // BLOCK_BYTES + index for index in bad)

    try:
        for index, start in enumerate(range(0, part.size, _PIECE_BYTES)):
            piece = buffers[index % 2][: min(_PIECE_BYTES, part.size - start)]
            await _read(store, part, start, piece)
            await finish()
            before, checking = (start, piece), asyncio.ensure_future(asyncio.to_thread(check, start, piece))
            reading.add(len(piece), part.name)
        await finish()
    finally:
        if checking:
            await to_its_end(checking)
    if damaged:
        return f"block {damaged[0]} is damaged ({len(damaged)} of {-(-part.size // BLOCK_BYTES)} blocks are)"
    return "" if whole.hexdigest() == part.digest else f"its digest is {whole.hexdigest()}, expected {part.digest}"


async def _read(store: Store, part: _Part, start: int, destination: memoryview, *, fresh: bool = False) -> None:
    """Fill the destination with the part's bytes from `start` on; `fresh` ones are not from what a backend keeps."""
    at = 0
    for key, first, length in segments(part.locations, start, start + len(destination)):
        if fresh:
            store.objects.forget(key)
        await store.objects.read_into(key, first, destination[at : at + length])
        at += length


def _forget(store: Store, locations: Sequence[Location]) -> None:
    for location in locations:
        store.objects.forget(location.object)


def _digests(joined: bytes) -> Iterator[bytes]:
    return (joined[at : at + 32] for at in range(0, len(joined), 32))
