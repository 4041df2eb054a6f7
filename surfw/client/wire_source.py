"""A server as a `ChunkSource`: what a fetch returns was received into its destination and verified there."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from ssl import SSLContext
from typing import TypeVar

from surfw.client.connect import open_link
from surfw.client.link import Link
from surfw.client.transfer import ChunkTransfer, Document, most_digests_bytes
from surfw.config import (
    BLOCK_BYTES,
    DAMAGE_RETRIES,
    DEFAULT_CONNECT_SECONDS,
    DEFAULT_SILENCE_SECONDS,
    WireLimits,
    count,
)
from surfw.errors import ConnectionFailedError, IntegrityError, ManifestError, RefusedError, UnknownModelError
from surfw.manifest import Digests, Manifest, parse_digests, parse_manifest, with_digests
from surfw.retry import RetryPolicy
from surfw.source import ChunkSource, Read, describe_damage, locate_damage
from surfw.threads import together
from surfw.wire import Get, GetDigests, GetFile, GetManifest, Request

logger = logging.getLogger("surfw.client")

T = TypeVar("T")
Connect = Callable[[], Awaitable[Link]]
"""Makes a link to one and the same server."""

_VERIFIERS = 2
_SERVED = "the server's storage or memory"


def _part(whole: Read, start: int, stop: int) -> memoryview:
    return whole.destination[start - whole.start : stop - whole.start]


class WireSource(ChunkSource):
    """Models of a server. Belongs to the event loop it was opened in.

    A connection that is lost is made again, as often as the retry policy says; a chunk then goes on behind the blocks
    that were already verified, and its attempts are counted anew whenever there were any. What arrives damaged is
    fetched again on its own, a few times.
    """

    def __init__(
        self, connect: Connect, retry: RetryPolicy, link: Link, *, unverified_for_measurement_only: bool = False
    ) -> None:
        """Take over a link; use `open_wire_source` to make one. `bench wire` alone leaves bytes unverified."""
        self.url = link.url
        self._connect = connect
        self._retry = retry
        self._link = link
        self._connecting = asyncio.Lock()
        self._closed = False
        self._fetched_bytes = 0
        self._refetched_blocks = 0
        self._limits = link.limits
        self._digests: dict[tuple[str, str], Digests] = {}
        self._asking: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._verifiers = ThreadPoolExecutor(_VERIFIERS, thread_name_prefix="surfw-verify")
        self._verify = not unverified_for_measurement_only

    @property
    def fetched_bytes(self) -> int:
        """Stored bytes delivered so far."""
        return self._fetched_bytes

    @property
    def refetched_blocks(self) -> int:
        """Blocks, manifests and files that arrived damaged and were fetched again."""
        return self._refetched_blocks

    @property
    def buffered_bytes(self) -> int:
        """What a server may have sent that is not in place yet."""
        return self._limits.window_bytes

    async def models(self) -> list[str]:
        """The names of the models there are."""
        return sorted(await self._persistently(lambda link: link.models()))

    async def manifest(self, model: str) -> Manifest:
        """The manifest of the model."""
        what = f"the manifest of {model} from {self.url}"
        into = partial(Document, what, made_from_bytes=self._limits.manifest_bytes)
        try:
            data = await self._receive(lambda number: GetManifest(number, model), into)
        except RefusedError as exc:
            if exc.code != "unknown-model":
                raise
            raise UnknownModelError(model, await self.models(), where=self.url) from exc
        manifest = parse_manifest(data, where=self.url)
        if manifest.name != model:
            raise ManifestError(f"{self.url} answered for {model} with the manifest of {manifest.name}")
        return manifest

    async def file(self, manifest: Manifest, path: str) -> bytes:
        """A tokenizer file of the model, verified."""
        entry = manifest.file(path)
        what = f"{path} of {manifest.name} from {self.url}"
        into = partial(Document, what, listed=(entry.size, entry.digest), made_from_bytes=entry.size)
        return await self._receive(lambda number: GetFile(number, manifest.name, path), into)

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill every read's destination, all at once, each verified while the rest arrives."""
        await together(self._fetch(manifest.name, read, priority) for read in reads)

    async def _fetch(self, model: str, whole: Read, priority: int) -> None:
        if not whole.form.is_known:
            whole = await self._with_digests(model, whole)
        size, reached, delays, first = whole.stop - whole.start, 0, self._retry.delays(), None
        damage: defaultdict[int, list[str]] = defaultdict(list)
        missing = [(whole.start, whole.stop)]
        while missing:
            start, stop = missing.pop()
            read = replace(whole, start=start, stop=stop, destination=_part(whole, start, stop))
            transfer = ChunkTransfer(read, self._verifiers if self._verify else None)
            try:
                await self._attempt(model, read, priority, transfer, fresh=start // BLOCK_BYTES in damage)
            except ConnectionFailedError as exc:
                first, reached = first or exc, max(reached, start - whole.start + transfer.received)
                if transfer.verified_bytes:
                    delays = self._retry.delays()
                self._note(whole, damage, await transfer.damage())
                missing.append((start + transfer.verified_bytes, stop))
                if not await self._wait(exc, delays):
                    last = "" if exc is first else f"; the last attempt: {exc}"
                    raise ConnectionFailedError(
                        f"{first}, after {reached} of {size} bytes of chunk {whole.chunk.name}{last}; "
                        "see what became of it, and run it again",
                        transient=exc.transient,
                    ) from exc
            else:
                missing += self._note(whole, damage, await transfer.damage())
        self._fetched_bytes += size

    def _note(
        self, whole: Read, damage: defaultdict[int, list[str]], found: Mapping[int, str]
    ) -> list[tuple[int, int]]:
        """Note what arrived damaged, and give the ranges to fetch again, the last one first.

        Raises:
            IntegrityError: a block was so too often.
        """
        for block, seen in found.items():
            damage[block].append(seen)
        for block, seen in found.items():
            what = describe_damage(whole.chunk, whole.form, block, seen, where=self.url)
            if len(damage[block]) > DAMAGE_RETRIES:
                raise IntegrityError(f"{what}; {locate_damage(damage[block], stored=_SERVED)}")
        if found:
            logger.warning("%s; fetching %s again", what, count(len(found), "block"))
        self._refetched_blocks += len(found)
        ranges: list[tuple[int, int]] = []
        for block in sorted(found, reverse=True):
            start, stop = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, whole.stop)
            if ranges and ranges[-1][0] == stop:
                _, stop = ranges.pop()
            ranges.append((start, stop))
        return ranges

    async def _with_digests(self, model: str, read: Read) -> Read:
        """The read, with the digests that its manifest lacks; the server is asked for them once."""
        name = (model, read.chunk.id)
        async with self._asking[name]:
            if name not in self._digests:
                what = f"what the server at {self.url} says of chunk {read.chunk.name}"
                size = read.form.stored_bytes
                into = partial(Document, what, most_bytes=most_digests_bytes(size), made_from_bytes=size)
                data = await self._receive(lambda number: GetDigests(number, model, read.chunk.id), into)
                self._digests[name] = parse_digests(data, size, where=what)
        known = with_digests(read.chunk, self._digests[name])
        asked = replace(known, id=read.chunk.id)  # a server knows a chunk by both
        return replace(read, chunk=asked, form=known.forms[0])

    async def _attempt(self, model: str, read: Read, priority: int, transfer: ChunkTransfer, *, fresh: bool) -> None:
        """Have a transfer done over the link; however it ends, nobody touches its destination afterwards."""

        def ask(number: int) -> Get:
            return Get(number, model, read.chunk.id, read.form.codec, read.start, read.stop, priority, fresh)

        try:
            await (await self._connected()).receive(ask, transfer)
            await transfer.damage()
        except ConnectionFailedError:
            await transfer.damage()  # what has arrived need not come again
            raise
        finally:
            await transfer.settle()

    async def _receive(self, make: Callable[[int], Request], into: Callable[[], Document]) -> bytes:
        """A whole document, from the start on with every attempt.

        Raises:
            IntegrityError: it is damaged, every time.
        """
        seen: list[object] = []
        while True:
            document = into()

            async def attempt(link: Link, document: Document = document) -> bytes:
                await link.receive(make, document)
                return document.verified()

            try:
                return await self._persistently(attempt)
            except IntegrityError as exc:
                seen.append(document.seen)
                if len(seen) > DAMAGE_RETRIES:
                    raise IntegrityError(f"{exc}; {locate_damage(seen, stored=_SERVED)}") from exc
                logger.warning("%s; fetching it again", exc)
                self._refetched_blocks += 1

    async def _persistently(self, attempt: Callable[[Link], Awaitable[T]]) -> T:
        """Do it, again if the connection is lost meanwhile."""
        delays = self._retry.delays()
        while True:
            try:
                return await attempt(await self._connected())
            except ConnectionFailedError as exc:
                if not await self._wait(exc, delays):
                    raise

    async def _connected(self) -> Link:
        """The link, made again if it is over."""
        async with self._connecting:
            if self._link.ended and not self._closed:
                self._link = await self._connect()
                logger.info("connected to %s again", self.url)
            return self._link

    async def _wait(self, error: ConnectionFailedError, delays: Iterator[float]) -> bool:
        """Wait before the next attempt; False if there is none."""
        return not self._closed and await wait_before_retry(error, delays)

    async def close(self) -> None:
        """Leave the server."""
        self._closed = True
        await self._link.close()
        self._verifiers.shutdown()


async def wait_before_retry(error: ConnectionFailedError, delays: Iterator[float]) -> bool:
    """Wait before the next attempt; False if there is none, or if it would not help."""
    delay = next(delays, None) if error.transient else None
    if delay is None:
        return False
    logger.info("%s; trying again in %.2f seconds", error, delay)
    await asyncio.sleep(delay)
    return True


async def open_wire_source(
    url: str,
    *,
    limits: WireLimits | None = None,
    connect_timeout: float = DEFAULT_CONNECT_SECONDS,
    silence_timeout: float = DEFAULT_SILENCE_SECONDS,
    token: str | None = None,
    ssl: SSLContext | None = None,
    retry: RetryPolicy | None = None,
) -> WireSource:
    """A source over the server at a `ws://` or `wss://` address.

    Args:
        url: the address.
        limits: sizes that both sides hold each other to.
        connect_timeout: seconds the server has to say hello.
        silence_timeout: seconds without progress, while something is asked for, after which a connection is given up:
            64 KiB that arrive, an answer that is complete, or a server that says how it reads its storage.
        token: what the server wants to be shown, if anything.
        ssl: whose certificates to trust for `wss://`, in place of the system's.
        retry: how often a connection that was refused or lost is made again; default: `RetryPolicy()`.

    Raises:
        ConfigurationError: the address is not one, or the token would go there in clear text.
        RefusedError: the server wants a token, or another one.
        ConnectionFailedError: nothing answers there, or something else does.
    """
    retry = retry or RetryPolicy()
    connect = partial(
        open_link,
        url,
        limits=limits or WireLimits(),
        connect_seconds=connect_timeout,
        silence_seconds=silence_timeout,
        token=token,
        ssl=ssl,
    )
    delays = retry.delays()
    while True:
        try:
            return WireSource(connect, retry, await connect())
        except ConnectionFailedError as exc:
            if not await wait_before_retry(exc, delays):
                raise
