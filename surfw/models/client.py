"""A source of weights, and the thread with an event loop that it runs on: what one or several models read through."""

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
    """A source, opened at its first use, and the thread with its event loop: what the package uses of `WeightClient`.

    Usable from any thread.

    Attributes:
        url: where the weights come from, for people.
    """

    def __init__(self, url: str, open_source: Callable[[], Coroutine[Any, Any, ChunkSource]]) -> None:
        """Note how to open the source, on the event loop; it is not opened yet."""
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
        """The thread and the source; the first call opens them.

        Raises:
            ModelClosedError: it was closed.
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
        """How many blocks and files arrived damaged and were fetched again, for all models that read through this."""
        source = self._source
        return self._refetched_blocks + (source.refetched_blocks if source else 0)

    @property
    def waiting(self) -> Waiting | None:
        """What keeps the source waiting, if it failed and is to be tried again."""
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
    """A connection to weights, which any number of models and threads may share. Close the ones you make.

    Models that are opened from an address have a client of their own. Make one yourself to open several models over
    one connection: `StreamingModel.open(client, model="a")`.

    Attributes:
        url: where the weights come from, for people.
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
        """Note where the weights are; nothing is contacted before the first use.

        Args:
            source: a server (`ws://host:port`, `wss://…`), or a store: a folder, a storage URL, a backend. A folder or
                URL may also be that of a plain checkpoint, which is then read from where it is. Several of them, in a
                list, are asked in this order: the next one where the one before fails, is late, or delivers damage.
                All of them have to have the same model.
            token: the secret that the server wants, or that all of several servers want.
            ssl: for `wss://`: whose certificates to trust, instead of the system's, and which to show; their files, or
                a context.
            retry: how often a connection that was refused or lost is made again.
            connect_timeout: seconds that a server has to answer.
            silence_timeout: seconds without progress (64 KiB, or all that is left of an answer), tries included, after
                which a server or a remote storage is given up; a backend of your own has its own.
            storage_options: for a storage URL, such as `{"endpoint_url": "http://…"}`.
            disk_cache: what may be kept on a local disk of what arrives, such as `20GB`, for this run and later ones;
                None to keep nothing. Sources on this machine need none, and have none.
            cache_dir: the folder for that, which many processes may share; default `$SURFW_HOME/cache`.
            offline: whether only that folder is read and nothing is contacted; default: what `HF_HUB_OFFLINE` says,
                where there is a `disk_cache`.
            deadline: seconds that whatever is to be read is waited for, however often its sources fail meanwhile;
                default: as `retry` says.
            encryption_key_file: holds the key of encrypted models. They are decrypted here; a server never sees it.
            verify_key: holds the public keys, in PEM, one of which every model has to be signed with.
            source_order: of several sources, `given` asks the first one that works; `speed` the one that turns out to
                be the fastest, and the others now and then in case that changes.

        Raises:
            ConfigurationError: an argument cannot be used, or the source takes no token, certificates or options.
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
        """The names of the models that the source has, sorted.

        Raises:
            ConfigurationError: an event loop runs here, and would be blocked: use `models_async`.
            SurfwError: the source cannot be reached.
        """
        refuse_event_loop("asking for the models", "'await client.models_async()'")
        return self.run(lambda source: source.models())

    async def models_async(self) -> list[str]:
        """As `models`, without blocking the event loop."""
        with ThreadPoolExecutor(1, thread_name_prefix="surfw-client") as executor:
            return await run_in_executor(executor, self.models)

    async def close_async(self) -> None:
        """As `close`, without blocking the event loop."""
        await in_thread(self.close)

    async def __aenter__(self) -> Self:
        """Enter the context."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Close, without blocking the event loop."""
        await self.close_async()

    def __enter__(self) -> Self:
        """Enter the context."""
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Close."""
        self.close()


Source = Place | Sequence[Place] | WeightClient
"""Where a model's weights may come from."""
