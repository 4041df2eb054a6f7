"""A checkpoint in a storage that is not here: of its weights only headers are read, until a tensor is asked for.

Small files (configuration, index, tokenizer) come to a temporary folder, each of at most its kind's size. Every object
is pinned to the revision it had when it was opened; one that changes meanwhile is an error. Reading is not safe from
several threads, and not done on an event loop.
"""

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from surfw.checkpoint import Checkpoint
from surfw.checkpoint.layout import CONFIG_FILE, GENERATION_FILE, TOKENIZER_FILES, WEIGHTS_FILES
from surfw.checkpoint.reader import open_directory
from surfw.checkpoint.shard import Identity, Shard, SourceTensor, read_tensors
from surfw.config import DEFAULT_SILENCE_SECONDS, FILE_BYTES, display_url
from surfw.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from surfw.manifest import Pin, check_model_name, payload_digest
from surfw.storage import StorageBackend, adapt_backend, open_backend
from surfw.storage.backends import read_address
from surfw.storage.store import MARKER

T = TypeVar("T")

_SMALL = (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES)


@dataclass(frozen=True)
class RemoteCheckpoint(Checkpoint):
    """A checkpoint whose shards are elsewhere.

    Attributes:
        url: its address.
        pins: what its objects were when they were opened, by their names.
        release: gives up what was opened for it.
    """

    url: str
    pins: Mapping[str, Pin]
    release: Callable[[], object]

    def close(self) -> None:
        """Leave the storage, and remove the copies of small files."""
        self.release()


def open_remote_checkpoint(
    url: str, options: Mapping[str, Any] | None = None, *, silence_timeout: float = DEFAULT_SILENCE_SECONDS
) -> RemoteCheckpoint:
    """Open the checkpoint that lies under a storage URL, in the layout of the Hugging Face hub.

    Raises:
        CheckpointError: it is damaged or incomplete.
        UnsupportedModelError: it is of a kind that surfw cannot read from afar.
        StorageError: the storage cannot be read, or does not tell when an object changes.
        ConfigurationError: the URL holds secrets, or cannot be used.
    """
    if display_url(url) != url:
        raise ConfigurationError(
            f"{display_url(url)} holds secrets, which would come into the manifest; put them into the environment or a "
            "settings file (storage_options)"
        )
    name, url = _name_of(url), _commit_of(read_address(url))
    opened = _Opened(adapt_backend(open_backend(url, options, silence_timeout=silence_timeout)))
    try:
        names = opened.run(opened.fetch_small())
        with _named_by_address(opened):
            found = open_directory(
                opened.folder, name=name, names=names, open_shard=lambda path: RemoteShard(path, opened)
            )
    except BaseException:
        opened.close()
        raise
    fields = {name: getattr(found, name) for name in Checkpoint.__dataclass_fields__}
    return RemoteCheckpoint(**fields, url=url.rstrip("/"), pins=opened.pins, release=opened.close)


@contextmanager
def _named_by_address(opened: "_Opened") -> Iterator[None]:
    """Errors about copies of small files are about the files themselves."""
    try:
        yield
    except (CheckpointError, UnsupportedModelError) as exc:
        text = str(exc).replace(str(opened.folder), opened.backend.url)
        raise type(exc)(text) from exc


class _Opened:
    """A storage that a checkpoint is read from, and the folder for its small files."""

    def __init__(self, backend: StorageBackend) -> None:
        self.backend = backend
        self.pins: dict[str, Pin] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="surfw-checkpoint")
        self._temporary = tempfile.TemporaryDirectory(prefix="surfw-checkpoint-")
        self.folder = Path(self._temporary.name)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it on an event loop of its own, whatever runs in this thread."""
        return self._thread.submit(asyncio.run, work).result()

    async def pin(self, name: str) -> Pin:
        """What the object is now, and has to stay."""
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

    async def fetch_small(self) -> set[str]:
        """Bring the small files; which files of a checkpoint there are.

        Raises:
            CheckpointError: it is none, or a file is absurdly large.
        """
        if not await self.backend.exists(CONFIG_FILE):
            url = self.backend.url
            if await self.backend.exists(MARKER):
                raise CheckpointError(
                    f"{url} is a surfw store, not a checkpoint: it is chunked already; give it to --store or --source"
                )
            raise CheckpointError(
                f"{url} is not a checkpoint: there is no {CONFIG_FILE}; name the place of what save_pretrained wrote"
            )
        candidates = (*_SMALL, *WEIGHTS_FILES)
        there = await asyncio.gather(*map(self.backend.exists, candidates))
        names = {name for name, is_there in zip(candidates, there, strict=True) if is_there}
        for name in sorted(names):
            if name in _SMALL or name.endswith(".json"):
                pin = await self.pin(name)
                if pin.size > FILE_BYTES:
                    raise CheckpointError(
                        f"{name} in {self.backend.url} has {pin.size} bytes, expected at most {FILE_BYTES}"
                    )
                memory = bytearray(pin.size)
                await self.read(name, 0, memoryview(memory))
                (self.folder / name).write_bytes(memory)
        return names

    def close(self) -> None:
        self.run(self.backend.close())
        self._thread.shutdown()
        self._temporary.cleanup()


class RemoteShard:
    """A safetensors file that lies elsewhere; its tensors are in the order of their names, as transformers has it."""

    def __init__(self, path: Path, opened: _Opened) -> None:
        """Read its header.

        Raises:
            CheckpointError: it is damaged.
            UnsupportedModelError: it is no safetensors file.
        """
        where = f"{path.name} in {opened.backend.url}"
        if path.suffix != ".safetensors":
            raise UnsupportedModelError(
                f"{where} is no safetensors file; download the checkpoint, and run surfw chunk without --in-place"
            )
        self.path = path
        self._opened = opened
        pin = opened.run(opened.pin(path.name))
        self.identity = Identity(path.name, pin.size, int(payload_digest(pin.revision.encode())[:15], 16))
        self.tensors = read_tensors(path, pin.size, self._fill, where=where)

    def read_into(self, tensor: SourceTensor, destination: memoryview, start: int) -> None:
        """Fill `destination` with the tensor's bytes from byte `start` of the tensor on."""
        if tensor.start is None:
            raise ValueError(f"tensor {tensor.name} is not of a safetensors file")
        self._fill(tensor.start + start, destination)

    def close(self) -> None:
        """Nothing is open."""

    def _fill(self, position: int, destination: memoryview) -> None:
        if destination.nbytes:
            self._opened.run(self._opened.read(self.path.name, position, destination))


_: type[Shard] = RemoteShard


def _commit_of(url: str) -> str:
    """The address with the commit that it means now, on the hub, where branches move; others as they are.

    Raises:
        CheckpointError: the hub does not tell.
    """
    scheme, _, rest = url.partition("://")
    if scheme != "hf":
        return url
    owner, _, rest = rest.partition("/")
    model, slash, folder = rest.partition("/")
    model, _, revision = model.partition("@")
    from surfw.checkpoint.hub import resolve_commit

    commit = resolve_commit(f"{owner}/{model}", revision.replace("%2F", "/") or None)
    return f"hf://{owner}/{model}@{commit}{slash}{folder}"


def _name_of(url: str) -> str:
    """A model's name, of the last part of its address."""
    last = url.partition("://")[2].rstrip("/").rpartition("/")[2]
    return plain_name(last)


def plain_name(text: str) -> str:
    """The text with a dash for whatever a model's name cannot have."""
    plain = "".join(one if one.isascii() and (one.isalnum() or one in "._-") else "-" for one in text)
    plain = plain.strip("._-").replace("..", "-") or "model"
    return check_model_name(plain.removesuffix(".json")[:100] or "model")
