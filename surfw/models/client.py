"""A source of weights and the event loop thread that it runs on; one or several models read through it."""

import os
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ssl import SSLContext
from types import TracebackType
from typing import Any, Self, TypeVar

from surfw.config import DEFAULT_CONNECT_SECONDS, DEFAULT_SILENCE_SECONDS, SourceOrder, TlsFiles
from surfw.errors import ModelClosedError
from surfw.models.disk_options import disk_options
from surfw.models.places import Connection, Place
from surfw.retry import RetryPolicy
from surfw.runtime.run import IoThread, run_in_executor
from surfw.source import ChunkSource, Waiting
from surfw.threads import in_thread, refuse_event_loop

T = TypeVar("T")


class SourceThread:
    """A source, opened at its first use, and its event loop thread; the package's internal side of `WeightClient`.

    Usable from any thread.

    Attributes:
        url: where the weights come from, for display.
    """

    def __init__(self, url: str, open_source: Callable[[], Coroutine[Any, Any, ChunkSource]]) -> None:
        """Store how to open the source on the event loop; it is not opened yet."""
        self.url = url
        self._open_source = open_source
        self._lock = threading.Lock()
        self._io: IoThread | None = None
        self._source: ChunkSource | None = None
        self._refetched_blocks = 0
        self._closed = False

    @property
    def io(self) -> IoThread:
        """The thread of the event loop."""
        return self._open()[0]

    @property
    def source(self) -> ChunkSource:
        """The source; only code on the event loop may use it."""
        return self._open()[1]

    def _open(self) -> tuple[IoThread, ChunkSource]:
        """Return the thread and the source; the first call opens them.

        Raises:
            ModelClosedError: the client is closed.
            SurfwError: the source cannot be reached.
        """
        with self._lock:
            if self._closed:
                raise ModelClosedError(f"the client of {self.url} is closed; open it again")
            if self._io is None or self._source is None:
                io = IoThread()
                try:
                    self._source = io.run(self._open_source())
                except BaseException:
                    io.close()
                    raise
                self._io = io
            return self._io, self._source

    @property
    def refetched_blocks(self) -> int:
        """Number of blocks and files that arrived damaged and were fetched again, over all models of this client."""
        source = self._source
        return self._refetched_blocks + (source.refetched_blocks if source else 0)

    @property
    def waiting(self) -> Waiting | None:
        """The state of a failed source that will be retried; None if it works."""
        source = self._source
        return source.waiting if source else None

    def run(self, work: Callable[[ChunkSource], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine that uses the source, on its event loop, and return its result."""
        io, source = self._open()
        return io.run(work(source))

    def close(self) -> None:
        """Close the source for good. Models that still read through it fail. Closing twice is fine."""
        self._closed = True
        self.disconnect()

    def disconnect(self) -> None:
        """Close the source; the next use opens it again."""
        with self._lock:
            io, source = self._io, self._source
            self._refetched_blocks = self.refetched_blocks
            self._io = self._source = None
        if io is None or source is None:
            return
        try:
            io.submit(source.close()).result()  # not `run`: an interrupted run has to close it, too
        finally:
            io.close()


class WeightClient(SourceThread):
    """A connection to weights that any number of models and threads may share. Close the clients that you create.

    A model opened from an address has its own client. Create one yourself to open several models over one connection:
    `StreamingModel.open(client, model="a")`.

    Attributes:
        url: where the weights come from, for display.
    """

    def __init__(
        self,
        source: Place | Sequence[Place],
        *,
        token: str | None = None,
        ssl: SSLContext | TlsFiles | None = None,
        retry: RetryPolicy | None = None,
        connect_timeout: float = DEFAULT_CONNECT_SECONDS,
        silence_timeout: float = DEFAULT_SILENCE_SECONDS,
        storage_options: Mapping[str, Any] | None = None,
        disk_cache: int | str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        offline: bool | None = None,
        deadline: float | None = None,
        encryption_key_file: str | os.PathLike[str] | None = None,
        verify_key: str | os.PathLike[str] | None = None,
        source_order: SourceOrder = "given",
    ) -> None:
        """Store where the weights are; nothing is contacted before the first use.

        Args:
            source: a server (`ws://host:port`, `wss://…`), or a store: a folder, a storage URL, a backend. A folder or
                URL may also be a plain checkpoint, which is then read in place. A list of sources is a failover order:
                the next one is used if the one before fails, is slow, or delivers damaged data. All of them must have
                the same model.
            token: the server's secret; with several servers, all must accept it.
            ssl: for `wss://`: the certificates to trust instead of the system's, and the one to present; as files, or
                as a context.
            retry: retry policy for refused and lost connections.
            connect_timeout: seconds that a server has to answer.
            silence_timeout: seconds without progress (64 KiB, or the rest of an answer), including retries, after which
                a server or remote storage counts as failed; your own backends use their own timeouts.
            storage_options: options for a storage URL, such as `{"endpoint_url": "http://…"}`.
            disk_cache: size of a local disk cache for fetched data, such as `20GB`, kept for later runs; None for no
                cache. Local sources are never cached.
            cache_dir: folder of the disk cache, which many processes may share; default `$SURFW_HOME/cache`.
            offline: read only from the disk cache and contact nothing; default: the value of `HF_HUB_OFFLINE` if there
                is a `disk_cache`.
            deadline: seconds to wait for any read, however often its sources fail; default: as `retry` says.
            encryption_key_file: file with the key of encrypted models. They are decrypted here; a server never sees it.
            verify_key: file with public keys in PEM; every model must be signed with one of them.
            source_order: for several sources, `given` uses the first one that works; `speed` the fastest one, probing
                the others now and then.

        Raises:
            ConfigurationError: an argument is invalid, or the source takes no token, certificates or options.
        """
        connection = Connection(
            token=token,
            ssl=ssl,
            retry=retry,
            connect_timeout=connect_timeout,
            silence_timeout=silence_timeout,
            storage_options=storage_options,
            disk=disk_options(disk_cache, cache_dir, offline),
            deadline=deadline,
            encryption_key_file=encryption_key_file,
            verify_key=verify_key,
            source_order=source_order,
        )
        super().__init__(*connection.locate(source))

    def models(self) -> list[str]:
        """The names of the source's models, sorted.

        Raises:
            ConfigurationError: an event loop runs in this thread and would be blocked: use `models_async`.
            SurfwError: the source cannot be reached.
        """
        refuse_event_loop("asking for the models", "'await client.models_async()'")
        return self.run(lambda source: source.models())

    async def models_async(self) -> list[str]:
        """Like `models`, without blocking the event loop."""
        with ThreadPoolExecutor(1, thread_name_prefix="surfw-client") as executor:
            return await run_in_executor(executor, self.models)

    async def close_async(self) -> None:
        """Like `close`, without blocking the event loop."""
        await in_thread(self.close)

    async def __aenter__(self) -> Self:
        """Enter the context."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Close the client, without blocking the event loop."""
        await self.close_async()

    def __enter__(self) -> Self:
        """Enter the context."""
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Close the client."""
        self.close()


Source = Place | Sequence[Place] | WeightClient
"""Where a model's weights may come from."""
