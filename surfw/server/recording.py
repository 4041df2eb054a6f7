"""Records what clients announce and request, for `surfw bench cache --trace`: one line of JSON for each event.

It does not identify the clients. Lines are buffered and written a megabyte at a time. If the file cannot be written any
more, only the recording ends.
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
        """Create the file; an existing one is replaced.

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
        """Record a client's schedule."""
        self._note({"client": client, "model": schedule.model, "cycle": schedule.cycle, "kept": schedule.kept})

    def asked(self, client: int, request: Get, locations: Sequence[Location]) -> None:
        """Record a valid request, with the size of the form's stored bytes."""
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
        """Record that a client has left."""
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
            self._file.close()  # writes what is left, and fails again
        except OSError:
            return

    def close(self) -> None:
        """Write what is left, and close the file."""
        try:
            self._file.close()
        except OSError as exc:
            self._give_up(exc)
