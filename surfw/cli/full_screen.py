"""A view that fills the terminal, as that of `top` does.

It is drawn on the terminal's alternate screen, so that the previous content comes back, and always as a whole, so that
a resize leaves no remains. When it ends, its last state is printed, followed by the warnings that were logged
meanwhile; they are held back because they would have garbled it.
"""

import logging
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live

from surfw.cli import signals

_KEPT_WARNINGS = 50

LOOK_SECONDS = 0.2
"""How often to check whether the window was resized."""


@dataclass(frozen=True)
class _Whole:
    """Passes the screen's height to a view; rich does not pass it to nested views."""

    view: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.view, options.update_dimensions(*console.size))


class FullScreen:
    """Shows views one after another; a context manager for `with` and `async with`."""

    def __init__(self, console: Console) -> None:
        """Show on `console`, which has to be a terminal."""
        self._console = console
        self._live = Live(
            console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._view: RenderableType = ""
        self._size = console.size
        self._held: deque[str] = deque(maxlen=_KEPT_WARNINGS)
        self._holding: list[tuple[logging.Handler, Callable[[logging.LogRecord], bool]]] = []

    def show(self, view: RenderableType) -> None:
        """Show a view, replacing the one before."""
        self._view, self._size = view, self._console.size
        self._live.update(_Whole(view), refresh=True)

    def redraw(self) -> None:
        """Redraw the view if the window was resized."""
        if self._console.size != self._size:
            self.show(self._view)

    def __enter__(self) -> Self:
        """Switch to the alternate screen, and hold back log lines."""
        for handler in logging.getLogger("surfw").handlers:
            if isinstance(handler, logging.StreamHandler):
                hold_back = partial(self._hold_back, handler)
                handler.addFilter(hold_back)
                self._holding.append((handler, hold_back))
        signals.is_full_screen = True
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Switch back, print the last view and the log lines that were held back."""
        self._live.stop()
        signals.is_full_screen = False
        self._console.print(self._view)
        for handler, hold_back in self._holding:
            handler.removeFilter(hold_back)
        for line in tuple(self._held):
            sys.stderr.write(line)

    def _hold_back(self, handler: "logging.StreamHandler[Any]", record: logging.LogRecord) -> bool:
        """Keep a log line for later; as a filter, since the handler then stays in place and loses no line."""
        self._held.append(handler.format(record) + handler.terminator)
        return False

    async def __aenter__(self) -> Self:
        """Enter as `with` does; the event loop does not wait for the terminal."""
        import asyncio

        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Exit as `with` does; the event loop does not wait for the terminal."""
        import asyncio

        await asyncio.to_thread(self.__exit__, kind, exc, trace)
