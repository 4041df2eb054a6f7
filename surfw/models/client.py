"""A source of weights with an event loop in a thread of its own: what models read through, alone or together."""

import os
import ssl as tls
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

from surfw.client import open_wire_source
from surfw.config import DEFAULT_CONNECT_SECONDS, DEFAULT_SILENCE_SECONDS, WireLimits
from surfw.errors import ConfigurationError, ModelClosedError
from surfw.retry import RetryPolicy
from surfw.runtime.io_thread import IoThread
from surfw.source import ChunkSource
from surfw.storage import StorageBackend, open_backend
from surfw.storage.source import open_storage_source

T = TypeVar("T")

OpenSource = Callable[[], Awaitable[ChunkSource]]
"""Opens a source of one's own; it runs on the client's event loop."""


class WeightClient:
    """A connection to weights, which any number of models and threads may share. Closed by whoever made it.

    Models that are opened from an address have a client of their own. Make one yourself to open several models over
    one connection: `StreamingModel.open(client, model="a")`.

    Attributes:
        url: where the weights come from, for people.
    """

    def __init__(
        self,
        source: "str | os.PathLike[str] | StorageBackend | OpenSource",
        *,
        token: str | None = None,
        ssl: tls.SSLContext | None = None,
        retry: RetryPolicy | None = None,
        connect_timeout: float = DEFAULT_CONNECT_SECONDS,
        silence_timeout: float = DEFAULT_SILENCE_SECONDS,
    ) -> None:
        """Note where the weights are; nothing is contacted before the first use.

        Args:
            source: a server (`ws://host:port`, `wss://…`), a store (a folder, a storage URL, a backend), or a function
                that opens a `ChunkSource`.
            token: the secret that the server wants.
            ssl: how to check a `wss://` server's certificate; default: as the system does.
            retry: how often a connection that was refused or lost is made again.
            connect_timeout: seconds that a server has to answer.
            silence_timeout: seconds without a byte, while something is asked for, after which a server is given up.
        """
        is_server = isinstance(source, str) and source.startswith(("ws://", "wss://"))
        if (token is not None or ssl is not None) and not is_server:
            raise ConfigurationError("token and ssl are for servers; expected a ws:// or wss:// address with them")
        if isinstance(source, str | os.PathLike) and not os.fspath(source):
            raise ConfigurationError("the source is empty; expected a server, a store's folder or URL, or a backend")
        self.url = _describe(source)
        self._open_source = _opener(
            source, token=token, ssl=ssl, retry=retry, connect_timeout=connect_timeout, silence_timeout=silence_timeout
        )
        self._lock = threading.Lock()
        self._io: IoThread | None = None
        self._source: ChunkSource | None = None
        self._closed = False

    @property
    def io(self) -> IoThread:
        """The thread of the event loop; opens the source if need be."""
        self.source  # noqa: B018 - opens both
        assert self._io is not None, "opening the source made it"
        return self._io

    @property
    def source(self) -> ChunkSource:
        """The source, opened at the first use; belongs to the event loop of `io`.

        Raises:
            ModelClosedError: the client is closed.
            SurfwError: it cannot be reached.
        """
        with self._lock:
            if self._closed:
                raise ModelClosedError(f"the client of {self.url} is closed; open it again")
            if self._source is None:
                io = IoThread()
                try:
                    self._source = io.run(_call(self._open_source))
                except BaseException:
                    io.close()
                    raise
                self._io = io
            return self._source

    def run(self, work: Callable[[ChunkSource], Coroutine[Any, Any, T]]) -> T:
        """Do something with the source, on its event loop, and wait for it."""
        source = self.source
        return self.io.run(work(source))

    def submit(self, work: Callable[[ChunkSource], Coroutine[Any, Any, T]]) -> "Future[T]":
        """Start something with the source, on its event loop."""
        source = self.source
        return self.io.submit(work(source))

    def models(self) -> list[str]:
        """The names of the models there are, sorted.

        Raises:
            SurfwError: the source cannot be reached.
        """
        return self.run(lambda source: source.models())

    def close(self) -> None:
        """Leave the source for good. Models that still read through it fail. Closing twice is fine."""
        self._closed = True
        self.disconnect()

    def disconnect(self) -> None:
        """Leave the source; the next use opens it again."""
        with self._lock:
            io, source = self._io, self._source
            self._io = self._source = None
        if io is None or source is None:
            return
        try:
            io.run(source.close())
        finally:
            io.close()

    def __enter__(self) -> Self:
        """Enter the context."""
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Close."""
        self.close()


Source = str | os.PathLike[str] | StorageBackend | WeightClient | OpenSource
"""Where a model's weights may come from."""


def _describe(source: "str | os.PathLike[str] | StorageBackend | OpenSource") -> str:
    if isinstance(source, StorageBackend):
        return source.url
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "a source of one's own"


def _opener(source: Any, **settings: Any) -> OpenSource:
    if isinstance(source, StorageBackend):
        return lambda: open_storage_source(source, owned=False)
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        if text.startswith(("ws://", "wss://")):
            return lambda: _open_wire(text, **settings)
        return lambda: _open_store(text)
    if not callable(source):
        raise ConfigurationError(
            f"a source is a server's address, a store's folder or URL, or a StorageBackend, not {type(source).__name__}"
        )
    opener: OpenSource = source
    return opener


async def _open_wire(url: str, **settings: Any) -> ChunkSource:
    return await open_wire_source(url, limits=WireLimits(), **settings)


async def _open_store(place: str) -> ChunkSource:
    return await open_storage_source(open_backend(place))


async def _call(opener: OpenSource) -> ChunkSource:
    return await opener()
