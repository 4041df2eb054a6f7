"""`surfw chunk MODEL --from SOURCE`: copy a chunked model into a store."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surfw.cli import options
from surfw.config import display_url, is_server_url

if TYPE_CHECKING:
    from surfw.chunking import Outcome
    from surfw.encryption import EncryptionKey
    from surfw.manifest import Manifest
    from surfw.signing import SigningKey
    from surfw.source import ChunkSource


@dataclass(frozen=True, kw_only=True)
class Copy:
    """The parsed options of `chunk --from`."""

    model: str
    source: str
    name: str | None
    codecs: tuple[str, ...] | None
    only_experts: bool
    encrypt: str | None
    key: "EncryptionKey | None"
    signer: "SigningKey | None"
    dry_run: bool


def copy_model(
    wanted: Copy, configuration: options.Configuration, step: Callable[[str], None], *, json: bool, quiet: bool
) -> None:
    """Copy a chunked model, or show what would be written; `step` shows the current step."""
    from surfw import chunking
    from surfw.chunking.copy import check_copy
    from surfw.cli import chunk_quality, chunk_view, render
    from surfw.cli.addresses import read_source
    from surfw.codec import stored_codecs, stored_packed_codecs
    from surfw.models.client import WeightClient
    from surfw.storage import open_backend
    from surfw.storage.origins import PlacedOptions, is_local_url

    settings = configuration.settings
    url = read_source(wanted.source, seconds=settings.connect_timeout, tls=settings.tls)
    placed = PlacedOptions(url if is_local_url(settings.store) else settings.store, settings.storage_options)
    backend = open_backend(settings.store, placed.for_url(settings.store))
    is_server = is_server_url(url)
    outcomes: Counter[Outcome] = Counter()
    with WeightClient(
        url,
        token=settings.token if is_server else None,
        ssl=options.tls_for(configuration, url),
        storage_options=None if is_server else placed.for_url(url),
        verify_key=settings.verify_key,
    ) as client:

        async def find(source: "ChunkSource") -> "Manifest":
            return await source.manifest(await source.resolve(wanted.model))

        manifest = client.run(find)
        step("")
        facts = chunk_view.copy_facts(manifest, wanted.name or manifest.name)
        if wanted.dry_run:
            client.run(
                lambda _: check_copy(
                    manifest,
                    backend,
                    name=wanted.name,
                    codecs=wanted.codecs,
                    only_experts=wanted.only_experts,
                    key=wanted.key,
                )
            )
            render.print_json(facts) if json else chunk_view.show_copy(manifest)
            return
        with render.byte_bar("copying", manifest.payload_bytes, quiet=json or quiet) as update:
            try:
                copied = client.run(
                    lambda source: chunking.copy_model(
                        source,
                        manifest,
                        backend,
                        name=wanted.name,
                        codecs=wanted.codecs,
                        only_experts=wanted.only_experts,
                        key=wanted.key,
                        signer=wanted.signer,
                        progress=lambda size, chunk: update(advance=size, description=chunk),
                        on_outcome=lambda _, outcome: outcomes.update([outcome]),
                    )
                )
            except KeyboardInterrupt as exc:
                raise KeyboardInterrupt("the same command goes on where it stopped") from exc
        quality = chunk_quality.measure(
            copied,
            [codec for codec in stored_packed_codecs(copied) if codec not in stored_codecs(manifest)],
            reference=(client, {"model": manifest.name}),
            written=(
                settings.store,
                {
                    "model": copied.name,
                    "storage_options": placed.for_url(settings.store),
                    "encryption_key_file": wanted.encrypt,
                },
            ),
            step=step,
        )
    chunk_view.show_result(facts, copied, outcomes, display_url(settings.store), quality=quality, json=json)
