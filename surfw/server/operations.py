"""Operating a running server: reloading, and draining before it stops.

A reload breaks nothing: whatever cannot be read now keeps its state. A drain ends no request early: requests already
made are answered, within a time limit, and no others are begun.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from surfw.config import count
from surfw.errors import SurfwError
from surfw.server.journal import Journal

GOODBYE = "the server is stopping, and may be back soon"
"""The text for clients when connections are closed or refused because the server stops."""


class Reloads:
    """What a server reloads on demand.

    Attributes:
        done: the number of successful reloads.
        failed: the number of things that could not be read and stayed as they were.
    """

    def __init__(self, journal: Journal) -> None:
        """Start with nothing to reload; the journal notes the result of each reload."""
        self.done = self.failed = 0
        self._journal = journal
        self._all: dict[str, Callable[[], Awaitable[str]]] = {}
        self._alone = asyncio.Lock()

    def add(self, what: str, reload: Callable[[], Awaitable[str]]) -> None:
        """Include something in reloads from now on.

        Args:
            what: its name in messages, such as `the tokens`.
            reload: reloads it and returns a description; raises `SurfwError` without changing anything.
        """
        self._all[what] = reload

    async def run(self, *, after: bool = True) -> bool:
        """Reload everything, and return whether all of it could be read.

        Args:
            after: whether earlier steps of this reload, done elsewhere, succeeded.
        """
        async with self._alone:
            found, failed = [], self.failed
            self.failed += not after
            for what, reload in self._all.items():
                try:
                    found.append(await reload())
                except SurfwError as exc:
                    self.failed += 1
                    text = f"{what} cannot be read again, and stay as they were"
                    self._journal.note("reload", text, str(exc), level=logging.WARNING)
            if found:
                self._journal.note("reload", f"looked again: {', '.join(found)}")
            self.done += failed == self.failed
            return failed == self.failed


class Drainable(Protocol):
    """What a drain needs of a connection."""

    def take_no_more(self) -> Iterable[asyncio.Task[None]]:
        """Accept no more requests, and return the tasks of those being answered."""


class Drain:
    """The draining of a server.

    Attributes:
        is_on: whether new requests and connections are refused.
    """

    def __init__(self, journal: Journal) -> None:
        self.is_on = False
        self._journal = journal

    async def run(self, connections: Iterable[Drainable], most_seconds: float) -> int:
        """Accept nothing new, wait for requests in flight, and return how many did not finish in time.

        All connections stay open meanwhile, even idle ones: a client that lost its connection now would look for a
        server that is not back yet.
        """
        self.is_on = True
        answering = [task for one in connections for task in one.take_no_more()]
        started = time.monotonic()
        some = count(len(answering), "request")
        text = f"stopping: {some} in flight, for which there are {most_seconds:g} s" if answering else "stopping"
        self._journal.note("stopping", text)
        late = (await asyncio.wait(answering, timeout=most_seconds))[1] if answering else ()
        took = time.monotonic() - started
        if late:
            text = f"{count(len(late), 'request')} of {len(answering)} took longer than {most_seconds:g} s: cut off"
            self._journal.note("stopping", text, level=logging.WARNING)
        elif answering:
            self._journal.note("stopping", f"{some} finished after {took:.1f} s")
        return len(late)
