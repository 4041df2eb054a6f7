"""`surfw chunk --list`, `--remove`, `--prune` and `--verify`: keeping a store in order."""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from surfw.config import count, format_size

if TYPE_CHECKING:
    from surfw.storage.housekeeping import Housekeeping, Pruned, Removed, Steps, StoreContents, StoredModel, Verified

T = TypeVar("T")
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What of it is asked for."""

    listing: bool
    remove: str | None
    prune: bool
    verify: bool

    def __bool__(self) -> bool:
        """Whether any is."""
        return self.listing or self.remove is not None or self.prune or self.verify


def check(wish: Wish, *, model: str | None, dry_run: bool, chunking: Mapping[str, bool]) -> None:
    """Refuse options that make no sense together.

    Raises:
        BadParameter: some do not.
    """
    asked = {
        "--list": wish.listing, "--remove": wish.remove is not None, "--prune": wish.prune, "--verify": wish.verify
    }  # fmt: skip
    given = [name for name, there in asked.items() if there]
    if not given:
        if model is None:
            raise typer.BadParameter(
                "name a checkpoint to chunk, or say --list, --remove, --prune or --verify", param_hint="MODEL"
            )
        return
    if len(given) > 1:
        raise typer.BadParameter(f"give one of {' and '.join(given)} at a time", param_hint=given[1])
    if model is not None and not wish.verify:
        raise typer.BadParameter(f"{given[0]} takes no MODEL to chunk", param_hint="MODEL")
    if dry_run and not wish.prune:
        raise typer.BadParameter(f"does not go with {given[0]}", param_hint="--dry-run")
    for name, is_given in chunking.items():
        if is_given:
            raise typer.BadParameter(f"is for chunking, and does not go with {given[0]}", param_hint=name)


def keep(
    wish: Wish, place: str, options: Mapping[str, Any] | None, *, model: str | None, dry_run: bool, json: bool
) -> None:
    """Do what is asked for, and show what came of it."""
    import asyncio

    from surfw.storage.housekeeping import Housekeeping

    async def run(work: "Callable[[Housekeeping], Awaitable[T]]") -> T:
        async with Housekeeping(place, storage_options=options) as house:
            return await work(house)

    if wish.listing:
        _show(asyncio.run(run(lambda house: house.contents())), _show_listing, json=json)
    elif wish.remove is not None:
        name = wish.remove
        _show(asyncio.run(run(lambda house: house.remove(name))), _show_removed, json=json)
    elif wish.prune:
        with _bar("pruning", quiet=json) as progress:
            pruned = asyncio.run(run(lambda house: house.prune(dry_run=dry_run, progress=progress)))
        _show(pruned, _show_pruned, json=json)
    else:
        with _bar("verifying", quiet=json) as progress:
            verified = asyncio.run(run(lambda house: house.verify(model, progress=progress)))
        _show(verified, _show_verified, json=json)
        _fail_if_damaged(verified)


@contextmanager
def _bar(what: str, *, quiet: bool) -> "Iterator[Steps]":
    from surfw.cli import render

    with render.byte_bar(quiet=quiet) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, _: bar.update(task, completed=done, total=total)


def _show(result: Any, show: Callable[[Any], None], *, json: bool) -> None:
    from surfw.cli import render

    if json:
        render.print_json(asdict(result))
    else:
        show(result)


def _say(text: str) -> None:
    from surfw.cli import render
    from surfw.cli.streams import one_line

    render.out.print(one_line(text), soft_wrap=True)


def _name_some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _show_models(models: "tuple[StoredModel, ...]") -> None:
    from rich.table import Table

    from surfw.cli import render

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("model", "class", "dtype"):
        table.add_column(title)
    for title in ("layers", "size", "shared"):
        table.add_column(title, justify="right")
    for model in models:
        sizes = (format_size(model.stored_bytes), format_size(model.shared_bytes))
        table.add_row(model.name, model.class_name, model.dtype, str(model.layers), *sizes)
    if models:
        render.out.print(table)
    for model in models:
        if model.origin is not None:
            _say(f"{model.name}: not copied; its weights, {format_size(model.payload_bytes)}, lie in {model.origin}")


def _show_listing(listing: "StoreContents") -> None:
    _show_models(listing.models)
    for one in listing.unfinished:
        state = f"being written by process {one.pid} on {one.host}" if one.at_work else "unfinished; its writer ended"
        ends = "" if one.at_work else "; 'surfw chunk' resumes it, --remove gives it up"
        _say(f"{one.name}: {state}; {count(one.blobs, 'blob')} kept for it{ends}")
    _say(f"{count(len(listing.models), 'model')}, {format_size(listing.stored_bytes)} in {listing.store}")
    if listing.unneeded_blobs:
        size = format_size(listing.unneeded_bytes or 0)
        _say(f"{count(listing.unneeded_blobs, 'blob')} of no model, {size}: --prune removes them")
    if listing.left_alone:
        _say(f"{count(len(listing.left_alone), 'object')} not surfw's: {_name_some(listing.left_alone)}")
    for complaint in listing.complaints:
        _say(f"not understood, so that nothing can be pruned: {complaint}")


def _show_removed(removed: "Removed") -> None:
    done = ["removed"] * removed.published + ["unfinished work given up"] * bool(removed.given_up)
    _say(f"{removed.model}: {', '.join(done)}; its blobs stay until 'surfw chunk --prune'")


def _show_pruned(pruned: "Pruned") -> None:
    verb = "would be removed from" if pruned.dry_run else "removed from"
    _say(f"{count(pruned.blobs, 'blob')}, {format_size(pruned.blob_bytes)}, {verb} {pruned.store}")
    if pruned.leftover_bytes:
        verb = "would be removed" if pruned.dry_run else "removed"
        _say(f"{format_size(pruned.leftover_bytes)} of unfinished work on this machine, older than a week, {verb}")
    if pruned.left_alone:
        _say(f"left alone, because they are not surfw's: {_name_some(pruned.left_alone)}")


def _show_verified(verified: "Verified") -> None:
    for damage in verified.damage:
        where = f", {damage.part}" * bool(damage.part) + f" ({', '.join(damage.objects)})" * bool(damage.objects)
        _say(f"{damage.model}{where}: {damage.complaint}")
    for model in verified.undigested:
        _say(f"{model}: its manifest has no digest, so that damage to it is not seen; chunk the model again to add one")
    _say(
        f"{count(len(verified.models), 'model')}, {count(verified.parts, 'chunk or file', 'chunks and files')}, "
        f"{format_size(verified.read_bytes)} read in {verified.store}: "
        f"{f'{len(verified.damage)} damaged' if verified.damage else 'all as it should be'}"
    )


def _fail_if_damaged(verified: "Verified") -> None:
    from surfw.errors import IntegrityError

    if verified.damage:
        first = verified.damage[0]
        raise IntegrityError(
            f"{count(len(verified.damage), 'part')} in {verified.store} damaged or missing, such as "
            f"{first.part or 'the manifest'} of {first.model}; chunk the model again, which replaces them"
        )
