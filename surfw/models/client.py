"""A source of weights, and the thread with an event loop that it runs on: what one or several models read through."""

import os
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ssl import SSLContext
from types import TracebackType
from typing import Any, Self, TypeVar

from surfw.chunking.in_place import publish_place
from surfw.client import open_wire_source
from surfw.config import DEFAULT_CONNECT_SECONDS, DEFAULT_SILENCE_SECONDS, TlsFiles, display_url, expect, is_server_url
from surfw.encryption import DecryptingSource, EncryptionKey, read_key
from surfw.errors import ConfigurationError, ModelClosedError
from surfw.retry import RetryPolicy
from surfw.runtime.run import IoThread, run_in_executor
from surfw.source import ChunkSource
from surfw.storage import StorageBackend, open_backend
from surfw.storage.backends import refuse_file
from surfw.storage.origins import PlacedOptions
from surfw.storage.store import is_checkpoint
from surfw.storage.store_source import open_storage_source
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
        source: str | os.PathLike[str] | StorageBackend,
        *,
        token: str | None = None,
        ssl: SSLContext | TlsFiles | None = None,
        retry: RetryPolicy | None = None,
        connect_timeout: float = DEFAULT_CONNECT_SECONDS,
        silence_timeout: float = DEFAULT_SILENCE_SECONDS,
        storage_options: Mapping[str, Any] | None = None,
        encryption_key_file: str | os.PathLike[str] | None = None,
    ) -> None:
        """Note where the weights are; nothing is contacted before the first use.

        Args:
            source: a server (`ws://host:port`, `wss://…`), or a store: a folder, a storage URL, a backend. A folder or
                URL may also be that of a plain checkpoint, which is then read from where it is.
            token: the secret that the server wants.
            ssl: for `wss://`: whose certificates to trust, instead of the system's, and which to show; their files, or
                a context.
            retry: how often a connection that was refused or lost is made again.
            connect_timeout: seconds that a server has to answer.
            silence_timeout: seconds without progress (64 KiB, or all that is left of an answer), tries included, after
                which a server or a remote storage is given up; a backend of your own has its own.
            storage_options: for a storage URL, such as `{"endpoint_url": "http://…"}`.
            encryption_key_file: holds the key of encrypted models. They are decrypted here; a server never sees it.

        Raises:
            ConfigurationError: an argument cannot be used, or the source takes no token, certificates or options.
        """
        is_server = isinstance(source, str) and is_server_url(source)
        if (token is not None or ssl is not None) and not is_server:
            raise ConfigurationError("token and ssl are for servers; expected a ws:// or wss:// address with them")
        expect("storage_options", storage_options, Mapping | None, "a mapping of names to values, or None")
        if storage_options and (is_server or not isinstance(source, str | os.PathLike)):
            raise ConfigurationError("storage_options are for a storage URL; expected one with them")
        expect("encryption_key_file", encryption_key_file, str | os.PathLike | None, "a file or None")
        expect("token", token, str | None, "a text or None")
        expect("ssl", ssl, SSLContext | TlsFiles | None, "an ssl.SSLContext, TlsFiles or None")
        expect("retry", retry, RetryPolicy | None, "a RetryPolicy or None")
        for name, seconds in (("connect_timeout", connect_timeout), ("silence_timeout", silence_timeout)):
            expect(name, seconds, int | float, "a number of seconds over 0")
            if not 0 < seconds < float("inf"):
                raise ConfigurationError(f"{name} is {seconds}; expected a number of seconds over 0")
        connect = partial(
            open_wire_source,
            token=token,
            ssl=ssl,
            retry=retry,
            connect_timeout=connect_timeout,
            silence_timeout=silence_timeout,
        )
        open_place = connect if is_server else partial(_open_store, storage_options, silence_timeout)
        url, open_source = _locate(source, open_place)
        if encryption_key_file is not None:
            open_source = partial(_open_encrypted, open_source, read_key(encryption_key_file))
        super().__init__(url, open_source)

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


Source = str | os.PathLike[str] | StorageBackend | WeightClient
"""Where a model's weights may come from."""


def _locate(
    source: object, open_place: Callable[[str], Coroutine[Any, Any, ChunkSource]]
) -> tuple[str, Callable[[], Coroutine[Any, Any, ChunkSource]]]:
    """Where a source is, for people, and how to open it; a function that opens one is taken as it is."""
    if isinstance(source, StorageBackend):
        return display_url(source.url), partial(open_storage_source, source, owned=False)
    if isinstance(source, str | os.PathLike):
        place = os.fspath(source)
        if not place:
            raise ConfigurationError("the source is empty; expected a server, a store's folder or URL, or a backend")
        return display_url(place), partial(open_place, place)
    if callable(source) and not isinstance(source, type):

        async def opened() -> ChunkSource:
            found: ChunkSource = await source()
            return found

        return "a source of your own", opened
    kind = f"the class {source.__name__}" if isinstance(source, type) else type(source).__name__
    raise ConfigurationError(
        f"a source is a server's address, a store's folder or URL, or a StorageBackend, not {kind}"
    )


async def _open_encrypted(
    open_source: Callable[[], Coroutine[Any, Any, ChunkSource]], key: EncryptionKey
) -> ChunkSource:
    return DecryptingSource(await open_source(), key)


async def _open_store(options: Mapping[str, Any] | None, silence_timeout: float, place: str) -> ChunkSource:
    """A source over a store; or over a plain checkpoint, which is read from where it is."""
    refuse_file(place)
    backend = open_backend(place, options, silence_timeout=silence_timeout)
    is_plain = await is_checkpoint(backend)
    if is_plain:
        await backend.close()
        private = await publish_place(place, options, silence_timeout=silence_timeout)
        backend = open_backend(private, silence_timeout=silence_timeout)
    source = await open_storage_source(backend, origin_options=PlacedOptions(place, options or {}))
    if is_plain:
        source.url = display_url(place)
    return source
