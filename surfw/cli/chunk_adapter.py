"""`surfw chunk ADAPTER --base NAME`: chunk a LoRA adapter over a model of the store."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surfw.config import count, display_url, format_size
from surfw.settings import Settings

if TYPE_CHECKING:
    from surfw.chunking import Outcome, PreparedModel
    from surfw.manifest import Manifest
    from surfw.signing import SigningKey


@dataclass(frozen=True, kw_only=True)
class WantedAdapter:
    """The parsed options of `chunk --base`."""

    model: str
    base: str
    name: str | None
    revision: str | None
    codecs: tuple[str, ...]
    signer: "SigningKey | None"
    dry_run: bool


def chunk_adapter(
    wanted: WantedAdapter, settings: Settings, step: Callable[[str], None], *, json: bool, quiet: bool
) -> None:
    """Chunk an adapter, or show what would be written; `step` shows the current step."""
    from surfw.chunking import prepare_adapter, read_base
    from surfw.cli import chunk_view, render
    from surfw.storage import open_backend
    from surfw.storage.origins import PlacedOptions

    backend = open_backend(settings.store, settings.storage_options)
    if not wanted.dry_run:
        backend.check_rights()
    placed = PlacedOptions.of_chunking(wanted.model, settings.store, settings.storage_options)
    base = asyncio.run(read_base(backend, wanted.base))
    with prepare_adapter(
        wanted.model,
        base,
        backend,
        name=wanted.name,
        revision=wanted.revision,
        show_progress=not (json or quiet) and render.err.is_terminal,
        storage_options=placed.for_url(wanted.model),
        on_step=step,
    ) as prepared:
        step("")
        facts = chunk_view.adapter_facts(prepared)
        if wanted.dry_run:
            render.print_json(facts) if json else _show(prepared)
            return
        manifest, outcomes = _write(prepared, settings, wanted, quiet=json or quiet)
        chunk_view.show_result(facts, manifest, outcomes, display_url(settings.store), quality={}, json=json)


def _write(
    prepared: "PreparedModel", settings: Settings, wanted: WantedAdapter, *, quiet: bool
) -> "tuple[Manifest, Counter[Outcome]]":
    from surfw.chunking import write_model
    from surfw.cli import render
    from surfw.storage import open_backend

    outcomes: Counter[Outcome] = Counter()
    with render.byte_bar("chunking", prepared.plan.payload_bytes, quiet=quiet) as update:
        writing = write_model(
            prepared,
            open_backend(settings.store, settings.storage_options),
            codecs=wanted.codecs,
            signer=wanted.signer,
            progress=lambda size, chunk: update(advance=size, description=chunk),
            on_outcome=lambda _, outcome: outcomes.update([outcome]),
        )
        return asyncio.run(writing), outcomes


def _show(prepared: "PreparedModel") -> None:
    from surfw.cli import render

    assert prepared.base is not None, "it is an adapter"
    chunks = prepared.plan.chunks
    render.say(
        f"{prepared.name}: an adapter over {prepared.base.name}; {count(len(chunks), 'chunk')}, "
        f"{format_size(prepared.plan.payload_bytes)} would be written"
    )
