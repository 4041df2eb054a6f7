"""A checkpoint in a remote storage: only the headers of weight files are read until a tensor is needed.

Small files (configuration, index, tokenizer) are copied to a temporary folder; their sizes are capped. Every object is
pinned to the revision it had when it was opened; if it changes, reading fails. Read from one thread at a time, and not
on an event loop.
"""

import asyncio
import tempfile
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from surfw.checkpoint import Checkpoint
from surfw.checkpoint.adapter import open_adapter_folder
from surfw.checkpoint.companions import (
    MODULES_FILE,
    SENTENCE_FILES,
    TEMPLATE_FOLDER,
    TOKENIZER_FILES,
    is_companion,
    module_folders,
)
from surfw.checkpoint.layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILES,
    CONFIG_FILE,
    GENERATION_FILE,
    has_adapter,
    no_adapter,
    weights_files,
)
from surfw.checkpoint.reader import open_directory
from surfw.checkpoint.shard import Identity, SourceTensor, read_tensors
from surfw.config import DEFAULT_SILENCE_SECONDS, FILE_BYTES, display_url
from surfw.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from surfw.manifest import Pin, check_model_name, payload_digest
from surfw.storage import StorageBackend, adapt_backend, open_backend
from surfw.storage.backends import read_address
from surfw.storage.store import MARKER

T = TypeVar("T")

_SMALL = (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES, *SENTENCE_FILES)


def open_remote_checkpoint(
    url: str,
    options: Mapping[str, Any] | None = None,
    *,
    variant: str | None = None,
    silence_timeout: float = DEFAULT_SILENCE_SECONDS,
    may_be_quantised: bool = False,
) -> Checkpoint:
    """Open the checkpoint at a storage URL, in the layout of the Hugging Face hub.

    Raises:
        CheckpointError: it is damaged or incomplete, or the storage does not report when an object changes.
        UnsupportedModelError: surfw cannot read this kind of checkpoint from a remote storage.
        StorageError: the storage cannot be read.
        ConfigurationError: the URL holds secrets, or cannot be used.
    """
    address, name, opened = _open(url, options, silence_timeout)
    with _closing_on_error(opened):
        found = open_directory(
            opened.folder,
            name=name,
            names=opened.run(opened.fetch_small(variant)),
            open_shard=partial(_RemoteShard, opened=opened),
            where=opened.backend.url,
            variant=variant,
            may_be_quantised=may_be_quantised,
        )
    return replace(found, url=address, pins=opened.pins, release=opened.close)


def open_remote_adapter(
    url: str, options: Mapping[str, Any] | None = None, *, silence_timeout: float = DEFAULT_SILENCE_SECONDS
) -> Checkpoint:
    """Open the adapter at a storage URL, in the layout in which peft saves it.

    Raises:
        CheckpointError, UnsupportedModelError: see `open_adapter`.
        StorageError, ConfigurationError: see `open_remote_checkpoint`.
    """
    address, name, opened = _open(url, options, silence_timeout)
    with _closing_on_error(opened):
        found = open_adapter_folder(
            opened.folder,
            name=name,
            names=opened.run(opened.fetch_adapter()),
            open_shard=partial(_RemoteShard, opened=opened),
            where=opened.backend.url,
        )
    return replace(found, url=address, pins=opened.pins, release=opened.close)


def _open(url: str, options: Mapping[str, Any] | None, silence_timeout: float) -> tuple[str, str, "_Opened"]:
    """Return the address of a checkpoint without secrets, its name, and its storage."""
    if display_url(url) != url:
        raise ConfigurationError(
            f"{display_url(url)} holds secrets, which would come into the manifest; put them into the environment or a "
            "settings file (storage_options)"
        )
    name, url = plain_name(url.partition("://")[2].rstrip("/").rpartition("/")[2]), _commit_of(read_address(url))
    return (
        url.rstrip("/"), name, _Opened(adapt_backend(open_backend(url, options, silence_timeout=silence_timeout)))
    )  # fmt: skip


@contextmanager
def _closing_on_error(opened: "_Opened") -> Iterator[None]:
    try:
        yield
    except BaseException:
        opened.close()
        raise


class _Opened:
    """The storage of a checkpoint, and the temporary folder for its small files."""

    def __init__(self, backend: StorageBackend) -> None:
        self.backend = backend
        self.pins: dict[str, Pin] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="surfw-checkpoint")
        self._temporary = tempfile.TemporaryDirectory(prefix="surfw-checkpoint-")
        self.folder = Path(self._temporary.name)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to completion on a separate event loop; this thread may already run one."""
        return self._thread.submit(asyncio.run, work).result()

    async def pin(self, name: str) -> Pin:
        """Pin an object to its current size and revision."""
        revision, size = await self.backend.revision(name), await self.backend.size(name)
        if revision is None:
            raise CheckpointError(
                f"{self.backend.url} does not tell when {name} changes, so nothing would notice that; copy the model: "
                "run surfw chunk without --in-place on a local copy"
            )
        self.pins[name] = Pin(size, revision)
        return self.pins[name]

    async def read(self, name: str, start: int, destination: memoryview) -> None:
        await self.backend.read_into(name, start, destination, revision=self.pins[name].revision)

    async def fetch_small(self, variant: str | None) -> set[str]:
        """Copy the small files, and return the names of the checkpoint's files."""
        url = self.backend.url
        if not await self.backend.exists(CONFIG_FILE):
            await self._refuse_store("a checkpoint", "give it to --store or --source")
            if await self.backend.exists(ADAPTER_CONFIG_FILE):
                raise has_adapter(url, None)
            raise CheckpointError(
                f"{url} is not a checkpoint: there is no {CONFIG_FILE}; name the place of what save_pretrained wrote"
            )
        names = await self._copy_small((*_SMALL, ADAPTER_CONFIG_FILE, *weights_files(variant)))
        if MODULES_FILE in names:
            folders = module_folders((self.folder / MODULES_FILE).read_bytes())
            more = await self._existing(filter(is_companion, (f"{folder}/config.json" for folder in folders)))
            for name in more:
                await self._copy(name)
            names |= more
        return names

    async def fetch_adapter(self) -> set[str]:
        """Copy the small files, and return the names of the adapter's files."""
        if not await self.backend.exists(ADAPTER_CONFIG_FILE):
            await self._refuse_store("an adapter", "copy adapters from it with --from, without --base")
            raise no_adapter(self.backend.url)
        return await self._copy_small((ADAPTER_CONFIG_FILE, *TOKENIZER_FILES, *ADAPTER_WEIGHTS_FILES))

    async def _refuse_store(self, what: str, advice: str) -> None:
        if await self.backend.exists(MARKER):
            raise CheckpointError(f"{self.backend.url} is a surfw store, not {what}: it is chunked already; {advice}")

    async def _copy_small(self, candidates: Iterable[str]) -> set[str]:
        """Copy the small files and chat templates that exist, and return the names of all files that exist."""
        names = await self._existing(candidates)
        names |= set(filter(is_companion, await self.backend.list(f"{TEMPLATE_FOLDER}/")))
        for name in sorted(names):
            if name in _SMALL or name.endswith((".json", ".jinja")):
                await self._copy(name)
        return names

    async def _existing(self, candidates: Iterable[str]) -> set[str]:
        candidates = list(candidates)
        there = await asyncio.gather(*map(self.backend.exists, candidates))
        return {name for name, is_there in zip(candidates, there, strict=True) if is_there}

    async def _copy(self, name: str) -> None:
        pin = await self.pin(name)
        if pin.size > FILE_BYTES:
            raise CheckpointError(f"{name} in {self.backend.url} has {pin.size} bytes, expected at most {FILE_BYTES}")
        memory = bytearray(pin.size)
        await self.read(name, 0, memoryview(memory))
        copy = self.folder / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(memory)

    def close(self) -> None:
        self.run(self.backend.close())
        self._thread.shutdown()
        self._temporary.cleanup()


class _RemoteShard:
    """A safetensors file in a remote storage; its tensors are sorted by name, as in `SafetensorsShard`."""

    def __init__(self, path: Path, opened: _Opened) -> None:
        self._name = path.relative_to(opened.folder).as_posix()
        where = f"{self._name} in {opened.backend.url}"
        if path.suffix != ".safetensors":
            raise UnsupportedModelError(
                f"{where} is no safetensors file; download it with the others, and run surfw chunk on their folder, "
                "without --in-place"
            )
        self.path = path
        self._opened = opened
        pin = opened.run(opened.pin(self._name))
        self.identity = Identity(path.name, pin.size, int(payload_digest(pin.revision.encode())[:15], 16))
        self.tensors = read_tensors(path, pin.size, self._fill, where=where)

    def read_into(self, tensor: SourceTensor, destination: memoryview, start: int) -> None:
        assert tensor.start is not None, "it is of this file"
        self._fill(tensor.start + start, destination)

    def close(self) -> None:
        """Do nothing: the storage is closed separately."""

    def _fill(self, position: int, destination: memoryview) -> None:
        if destination.nbytes:
            self._opened.run(self._opened.read(self._name, position, destination))


def _commit_of(url: str) -> str:
    """Return the address; a hub address is resolved to its current commit, since branches move."""
    scheme, _, rest = url.partition("://")
    if scheme != "hf":
        return url
    owner, _, rest = rest.partition("/")
    model, slash, folder = rest.partition("/")
    model, _, revision = model.partition("@")
    from surfw.checkpoint.hub import resolve_commit

    commit = resolve_commit(f"{owner}/{model}", revision.replace("%2F", "/") or None)
    return f"hf://{owner}/{model}@{commit}{slash}{folder}"


def plain_name(text: str) -> str:
    """Return the text as a model's name, with dashes in place of characters that are not allowed."""
    plain = "".join(one if one.isascii() and (one.isalnum() or one in "._-") else "-" for one in text)
    plain = plain.strip("._-").replace("..", "-") or "model"
    return check_model_name(plain.removesuffix(".json")[:100] or "model")
