"""Logging on stderr of a server without a screen: lines for people, or one JSON object per line for programs."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import typer

from surfw.cli.streams import OneLine, one_line
from surfw.cli.wording import with_options
from surfw.config import LogFormat, escape_json
from surfw.errors import SurfwError

_LOGGER = logging.getLogger("surfw.server")


class JsonLines(logging.Formatter):
    """Formats every record as one JSON object in one line.

    The keys `time` (RFC 3339, in UTC), `level` (`info`, `warning` or `error`), `kind` and `text` are always present.
    The kind is that of a server's event, as in its statistics; or `serving` (with its address), `ended` (by an error),
    or `log`, for records of libraries. The keys `details` (such as locations), `more` (the number of earlier events
    that the line stands for), and `trace` (of an exception) are present if they have a value.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        parts = vars(record)
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "kind": parts.get("kind", "log"),
            "text": parts.get("event") or record.getMessage(),
            "details": parts.get("details"),
            "more": parts.get("more"),
            "trace": self.formatException(record.exc_info) if record.exc_info else None,
        }
        return escape_json(json.dumps({key: value for key, value in line.items() if value}))


def set_up(form: LogFormat, level: int) -> None:
    """Log what a server does, from this level on, instead of showing a screen."""
    handler: logging.Handler
    if form == "text":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
        _LOGGER.addHandler(handler)
        _LOGGER.propagate = False
    else:  # all records, of any library
        handler = logging.StreamHandler(getattr(sys.stderr, "rich_proxied_file", sys.stderr))  # does not wrap lines
        handler.setFormatter(JsonLines())
        logging.getLogger().addHandler(handler)
        logging.getLogger("surfw").handlers.clear()
        logging.captureWarnings(capture=True)
    _LOGGER.setLevel(level)


@contextmanager
def reporting(form: LogFormat) -> Iterator[None]:
    """With JSON lines, log the error that ends the command, with options instead of arguments; exit with code 1."""
    try:
        yield
    except SurfwError as exc:
        if form == "text":
            raise
        _LOGGER.error(one_line(with_options(str(exc))), extra={"kind": "ended"})  # noqa: TRY400 - no traceback
        raise typer.Exit(1) from None
