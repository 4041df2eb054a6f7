"""The work of the commands in `store`, and how the results are shown: one function per command."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from itertools import groupby
from typing import Any, TypeVar

from surfw.cli import render
from surfw.cli.status import percent
from surfw.client import read_stats
from surfw.codec import PACKED_CODECS
from surfw.config import DEFAULT_HOST, count, display_url, format_size
from surfw.errors import IntegrityError, StorageError, SurfwError
from surfw.settings import Settings
from surfw.storage import open_backend
from surfw.storage.housekeeping import (
    Housekeeping,
    Pruned,
    Removed,
    Steps,
    StoreContents,
    StoredModel,
    Verified,
)
from surfw.storage.housekeeping.details import ModelDetails, StoredChunk, describe_model

T = TypeVar("T")

logger = logging.getLogger("surfw.cli")

_ASK_SECONDS = 1.0


def list_models(settings: Settings, *, json: bool, quiet: bool) -> None:
    """Show the contents of the store.

    Raises:
        StorageError: a manifest or a lease is not understood; raised after everything else was shown.
    """
    with _busy(settings, quiet=json or quiet):
        contents = _run(settings, Housekeeping.contents)
    render.show(contents, _show_contents, json=json)
    if contents.complaints:
        what = count(len(contents.complaints), "manifest or lease", "manifests and leases")
        which = f", such as {contents.complaints[0]}" if json else "; the list says which"
        raise StorageError(f"{what} in {contents.store} not understood{which}")


def show_model(settings: Settings, name: str, *, json: bool, quiet: bool) -> None:
    """Show one model of the store."""
    with _busy(settings, quiet=json or quiet):
        details = asyncio.run(describe_model(settings.store, name, storage_options=settings.storage_options))
    if json:
        render.print_json(_document(details))
    else:
        _show_details(details)


def remove_model(settings: Settings, name: str, *, json: bool, quiet: bool) -> None:
    """Remove a model from the store."""
    with _busy(settings, quiet=json or quiet):
        warning = _find_readers(settings, name)  # asked before: a server soon forgets what was removed
        removed = _run(settings, lambda store: store.remove(name))
        if warning:  # said only if the removal was not refused
            logger.warning(warning)
    render.show(removed, _show_removed, json=json)


def prune(settings: Settings, *, dry_run: bool, json: bool, quiet: bool) -> None:
    """Remove the blobs that no model needs."""
    with _progress("pruning", quiet=json or quiet) as progress:
        if warning := _find_readers(settings, None):
            logger.warning(warning)
        pruned = _run(settings, lambda store: store.prune(dry_run=dry_run, progress=progress))
    render.show(pruned, _show_pruned, json=json)


def verify(settings: Settings, model: str | None, *, json: bool, quiet: bool) -> None:
    """Read and check every byte of one model, or of all; if there is a verify key, check signatures first.

    Raises:
        IntegrityError: a signature is missing or wrong; or parts are damaged or missing, raised after all of them were
            shown.
    """
    if settings.verify_key is not None:
        _check_signatures(settings, model)
    with _progress("verifying", quiet=json or quiet) as progress:
        verified = _run(settings, lambda store: store.verify(model, progress=progress))
    render.show(verified, _show_verified, json=json)
    if verified.damage:
        first = verified.damage[0]
        raise IntegrityError(
            f"{count(len(verified.damage), 'part')} in {verified.store} damaged or missing, such as "
            f"{first.part or 'the manifest'} of {first.model}; chunk the model again, which replaces them"
        )


def _check_signatures(settings: Settings, model: str | None) -> None:
    from surfw.signing import VerifyingSource, read_verify_keys
    from surfw.storage.store_source import open_storage_source

    async def check() -> None:
        keys = read_verify_keys(settings.verify_key or "")
        backend = open_backend(settings.store, settings.storage_options)
        async with VerifyingSource(await open_storage_source(backend), keys) as source:
            for name in await source.models() if model is None else [await source.resolve(model)]:
                await source.manifest(name)

    asyncio.run(check())


def _run(settings: Settings, work: Callable[[Housekeeping], Awaitable[T]]) -> T:
    async def run() -> T:
        async with Housekeeping(settings.store, storage_options=settings.storage_options) as store:
            return await work(store)

    return asyncio.run(run())


def _find_readers(settings: Settings, model: str | None) -> str:
    """Return a warning if a server on this machine has clients that read the model, otherwise "".

    The model None means models that were removed already.

    A store does not know its readers, so this asks the server at the setting `port` of this machine. A server that
    serves another store, or does not answer within a second, is ignored.
    """
    url = f"ws://{DEFAULT_HOST}:{settings.port}"
    try:
        stats: Mapping[str, Any] = read_stats(url, token=settings.token, timeout_seconds=_ASK_SECONDS)
        store = display_url(open_backend(settings.store, settings.storage_options).url)
    except SurfwError:
        return ""
    if stats["storage"]["url"] != store or not stats["clients"]:
        return ""
    if "connections" in stats:
        reading = [one["model"] for one in stats["connections"] if one["model"]]
        readers = sum(one == model if model else one not in stats["models"] for one in reading)
    else:  # the server does not say who reads what
        readers = stats["clients"] if model is None or model in stats["models"] else 0
    if not readers:
        return ""
    return (
        f"the server at {url} serves this store, and {count(readers, 'client')} of it may be reading "
        f"{model or 'models that were removed'}; what they run will fail"
    )


def _busy(settings: Settings, *, quiet: bool) -> AbstractContextManager[object]:
    return render.busy(f"reading {display_url(settings.store)}", quiet=quiet)


@contextmanager
def _progress(what: str, *, quiet: bool) -> Iterator[Steps]:
    with render.byte_bar(what, quiet=quiet) as update:
        yield lambda done, total, _: update(completed=done, total=total)


def _show_contents(contents: StoreContents) -> None:
    _show_models(contents.models)
    for one in contents.unfinished:
        state = f"being written by process {one.pid} on {one.host}" if one.at_work else "unfinished; its writer ended"
        advice = "" if one.at_work else "; 'surfw chunk' resumes it, 'surfw rm' gives it up"
        render.say(f"{one.name}: {state}; {count(one.blobs, 'blob')} kept for it{advice}")
    render.say(f"{count(len(contents.models), 'model')}, {format_size(contents.stored_bytes)} in {contents.store}")
    if contents.unneeded_blobs:
        size = format_size(contents.unneeded_bytes or 0)
        render.say(f"{count(contents.unneeded_blobs, 'blob')} of no model, {size}: 'surfw prune' removes them")
    if contents.left_alone:
        names = render.list_names(contents.left_alone)
        render.say(f"{count(len(contents.left_alone), 'object')} not surfw's: {names}")
    for complaint in contents.complaints:
        render.say(f"not understood, so that nothing can be pruned: {complaint}")


def _show_models(models: Sequence[StoredModel]) -> None:
    if models:
        headings = ("model", "class", "dtype", "layers", "size", "shared")
        rows = [
            (
                one.name,
                one.class_name if one.base is None else f"LoRA over {one.base}",
                one.dtype if set(one.codecs) - set(PACKED_CODECS) else f"{one.dtype} as {', '.join(one.codecs)}",
                str(one.layers),
                format_size(one.stored_bytes),
                format_size(one.shared_bytes),
            )
            for one in models
        ]
        render.print_table(headings, rows, numbers=headings[3:])
    for one in models:
        if one.origin is not None:
            render.say(f"{one.name}: not copied; its weights, {format_size(one.payload_bytes)}, lie in {one.origin}")


def _document(model: ModelDetails) -> dict[str, Any]:
    """Return what `--json` prints for a model; some facts are repeated under the keys that `chunk` uses."""
    facts = asdict(model)
    if facts["experts"] is None:
        del facts["experts"]
    parts = [part | {"bytes": part["payload_bytes"]} for part in facts["parts"]]
    return facts | {"model": model.name, "class": model.class_name, "parts": parts}


def _show_details(model: ModelDetails) -> None:
    rows = [
        ("store", model.store),
        ("class", f"{model.class_name}, {model.dtype}"),
        ("chunks", f"{model.chunks}, {model.layers} of them layers"),
        ("weights", format_size(model.payload_bytes)),
        (
            "in the store",
            f"{format_size(model.stored_bytes)}, {format_size(model.shared_bytes)} shared with other models",
        ),
        ("forms", ", ".join(f"{codec} {format_size(size)}" for codec, size in model.form_bytes.items())),
        ("files", ", ".join(file.name for file in model.files) or "none, so that it takes no text"),
        ("digest", model.digest),
        ("pin", f"@b3:{model.identity}" if model.identity else "none, without digests of its weights"),
    ]
    if model.base is not None:
        rows.insert(1, ("adapter", f"LoRA over {model.base}"))
        rows = [(name, what) for name, what in rows if name != "files" or model.files]
    if model.origin is not None:
        rows[4] = ("origin", f"{model.origin}; the weights were not copied")
    if model.key_id is not None:
        rows.append(("encrypted", f"with key {model.key_id}"))
    if used := model.experts:
        share = f"{percent(used.quarter_share)} of the choices fell on the most chosen quarter"
        rows.append(("experts", f"{share}, in {count(used.tokens, 'token')} so far"))
    if model.signed_by is not None:
        rows.append(("signed", f"with key {model.signed_by}, which --verify-key checks"))
    render.print_table(("model", model.name), rows)
    render.out.print()
    headings = ("chunk", "kind", "tensors", "size")
    render.print_table(headings, map(_row, _alike(model.parts)), numbers=headings[2:])


def _alike(parts: Sequence[StoredChunk]) -> list[list[StoredChunk]]:
    """Group adjacent chunks with the same kind, number of tensors and size."""
    return [list(group) for _, group in groupby(parts, lambda one: (one.kind, one.tensors, one.payload_bytes))]


def _row(group: Sequence[StoredChunk]) -> tuple[str, ...]:
    first, last = group[0], group[-1]
    name = first.name if len(group) == 1 else f"{first.name} … {last.name} ({len(group)})"
    each = " each" * (len(group) > 1)
    return name, first.kind, str(first.tensors), f"{format_size(first.payload_bytes)}{each}"


def _show_removed(removed: Removed) -> None:
    done = ["removed"] * removed.published + ["unfinished work given up"] * bool(removed.given_up)
    render.say(f"{removed.model}: {', '.join(done)}; its blobs stay until 'surfw prune'")


def _show_pruned(pruned: Pruned) -> None:
    verb = "would be removed" if pruned.dry_run else "removed"
    render.say(f"{count(pruned.blobs, 'blob')}, {format_size(pruned.blob_bytes)}, {verb} from {pruned.store}")
    if pruned.leftover_bytes:
        size = format_size(pruned.leftover_bytes)
        render.say(f"{size} of unfinished work on this machine, older than a week, {verb}")
    if pruned.left_alone:
        render.say(f"left alone, because they are not surfw's: {render.list_names(pruned.left_alone)}")


def _show_verified(verified: Verified) -> None:
    for damage in verified.damage:
        where = f", {damage.part}" * bool(damage.part) + f" ({', '.join(damage.objects)})" * bool(damage.objects)
        render.say(f"{damage.model}{where}: {damage.complaint}")
    for model in verified.undigested:
        render.say(
            f"{model}: its manifest has no digest, so damage to it is not noticed; chunk the model again to add one"
        )
    render.say(
        f"{count(len(verified.models), 'model')}, {count(verified.parts, 'chunk or file', 'chunks and files')}, "
        f"{format_size(verified.read_bytes)} read in {verified.store}: "
        f"{f'{len(verified.damage)} damaged' if verified.damage else 'all as it should be'}"
    )
