"""Places that weights come from, and how to open them as a source, with failover, disk cache and decryption."""

import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from ssl import SSLContext
from typing import Any

from surfw.client import open_wire_source
from surfw.config import SourceOrder, TlsFiles, check_source_order, display_url, expect, is_server_url
from surfw.encryption import DecryptingSource, EncryptionKey, read_key
from surfw.errors import ConfigurationError
from surfw.models.disk_options import DiskOptions, OpenSource
from surfw.retry import RetryPolicy
from surfw.signing import VerifyingSource, VerifyKeys, read_verify_keys
from surfw.source import ChunkSource
from surfw.sources.failover import Failover
from surfw.storage import StorageBackend, open_backend
from surfw.storage.backends import refuse_file
from surfw.storage.origins import PlacedOptions
from surfw.storage.store import is_checkpoint
from surfw.storage.store_source import open_storage_source

Place = str | os.PathLike[str] | StorageBackend
"""A server's address, a store's folder or URL, or a backend."""


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Connection settings; see `WeightClient` for each.

    Raises:
        ConfigurationError: a setting is invalid.
    """

    token: str | None
    ssl: SSLContext | TlsFiles | None
    retry: RetryPolicy | None
    connect_timeout: float
    silence_timeout: float
    storage_options: Mapping[str, Any] | None
    disk: DiskOptions
    deadline: float | None
    encryption_key_file: str | os.PathLike[str] | None
    verify_key: str | os.PathLike[str] | None
    source_order: SourceOrder

    def __post_init__(self) -> None:
        """Check the values."""
        expect("storage_options", self.storage_options, Mapping | None, "a mapping of names to values, or None")
        for name in ("encryption_key_file", "verify_key"):
            expect(name, getattr(self, name), str | os.PathLike | None, "a file or None")
        check_source_order(self.source_order)
        expect("token", self.token, str | None, "a text or None")
        expect("ssl", self.ssl, SSLContext | TlsFiles | None, "an ssl.SSLContext, TlsFiles or None")
        expect("retry", self.retry, RetryPolicy | None, "a RetryPolicy or None")
        for name in ("connect_timeout", "silence_timeout", "deadline"):
            seconds = getattr(self, name)
            if name == "deadline" and seconds is None:
                continue
            expect(name, seconds, int | float, "a number of seconds over 0")
            if not 0 < seconds < float("inf"):
                raise ConfigurationError(f"{name} is {seconds}; expected a number of seconds over 0")

    def locate(self, source: object) -> tuple[str, OpenSource]:
        """Return the display URL of a source, or of a list of sources, and a function that opens it.

        Raises:
            ConfigurationError: it is not a source, or takes no token, certificates or options.
        """
        places = list(source) if isinstance(source, list | tuple) else [source]
        if not places:
            raise ConfigurationError("there is no source in the list; expected one or more")
        servers = [isinstance(place, str) and is_server_url(place) for place in places]
        if (self.token is not None or self.ssl is not None) and not any(servers):
            raise ConfigurationError("token and ssl are for servers; expected a ws:// or wss:// address with them")
        takes_options = [isinstance(place, str | os.PathLike) for place in places]
        if self.storage_options and not any(
            takes and not is_server for takes, is_server in zip(takes_options, servers, strict=True)
        ):
            raise ConfigurationError("storage_options are for a storage URL; expected one with them")
        is_alone = len(places) == 1 and self.deadline is None
        retry = self.retry if is_alone else RetryPolicy(attempts=1)
        found = [_locate(place, partial(self._open, retry, self._tls_for(place, places))) for place in places]
        url, open_source = found[0] if is_alone else (found[0][0], partial(self._open_all, found))
        if all(isinstance(place, str | os.PathLike | StorageBackend) for place in places):
            open_source = self.disk.wrap([one for one, _ in found], open_source)
        if self.encryption_key_file is not None:  # outside the disk cache, whose data stays encrypted
            open_source = partial(_open_encrypted, open_source, read_key(self.encryption_key_file))
        if self.verify_key is not None:  # outermost, as a disk cache's data may be wrong, too
            open_source = partial(_open_verified, open_source, read_verify_keys(self.verify_key))
        return url, open_source

    def _tls_for(self, place: object, places: Sequence[object]) -> SSLContext | TlsFiles | None:
        """The certificates for a place; among several places, those without TLS get none."""
        return self.ssl if len(places) == 1 or str(place).startswith("wss://") else None

    async def _open(self, retry: RetryPolicy | None, tls: SSLContext | TlsFiles | None, place: str) -> ChunkSource:
        """Open a server or a store."""
        if not is_server_url(place):
            return await _open_store(self.storage_options, self.silence_timeout, place)
        return await open_wire_source(
            place,
            token=self.token,
            ssl=tls,
            retry=retry,
            connect_timeout=self.connect_timeout,
            silence_timeout=self.silence_timeout,
        )

    async def _open_all(self, found: Sequence[tuple[str, OpenSource]]) -> ChunkSource:
        """Combine several sources into one; none is contacted yet."""
        return Failover(found, retry=self.retry, deadline_seconds=self.deadline, by_speed=self.source_order == "speed")


async def _open_encrypted(open_source: OpenSource, key: EncryptionKey) -> ChunkSource:
    return DecryptingSource(await open_source(), key)


async def _open_verified(open_source: OpenSource, keys: VerifyKeys) -> ChunkSource:
    return VerifyingSource(await open_source(), keys)


def _locate(source: object, open_place: Callable[[str], Coroutine[Any, Any, ChunkSource]]) -> tuple[str, OpenSource]:
    """Return the display URL of one source and a function that opens it; a callable is used as that function."""
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


async def _open_store(options: Mapping[str, Any] | None, silence_timeout: float, place: str) -> ChunkSource:
    """Open a store, or a plain checkpoint, which is read in place."""
    refuse_file(place)
    backend = open_backend(place, options, silence_timeout=silence_timeout)
    is_plain = await is_checkpoint(backend)
    if is_plain:
        await backend.close()
        from surfw.chunking.in_place import publish_place  # slow; not needed for servers

        private = await publish_place(place, options, silence_timeout=silence_timeout)
        backend = open_backend(private, silence_timeout=silence_timeout)
    source = await open_storage_source(backend, origin_options=PlacedOptions(place, options or {}))
    if is_plain:
        source.url = display_url(place)
    return source
