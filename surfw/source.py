"""The source of weights: the one interface between the runtime and a storage or a server.

A `ChunkSource` delivers *verified stored bytes* into memory that the caller owns. It is read-only and never decodes.
Stored bytes may be encrypted; `surfw.encryption` wraps such a source in one that delivers plaintext.
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from blake3 import blake3

from surfw import tracing
from surfw.config import BLOCK_BYTES, DAMAGE_RETRIES
from surfw.errors import ConfigurationError, IntegrityError, ManifestError, UnknownModelError
from surfw.manifest import Chunk, Digests, Form, Manifest, is_digest


@dataclass(frozen=True, slots=True)
class Read:
    """A range of a chunk's stored bytes, and the writable memory it is read into.

    `start` and `stop` (end-exclusive) are offsets into the form's stored bytes. Both lie on block boundaries (1 MiB),
    except that `stop` may be the end of the form: only whole blocks can be verified. `destination` has `stop - start`
    bytes.

    `on_verified`, if set, is called with the index and the memory of each block once it is verified. It may modify that
    memory. It runs in the thread that verified the block, before `fetch` returns, and again if the block is refetched.
    """

    chunk: Chunk
    form: Form
    start: int
    stop: int
    destination: memoryview
    on_verified: Callable[[int, memoryview], None] | None = None

    def __post_init__(self) -> None:
        """Validate the range.

        Raises:
            ValueError: the range is not made of whole blocks, or `destination` has another size.
        """
        ends_well = self.stop % BLOCK_BYTES == 0 or self.stop == self.form.stored_bytes
        if self.start % BLOCK_BYTES or not ends_well or not 0 <= self.start <= self.stop <= self.form.stored_bytes:
            raise ValueError(f"range {self.start}-{self.stop} of chunk {self.chunk.name} is not made of whole blocks")
        if self.destination.nbytes != self.stop - self.start:
            raise ValueError(f"destination has {self.destination.nbytes} bytes, the range {self.stop - self.start}")


def find_damage(form: Form, first: int, data: memoryview) -> dict[int, str]:
    """Find the blocks of `data`, which starts with block `first` of the form, that do not match their digests.

    Returns:
        The actual BLAKE3 of each damaged block, in hex, by block index.
    """
    damage = {}
    with tracing.span("verify", "verify", bytes=len(data)):
        for index, start in enumerate(range(0, len(data), BLOCK_BYTES), first):
            seen = blake3(data[start : start + BLOCK_BYTES]).digest()
            if seen != form.block_digest(index):
                damage[index] = seen.hex()
    return damage


def check_blocks(read: Read, first: int, data: memoryview) -> dict[int, str]:
    """Like `find_damage`, for blocks in a read's destination; calls `read.on_verified` for each valid block."""
    if read.on_verified is None:
        return find_damage(read.form, first, data)
    damage: dict[int, str] = {}
    for index, start in enumerate(range(0, len(data), BLOCK_BYTES), first):
        block = data[start : start + BLOCK_BYTES]
        if found := find_damage(read.form, index, block):
            damage |= found
        else:
            read.on_verified(index, block)  # while it is in the processor's cache
    return damage


class Verification:
    """A callable that records the damaged blocks of a read.

    It never raises, so that the read's other ranges can continue. It is thread-safe.

    Attributes:
        damaged: the actual BLAKE3 of each damaged block, in hex, by its index in the form.
    """

    def __init__(self, read: Read) -> None:
        self.damaged: dict[int, str] = {}
        self._read = read
        self._first = read.start // BLOCK_BYTES

    def __call__(self, at: int, piece: memoryview) -> None:
        """Check whole blocks; `piece` starts `at` bytes after the start of the read."""
        self.damaged.update(check_blocks(self._read, self._first + at // BLOCK_BYTES, piece))


def describe_damage(chunk: Chunk, form: Form, block: int, seen: str, *, where: str) -> str:
    """Describe a damaged block, without advice; `seen` is its actual BLAKE3."""
    return (
        f"chunk {chunk.name} from {where} is damaged: block {block} has BLAKE3 {seen[:16]}…, "
        f"the manifest promises {form.block_digest(block).hex()[:16]}…"
    )


def locate_damage(seen: Sequence[object], *, stored: str = "the store") -> str:
    """Say whether data that was damaged on every read was damaged in storage or in transit, and what to do.

    Args:
        seen: what arrived each time, such as digests.
        stored: names the storage.
    """
    if len(set(seen)) == 1:
        return f"chunk the model again: it was the same {len(seen)} times, so the damage lies in {stored}"
    return (
        f"it differed between {len(seen)} reads, so it is damaged on the way; check the network and the memory of this "
        "machine"
    )


async def read_again(read: Callable[[], Awaitable[str | None]], seen: list[str]) -> bool:
    """Reread damaged data until it is valid or `seen` has `1 + DAMAGE_RETRIES` digests.

    Args:
        read: reads the data, bypassing all caches; returns None if it is valid, else its digest.
        seen: the digests seen so far; extended in place. See `locate_damage`.

    Returns:
        Whether a read was valid.
    """
    while len(seen) <= DAMAGE_RETRIES:
        digest = await read()
        if digest is None:
            return True
        seen.append(digest)
    return False


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class View:
    """Stored bytes in memory that the caller does not own, usually a mapped file.

    Attributes:
        memory: the bytes.
        expect_unchanged: must be called before the bytes are used again. It is cheap, and raises `IntegrityError` or
            `StorageError` if the file was changed since it was verified.
        is_mapped: whether this is a mapped file, whose pages the system can reclaim.
    """

    memory: memoryview
    expect_unchanged: Callable[[], None]
    is_mapped: bool = True


@dataclass(frozen=True, slots=True)
class Waiting:
    """A pending retry after a source failed. Times are `time.monotonic` values.

    Attributes:
        lost: the address that failed.
        since: when it failed.
        trying: the address to be tried next.
        at: when it will be tried.
    """

    lost: str
    since: float
    trying: str
    at: float


_PIN = "@b3:"


def split_pin(name: str | None) -> tuple[str | None, str | None]:
    """Split `name@b3:DIGEST` into the model's name and the identity that it is pinned to; None for a missing part.

    Raises:
        ConfigurationError: the text after `@b3:` is not a BLAKE3 digest.
    """
    name, mark, pin = (name or "").rpartition(_PIN) if _PIN in (name or "") else (name, "", "")
    if mark and not is_digest(pin):
        raise ConfigurationError(
            f"{name} is pinned to {pin[:80]!a}, expected 64 hexadecimal digits in lower case, as "
            "'surfw show' has them (pin)"
        )
    return name or None, pin or None


def check_pin(manifest: Manifest, pin: str | None, *, where: str) -> None:
    """Check that a model has the pinned identity.

    Raises:
        IntegrityError: it has another identity, or its identity is unknown because digests of its weights are missing.
    """
    if pin is None:
        return
    if not manifest.is_known:
        raise IntegrityError(
            f"{manifest.name} in {where} is served in place, without digests of its weights, so that it cannot be "
            "pinned; chunk it, or leave out the pin"
        )
    if manifest.identity != pin:
        advice = "take another source, or leave out the pin if the change is meant"
        if pin == manifest.digest:
            advice = "that is its digest, which 'surfw show' prints above its pin; take the pin"
        raise IntegrityError(
            f"{manifest.name} in {where} is not the model that is wanted: its identity is b3:{manifest.identity}, "
            f"expected b3:{pin}; {advice}"
        )


def find_model(name: str | None, known: Sequence[str], *, where: str) -> str:
    """Return the full name of a model.

    Args:
        name: the full name, its last part if that is unique, or None for the only model.
        known: the full names of all models.
        where: names the place in errors.

    Raises:
        UnknownModelError: no model or several models match.
    """
    if name is None:
        matches = known
    else:
        matches = [name] if name in known else [one for one in known if one.rpartition("/")[2] == name]
    if len(matches) != 1:
        raise UnknownModelError(name, known, where=where)
    return matches[0]


def expect_base(adapter: Manifest, base: Manifest, *, where: str) -> None:
    """Check that an adapter was made for the weights of `base`; names are ignored.

    Raises:
        ManifestError: it was made for other weights.
    """
    assert adapter.base is not None, "it is an adapter"
    if adapter.base.key == base.weights_key:
        return
    if adapter.base.name != base.name:
        raise ManifestError(
            f"the adapter {adapter.name} belongs to {adapter.base.name}, and not to {base.name}; give "
            f"{adapter.base.name} as the model (model, --model), or chunk the adapter over {base.name}: "
            f"surfw chunk FOLDER --base {base.name}"
        )
    raise ManifestError(
        f"the adapter {adapter.name} belongs to {adapter.base.name} with other weights than {base.name} has in "
        f"{where} (key {adapter.base.key[:16]}…, here {base.weights_key[:16]}…); chunk the adapter again over this "
        "base (surfw chunk FOLDER --base NAME), or use the base that it was chunked over"
    )


async def find_adapter(source: "ChunkSource", name: str, base: Manifest) -> Manifest:
    """Return the manifest of an adapter that can be applied to a model.

    Raises:
        UnknownModelError: the source has no model of this name.
        ConfigurationError: the model is not an adapter.
        ManifestError: the adapter belongs to another base.
    """
    manifest = await source.manifest(await source.resolve(name))
    if manifest.base is None:
        raise ConfigurationError(
            f"{manifest.name} is a whole model, and no adapter; name an adapter over {base.name}, which surfw chunk "
            f"FOLDER --base {base.name} makes, or leave it out (adapter, --adapter)"
        )
    expect_base(manifest, base, where=source.url)
    return manifest


def refuse_second_adapter(manifest: Manifest, adapter: str | None) -> None:
    """Refuse an adapter on top of a model that is itself an adapter.

    Raises:
        ConfigurationError: both are adapters.
    """
    if manifest.base is not None and adapter is not None:
        raise ConfigurationError(
            f"{manifest.name} is an adapter over {manifest.base.name} already; give {manifest.base.name} as the "
            "model, or leave the other adapter out (adapter, --adapter)"
        )


async def find_base(source: "ChunkSource", adapter: Manifest) -> Manifest:
    """Return the manifest of an adapter's base model.

    Raises:
        ManifestError: the source does not have the base, or has other weights under its name.
    """
    assert adapter.base is not None, "it is an adapter"
    try:
        base = await source.manifest(adapter.base.name)
    except UnknownModelError as exc:
        raise ManifestError(
            f"{adapter.name} is an adapter over {adapter.base.name}, which {source.url} does not have; copy or chunk "
            "that model into it as well"
        ) from exc
    expect_base(adapter, base, where=source.url)
    return base


class ChunkSource(ABC):
    """A source of manifests and verified stored bytes. Use it as an async context manager, or `close()` it."""

    url: str
    """Where the bytes come from, for display and error messages."""

    @abstractmethod
    async def models(self) -> list[str]:
        """Return the names of all models, sorted."""

    @abstractmethod
    async def manifest(self, model: str) -> Manifest:
        """Return the manifest of the model with exactly this name.

        Raises:
            UnknownModelError: there is no such model.
            ManifestError: its manifest is not valid.
        """

    async def manifest_to_open(self, manifest: Manifest) -> Manifest:
        """Return the manifest to open a model by: the one that its weights are read ahead by, or else the given one."""
        return manifest

    @abstractmethod
    async def file(self, manifest: Manifest, path: str) -> bytes:
        """Return a tokenizer file of the model, verified.

        Raises:
            IntegrityError: its bytes do not match the manifest.
        """

    @abstractmethod
    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill every read's destination with verified bytes. Lower priorities go first.

        Pass all reads in one call: a remote source keeps several in flight, in any order, so that many small reads cost
        few round trips. The number of reads does not change the buffer memory (see `buffered_bytes`).

        Returns when all destinations are filled. If a read fails, the first failure is raised and the other reads are
        abandoned; the contents of all destinations are then undefined. Once the call has ended, including by a failure
        or a cancellation, no destination is written to any more.

        Raises:
            IntegrityError: bytes do not match the manifest.
            StorageError, WireError: they could not be read.
        """

    async def announce(self, manifest: Manifest, cycle: Sequence[Chunk], kept: Sequence[Chunk]) -> None:
        """Announce upcoming reads so that the source can prepare for them. Most sources ignore this.

        Each call replaces the previous announcement for this model.

        Args:
            manifest: the model.
            cycle: the chunks that each pass uses, in this order; a chunk may occur more than once.
            kept: the chunks of `cycle` that stay resident once they were read.
        """
        del manifest, cycle, kept

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> View | None:
        """Return the form's stored bytes, verified and mapped, without a copy.

        The memory is writable; writes affect this view only. It is page-aligned and stays valid after `close`.

        Returns:
            The view, or None if the bytes cannot be mapped and have to be fetched.

        Raises:
            IntegrityError: bytes do not match the manifest.
            StorageError: they could not be read.
        """
        del manifest, chunk, form
        return None

    async def digests(self, manifest: Manifest, chunk: Chunk) -> Digests | None:
        """Return the digests of a chunk whose manifest lacks them, or None if they are unknown."""
        del manifest, chunk
        return None

    async def keep(self, manifest: Manifest, chunk: Chunk, form: Form, *, priority: int = 0) -> bool:
        """Copy a form's stored bytes to local storage ahead of use; return whether all of them are there.

        Most sources have no local storage, and do nothing.

        Raises:
            IntegrityError, StorageError, WireError: they could not be read.
        """
        del manifest, chunk, form, priority
        return False

    def near(self, manifest: Manifest, chunk: Chunk) -> tuple[Form, ...]:
        """Return the forms of a chunk to prefer because they are stored locally."""
        del manifest, chunk
        return ()

    async def expect_there(self, manifest: Manifest, run: Manifest) -> None:
        """Check that an offline source has weights in a form that a run reads. A part may still be missing.

        Args:
            manifest: the stored manifest.
            run: the same with only the forms that the run may read.

        Raises:
            NotFoundError: it has none.
        """
        del manifest, run

    def expect_readable(self, manifest: Manifest) -> None:
        """Check that this source delivers the model's weights in plaintext. Call it before computing with them.

        Raises:
            ConfigurationError: the weights are encrypted, and the key is missing or wrong.
        """
        if manifest.key_id:
            raise ConfigurationError(
                f"{manifest.name} is encrypted with key {manifest.key_id}, and no key is given; name the file that "
                "holds it (encryption_key_file, --encryption-key-file)"
            )

    def identify(self, manifest: Manifest, digest: str) -> str:
        """Return the id of a chunk whose payload has this BLAKE3: the digest itself, unless the model is encrypted."""
        del manifest
        return digest

    @property
    def buffered_bytes(self) -> int:
        """The most memory, in bytes, that fetching needs besides the destinations."""
        return 0

    @property
    def is_offline(self) -> bool:
        """Whether only local copies are read, so that what is not there is an error."""
        return False

    @property
    def refetched_blocks(self) -> int:
        """The number of blocks that arrived damaged and were refetched."""
        return 0

    @abstractmethod
    async def close(self) -> None:
        """Release connections, threads and files. It may be closed twice."""

    @property
    def fetched_bytes(self) -> int:
        """Stored bytes delivered so far."""
        return 0

    @property
    def waiting(self) -> Waiting | None:
        """The pending retry that all reads wait for; None if no retry is pending."""
        return None

    async def resolve(self, name: str | None) -> str:
        """Return the full name of a model, from its full name, a unique last part, or None for the only model.

        Raises:
            UnknownModelError: no model or several models match.
        """
        return find_model(name, await self.models(), where=self.url)

    async def __aenter__(self) -> Self:
        """Return this source. Nothing is opened."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Close."""
        await self.close()


class SourceInFront(ChunkSource):
    """A source that wraps another one and forwards every call; subclasses override what they change."""

    def __init__(self, source: ChunkSource) -> None:
        self._source = source

    async def models(self) -> list[str]:
        """Return the names of all models, sorted."""
        return await self._source.models()

    async def resolve(self, name: str | None) -> str:
        """Return the full name of a model."""
        return await self._source.resolve(name)

    async def manifest(self, model: str) -> Manifest:
        """Return the manifest of a model."""
        return await self._source.manifest(model)

    async def manifest_to_open(self, manifest: Manifest) -> Manifest:
        """Return the manifest to open a model by."""
        return await self._source.manifest_to_open(manifest)

    async def file(self, manifest: Manifest, path: str) -> bytes:
        """Return a tokenizer file, verified."""
        return await self._source.file(manifest, path)

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill every read's destination with verified bytes."""
        await self._source.fetch(manifest, reads, priority=priority)

    async def announce(self, manifest: Manifest, cycle: Sequence[Chunk], kept: Sequence[Chunk]) -> None:
        """Announce upcoming reads."""
        await self._source.announce(manifest, cycle, kept)

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> View | None:
        """Return the form's stored bytes, verified and mapped, if possible."""
        return await self._source.view(manifest, chunk, form)

    async def digests(self, manifest: Manifest, chunk: Chunk) -> Digests | None:
        """Return the digests of a chunk whose manifest lacks them."""
        return await self._source.digests(manifest, chunk)

    async def keep(self, manifest: Manifest, chunk: Chunk, form: Form, *, priority: int = 0) -> bool:
        """Copy a form's stored bytes to local storage, if the source has any."""
        return await self._source.keep(manifest, chunk, form, priority=priority)

    def near(self, manifest: Manifest, chunk: Chunk) -> tuple[Form, ...]:
        """Return the forms of a chunk to prefer because they are stored locally."""
        return self._source.near(manifest, chunk)

    async def expect_there(self, manifest: Manifest, run: Manifest) -> None:
        """Check that an offline source has weights in a form that a run reads."""
        await self._source.expect_there(manifest, run)

    def expect_readable(self, manifest: Manifest) -> None:
        """Check that the source delivers the model's weights in plaintext."""
        self._source.expect_readable(manifest)

    def identify(self, manifest: Manifest, digest: str) -> str:
        """Return the id of a chunk whose payload has this BLAKE3."""
        return self._source.identify(manifest, digest)

    @property
    def is_offline(self) -> bool:
        """Whether only local copies are read."""
        return self._source.is_offline

    @property
    def buffered_bytes(self) -> int:
        """The most memory, in bytes, that fetching needs besides the destinations."""
        return self._source.buffered_bytes

    @property
    def waiting(self) -> Waiting | None:
        """The source's pending retry, if any."""
        return self._source.waiting

    @property
    def refetched_blocks(self) -> int:
        """The number of blocks that arrived damaged and were refetched."""
        return self._source.refetched_blocks

    @property
    def fetched_bytes(self) -> int:
        """Stored bytes delivered so far."""
        return self._source.fetched_bytes

    async def close(self) -> None:
        """Close the wrapped source."""
        await self._source.close()
