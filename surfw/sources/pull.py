"""Fetch a whole model into a disk cache before its first run."""

from collections.abc import Callable
from dataclasses import dataclass

from surfw.codec import choose_form, for_run
from surfw.config import CodecChoice, format_size
from surfw.errors import StorageError, StorageFullError
from surfw.manifest import Chunk, Form, Manifest, count_blocks
from surfw.source import check_pin, split_pin
from surfw.sources.disk_cache import DiskCache


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulled:
    """A model in a disk cache.

    Attributes:
        manifest: the model.
        stored_bytes: the stored bytes of its cached forms.
        fetched_bytes: stored bytes that were fetched from the source.
    """

    manifest: Manifest
    stored_bytes: int
    fetched_bytes: int


async def pull_model(
    cache: DiskCache,
    name: str | None,
    *,
    codec: CodecChoice = "auto",
    check: Callable[[Manifest], object] = lambda _: None,
    progress: Callable[[int, int, str], object] = lambda *_: None,
) -> Pulled:
    """Fetch all chunks and files of a model into the cache, and pin it. Resumes an interrupted call.

    Args:
        cache: the cache, with a source.
        name: the model's name in the source, in full or a unique last part, optionally with a pin; None for the only
            model.
        codec: which forms to fetch; `auto` prefers cached forms, then compressed ones.
        check: called with the manifest before anything else is fetched; raises to refuse it.
        progress: called with the stored bytes done, their total, and the next chunk.

    Raises:
        StorageFullError: the model does not fit into the budget.
        StorageError: the folder cannot be written.
        SurfwError: the source cannot be reached or read.
    """
    wanted, pin = split_pin(name)
    manifest = await cache.manifest(await cache.resolve(wanted))
    check_pin(manifest, pin, where=cache.url)
    check(manifest)
    forms = [(chunk, _choose(cache, manifest, chunk, codec)) for chunk in manifest.chunks]
    total, done = sum(form.stored_bytes for _, form in forms), 0
    blobs = {form.digest or chunk.id: form.stored_bytes for chunk, form in forms}
    least = sum(size + count_blocks(size) for size in blobs.values())
    if (most := cache.folder.budget_bytes) is not None and most < least and cache.is_writable:
        raise StorageFullError(  # refused before a part of it is cached and pinned
            f"the disk cache in {cache.folder.path} may take {format_size(most)}, and {manifest.name} takes "
            f"{format_size(least)} ({least} bytes); give it more (disk_cache, --disk-cache)"
        )
    await cache.pin(manifest)
    for file in manifest.files:
        await cache.file(manifest, file.path)
    for chunk, form in forms:
        progress(done, total, chunk.name)
        await cache.learn(manifest, chunk)
        if not await cache.keep(manifest, chunk, form):
            _refuse(cache, manifest, done, total)
        done += form.stored_bytes
    progress(done, total, "")
    return Pulled(manifest=manifest, stored_bytes=total, fetched_bytes=cache.far_bytes)


def _choose(cache: DiskCache, manifest: Manifest, chunk: Chunk, codec: CodecChoice) -> Form:
    chunk = for_run(manifest, codec, where=cache.url).by_name[chunk.name]
    if codec != "auto":
        return choose_form(chunk, codec)
    near = cache.near(manifest, chunk)
    return near[0] if near else choose_form(chunk, "lossless")


def _refuse(cache: DiskCache, manifest: Manifest, done: int, total: int) -> None:
    place = cache.folder.path
    if not cache.is_writable:
        raise StorageError(f"the disk cache in {place} cannot be written; name another (cache_dir, --cache-dir)")
    raise StorageFullError(
        f"the disk cache in {place} has room for {format_size(done)} of the {format_size(total)} of {manifest.name}; "
        "give it more (disk_cache, --disk-cache), or make room with 'surfw rm --cached'"
    )
