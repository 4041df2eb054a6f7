"""How signals end a command: SIGTERM and SIGHUP interrupt it and let it clean up, as Ctrl-C does.

- Before a command runs, while its code is imported, and after it ran, there is nothing to clean up: a signal ends the
  process at once, with a line on stderr.
- While it runs, a signal acts as SIGINT would: it raises `KeyboardInterrupt`, or calls the handler that an event loop
  has installed. During an import it is deferred until the import ends, with a message: an interrupted import of numpy
  cannot be repeated, and later fails with unrelated errors. In a `__del__` it is deferred, too: Python prints an
  exception raised there as a traceback and drops it. And while a temporary folder is made or removed, or a process
  started: an exception there would leave it behind.
- A second signal ends the process at once.

The exit code is 128 plus the signal's number, as in a shell: 130, 143 or 129.
"""

import os
import signal
import sys
import termios
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

INTERRUPTED = 128 + signal.SIGINT
"""The exit code that typer gives any interrupted command; `exit_code` tells the signals apart."""

_IMPORT = "<frozen importlib._bootstrap>"
_STARTS = {("subprocess", "__init__"), ("multiprocessing.process", "start")}
"""The functions that start a process, with their modules."""
_CHILD = ("multiprocessing.process", "_bootstrap")
"""The outermost function of a process that was forked; what is outside of it belongs to the parent."""

_LOOK_SECONDS = 0.01
_SILENT_SECONDS = 0.5
_received: list[int] = []
_modes: list[Any] | None = None
_is_quiet = _has_said = False
_looks = 0
"""How often it was seen that an interruption has to wait; 0 if none does."""

is_full_screen = False
"""Whether a view has switched the terminal to its alternate screen."""

is_line_open = False
"""Whether there is text before the cursor in its line on the terminal."""


def set_up() -> None:
    """Make these signals end the process at once, with a line, unless it was started to ignore them."""
    global _modes, _has_said, _looks  # noqa: PLW0603 - the terminal is the process's
    _received.clear()
    _has_said, _looks = False, 0
    with suppress(OSError, termios.error):
        _modes = termios.tcgetattr(0)
    _handle_all(_end_with_line)


def begin(*, quiet: bool = False) -> None:
    """Make these signals interrupt the command, until `conclude`. Does nothing without `set_up`.

    Args:
        quiet: do not say that an import defers an interruption.
    """
    global _is_quiet  # noqa: PLW0603 - there is one command in a process
    _is_quiet = quiet
    for number in ENDING:
        if signal.getsignal(number) is _end_with_line:
            signal.signal(number, _interrupt)
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.default_int_handler = _interrupt  # asyncio.run replaces this handler only


def conclude() -> None:
    """Note that the command has ended and cleaned up."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    if not _received:
        _handle_all(_end_with_line)


def note(number: int) -> None:
    """Note that a signal is ending this process; the next one of any kind ends it at once.

    Code that handles signals itself calls this, and then ends by itself.
    """
    _note_echo(number)
    _received.append(number)
    _handle_all(_end_at_once)


def is_interrupted() -> bool:
    """Whether a signal was noted: later failures may be its consequence."""
    return bool(_received)


def check() -> None:
    """Raise a deferred `KeyboardInterrupt`, before another import begins."""
    if _looks and threading.current_thread() is threading.main_thread():
        import inspect  # slow to import, and rarely needed

        _raise_when_possible(inspect.currentframe())


def exit_code() -> int:
    """Return the exit code of an interrupted process."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def say(then: str = "") -> None:
    """Say on stderr that the command was interrupted, and what happens then; without the latter, only once."""
    global _has_said  # noqa: PLW0603 - of this process
    if then or not _has_said:
        _has_said = True
        print(_line(_received[0] if _received else signal.SIGINT, then), file=sys.stderr, flush=True)


def _line(number: int, then: str = "") -> str:
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    return f"{_new_line()}surfw: interrupted{by}{f'; {then}' if then else ''}"


def _new_line() -> str:
    """Return a newline if the cursor's line has text; rich's spinner adds one itself."""
    is_spinning = type(sys.stderr).__module__.startswith("rich.")
    return "\n" if is_line_open and not is_spinning and os.isatty(2) else ""


def _note_echo(number: int) -> None:
    """Note that the terminal has shown `^C`, if it echoes what is typed."""
    global is_line_open  # noqa: PLW0603 - the terminal is the process's
    with suppress(OSError, termios.error):
        if number == signal.SIGINT and termios.tcgetattr(2)[3] & termios.ECHO:
            is_line_open = True


def _handle_all(handler: "signal._HANDLER") -> None:
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    of_loop = signal.getsignal(signal.SIGINT)
    note(number)
    if callable(of_loop) and of_loop is not _interrupt:
        of_loop(number, frame)
    else:  # no loop runs, or SIGINT alone is ignored, as in a shell's background job
        _raise_when_possible(frame)


def _raise_when_possible(frame: FrameType | None) -> None:
    """Raise `KeyboardInterrupt` now; within what must not be interrupted, defer it until shortly after that ends."""
    global _looks  # noqa: PLW0603 - of this process
    while not (frame is None or _is_import(frame) or _must_end(frame)):
        frame = frame.f_back if _function(frame) != _CHILD else None
    if frame is None:
        _looks = 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt
    _looks += 1
    if not (_is_quiet or _has_said) and (_is_import(frame) or _looks * _LOOK_SECONDS > _SILENT_SECONDS):
        with suppress(RuntimeError):  # the interrupted code may be writing to stderr
            say("ends after this import" if _is_import(frame) else "ends after this step")
    signal.signal(signal.SIGALRM, _look_again)
    signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS)


def _is_import(frame: FrameType) -> bool:
    return frame.f_code.co_filename == _IMPORT


def _must_end(frame: FrameType) -> bool:
    """Whether the code makes or removes temporary files, starts a process, or is a finalizer."""
    module, name = function = _function(frame)
    return module == "tempfile" or name == "__del__" or function in _STARTS


def _function(frame: FrameType) -> tuple[object, str]:
    """The names of a frame's module and function."""
    return frame.f_globals.get("__name__"), frame.f_code.co_name


def _look_again(_: int, frame: FrameType | None) -> None:
    if _looks:
        _raise_when_possible(frame)


def _end_with_line(number: int, _: FrameType | None) -> NoReturn:
    _note_echo(number)
    _end(number, _line(number))


def _end_at_once(number: int, _: FrameType | None) -> NoReturn:
    _note_echo(number)
    _end(number, f"{_new_line()}surfw: ended at once, without cleaning up")


def _end(number: int, line: str) -> NoReturn:
    _restore_terminal()
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
    os._exit(128 + number)


def _restore_terminal() -> None:
    """Restore the terminal's modes, main screen and cursor."""
    with suppress(OSError, termios.error):
        if _modes is not None and termios.tcgetattr(0) != _modes:
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # else tcsetattr would stop a background process
            termios.tcsetattr(0, termios.TCSANOW, _modes)
        for number in (1, 2):
            if os.isatty(number) and os.environ.get("TERM", "dumb") != "dumb":
                os.write(number, b"\x1b[?1049l\x1b[?25h" if is_full_screen else b"\x1b[?25h")
