"""A server that has a place for a cache in Redis, which it shares with other servers."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from ssl import SSLContext
from typing import Any

from surfw.config import DEFAULT_CLIENTS, DEFAULT_HOST, DEFAULT_PORT, WireLimits, expect
from surfw.server.redis_tier import RedisTier
from surfw.server.server import WeightServer
from surfw.wire import ServerHealth, ServerStats

_CACHE_MB = 1000


class AdvancedWeightServer(WeightServer):
    """A `WeightServer` with a Redis. While Redis cannot be reached, it serves as one without."""

    def __init__(
        self,
        chunks_dir: str | Path,
        redis_url: str,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        cache_size_mb: float = _CACHE_MB,
        *,
        token: str | None = None,
        ssl: SSLContext | None = None,
        insecure: bool = False,
        clients: int = DEFAULT_CLIENTS,
        allowed_hosts: Sequence[str] = (),
        limits: WireLimits | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Say what to serve, and where; nothing is read yet.

        Args:
            chunks_dir: the store's folder or URL, opened and closed by the server.
            redis_url: `redis://`, `rediss://` (with TLS) or `unix://`.
            host: see `WeightServer`, as for all that follow.
            port: TCP port; 0 lets the system choose.
            cache_size_mb: budget of the cache in the server's own memory, in units of 10^6 bytes.
            token: what clients have to show.
            ssl: a server's context with its certificates.
            insecure: listen beyond loopback without a token, or with a token in clear text.
            clients: the most connections at a time.
            allowed_hosts: names that the server may be called by.
            limits: sizes of messages, frames and windows.
            storage_options: for the storage that `chunks_dir` names.

        Raises:
            ConfigurationError: one of them cannot be used, or the `redis` package is missing.
        """
        expect("redis_url", redis_url, str, "redis://…, rediss://… or unix://…")
        self._redis = RedisTier(redis_url)
        super().__init__(
            model_path=chunks_dir,
            host=host,
            port=port,
            cache_size_mb=cache_size_mb,
            token=token,
            ssl=ssl,
            insecure=insecure,
            clients=clients,
            allowed_hosts=allowed_hosts,
            limits=limits,
            storage_options=storage_options,
        )

    async def _prepare(self) -> None:
        await super()._prepare()
        await self._redis.open()

    async def _release(self) -> None:
        await self._redis.close()
        await super()._release()

    async def health(self) -> ServerHealth:
        """Whether the server listens, and whether its storage can be reached now; looks at Redis too."""
        health, _ = await asyncio.gather(super().health(), self._redis.check())
        return health

    def stats(self) -> ServerStats:
        """The counters since the start, with `redis`: where it is, and whether it answered when last asked."""
        return super().stats() | {"redis": self._redis.state}
