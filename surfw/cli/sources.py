"""Choose the source of a model's weights, open the model, and serve the demo model.

The source is the first of these that applies: the setting `source`; a surfw server at the setting `port` of 127.0.0.1;
the setting `store`, if it was set or holds models; the demo model, if no other was named. The model `demo` is always
the demo model, unless `--source` is given. A server that answers but refuses access is an error: a silent fallback to
the store might run other weights than intended.
"""

import asyncio
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from surfw.checkpoint import demo_checkpoint
from surfw.cli.addresses import Mistake, is_here, is_host, is_path, read_address, read_source
from surfw.cli.options import Configuration, tls_for
from surfw.config import DEFAULT_HOST, DEFAULT_PORT, TlsFiles, display_url, is_server_url, parse_size, surfw_home
from surfw.errors import ConfigurationError, StorageError, SurfwError, WireError
from surfw.files import expand_home
from surfw.manifest import VERSION
from surfw.settings import SettingOrigin, Settings
from surfw.storage.origins import is_local_url

if TYPE_CHECKING:
    from surfw.manifest import Manifest
    from surfw.models.client import WeightClient
    from surfw.models.options import ConnectionOptions
    from surfw.models.read_ahead import ReadAheadClient
    from surfw.models.streaming import StreamingModel

DEMO = "demo"
_TURN_SECONDS = 0.0005
"""The thread switch interval during imports, and so the longest wait of the thread that receives weights."""

_MODEL = "MODEL"
"""The positional argument of `infer`."""


@dataclass(frozen=True)
class ChosenSource:
    """Where the weights come from, and why, with the certificates for a server with TLS."""

    url: str
    reason: str
    others: tuple[str, ...] = ()
    tls: TlsFiles | None = None

    @property
    def is_server(self) -> bool:
        """Whether the source is a server rather than a store."""
        return is_server_url(self.url)

    @property
    def all(self) -> tuple[str, ...]:
        """The source and its fallbacks, in order."""
        return (self.url, *self.others)

    @property
    def described(self) -> str:
        """All sources and the reason for the choice, as text for people."""
        others = "".join(f", then {display_url(url)}" for url in self.others)
        return f"{display_url(self.url)}{others} ({self.reason})"

    def connection(self, settings: Settings) -> "ConnectionOptions":
        """Return the connection options from the settings."""
        servers = [is_server_url(url) for url in self.all]
        return {
            "token": settings.token if any(servers) else None,
            "ssl": self.tls,
            "storage_options": None if all(servers) else settings.storage_options,
            "retry": settings.retry,
            "connect_timeout": settings.connect_timeout,
            "silence_timeout": settings.silence_timeout,
            "disk_cache": settings.disk_cache,
            "cache_dir": settings.cache_dir,
            "offline": settings.offline,
            "deadline": settings.deadline,
            "encryption_key_file": settings.encryption_key_file,
            "verify_key": settings.verify_key,
            "source_order": settings.source_order,
        }

    def check_folder(self) -> None:
        """Check, without importing torch, that each local source is a store or a checkpoint.

        Raises:
            NotAStoreError: one is neither.
        """
        from surfw.storage import open_backend
        from surfw.storage.backends import refuse_file
        from surfw.storage.store import is_checkpoint

        for url in filter(is_local_url, self.all):
            refuse_file(url)
            asyncio.run(is_checkpoint(open_backend(url)))


@contextlib.contextmanager
def choose_source(
    configuration: Configuration, *, on_phase: Callable[[str], None] = lambda _: None
) -> Iterator[ChosenSource]:
    """Choose the source; the demo model's server, if needed, runs as long as the context.

    Args:
        configuration: of the command.
        on_phase: called with a description of each slow phase.
    """
    settings, origin = configuration.settings, configuration.origins["source"]
    if settings.source is not None and (settings.model != DEMO or origin.kind == "argument"):
        how = {
            "argument": "as MODEL" if origin.name == _MODEL else "with --source",
            "variable": f"by {origin.name}",
        }.get(origin.kind, f"in {origin.name}")
        url, *others = [
            read_source(one, seconds=settings.connect_timeout, tls=settings.tls) for one in settings.sources
        ]
        is_hub = read_address(settings.sources[0]).kind == "hub"
        reason = f"named {how}{'; no such folder is here' if is_hub else ''}"
        encrypted = next((one for one in (url, *others) if one.startswith("wss://")), url)
        yield ChosenSource(url, reason, tuple(others), tls_for(configuration, encrypted))
        return
    if settings.model != DEMO:
        local = f"ws://{DEFAULT_HOST}:{settings.port}"
        tls_for(configuration, local)
        if settings.offline and not _holds_models(configuration):
            yield ChosenSource(local, "the server on this machine, as far as the disk cache has it")
            return
        if not settings.offline and _is_served(local, configuration):
            yield ChosenSource(local, "the server on this machine")
            return
        if _holds_models(configuration):
            is_default = configuration.origins["store"].kind == "default"
            yield ChosenSource(settings.store, "the default store" if is_default else "the store that is set")
            return
        if settings.model is not None:
            raise ConfigurationError(
                f"there is no model {settings.model[:80]!a}: no server answers at {local}, and {settings.store} holds "
                "no models; name the source with --source, or chunk the model first"
            )
    on_phase("starting a server for the demo model, importing torch")
    with _serve_demo() as url:
        yield ChosenSource(url, "the demo model that comes with surfw, through a server of its own")


def choose_model(configuration: Configuration, word: str) -> Configuration:
    """Apply the argument MODEL to the configuration: it is a model's name in the source, or a source.

    A word that may be either is a name if the server on this machine, or else the store, has a model of that name.

    Raises:
        Mistake: MODEL contradicts --model or --source, or looks like a prompt or a host.
        ConfigurationError: the server on this machine refuses access.
    """
    origins, address = configuration.origins, read_address(word)
    is_source = address.kind in {"server", "web", "storage"} or is_path(word)
    may_be_source = word != DEMO and (address.kind == "hub" or is_here(word))
    if not is_source and any(one.isspace() for one in word) and not is_here(word):
        raise Mistake(f"{word[:60]!r} is no model's name; for a prompt alone write --prompt {word[:60]!r}")
    if is_host(word):
        raise Mistake(f"{word} is a host, and no model's name; a server is HOST:PORT, such as {word}:{DEFAULT_PORT}")
    named = origins["source"].kind == "argument"
    if not is_source and may_be_source and origins["source"].kind == "default":
        is_source = not _has_model(configuration, word)
    if is_source and named:
        raise Mistake(f"--source does not go with MODEL {display_url(word)!r}, which is a source; give one of them")
    if is_source:
        model = configuration.settings.model if origins["model"].kind == "argument" else None
        settings = replace(configuration.settings, source=word, model=model)
        origins = {**origins, "source": SettingOrigin("argument", _MODEL)}
        return replace(configuration, settings=settings, origins=origins)
    if origins["model"].kind == "argument":
        raise Mistake(f"--model does not go with MODEL {word!r}; give one of them (a prompt may also be --prompt)")
    settings = replace(configuration.settings, model=word)
    origins = {**origins, "model": SettingOrigin("argument", _MODEL)}
    return replace(configuration, settings=settings, origins=origins)


def _has_model(configuration: Configuration, name: str) -> bool:
    """Whether the server on this machine, or else the store, has a model whose name, or its last part, is this."""
    from surfw.models.client import WeightClient

    settings = configuration.settings
    local = f"ws://{DEFAULT_HOST}:{settings.port}"
    is_served = _is_served(local, configuration)
    if not is_served and not _holds_models(configuration):
        return False
    with WeightClient(
        local if is_served else settings.store,
        token=settings.token if is_served else None,
        storage_options=None if is_served else settings.storage_options,
    ) as client:
        return any(name in {one, one.rpartition("/")[2]} for one in client.models())


def _holds_models(configuration: Configuration) -> bool:
    """Whether the store is a candidate: it was set, or the default store holds models."""
    is_default = configuration.origins["store"].kind == "default"
    return not is_default or any((expand_home(configuration.settings.store) / "models").rglob("*.json"))


@contextlib.contextmanager
def connect(
    chosen: "ChosenSource", settings: Settings, *, explain: bool, check: "Callable[[Manifest], None]" = lambda _: None
) -> Iterator["ReadAheadClient"]:
    """Connect to the source without torch, pass the manifest to `check`, and read ahead during the imports.

    Chunks are not read ahead if they are cast to another dtype, copied to a device, streamed, or measured first.
    """
    from surfw.models.read_ahead import ReadAheadClient

    budget = None if settings.memory_budget is None else parse_size(settings.memory_budget)
    is_streamed = settings.cache_layers is not None or settings.dtype not in {None, "auto"} or explain
    is_streamed |= settings.device != "cpu"  # its weights do not stay in host memory, where they are read ahead
    with ReadAheadClient(
        chosen.all if chosen.others else chosen.url,
        settings.model,
        memory_bytes=0 if is_streamed else budget,
        codec=settings.codec,
        budget_bytes=budget,
        adapter=settings.adapter,
        **chosen.connection(settings),
    ) as client:
        on_cpu = settings.device in {"cpu", "auto"} and settings.dtype in {None, "auto"}
        client.begin(check, on_cpu=on_cpu, streams=settings.cache_layers is not None)
        yield client


def find_manifest(client: "WeightClient", name: str | None) -> "Manifest":
    """Return the manifest of a model, without importing torch. Checks that it exists and matches a pin in its name.

    Args:
        client: reads it.
        name: as the user gave it; None for the only model.

    Raises:
        SurfwError: the model does not exist, or does not match its pin.
    """
    from surfw.source import ChunkSource, check_pin, split_pin

    wanted, pin = split_pin(name)

    async def find(source: ChunkSource) -> "Manifest":
        manifest = await source.manifest(await source.resolve(wanted))
        check_pin(manifest, pin, where=client.url)
        source.expect_readable(manifest)
        return manifest

    return client.run(find)


def find_base(client: "WeightClient", manifest: "Manifest") -> "Manifest":
    """Return the manifest of an adapter's base, or the model's own.

    Raises:
        SurfwError: the base cannot be read.
    """
    from surfw.source import find_base

    if manifest.base is None:
        return manifest
    return client.run(lambda source: find_base(source, manifest))


@contextlib.contextmanager
def _opening() -> Iterator[None]:
    """Switch threads more often during the imports, so that weights keep arriving, and pause garbage collection.

    Repeated collections over everything that was imported would take a seventh of the time.
    """
    seconds, collects = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(_TURN_SECONDS)
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(seconds)
        if collects:
            gc.enable()


@_opening()
def open_model(
    client: "WeightClient", settings: Settings, on_phase: Callable[[str], None], *, pipeline: bool = False
) -> "StreamingModel":
    """Open the model, or this rank's stage of it, as the settings say; `on_phase` is called with each slow phase."""
    on_phase("importing torch")
    import surfw.skeleton.dtypes  # noqa: F401 - imports torch

    on_phase("importing transformers")
    from surfw.models.streaming import StreamingModel

    if not gc.get_freeze_count():  # a collection over all imports stops weights for a third of a second
        gc.freeze()
    on_phase("building the model")
    kind: type[StreamingModel] = StreamingModel
    if pipeline:
        from surfw.distributed import StageModel

        kind = StageModel
    return kind.open(
        client,
        settings.model,
        cache_size=settings.cache_layers,
        memory_budget=settings.memory_budget,
        device=settings.device,
        device_memory=settings.device_memory,
        policy=settings.policy,
        codec=settings.codec,
        dtype=settings.dtype,
        on_missing=settings.on_missing,
        adapter=settings.adapter,
    )


def _is_served(url: str, configuration: Configuration) -> bool:
    """Whether a surfw server answers at the address and grants access.

    Raises:
        ConfigurationError: it refuses access, or what answers cannot be identified.
    """
    from surfw.client import probe

    settings, token = configuration.settings, configuration.settings.token
    try:
        return asyncio.run(probe(url, settings.connect_timeout, token=token))
    except SurfwError as exc:
        raise ConfigurationError(
            f"{exc}; to run without the server on this machine, name a source with --source, such as {settings.store}"
        ) from exc


@contextlib.contextmanager
def _serve_demo() -> Iterator[str]:
    """Serve the demo model on a free loopback port, in a process of its own; yields the address.

    Raises:
        WireError: the server did not start.
    """
    with _demo_store() as store:
        command = [sys.executable, "-m", "surfw", "serve", "--store", str(store), "--port", "0", "--no-live"]
        server = subprocess.Popen(
            [*command, "--announce", "--exit-with-stdin"],
            env={name: value for name, value in os.environ.items() if not name.startswith("SURFW_")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C ends only this process, which then ends the server
        )
        assert server.stdin is not None, "a pipe was asked for"
        assert server.stdout is not None, "a pipe was asked for"
        try:
            import surfw.skeleton.dtypes  # noqa: F401 - imports torch, which infer needs anyway, while the server starts

            line = server.stdout.readline()
            if not line:
                raise WireError(
                    f"the server of the demo model ended with exit code {server.wait()}; try 'surfw serve --port 0'"
                )
            yield str(json.loads(line)["url"])
        finally:
            server.stdin.close()  # ends it
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(5)
            server.kill()
            server.wait()
            server.stdout.close()


@contextlib.contextmanager
def _demo_store() -> Iterator[Path]:
    """Yield the demo store, made on first use in `$SURFW_HOME`, or in a temporary folder if that is read-only."""
    checkpoint = demo_checkpoint()
    hasher = blake3(f"manifest {VERSION}".encode())
    for file in sorted(checkpoint.iterdir()):
        hasher.update(file.read_bytes())
    store = surfw_home() / "demo" / hasher.hexdigest()[:16]
    if not (store / "models" / "demo.json").exists():
        try:
            _chunk_demo(checkpoint, store)
        except StorageError:
            with tempfile.TemporaryDirectory(prefix="surfw-demo-") as folder:
                _chunk_demo(checkpoint, Path(folder))
                yield Path(folder)
            return
    yield store


def _chunk_demo(checkpoint: Path, store: Path) -> None:
    from surfw.chunking import prepare_model, write_model
    from surfw.storage import open_backend

    try:
        with prepare_model(str(checkpoint), name=DEMO) as prepared:
            asyncio.run(write_model(prepared, open_backend(store)))
    except StorageError:
        raise
    except SurfwError as exc:
        raise SurfwError(f"the demo model that comes with surfw cannot be used: {exc}; install surfw again") from exc
