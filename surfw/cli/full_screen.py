"""A view that has the terminal to itself, as `top` has, for as long as it is shown.

It is drawn on the terminal's other screen, so that whatever was there before comes back, and each time as a whole, so
that nothing is left of it where the window changes its size. Its last state stays when it ends, with the warnings that
were logged meanwhile, which would have torn it apart.
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
"""How often to look whether the window has another size."""


@dataclass(frozen=True)
class _Whole:
    """A view that is told how high the screen is; rich tells that to none that it shows inside of another."""

    view: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.view, options.update_dimensions(*console.size))


class FullScreen:
    """Shows views, one after the other; a context manager, also for `async with`."""

    def __init__(self, console: Console) -> None:
        """Show on this console, which is a terminal."""
        self._console = console
        self._live = Live(
            console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._view: RenderableType = ""
        self._size = console.size
        self._held: deque[str] = deque(maxlen=_KEPT_WARNINGS)
        self._holding: list[tuple[logging.Handler, Callable[[logging.LogRecord], bool]]] = []

    def show(self, view: RenderableType) -> None:
        """Show a view instead of the one before."""
        self._view, self._size = view, self._console.size
        self._live.update(_Whole(view), refresh=True)

    def redraw(self) -> None:
        """Draw the view again if the window has another size."""
        if self._console.size != self._size:
            self.show(self._view)

    def __enter__(self) -> Self:
        """Turn to the other screen, and hold back what is logged."""
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
        """Turn back, print the last view, and log what was held back."""
        self._live.stop()
        signals.is_full_screen = False
        self._console.print(self._view)
        for handler, hold_back in self._holding:
            handler.removeFilter(hold_back)
        for line in tuple(self._held):
            sys.stderr.write(line)

    def _hold_back(self, handler: "logging.StreamHandler[Any]", record: logging.LogRecord) -> bool:
        """Keep a line for later, as a filter of its handler, which has no moment without a place for it."""
        self._held.append(handler.format(record) + handler.terminator)
        return False

    async def __aenter__(self) -> Self:
        """Turn to the other screen, as `with` does; the event loop does not wait for the terminal."""
        import asyncio

        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Turn back, as at the end of `with`."""
        import asyncio

        await asyncio.to_thread(self.__exit__, kind, exc, trace)
