"""`infer --trace FILE`: the timeline of a run, from the start of its process until the file is written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surfw import __version__, tracing
from surfw.errors import ConfigurationError

_KINDS = {
    "looking for the weights": "connect",
    "connecting": "connect",
    "reading the manifest": "connect",
    "importing torch": "import",
    "importing transformers": "import",
    "starting a server for the demo model, importing torch": "import",
}
"""The kinds of a run's phases; all others are of the kind `prepare`."""


@contextmanager
def writing_trace(path: Path | None) -> Iterator[None]:
    """Trace the body, and write the trace to the file at the end, even if the body fails; without a file, do nothing.

    Raises:
        ConfigurationError: the file cannot be written; raised before the body begins, unless the disk fills up.
    """
    if path is None:
        yield
        return
    trace = tracing.Trace(tracing.process_began())
    trace.phase("import", "starting")
    with _writing(path):
        file = path.open("w", encoding="utf-8")
    try:
        with tracing.recording(trace):
            yield
    finally:
        with _writing(path), file:
            trace.write(file, version=__version__)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the body, which only writes the trace, into a `ConfigurationError`."""
    try:
        yield
    except OSError as exc:
        raise ConfigurationError(f"{path} (--trace) cannot be written: {exc.strerror or exc}; name another") from exc


def note_phase(text: str) -> None:
    """Record a phase that `infer` shows as a phase of the trace."""
    tracing.phase(_KINDS.get(text, "prepare"), text)
