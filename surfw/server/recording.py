"""What clients announce and ask for, as a file that `surfw bench cache --trace` reads: one line of JSON for each event.

Nothing in it says who the clients are. Lines are collected and written a megabyte at a time. A file that cannot be
written any more ends the recording, and nothing else.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surfw.config import MIB
from surfw.errors import ConfigurationError
from surfw.manifest import Location
from surfw.server.journal import Journal
from surfw.wire import Get, Schedule


class Recording:
    """A file that is being written."""

    def __init__(self, path: Path, journal: Journal) -> None:
        """Begin a new file; one that is there is replaced.

        Raises:
            ConfigurationError: it cannot be written.
        """
        self._path = path
        self._journal = journal
        try:
            self._file = path.open("w", buffering=MIB, encoding="ascii")
        except OSError as exc:
            raise ConfigurationError(
                f"{path} cannot be written: {exc.strerror or type(exc).__name__}; record to another file"
            ) from exc

    def scheduled(self, client: int, schedule: Schedule) -> None:
        """Note what a client announces."""
        self._note({"client": client, "model": schedule.model, "cycle": schedule.cycle, "kept": schedule.kept})

    def asked(self, client: int, request: Get, locations: Sequence[Location]) -> None:
        """Note what a client asks for, where it is there."""
        self._note(
            {
                "client": client,
                "model": request.model,
                "chunk": request.chunk,
                "form": request.form,
                "start": request.start,
                "stop": request.stop,
                "size": sum(location.stop - location.start for location in locations),
            }
        )

    def left(self, client: int) -> None:
        """Note that a client is gone."""
        self._note({"client": client})

    def _note(self, event: Mapping[str, Any]) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(json.dumps(event, separators=(",", ":")) + "\n")
        except OSError as exc:
            self._give_up(exc)

    def _give_up(self, exc: OSError) -> None:
        why = exc.strerror or type(exc).__name__
        self._journal.note("failed", "the recording ends", f"{self._path}: {why}", level=logging.WARNING)
        try:
            self._file.close()  # which writes what is left, and fails again
        except OSError:
            return

    def close(self) -> None:
        """Write what is left."""
        try:
            self._file.close()
        except OSError as exc:
            self._give_up(exc)
