"""A server as a `ChunkSource`: what a fetch returns was received into its destination and verified there."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ssl import SSLContext

from surfw.client.link import Link
from surfw.client.opening import open_link
from surfw.client.transfer import ChunkTransfer, Document
from surfw.config import DEFAULT_CONNECT_SECONDS, DEFAULT_SILENCE_SECONDS, WireLimits
from surfw.errors import ConnectionFailedError, ManifestError, RefusedError, UnknownModelError
from surfw.manifest import Manifest, parse_manifest
from surfw.source import ChunkSource, Read
from surfw.wire import Get, GetFile, GetManifest

_VERIFIERS = 2


class WireSource(ChunkSource):
    """Models of a server. Belongs to the event loop it was opened in."""

    def __init__(self, link: Link, *, unverified_for_measurement_only: bool = False) -> None:
        """Take over the connection; use `open_wire_source` to make one. `bench wire` alone leaves bytes unverified."""
        self.url = link.url
        self._link = link
        self._fetched_bytes = 0
        self._verifiers = ThreadPoolExecutor(_VERIFIERS, thread_name_prefix="surfw-verify")
        self._verify = not unverified_for_measurement_only

    @property
    def fetched_bytes(self) -> int:
        """Stored bytes delivered so far."""
        return self._fetched_bytes

    async def models(self) -> list[str]:
        """The names of the models there are."""
        return sorted(await self._link.models())

    async def manifest(self, model: str) -> Manifest:
        """The manifest of the model."""
        document = Document(f"the manifest of {model} from {self.url}")
        try:
            await self._link.receive(lambda number: GetManifest(number, model), document)
        except RefusedError as exc:
            if exc.code != "unknown-model":
                raise
            raise UnknownModelError(model, await self.models(), where=self.url) from exc
        manifest = parse_manifest(document.verified(), where=self.url)
        if manifest.name != model:
            raise ManifestError(f"{self.url} answered for {model} with the manifest of {manifest.name}")
        return manifest

    async def file(self, manifest: Manifest, path: str) -> bytes:
        """A tokenizer file of the model, verified."""
        entry = manifest.file(path)
        document = Document(f"{path} of {manifest.name} from {self.url}", listed=(entry.size, entry.digest))
        await self._link.receive(lambda number: GetFile(number, manifest.name, path), document)
        return document.verified()

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill every read's destination, all at once, each verified while the rest arrives."""
        fetches = [asyncio.create_task(self._fetch(manifest.name, read, priority)) for read in reads]
        try:
            await asyncio.gather(*fetches)
        finally:
            for fetch in fetches:
                fetch.cancel()
            await asyncio.gather(*fetches, return_exceptions=True)

    async def _fetch(self, model: str, read: Read, priority: int) -> None:
        chunk, form = read.chunk, read.form
        transfer = ChunkTransfer(read, self._verifiers if self._verify else None, where=self.url)
        try:
            await self._link.receive(
                lambda number: Get(number, model, chunk.id, form.codec, read.start, read.stop, priority), transfer
            )
            await transfer.verified()
        except ConnectionFailedError as exc:
            raise ConnectionFailedError(
                f"{exc}, after {transfer.received} of {read.stop - read.start} bytes of chunk {chunk.name}; "
                "see what became of it, and run the command again"
            ) from exc
        finally:
            await transfer.settle()
        self._fetched_bytes += transfer.received

    async def close(self) -> None:
        """Leave the server."""
        await self._link.close()
        self._verifiers.shutdown()


async def open_wire_source(
    url: str,
    *,
    limits: WireLimits | None = None,
    connect_timeout: float = DEFAULT_CONNECT_SECONDS,
    silence_timeout: float = DEFAULT_SILENCE_SECONDS,
    token: str | None = None,
    ssl: SSLContext | None = None,
) -> WireSource:
    """A source over the server at a `ws://` or `wss://` address.

    Waits `connect_timeout` seconds for the server to say hello, and later as long as no `silence_timeout` seconds pass
    without a byte while something is asked for. `token` is what the server wants to be shown, if anything; `ssl` says
    whose certificates to trust for `wss://`, in place of the system's.

    Raises:
        ConfigurationError: the address is not one, or the token would go there in clear text.
        RefusedError: the server wants a token, or another one.
        ConnectionFailedError: nothing answers there, or something else does.
    """
    link = await open_link(
        url,
        limits=limits or WireLimits(),
        connect_seconds=connect_timeout,
        silence_seconds=silence_timeout,
        token=token,
        ssl=ssl,
    )
    return WireSource(link)
