"""Verify a store: read every byte of its models, and compare every digest.

- Parts that several models share are read once.
- Two pieces of 8 MiB are in memory: one is verified while the next is read.
- Lossless forms are decoded, and compared with the id of their chunk.
- Damaged or missing parts are reported in the result; a storage that does not answer raises an error.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from blake3 import blake3

from surfw.codec.lossless import FRAME_BYTES, decode_frame
from surfw.config import BLOCK_BYTES, PIECE_BYTES
from surfw.errors import ConfigurationError, ManifestError, NotFoundError, StorageError, UnknownModelError
from surfw.manifest import Form, Location, Manifest, count_blocks, has_digest
from surfw.safetensors_header import MAX_HEADER_BYTES, PREFIX_BYTES, HeaderError, header_length, parse_header
from surfw.source import expect_base, find_damage, locate_damage, read_again
from surfw.storage.housekeeping.prune import Steps
from surfw.storage.store import Store, segments
from surfw.threads import in_thread, together


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A part of a model that is damaged or missing.

    Attributes:
        model: the model's name; for a shared part, the first model that has it.
        part: the chunk or tokenizer file; `base NAME` for the base of an adapter; empty for the manifest itself.
        objects: the objects that hold it.
        complaint: what is wrong with it.
    """

    model: str
    part: str
    objects: tuple[str, ...]
    complaint: str


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The result of verifying a store.

    Attributes:
        store: the address of the store.
        models: the models that were verified.
        parts: how many chunks and files were read; shared ones count once.
        read_bytes: how many bytes were read.
        damage: what is damaged or missing; empty if nothing is.
        undigested: the models whose manifests have no digest, as written by surfw 0.1.0. Damage to such a manifest
            cannot be detected; chunking the model again adds the digest.
    """

    store: str
    models: tuple[str, ...]
    parts: int
    read_bytes: int
    damage: tuple[Damage, ...]
    undigested: tuple[str, ...]


@dataclass(frozen=True)
class _Part:
    """A form of a chunk, or a tokenizer file, to be read; `model` is the first model that has it.

    A file has no block digests, and is a whole object, not a range of one. For a lossless form, `payload` is the size
    and digest of the decoded bytes.
    """

    model: str
    name: str
    form: Form
    is_file: bool = False
    has_header: bool = False  # a safetensors header before the payload
    payload: tuple[int, str] | None = None


async def verify(store: Store, model: str | None, *, progress: Steps) -> Verified:
    """See `Housekeeping.verify`."""
    await store.check()
    names = await store.models() if model is None else [await store.resolve(model)]
    parts: dict[tuple[Form, tuple[int, str] | None], _Part] = {}
    damage, undigested = [], []
    manifests = list[Manifest]()
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
        manifests.append(manifest)
        for part in _parts_of(await asyncio.to_thread(store.with_digests, manifest)):
            parts.setdefault((part.form, part.payload), part)
    damage += await _check_bases(store, manifests, broken={one.model for one in damage})
    done, total = 0, sum(form.stored_bytes for form, _ in parts)
    for (form, _), part in parts.items():

        def tell(read_bytes: int, before: int = done, name: str = part.name) -> None:
            progress(before + read_bytes, total, name)

        complaint = await _verify(store, part, tell)
        tell(form.stored_bytes)
        done += form.stored_bytes
        if complaint:
            objects = tuple(dict.fromkeys(at.object for at in form.locations))
            damage.append(Damage(model=part.model, part=part.name, objects=objects, complaint=complaint))
    return Verified(
        store=store.url,
        models=tuple(names),
        parts=len(parts),
        read_bytes=total,
        damage=tuple(damage),
        undigested=tuple(undigested),
    )


async def _check_bases(store: Store, manifests: Sequence[Manifest], *, broken: Container[str]) -> list[Damage]:
    """Check the bases of all adapters, except those that were found `broken` already."""
    adapters: dict[str, list[Manifest]] = {}
    for manifest in manifests:
        if manifest.base is not None and manifest.base.name not in broken:
            adapters.setdefault(manifest.base.name, []).append(manifest)
    return [damage for name, over in adapters.items() for damage in await _check_base(store, name, over)]


async def _check_base(store: Store, name: str, adapters: Sequence[Manifest]) -> list[Damage]:
    """Check the base of this name, and that these adapters belong to it."""
    try:
        base = await store.manifest(name)
    except UnknownModelError:
        needed_by = f"it is missing; {adapters[0].name}{' and others need' if adapters[1:] else ' needs'} it"
        return [Damage(model=name, part="", objects=(), complaint=needed_by)]
    except (ConfigurationError, ManifestError, StorageError) as exc:
        return [Damage(model=name, part="", objects=(), complaint=str(exc))]
    damage = []
    for adapter in adapters:
        try:
            expect_base(adapter, base, where=store.url)
        except ManifestError as exc:
            damage.append(Damage(model=adapter.name, part=f"base {name}", objects=(), complaint=str(exc)))
    return damage


def _parse(store: Store, name: str, data: bytes) -> tuple[Manifest, bool]:
    """The manifest, and whether it is stored with a digest."""
    return store.parse_manifest(name, data), has_digest(data)


def _parts_of(manifest: Manifest) -> Iterator[_Part]:
    """The parts of a model to verify. For a model in place, these are the chunks with known digests."""
    for chunk in manifest.chunks:
        for form in chunk.forms:
            if form.is_known:
                is_ours = manifest.origin is None and not manifest.key_id
                has_header = is_ours and form.codec == "none" and len(form.locations) == 1
                is_coded = form.codec == "lossless" and not manifest.key_id  # encrypted forms cannot be decoded here
                payload = (chunk.payload_bytes, chunk.id) if is_coded else None
                yield _Part(manifest.name, chunk.name, form, has_header=has_header, payload=payload)
    for file in manifest.files:
        form = Form("none", file.size, file.digest, b"", (Location(file.object, 0, file.size),))
        yield _Part(manifest.name, file.path, form, is_file=True)


async def _verify(store: Store, part: _Part, tell: Callable[[int], object]) -> str:
    """Return what is wrong with a part; empty if it is intact. `tell` gets the number of its bytes read so far."""
    form, read = part.form, partial(_read_through, store, part, tell)
    if form.stored_bytes and not form.locations:
        return "its manifest does not say where it lies"

    try:
        for location in form.locations:
            size = await store.objects.size(location.object)
            if size < location.stop or (part.is_file and size != location.stop):
                return f"{location.object} has {size} bytes, expected {location.stop}"
        # Damaged blocks are read again one by one, a file as a whole.
        complaint = await (_retried(store, form, read) if part.is_file else read())
        if not complaint and part.payload:
            complaint = await _retried(store, form, partial(_decode, store, form, *part.payload))
        if complaint or not part.has_header:
            return complaint
        return await _retried(store, form, partial(_read_header, store, form.locations[0]))
    except NotFoundError:
        return "it is missing"
    except StorageError as exc:
        await store.check()  # an error of its own, if the storage does not answer
        return f"it cannot be read: {exc}"


async def _retried(store: Store, form: Form, read: Callable[[], Awaitable[str]]) -> str:
    """Return what `read` still complains of after retries: bytes may be damaged in transit."""
    seen: list[str] = []

    async def again() -> str | None:
        for location in form.locations if seen else ():
            store.objects.forget(location.object)
        return await read() or None

    if await read_again(again, seen):
        return ""
    return seen[-1] if len(set(seen)) == 1 else f"{seen[-1]}; {locate_damage(seen)}"


async def _read_header(store: Store, at: Location) -> str:
    """Return what is damaged in the safetensors header before a chunk's payload, which has no digest.

    Names, dtypes and shapes are not compared: models with an equal payload share a file, with the header of one model.
    """
    if not PREFIX_BYTES <= at.start <= PREFIX_BYTES + MAX_HEADER_BYTES:
        return f"its payload begins at byte {at.start}, expected a header of at most {MAX_HEADER_BYTES} bytes before it"
    header = bytearray(at.start)
    await store.objects.read_into(at.object, 0, memoryview(header))
    try:
        length = header_length(bytes(header[:PREFIX_BYTES]), at.stop)
        if length != at.start - PREFIX_BYTES:
            return f"the header of its file says that it has {length} bytes, expected {at.start - PREFIX_BYTES}"
        await asyncio.to_thread(parse_header, bytes(header[PREFIX_BYTES:]), at.stop)
    except HeaderError as exc:
        return f"the header of its file is damaged: {exc}"
    return ""


async def _read_through(store: Store, part: _Part, tell: Callable[[int], object]) -> str:
    """Return what is wrong with the stored bytes; empty if they are intact."""
    form = part.form
    buffers = [memoryview(bytearray(min(form.stored_bytes, PIECE_BYTES))) for _ in range(2)]
    whole, damaged = blake3(), list[int]()

    async def check(start: int, piece: memoryview) -> None:
        """Hash a piece, after its damaged blocks were read again."""
        bad = await in_thread(find_damage, form, start // BLOCK_BYTES, piece) if form.blocks else {}
        for block, digest in bad.items():
            low = block * BLOCK_BYTES - start
            again = partial(_read_block, store, form, block, piece[low : low + BLOCK_BYTES])
            if not await read_again(again, [digest]):
                damaged.append(block)
        if not damaged:
            await in_thread(whole.update, piece)

    before = 0, buffers[0][:0]
    for index, start in enumerate(range(0, form.stored_bytes, PIECE_BYTES)):
        piece = buffers[index % 2][: min(PIECE_BYTES, form.stored_bytes - start)]
        await together([_read(store, form, start, piece), check(*before)])
        before = start, piece
        tell(start + len(piece))
    await check(*before)
    if damaged:
        blocks = count_blocks(form.stored_bytes)
        return f"block {damaged[0]} is damaged ({len(damaged)} of {blocks} blocks are)"
    return "" if whole.hexdigest() == form.digest else f"its digest is {whole.hexdigest()}, expected {form.digest}"


async def _decode(store: Store, form: Form, payload_bytes: int, digest: str) -> str:
    """Return what is wrong with the decoded payload of intact stored bytes. A few MiB are in memory at a time."""
    whole, at, ends = blake3(), 0, [*accumulate(form.frames)]
    frame_of = memoryview(bytearray(FRAME_BYTES))

    def decode(coded: memoryview, first: int, sizes: Sequence[int]) -> None:
        start = 0
        for index, size in enumerate(sizes, first):
            into = frame_of[: min(FRAME_BYTES, payload_bytes - index * FRAME_BYTES)]
            decode_frame(coded[start : start + size], into)
            whole.update(into)
            start += size

    while at < len(ends):
        start = ends[at] - form.frames[at]
        last = max(at + 1, bisect_right(ends, start + PIECE_BYTES))
        coded = memoryview(bytearray(ends[last - 1] - start))
        await _read(store, form, start, coded)
        try:
            await in_thread(decode, coded, at, form.frames[at:last])
        except ValueError as exc:
            return f"it cannot be decoded: {exc}"
        at = last
    return "" if whole.hexdigest() == digest else f"it decodes to BLAKE3 {whole.hexdigest()}, expected {digest}"


async def _read_block(store: Store, form: Form, block: int, destination: memoryview) -> str | None:
    """Read a block past the backend's cache. Returns its digest if that is wrong, otherwise None."""
    start = block * BLOCK_BYTES
    for key, _, _ in segments(form.locations, start, start + len(destination)):
        store.objects.forget(key)
    await _read(store, form, start, destination)
    return (await asyncio.to_thread(find_damage, form, block, destination)).get(block)


async def _read(store: Store, form: Form, start: int, destination: memoryview) -> None:
    """Fill the destination with stored bytes from `start` on."""
    at = 0
    for key, first, length in segments(form.locations, start, start + len(destination)):
        await store.objects.read_into(key, first, destination[at : at + length])
        at += length
