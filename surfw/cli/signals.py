"""How a command is ended from outside: SIGTERM and SIGHUP end it as Ctrl-C does, and clean up as that does.

They do what SIGINT does at that moment: raise `KeyboardInterrupt`, or what an event loop has put in its place. A second
signal ends the process at once. The exit code is 128 and the signal's number, as shells have it: 130, 143 or 129.
"""

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

INTERRUPTED = 128 + signal.SIGINT
"""The exit code of a command that was interrupted, whichever signal did it, until `exit_code` tells them apart."""

_received: list[int] = []


def set_up() -> None:
    """Have SIGTERM and SIGHUP end this process as an interrupt does, unless it was started to ignore them."""
    _received.clear()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_as_interrupt)


def note(number: int) -> None:
    """Note that a signal ends this process now; the next one of any kind ends it at once.

    For whoever handles signals alone; what follows has to come to an end by itself.
    """
    _received.append(number)
    for other in ENDING:
        if signal.getsignal(other) is not signal.SIG_IGN:
            signal.signal(other, _end_at_once)


def exit_code() -> int:
    """The exit code of a process that was interrupted."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def description() -> str:
    """What to say of it."""
    first = _received[0] if _received else signal.SIGINT
    return "interrupted" if first == signal.SIGINT else f"interrupted by {signal.Signals(first).name}"


def _end_as_interrupt(number: int, frame: FrameType | None) -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    note(number)
    if callable(interrupt):
        interrupt(number, frame)
    else:  # a shell's background job ignores SIGINT, and no other signal
        signal.default_int_handler(number, frame)


def _end_at_once(number: int, _: FrameType | None) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"surfw: ended at once, without cleaning up\n")
    os._exit(128 + number)
