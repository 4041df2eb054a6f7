"""A full screen tells its view its height, holds back log lines, and leaves the last view visible."""

import asyncio
import io
import logging
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from rich.console import Console, ConsoleOptions, RenderResult

from surfw.cli import render
from surfw.cli.app import _ToStderr
from surfw.cli.full_screen import FullScreen


class Asks:
    """A view that records the sizes it was given."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int | None]] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.sizes.append((options.max_width, options.height))
        yield f"a view of {options.height} lines"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The log, as the command line's handler writes it."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("surfw").addHandler(handler)
    yield stream
    logging.getLogger("surfw").removeHandler(handler)


def test_what_it_shows_and_what_it_leaves(log: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    terminal, view = io.StringIO(), Asks()
    handlers = list(logging.getLogger("surfw").handlers)
    with FullScreen(Console(file=terminal, force_terminal=True, highlight=False, width=60, height=20)) as screen:
        screen.show(view)
        screen.redraw()
        assert logging.getLogger("surfw").handlers == handlers, "none was away for a moment, which would lose a line"
        logging.getLogger("surfw.server").warning("torn")
        assert log.getvalue() == ""
        assert "torn" not in terminal.getvalue()
    assert view.sizes == [(60, 20), (60, None)], "drawn once, and printed in the end"
    drawn, _, left = terminal.getvalue().partition("\x1b[?1049l")
    assert "a view of 20 lines" in drawn
    assert "a view of None lines" in left
    assert capsys.readouterr().err == "torn\n"
    logging.getLogger("surfw.server").warning("after")
    assert log.getvalue() == "after\n"


def test_another_size_is_drawn_anew() -> None:
    view = Asks()
    console = Console(file=io.StringIO(), force_terminal=True, highlight=False, width=60, height=20)
    with FullScreen(console) as screen:
        screen.show(view)
        console.width, console.height = 40, 10
        screen.redraw()
        screen.redraw()
    assert view.sizes == [(60, 20), (40, 10), (40, None)]


def test_what_goes_to_stderr_as_it_is_at_the_time_is_held_back_too(capsys: pytest.CaptureFixture[str]) -> None:
    logger, handler = logging.getLogger("surfw"), _ToStderr()
    logger.addHandler(handler)
    try:
        with FullScreen(Console(file=io.StringIO(), force_terminal=True, width=60, height=20)) as screen:
            screen.show("a view")
            logger.warning("torn")
            assert capsys.readouterr().err == ""
        assert capsys.readouterr().err == "torn\n"
    finally:
        logger.removeHandler(handler)


def test_what_is_waited_for_is_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(render, "err", Console(file=terminal, force_terminal=True, width=60))
    monkeypatch.setattr(render, "can_draw", lambda _: True)
    with render.busy("reading a[/b]", quiet=False) as step:
        step("reading [old]/a[/b]")
    assert "reading [old]/a[/b]" in terminal.getvalue()


class Unread(io.StringIO):
    """A terminal that accepts nothing until another task has run."""

    def __init__(self) -> None:
        super().__init__()
        self.read = threading.Event()

    def write(self, text: str) -> int:
        assert self.read.wait(60)
        return super().write(text)


def test_an_event_loop_does_not_wait_for_the_terminal() -> None:
    terminal = Unread()
    screen = FullScreen(Console(file=terminal, force_terminal=True, highlight=False, width=60, height=20))

    async def others(does: Coroutine[Any, Any, object]) -> None:
        """Run this while the terminal is not being read, and then have it read."""
        terminal.read.clear()
        doing = asyncio.create_task(does)
        await asyncio.sleep(0)
        terminal.read.set()
        await doing

    async def main() -> None:
        await others(screen.__aenter__())
        await asyncio.to_thread(screen.show, "the last view")
        await others(screen.__aexit__(None, None, None))

    asyncio.run(main())
    assert terminal.getvalue().rindex("the last view") > terminal.getvalue().rindex("\x1b[?1049l")
