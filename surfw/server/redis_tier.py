"""The connection to a Redis that servers share. Nothing is stored there yet: it is known whether Redis answers.

Nothing depends on Redis. While it cannot be reached, the server goes on without it, and says so; once it is back, the
next check finds it. The credentials in its URL are never shown.
"""

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from surfw.config import display_url, printable
from surfw.errors import ConfigurationError
from surfw.server.journal import Journal
from surfw.wire import RedisState

if TYPE_CHECKING:
    from redis.asyncio import Redis

_SECONDS = 1.0
"""How long Redis may take to answer, its connection included."""

_SCHEMES = ("redis://", "rediss://", "unix://")


class RedisTier:
    """A Redis that several servers share. `open` it in the event loop it is used in, and `close` it there."""

    def __init__(self, url: str) -> None:
        """Use the Redis at this URL; nothing is connected yet.

        Raises:
            ConfigurationError: the URL is not one of a Redis, or the `redis` package is missing.
        """
        self.url = display_url(url)
        self._secret_url = url
        self._client: Redis | None = None
        self._journal = Journal()
        self._reachable: bool | None = None  # not known until it is asked
        _make_client(url, self.url)

    @property
    def state(self) -> RedisState:
        """Where it is, and whether it answered when it was last asked."""
        return {"url": self.url, "reachable": bool(self._reachable)}

    async def open(self, journal: Journal) -> None:
        """Connect. If it cannot be reached, go on; the journal notes that, and when it changes."""
        self._journal = journal
        self._client = _make_client(self._secret_url, self.url)
        self._reachable = None
        await self.check()

    async def check(self) -> None:
        """Find out whether it answers now, within a second; note it if that has changed."""
        if self._client is None:
            return
        from redis.exceptions import RedisError

        reason = ""
        try:
            async with asyncio.timeout(_SECONDS):
                await self._client.ping()
        except TimeoutError:
            reason = f"no answer within {_SECONDS:g} seconds"
        except (RedisError, OSError, ValueError) as exc:  # ValueError: the answer is not Redis's
            reason = printable(str(exc)) or type(exc).__name__
        was_reachable, self._reachable = self._reachable, not reason
        if was_reachable is not self._reachable:
            if reason:
                text = f"Redis at {self.url} cannot be reached, and the server goes on without it"
                self._journal.note("redis", text, reason, level=logging.WARNING)
            else:
                self._journal.note("redis", f"Redis at {self.url} is reached")

    async def close(self) -> None:
        """Disconnect. Closing twice is fine."""
        client, self._client, self._reachable = self._client, None, None
        if client is not None:
            await client.aclose()


def _make_client(url: str, shown: str) -> "Redis":
    """Return a client that is not connected yet."""
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as exc:
        raise ConfigurationError(
            f"Redis at {shown} needs the package 'redis', which is not installed; pip install \"surfw[redis]\""
        ) from exc
    with suppress(ValueError, TypeError):
        if url.startswith(_SCHEMES):
            client: Redis = Redis.from_url(
                url, socket_connect_timeout=_SECONDS, socket_timeout=_SECONDS, retry=Retry(NoBackoff(), 0)
            )
            # Making a connection, without connecting it, finds options that do not exist.
            client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
            return client
    # Raised here, so that no traceback shows what could not be parsed: it may be part of a password.
    raise ConfigurationError(
        f"{shown} is not the URL of a Redis; expected redis://HOST:PORT/DB, rediss://HOST:PORT/DB or unix://PATH, "
        "with a password that is percent-encoded"
    )
