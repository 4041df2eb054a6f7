"""Tokens and certificates that a server reads from files, and rereads whenever they change.

Files are read in a thread, every two seconds and on demand. If new contents are invalid, the previous ones stay in
force; each failure is reported once.
"""

import asyncio
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from surfw.errors import ConfigurationError
from surfw.server.journal import Journal, Sparse
from surfw.threads import cancel_all

POLL_SECONDS = 2.0


class FromFiles(ABC):
    """Something that is read from files, and replaced when they change."""

    shown = ""
    """Its name in messages."""
    _digest: bytes | None = None
    _complaint = ""

    @abstractmethod
    def contents(self) -> bytes:
        """Read the files. Runs in a thread.

        Raises:
            ConfigurationError: they cannot be read.
        """

    @abstractmethod
    def load(self, contents: bytes) -> Callable[[], str]:
        """Return a function that puts the contents in force and returns a description. Runs in a thread.

        Raises:
            ConfigurationError: the contents are invalid.
        """

    def look(self, *, anyway: bool) -> Callable[[], str] | None:
        """Read and load the files; return None if they have not changed, unless `anyway`. Runs in a thread."""
        before, self._digest = self._digest, None
        contents = self.contents()
        self._digest = hashlib.sha256(contents).digest()
        if self._digest == before and not anyway:
            return None  # so invalid contents are not tried again either
        return self.load(contents)

    def is_new(self, complaint: str) -> bool:
        """Whether the complaint differs from the previous one, which it replaces."""
        before, self._complaint = self._complaint, complaint
        return complaint != before


class Reloading:
    """Reads files when the server starts, when they change, and on demand."""

    def __init__(self, files: Sequence[FromFiles], journal: Journal) -> None:
        """Start without reading anything."""
        self._files = files
        self._journal = journal
        self._failures = Sparse(journal, "failed", logging.ERROR)
        self._alone = asyncio.Lock()
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read everything for the first time, and start polling for changes.

        Raises:
            ConfigurationError: something is invalid.
        """
        self._alone = asyncio.Lock()  # for this event loop
        for one in self._files:
            await self._look(one, anyway=True)
        if self._files:
            self._polling = asyncio.create_task(self._poll(), name="surfw reloading")

    async def stop(self) -> None:
        """Stop polling."""
        if self._polling is not None:
            await cancel_all([self._polling])
            self._polling = None
        self._failures.flush()

    async def look(self, *, anyway: bool = False) -> bool:
        """Read what has changed, or everything if `anyway`; return whether everything read is valid."""
        can_be_used = True
        async with self._alone:
            for one in self._files:
                try:
                    said = await self._look(one, anyway=anyway)
                except ConfigurationError as exc:
                    can_be_used = False
                    if one.is_new(str(exc)) or anyway:
                        text = f"{one.shown} cannot be used, and what was there before stays in force"
                        self._journal.note("access", text, str(exc), level=logging.WARNING)
                else:
                    if said is not None:
                        self._journal.note("access", f"{one.shown} was read again: {said}")
        return can_be_used

    async def _look(self, one: FromFiles, *, anyway: bool) -> str | None:
        """Put changes in force and return their description; None if nothing has changed."""
        put_in_force = await asyncio.to_thread(one.look, anyway=anyway)
        if put_in_force is None:
            return None
        one.is_new("")
        return put_in_force()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self.look()
            except Exception as exc:  # noqa: BLE001 - no thread, or a bug: later withdrawals of tokens must still work
                self._failures.note("files could not be looked at, and are at the next look", trace=exc)
