"""The disk cache: `surfw pull` fills it, `list --cached` shows it, `rm --cached` removes models from it."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surfw.cli import completion, options
from surfw.cli.addresses import Mistake
from surfw.config import count, display_url, format_size
from surfw.errors import ConfigurationError, NotFoundError

if TYPE_CHECKING:
    from surfw.manifest import Manifest
    from surfw.models.client import WeightClient
    from surfw.settings import Settings
    from surfw.source import ChunkSource
    from surfw.sources.disk import CachedModel, CacheFolder
    from surfw.sources.pull import Pulled

EXAMPLES = """\b
Examples:
  surfw pull 127.0.0.1:8765
  surfw pull my-model --source s3://bucket/store --disk-cache 50GB
  surfw list --cached
"""

_NO_LIMIT_BYTES = 1 << 62
"""The limit of a cache whose size was not set: pulled models are kept whatever their size."""

_DIGEST_SHOWN = 12


@options.with_settings(
    "model", "source", "source_order", "storage_options", "codec", "disk_cache", "cache_dir", "connect_timeout",
    "silence_timeout", "retry_attempts", "retry_first_delay", "retry_backoff", "retry_most_delay", "retry_jitter",
    "retry_restart", "deadline", "token_file", *options.TLS_SETTINGS, "verify_key",
)  # fmt: skip
def pull(
    *,
    place: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="The model's name in the source, or a source: HOST:PORT, URL, or hub id. [default: see --source]",
            autocompletion=completion.models_in_source,
        ),
    ] = None,
    configuration: options.Configuration,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fetch a model into the disk cache and pin it there. Remove it with 'surfw rm --cached'."""
    from surfw.cli import render
    from surfw.cli.sources import choose_model, choose_source
    from surfw.models.client import WeightClient
    from surfw.storage.origins import is_local_url

    if place is not None:
        configuration = choose_model(configuration, place)
    settings = configuration.settings
    with choose_source(configuration) as chosen:
        if all(map(is_local_url, chosen.all)):
            raise Mistake(
                f"{display_url(chosen.url)} is on this machine, which needs no disk cache; name a source with --source"
            )
        connection = chosen.connection(settings) | {
            "disk_cache": settings.disk_cache or _NO_LIMIT_BYTES,
            "offline": False,
            "verify_key": None,  # the manifest is checked below
            "encryption_key_file": None,  # chunks are cached as they are stored
        }
        with WeightClient(chosen.all if chosen.others else chosen.url, **connection) as client:
            pulled = _pull(client, settings, quiet=json or quiet)
    cache = _folder(settings).path
    if json:
        render.print_json(
            {
                "model": pulled.manifest.name,
                "source": display_url(chosen.url),
                "digest": pulled.manifest.digest,
                "stored_bytes": pulled.stored_bytes,
                "fetched_bytes": pulled.fetched_bytes,
                "cache": str(cache),
            }
        )
    else:
        fetched = format_size(pulled.fetched_bytes) if pulled.fetched_bytes else "nothing"
        render.say(
            f"{pulled.manifest.name}: {format_size(pulled.stored_bytes)} in {cache}, {fetched} fetched now; "
            "--disk-cache SIZE or --offline runs it from there"
        )


def _pull(client: "WeightClient", settings: "Settings", *, quiet: bool) -> "Pulled":
    from surfw.cli import render
    from surfw.signing import read_verify_keys
    from surfw.sources.disk_cache import DiskCache
    from surfw.sources.pull import pull_model

    keys = None if settings.verify_key is None else read_verify_keys(settings.verify_key)

    def check(manifest: "Manifest") -> None:
        if keys is not None:
            keys.check(manifest, where=client.url)

    with render.byte_bar("pulling", quiet=quiet) as update:

        async def pull(source: "ChunkSource") -> "Pulled":
            assert isinstance(source, DiskCache), "it was asked for"
            return await pull_model(
                source,
                settings.model,
                codec=settings.codec,
                check=check,
                progress=lambda done, total, chunk: update(completed=done, total=total, description=chunk),
            )

        try:
            return client.run(pull)
        except KeyboardInterrupt as exc:
            raise KeyboardInterrupt("the same command goes on where it stopped") from exc


def _folder(settings: "Settings") -> "CacheFolder":
    from surfw.models.disk_options import disk_options

    return disk_options(settings.disk_cache, settings.cache_dir, offline=False).open_folder()


def list_cached(settings: "Settings", *, json: bool) -> None:
    """List the models in the disk cache."""
    from surfw.cli import render

    folder = _folder(settings)
    models = folder.models()
    if json:
        render.print_json(
            {"cache": str(folder.path), "used_bytes": folder.used_bytes(), "models": [_facts(one) for one in models]}
        )
        return
    if models:
        headings = ("model", "digest", "there", "last used", "size")
        rows = [
            (
                one.manifest.name,
                one.manifest.digest[:_DIGEST_SHOWN],
                f"{'all' if one.complete else 'a part'}{', pinned' if one.pinned else ''}",
                _ago(time.time() - one.used),
                format_size(one.held_bytes),
            )
            for one in models
        ]
        render.print_table(headings, rows, numbers=headings[4:])
    render.say(f"{count(len(models), 'model')}, {format_size(folder.used_bytes())} in {folder.path}")


def _facts(one: "CachedModel") -> dict[str, Any]:
    return {
        "model": one.manifest.name,
        "digest": one.manifest.digest,
        "sources": list(one.sources),
        "last_used": one.used,
        "pinned": one.pinned,
        "complete": one.complete,
        "held_bytes": one.held_bytes,
    }


def remove_cached(settings: "Settings", name: str, *, json: bool) -> None:
    """Remove a model from the disk cache.

    Raises:
        UnknownModelError: the cache does not hold it.
        NotFoundError: the cache is empty.
        ConfigurationError: a process uses it.
    """
    from surfw.cli import render
    from surfw.source import find_model

    folder = _folder(settings)
    found = [one.manifest for one in folder.models()]
    if not found:
        raise NotFoundError(f"the disk cache in {folder.path} holds no model; 'surfw pull' puts one there")
    full = find_model(name, sorted({one.name for one in found}), where=f"the disk cache in {folder.path}")
    freed = 0
    for manifest in found:
        if manifest.name == full:
            if folder.in_use(manifest.digest):
                raise ConfigurationError(f"{full} is in use by a process; end that first")
            freed += folder.remove(manifest)
    if json:
        render.print_json({"model": full, "cache": str(folder.path), "freed_bytes": freed})
    else:
        render.say(f"{full}: removed from {folder.path}, {format_size(freed)} freed")


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit} ago"
    return "now"
