"""A writer's lease: the blobs that it relies on stay, on whatever machine someone prunes. `notices` has the protocol.

The lease's name is kept beside the unfinished work, so that whoever resumes it goes on with the same lease. It is
left in the store if the writer fails or is killed: then it holds what was written for a week, or until `--remove`
gives it up.
"""

import asyncio
import logging
import re
import uuid
from collections.abc import Collection, Iterable
from pathlib import Path

from surfw.errors import StorageError
from surfw.files import read_regular
from surfw.storage.base import StorageBackend
from surfw.storage.fsspec_backend import translate_errors
from surfw.storage.notices import LEASES, Announcement, pruners

logger = logging.getLogger("surfw.storage")

_LOOK_SECONDS = 1.0
_AT_ONCE = 16
_NAME_BYTES = 4096
_ID = re.compile(r"[0-9a-f]{32}")


class Lease(Announcement):
    """The notice of a writer."""

    def __init__(self, backend: StorageBackend, model: str, folder: Path) -> None:
        """Name the model, and the local folder of its unfinished work; nothing is read or written yet."""
        super().__init__(backend, "", model=model)
        self._folder = folder
        self._held: set[str] = set()

    async def hold(self, objects: Iterable[str]) -> None:
        """Rely on these blobs: call it before they are looked for or put in place. Waits while someone prunes.

        Raises:
            StorageError: the lease cannot be written.
        """
        added = set(objects) - self._held
        if added:
            await self._hold(added)
            self._held |= added

    async def confirm(self, objects: Collection[str]) -> None:
        """Make sure that all these blobs are there and stay; then publish at once.

        Raises:
            StorageError: one is gone: someone gave the lease up, or this process slept for a week.
        """
        while True:
            await self._hold(objects)
            await self._expect(sorted(objects))
            if self.trusted:
                return

    async def _hold(self, objects: Iterable[str]) -> None:
        """Ends with a lease that was written while nobody was pruning: such a lease is seen by all who come later."""
        self._objects.update(objects)
        if not self.key:
            self.key = f"{LEASES}{await asyncio.to_thread(self._name)}.json"
        await self.post()
        while await self._wait():
            await self.post()

    async def _wait(self) -> bool:
        """Wait until nobody prunes; whether that took any time."""
        waited = False
        while found := await pruners(self.backend):
            if not waited:
                logger.warning("waiting for 'surfw chunk --prune' (%s) in %s", found[0], self.backend.url)
            waited = True
            await asyncio.sleep(_LOOK_SECONDS)
        return waited

    async def _expect(self, objects: list[str]) -> None:
        for start in range(0, len(objects), _AT_ONCE):
            part = objects[start : start + _AT_ONCE]
            there = await asyncio.gather(*(self.backend.exists(key) for key in part))
            if not all(there):
                raise StorageError(
                    f"{part[there.index(False)]} vanished from {self.backend.url} while {self._model} was written; "
                    "run the same command again"
                )

    def _name(self) -> str:
        """The name of the lease that a run before this one had, or a new one."""
        file = self._folder / "lease"
        with translate_errors(f"preparing {file}"):
            known = read_regular(file, _NAME_BYTES).decode(errors="replace") if file.exists() else ""
            if not _ID.fullmatch(known):
                known = uuid.uuid4().hex
                file.write_text(known)
        return known
