"""What whoever operates a server asks of it while it runs: to look at things again, and to finish before it stops.

A reload changes nothing that is broken: each thing that is looked at again keeps its state if it cannot be read now. A
drain ends no request early: those that clients have made are answered, within a time, and no others are begun.
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
"""Why connections are closed, and no new ones are taken, in words for clients."""


class Reloads:
    """What a server looks at again on demand.

    Attributes:
        done: how often that went well.
        failed: how often something stayed as it was, because it could not be read.
    """

    def __init__(self, journal: Journal) -> None:
        """Start with nothing to look at; the journal notes what came of each reload."""
        self.done = self.failed = 0
        self._journal = journal
        self._all: dict[str, Callable[[], Awaitable[str]]] = {}
        self._alone = asyncio.Lock()

    def add(self, what: str, reload: Callable[[], Awaitable[str]]) -> None:
        """Look at this, too, from now on.

        Args:
            what: in words, such as `the tokens`.
            reload: looks again, and returns what is there now in words; raises `SurfwError`, having changed nothing.
        """
        self._all[what] = reload

    async def run(self, *, after: bool = True) -> bool:
        """Look at everything again, and return whether all of it could be read.

        Args:
            after: whether that is so of what was looked at for this reload elsewhere.
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
    """What is asked of a connection."""

    def take_no_more(self) -> Iterable[asyncio.Task[None]]:
        """Begin no more requests, and return the tasks that answer those that were made before."""


class Drain:
    """How a server finishes.

    Attributes:
        is_on: whether no new requests and connections are taken.
    """

    def __init__(self, journal: Journal) -> None:
        """Take everything."""
        self.is_on = False
        self._journal = journal

    async def run(self, connections: Iterable[Drainable], most_seconds: float) -> int:
        """Take nothing new, wait until what was asked for is answered, and return how many requests were not in time.

        Connections stay open meanwhile, also those that wait for nothing more: a client that lost its connection now
        would look for a server that is not back yet.
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
