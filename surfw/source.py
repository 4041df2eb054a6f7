"""The source of weights: the one interface that the runtime knows, whether a storage or a server is behind it.

A `ChunkSource` delivers *verified stored bytes* into memory that the caller owns. It never decodes, and it is
read-only. Stored bytes may be encrypted: `surfw.encryption` makes a source of plain ones of it.
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
    """A range of a chunk's stored bytes, and the writable memory it goes to.

    `start` and `stop` (end-exclusive) count stored bytes of the form. Both lie on block boundaries (1 MiB), except that
    `stop` may be the end of the form: only whole blocks can be verified. `destination` has `stop - start` bytes.

    `on_verified` may be told of each block as soon as it is right, with its index and its memory, which it may change:
    by the thread that verified it, before `fetch` ends, and again if the block arrives again.
    """

    chunk: Chunk
    form: Form
    start: int
    stop: int
    destination: memoryview
    on_verified: Callable[[int, memoryview], None] | None = None

    def __post_init__(self) -> None:
        """Refuse ranges that cannot be verified."""
        ends_well = self.stop % BLOCK_BYTES == 0 or self.stop == self.form.stored_bytes
        if self.start % BLOCK_BYTES or not ends_well or not 0 <= self.start <= self.stop <= self.form.stored_bytes:
            raise ValueError(f"range {self.start}-{self.stop} of chunk {self.chunk.name} is not made of whole blocks")
        if self.destination.nbytes != self.stop - self.start:
            raise ValueError(f"destination has {self.destination.nbytes} bytes, the range {self.stop - self.start}")


def find_damage(form: Form, first: int, data: memoryview) -> dict[int, str]:
    """Return which blocks of a run, starting with block `first` of the form, do not match their digests.

    Returns:
        The BLAKE3 that each of them has instead, in hex, by its index.
    """
    damage = {}
    with tracing.span("verify", "verify", bytes=len(data)):
        for index, start in enumerate(range(0, len(data), BLOCK_BYTES), first):
            seen = blake3(data[start : start + BLOCK_BYTES]).digest()
            if seen != form.block_digest(index):
                damage[index] = seen.hex()
    return damage


def check_blocks(read: Read, first: int, data: memoryview) -> dict[int, str]:
    """As `find_damage`, for blocks in the destination of a read, which is told of those that are right."""
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
    """A check that notes which blocks of a read are damaged, counted from the read's start.

    It raises nothing, so that the other ranges of a read go on. It may be called in several threads at once.

    Attributes:
        damaged: the BLAKE3 that each of them has instead, in hex, by its index.
    """

    def __init__(self, read: Read) -> None:
        """Expect the blocks of the read."""
        self.damaged: dict[int, str] = {}
        self._read = read
        self._first = read.start // BLOCK_BYTES

    def __call__(self, at: int, piece: memoryview) -> None:
        """Look at whole blocks, `at` bytes after the first one."""
        self.damaged.update(check_blocks(self._read, self._first + at // BLOCK_BYTES, piece))


def describe_damage(chunk: Chunk, form: Form, block: int, seen: str, *, where: str) -> str:
    """Describe a damaged block, without advice; `seen` is the BLAKE3 that it has."""
    return (
        f"chunk {chunk.name} from {where} is damaged: block {block} has BLAKE3 {seen[:16]}…, "
        f"the manifest promises {form.block_digest(block).hex()[:16]}…"
    )


def locate_damage(seen: Sequence[object], *, stored: str = "the store") -> str:
    """Say where the damage of something is that was fetched several times, and what to do about it.

    Args:
        seen: what arrived each time, such as digests.
        stored: the place where it is stored.
    """
    if len(set(seen)) == 1:
        return f"chunk the model again: it was the same {len(seen)} times, so the damage lies in {stored}"
    return (
        f"it differed between {len(seen)} reads, so it is damaged on the way; check the network and the memory of this "
        "machine"
    )


async def read_again(read: Callable[[], Awaitable[str | None]], seen: list[str]) -> bool:
    """Read something damaged again until it is right, and return whether it is; at most `1 + DAMAGE_RETRIES` are seen.

    Args:
        read: reads it, past all caches, and returns the digest of what came, or None if that is right.
        seen: the digests seen so far; those of this are added. See `locate_damage`.
    """
    while len(seen) <= DAMAGE_RETRIES:
        digest = await read()
        if digest is None:
            return True
        seen.append(digest)
    return False


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class View:
    """Stored bytes in memory that is not the caller's: in most cases a mapped file.

    Attributes:
        memory: the bytes.
        expect_unchanged: call it before the bytes are used again. It is cheap, and raises `IntegrityError` or
            `StorageError` if the file shows that they are no longer what was verified.
        is_mapped: whether it is a mapped file, whose memory the system can take back.
    """

    memory: memoryview
    expect_unchanged: Callable[[], None]
    is_mapped: bool = True


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a source waits for; times are those of `time.monotonic`.

    Attributes:
        lost: the address that failed.
        since: when it did.
        trying: the address that is tried next.
        at: when.
    """

    lost: str
    since: float
    trying: str
    at: float


_PIN = "@b3:"


def split_pin(name: str | None) -> tuple[str | None, str | None]:
    """A model's name, and the identity that it is pinned to, if it is: `name@b3:DIGEST`.

    Raises:
        ConfigurationError: what stands behind `@b3:` is no BLAKE3.
    """
    name, mark, pin = (name or "").rpartition(_PIN) if _PIN in (name or "") else (name, "", "")
    if mark and not is_digest(pin):
        raise ConfigurationError(
            f"{name} is pinned to {pin[:80]!a}, expected 64 hexadecimal digits in lower case, as "
            "'surfw show' has them (pin)"
        )
    return name or None, pin or None


def check_pin(manifest: Manifest, pin: str | None, *, where: str) -> None:
    """Check that a model is the one that it is pinned to.

    Raises:
        IntegrityError: it is another one, or it cannot be told, because digests of its weights are not known.
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
    """Return the full name of a model, given in full, by a unique last part, or as None if it is the only one.

    Args:
        name: what was given.
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
    """Check that an adapter belongs to the weights of a model, whatever that is called.

    Raises:
        ManifestError: it belongs to others.
    """
    assert adapter.base is not None, "it is an adapter"
    if adapter.base.key != base.weights_key:
        raise ManifestError(
            f"the adapter {adapter.name} belongs to {adapter.base.name} with other weights than {base.name} has in "
            f"{where} (key {adapter.base.key[:16]}…, here {base.weights_key[:16]}…); chunk the adapter again over this "
            "base (surfw chunk FOLDER --base NAME), or use the base that it was chunked over"
        )


async def find_adapter(source: "ChunkSource", name: str, base: Manifest) -> Manifest:
    """Return the manifest of an adapter that can be applied to a model.

    Raises:
        UnknownModelError: the source has none of this name.
        ConfigurationError: it is no adapter.
        ManifestError: it belongs to another base.
    """
    manifest = await source.manifest(await source.resolve(name))
    if manifest.base is None:
        raise ConfigurationError(
            f"{manifest.name} is a whole model, and no adapter; chunk one with surfw chunk FOLDER --base "
            f"{manifest.name}"
        )
    expect_base(manifest, base, where=source.url)
    return manifest


def refuse_second_adapter(manifest: Manifest, adapter: str | None) -> None:
    """Check that no other adapter is wanted over a model that is one itself.

    Raises:
        ConfigurationError: one is.
    """
    if manifest.base is not None and adapter is not None:
        raise ConfigurationError(
            f"{manifest.name} is an adapter over {manifest.base.name} already; give {manifest.base.name} as the "
            "model, or leave the other adapter out (adapter, --adapter)"
        )


async def find_base(source: "ChunkSource", adapter: Manifest) -> Manifest:
    """Return the manifest of the model that an adapter changes.

    Raises:
        UnknownModelError: the source does not have it.
        ManifestError: the source has other weights under its name.
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
    """Manifests and verified stored bytes, from somewhere. Use it as an async context manager, or `close()` it."""

    url: str
    """The place that the bytes come from, for people and for error messages."""

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

    @abstractmethod
    async def file(self, manifest: Manifest, path: str) -> bytes:
        """Return a tokenizer file of the model, verified.

        Raises:
            IntegrityError: its bytes do not match the manifest.
        """

    @abstractmethod
    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill every read's destination with verified bytes. Lower priorities go first.

        Pass all reads in one call: a far source has several of them under way at a time, in any order, so that many
        small ones cost few round trips. Their number does not change the memory that it takes besides the destinations
        (see `buffered_bytes`).

        Returns when all destinations are filled. If a read fails, the first failure is raised and the others are given
        up: the contents of their destinations are undefined then. Once the call has ended, also by a failure or a
        cancellation, no destination is written to any more.

        Raises:
            IntegrityError: bytes do not match the manifest.
            StorageError, WireError: they could not be read.
        """

    async def announce(self, manifest: Manifest, cycle: Sequence[Chunk], kept: Sequence[Chunk]) -> None:
        """Say what will be read, so that the source can prepare for it; most have no use for that.

        It may be said again, and takes the place of what was said of this model before.

        Args:
            manifest: the model.
            cycle: the chunks that are used again and again, in this order; one may recur.
            kept: those of them that are kept once they were read.
        """
        del manifest, cycle, kept

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> View | None:
        """Return the form's stored bytes, verified and mapped: no copy of them is made.

        The memory may be written to, which changes nothing but this view. It is page-aligned, and stays valid after
        `close`.

        Returns:
            None if the bytes cannot be mapped and have to be fetched.

        Raises:
            IntegrityError: bytes do not match the manifest.
            StorageError: they could not be read.
        """
        del manifest, chunk, form
        return None

    async def digests(self, manifest: Manifest, chunk: Chunk) -> Digests | None:
        """Return the digests of a chunk whose manifest lacks them, or None if nobody knows them."""
        del manifest, chunk
        return None

    async def keep(self, manifest: Manifest, chunk: Chunk, form: Form, *, priority: int = 0) -> bool:
        """Have a form's stored bytes near by, before they are used; return whether all of them are.

        Most sources have no such place, and do nothing.

        Raises:
            IntegrityError, StorageError, WireError: they could not be read.
        """
        del manifest, chunk, form, priority
        return False

    def near(self, manifest: Manifest, chunk: Chunk) -> tuple[Form, ...]:
        """Return the forms of a chunk that are to be preferred, because they are nearer than others of it."""
        del manifest, chunk
        return ()

    def expect_readable(self, manifest: Manifest) -> None:
        """Check that what this delivers of a model are its weights. Whoever computes with them asks this first.

        Raises:
            ConfigurationError: they are encrypted, and there is no key, or another one.
        """
        if manifest.key_id:
            raise ConfigurationError(
                f"{manifest.name} is encrypted with key {manifest.key_id}, and no key is given; name the file that "
                "holds it (encryption_key_file, --encryption-key-file)"
            )

    def identify(self, manifest: Manifest, digest: str) -> str:
        """The id that a chunk whose payload has this BLAKE3 has in a model: just that, unless it is encrypted."""
        del manifest
        return digest

    @property
    def buffered_bytes(self) -> int:
        """The most memory that fetching takes besides the destinations."""
        return 0

    @property
    def refetched_blocks(self) -> int:
        """Blocks that arrived damaged and were fetched again."""
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
        """What keeps everything waiting, if a source failed and is to be tried again."""
        return None

    async def resolve(self, name: str | None) -> str:
        """Return the full name of a model, given in full, by a unique last part, or as None if it is the only one.

        Raises:
            UnknownModelError: no model or several models match.
        """
        return find_model(name, await self.models(), where=self.url)

    async def __aenter__(self) -> Self:
        """Enter the context. Nothing is opened."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Close."""
        await self.close()


class SourceInFront(ChunkSource):
    """A source in front of another one: what a subclass does not do otherwise, it hands on."""

    def __init__(self, source: ChunkSource) -> None:
        """Stand in front of that source."""
        self._source = source

    async def models(self) -> list[str]:
        """The names of all models."""
        return await self._source.models()

    async def resolve(self, name: str | None) -> str:
        """The full name of a model."""
        return await self._source.resolve(name)

    async def manifest(self, model: str) -> Manifest:
        """The manifest of a model."""
        return await self._source.manifest(model)

    async def file(self, manifest: Manifest, path: str) -> bytes:
        """A tokenizer file."""
        return await self._source.file(manifest, path)

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill every read's destination."""
        await self._source.fetch(manifest, reads, priority=priority)

    async def announce(self, manifest: Manifest, cycle: Sequence[Chunk], kept: Sequence[Chunk]) -> None:
        """Tell the source."""
        await self._source.announce(manifest, cycle, kept)

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> View | None:
        """The form's bytes where they are stored."""
        return await self._source.view(manifest, chunk, form)

    async def digests(self, manifest: Manifest, chunk: Chunk) -> Digests | None:
        """The digests of a chunk that its manifest lacks."""
        return await self._source.digests(manifest, chunk)

    async def keep(self, manifest: Manifest, chunk: Chunk, form: Form, *, priority: int = 0) -> bool:
        """Have the form near by, if the source can."""
        return await self._source.keep(manifest, chunk, form, priority=priority)

    def near(self, manifest: Manifest, chunk: Chunk) -> tuple[Form, ...]:
        """The forms of a chunk that are near by."""
        return self._source.near(manifest, chunk)

    def expect_readable(self, manifest: Manifest) -> None:
        """Check that the source has the key of an encrypted model."""
        self._source.expect_readable(manifest)

    def identify(self, manifest: Manifest, digest: str) -> str:
        """The id of a chunk whose payload has this BLAKE3."""
        return self._source.identify(manifest, digest)

    @property
    def buffered_bytes(self) -> int:
        """The most memory that fetching takes besides the destinations."""
        return self._source.buffered_bytes

    @property
    def waiting(self) -> Waiting | None:
        """What keeps the source waiting."""
        return self._source.waiting

    @property
    def refetched_blocks(self) -> int:
        """Blocks that arrived damaged and were fetched again."""
        return self._source.refetched_blocks

    @property
    def fetched_bytes(self) -> int:
        """Stored bytes delivered so far."""
        return self._source.fetched_bytes

    async def close(self) -> None:
        """Close the source."""
        await self._source.close()
