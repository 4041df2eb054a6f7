"""A server as a `ChunkSource`: bytes are received directly into their destination, and verified there.

All of the client's retries are decided here. `_persistently` connects, and reconnects after a connection was lost.
Damaged data is requested again, to be read fresh from the server's storage.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from ssl import SSLContext
from typing import TypeVar

from surfw.client.connect import START_ONE, Endpoint, open_link
from surfw.client.downloads import ChunkDownload, DocumentDownload, most_read
from surfw.client.link import Link
from surfw.config import DAMAGE_RETRIES, DEFAULT_CONNECT_SECONDS, DEFAULT_SILENCE_SECONDS, TlsFiles, WireLimits, count
from surfw.errors import ConnectionFailedError, IntegrityError, ManifestError, RefusedError, UnknownModelError
from surfw.manifest import Chunk, Digests, Manifest, count_blocks, parse_digests, parse_manifest, with_digests
from surfw.retry import RESTART_DELAY_SECONDS, RetryPolicy
from surfw.source import ChunkSource, Read, Waiting, describe_damage, locate_damage
from surfw.threads import together
from surfw.wire import MOST_SCHEDULED, Get, GetDigests, GetFile, GetManifest, ListModels, Request, Schedule

logger = logging.getLogger("surfw.client")

T = TypeVar("T")
Connect = Callable[[], Awaitable[Link]]
"""Opens a new link to the same server."""

_VERIFIERS = 2
_LONGEST_NAME = 256
"""The most characters of a model's name in a request; longer names cannot exist."""
_NAMED = 10
"""The most models named in an error."""
_SERVED = "the server's storage or memory"
_AROUND_DIGESTS_BYTES = 1024
"""The size of a digests document without the 64 characters for each block."""


class WireSource(ChunkSource):
    """The models of a server. A source belongs to the event loop in which it was opened.

    A lost connection is reopened as often as the retry policy allows. A chunk then continues after its verified blocks;
    if any were verified since the last failure, its attempts are counted anew. Damaged blocks are fetched again
    individually, up to `DAMAGE_RETRIES` times.

    Attributes:
        fetched_bytes: stored bytes delivered so far.
        refetched_blocks: blocks, manifests and files that arrived damaged and were fetched again.
        waiting: when the connection was lost, and when it is retried; None while connected.
        buffered_bytes: the window: the most bytes a server may send before they are received.
        unverified_for_measurement_only: leaves bytes unverified; only `bench wire` sets it.
    """

    fetched_bytes = 0
    refetched_blocks = 0
    buffered_bytes = 0
    waiting: Waiting | None = None
    unverified_for_measurement_only = False

    def __init__(self, url: str, connect: Connect, retry: RetryPolicy, limits: WireLimits) -> None:
        """Create a source that is not connected yet; `open_wire_source` connects it."""
        self.url = url
        self.buffered_bytes = limits.window_bytes
        self._connect = connect
        self._retry = retry
        self._link: Link | None = None
        self._awaited: Link | None = None
        self._connecting = asyncio.Lock()
        self._closed = False
        self._limits = limits
        self._schedules: dict[str, Schedule] = {}  # by model; sent again over every new link
        self._digests: dict[tuple[str, str], Digests] = {}
        self._asking: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._verifiers = ThreadPoolExecutor(_VERIFIERS, thread_name_prefix="surfw-verify")

    async def connect(self) -> None:
        """Connect for the first time, with the attempts that the retry policy allows."""
        await self._persistently(lambda link: link.greeted)

    async def models(self) -> list[str]:
        """Return the names of the server's models, sorted."""
        answer = await self._persistently(lambda link: link.receive(ListModels))
        return sorted(answer.models) if answer else []

    async def resolve(self, name: str | None) -> str:
        """Resolve a name as any source does; if the token may not read the model, the server's refusal is raised.

        Raises:
            UnknownModelError: no model or several models match.
            RefusedError: the token may not read the model.
        """
        try:
            return await super().resolve(name)
        except UnknownModelError as exc:
            if not name or len(name) > _LONGEST_NAME or not name.isprintable():
                raise
            try:
                return (await self.manifest(name)).name
            except RefusedError as refused:
                may = f"; it may read {', '.join(exc.known[:_NAMED])}" if exc.known else ""
                raise RefusedError(f"{refused}{may}", code=refused.code) from None

    async def manifest(self, model: str) -> Manifest:
        """Return the manifest of the model."""
        what = f"the manifest of {model} from {self.url}"
        document = DocumentDownload(what, most_read(self._limits.manifest_bytes))
        try:
            data = await self._receive(lambda number: GetManifest(number, model), document)
        except RefusedError as exc:
            if exc.code != "unknown-model":
                raise
            raise UnknownModelError(model, await self.models(), where=self.url) from exc
        manifest = parse_manifest(data, where=self.url)
        if manifest.name != model:
            raise ManifestError(f"{self.url} answered for {model} with the manifest of {manifest.name}")
        return manifest

    async def file(self, manifest: Manifest, path: str) -> bytes:
        """Return a tokenizer file of the model, verified."""
        entry = manifest.file(path)
        what = f"{path} of {manifest.name} from {self.url}"
        document = DocumentDownload(what, most_read(entry.size), listed=(entry.size, entry.digest))
        return await self._receive(lambda number: GetFile(number, manifest.name, path), document)

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill all destinations concurrently; each is verified while the rest arrives."""
        await together(self._fetch(manifest.name, read, priority) for read in reads)

    async def announce(self, manifest: Manifest, cycle: Sequence[Chunk], kept: Sequence[Chunk]) -> None:
        """Send a schedule to the server; an empty one if the cycle is too long."""
        ids = () if len(cycle) > MOST_SCHEDULED else tuple(chunk.id for chunk in cycle)
        schedule = Schedule(manifest.name, ids, tuple({chunk.id for chunk in kept} & set(ids)))
        if schedule == self._schedules.get(manifest.name):
            return
        self._schedules[manifest.name] = schedule
        if self._link:
            self._link.announce(schedule)

    async def _fetch(self, model: str, read: Read, priority: int) -> None:
        if not read.form.is_known:
            read = await self._with_digests(model, read)
        download = ChunkDownload(read, None if self.unverified_for_measurement_only else self._verifiers)
        size = read.stop - read.start

        async def attempt(link: Link) -> None:
            while download.missing:
                await self._receive_range(link, model, download, priority)

        try:
            await self._persistently(attempt, download.failed)
        except ConnectionFailedError as exc:
            first, last = (text.removesuffix(f"; {START_ONE}") for text in (download.first_failure, str(exc)))
            later = "" if last == first else f"; the last attempt: {last}"
            raise ConnectionFailedError(
                f"{first}, after {download.reached_bytes} of {size} bytes of chunk {read.chunk.name}{later}; "
                "see what became of the server, and run it again",
                transient=exc.transient,
            ) from exc
        self.fetched_bytes += size

    async def _receive_range(self, link: Link, model: str, download: ChunkDownload, priority: int) -> None:
        """Receive the next range of a download. Afterwards no thread accesses the destination any more."""
        read = download.read
        start, stop, fresh = download.next_range()

        def ask(number: int) -> Get:
            return Get(number, model, read.chunk.id, read.form.codec, start, stop, priority, fresh)

        try:
            await link.receive(ask, download)
        except ConnectionFailedError:
            await self._verify_range(download)  # intact blocks need not be fetched again
            raise
        else:
            await self._verify_range(download)
        finally:
            await download.settle()

    async def _verify_range(self, download: ChunkDownload) -> None:
        """Wait for the verification of what arrived.

        Raises:
            IntegrityError: a block was damaged too often.
        """
        found = await download.verify()
        for block, seen in found.items():
            what = describe_damage(download.read.chunk, download.read.form, block, seen, where=self.url)
            if len(download.damage[block]) > DAMAGE_RETRIES:
                raise IntegrityError(f"{what}; {locate_damage(download.damage[block], stored=_SERVED)}")
        if found:
            logger.warning("%s; fetching %s again", what, count(len(found), "block"))
        self.refetched_blocks += len(found)

    async def digests(self, manifest: Manifest, chunk: Chunk) -> Digests:
        """Return the digests of a chunk that its manifest lacks. The server is asked once for each chunk."""
        return await self._find_digests(manifest.name, chunk)

    async def _find_digests(self, model: str, chunk: Chunk) -> Digests:
        name = (model, chunk.id)
        async with self._asking[name]:
            if name not in self._digests:
                what = f"what the server at {self.url} says of chunk {chunk.name}"
                size = chunk.forms[0].stored_bytes
                most_bytes = 64 * count_blocks(size) + _AROUND_DIGESTS_BYTES
                document = DocumentDownload(what, most_read(size), most_bytes=most_bytes)
                data = await self._receive(lambda number: GetDigests(number, model, chunk.id), document)
                self._digests[name] = parse_digests(data, size, where=what)
            return self._digests[name]

    async def _with_digests(self, model: str, read: Read) -> Read:
        """Return the read with the digests that its manifest lacks."""
        known = with_digests(read.chunk, await self._find_digests(model, read.chunk))
        asked = replace(known, id=read.chunk.id)  # the server finds the chunk by the id of its manifest
        return replace(read, chunk=asked, form=known.forms[0])

    async def _receive(self, make: Callable[[int], Request], document: DocumentDownload) -> bytes:
        """Receive a whole document; every attempt starts from the beginning.

        Raises:
            IntegrityError: it was damaged every time.
        """

        async def attempt(link: Link) -> bytes:
            await link.receive(make, document)
            return document.verified()

        while True:
            try:
                return await self._persistently(attempt)
            except IntegrityError as exc:
                if len(document.damage) > DAMAGE_RETRIES:
                    raise IntegrityError(f"{exc}; {locate_damage(document.damage, stored=_SERVED)}") from exc
                logger.warning("%s; fetching it again", exc)
                self.refetched_blocks += 1

    async def _persistently(
        self, attempt: Callable[[Link], Awaitable[T]], failed: Callable[[ConnectionFailedError], bool] = lambda _: False
    ) -> T:
        """Run `attempt` over the link, and again over a new one if the connection is lost, as the retry policy allows.

        `failed` is called with the error of each lost connection. It returns True if there was progress; attempts are
        then counted anew.
        """
        delays = self._retry.delays()
        waits_until: float | None = None
        while True:
            try:
                answer = await attempt(await self._connected())
            except ConnectionFailedError as exc:
                if failed(exc):
                    delays, waits_until = self._retry.delays(), None
                if waits_until is None and self._link and self._link.said_goodbye and self._retry.attempts > 1:
                    waits_until = time.monotonic() + self._retry.restart_seconds
                delay = next(delays, None)
                if delay is None and waits_until is not None and time.monotonic() < waits_until and not self._closed:
                    delay = RESTART_DELAY_SECONDS
                    self._note_waiting()
                if delay is None or not exc.transient or self._closed:
                    raise
                now = time.monotonic()
                self.waiting = Waiting(self.url, self.waiting.since if self.waiting else now, self.url, now + delay)
                logger.info("%s; trying again in %.2f seconds", exc, delay)
                await asyncio.sleep(delay)
            else:
                self.waiting = None
                return answer

    def _note_waiting(self) -> None:
        """Log once per link that the server is stopping and is waited for."""
        if self._link is not None and self._awaited is not self._link:
            self._awaited = self._link
            seconds = self._retry.restart_seconds
            logger.warning("the server at %s is stopping; waiting %g seconds for it to be back", self.url, seconds)

    async def _connected(self) -> Link:
        """Return the link; open one if none is open."""
        async with self._connecting:
            if self._link is None:
                self._link = await self._connect()
                self.url = self._link.url
            elif self._link.ended and not self._closed:
                self._link = await self._connect()
                logger.info("connected to %s again", self.url)
                for schedule in self._schedules.values():
                    self._link.announce(schedule)
            if self._closed:  # closed meanwhile: no one else closes a new link
                await self._link.close()
            return self._link

    async def close(self) -> None:
        """Close the connection and stop the threads."""
        self._closed = True
        if self._link:
            await self._link.close()
        self._verifiers.shutdown()


async def open_wire_source(
    url: str,
    *,
    limits: WireLimits | None = None,
    connect_timeout: float = DEFAULT_CONNECT_SECONDS,
    silence_timeout: float = DEFAULT_SILENCE_SECONDS,
    token: str | None = None,
    ssl: SSLContext | TlsFiles | None = None,
    retry: RetryPolicy | None = None,
) -> WireSource:
    """Open a source for the server at a `ws://` or `wss://` address.

    Args:
        url: the address.
        limits: the client's limits on messages, frames and windows.
        connect_timeout: seconds for the server to send its hello.
        silence_timeout: seconds without progress, while requests are open, after which the connection is dropped.
            Progress is 64 KiB received, a completed answer, or a report that the server has read that much.
        token: the server's secret, if it has one.
        ssl: for a `wss://` server: the certificates to trust instead of the system's, and the client certificate to
            send.
        retry: how often to retry a refused or lost connection; default: `RetryPolicy()`.

    Raises:
        ConfigurationError: the address is malformed, or the token would be sent in clear text.
        RefusedError: the server requires a token, or rejects this one.
        ConnectionFailedError: nothing answers there, or something that is not a surfw server.
    """
    limits = limits or WireLimits()
    connect = partial(
        open_link,
        Endpoint(url, token, ssl),
        limits=limits,
        connect_seconds=connect_timeout,
        silence_seconds=silence_timeout,
    )
    source = WireSource(url, connect, retry or RetryPolicy(), limits)
    await source.connect()
    return source
