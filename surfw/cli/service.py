"""A server's process as a service: what signals mean to it, and what it tells the one that manages it.

- Before it is up, SIGINT, SIGTERM and SIGHUP end it at once.
- Later, SIGINT and SIGTERM end it once what is in flight is finished, and the second of them at once.
- SIGHUP has it look again at what may have changed. But the system sends that too when a terminal is closed, and then
  it ends the server that was started there.

systemd (`Type=notify`) is told when the server is up, looks again, or stops, as sd_notify(3) says.
"""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from surfw.cli import signals

logger = logging.getLogger("surfw.server")


class Service:
    """Waits for signals, in the event loop that it is made in.

    Attributes:
        stop: set once the server is to end.
        is_ended_by_signal: whether a signal has set it.
    """

    def __init__(self, give_up: Callable[[], object]) -> None:
        """Take signals over; `give_up` is called as well when one ends the server."""
        self.stop = asyncio.Event()
        self.is_ended_by_signal = False
        self._give_up = give_up
        self._loop = asyncio.get_running_loop()
        self._has_terminal = has_terminal()
        self._reloading: asyncio.Task[None] | None = None
        for number in signals.ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._loop.add_signal_handler(number, self._end_by, number)

    def end(self) -> None:
        """End the server."""
        self.stop.set()
        self._give_up()

    def _end_by(self, number: int) -> None:
        self.is_ended_by_signal = True
        self.end()
        for other in signals.ENDING:
            self._loop.remove_signal_handler(other)
        signals.note(number)

    def reload_by_signal(self, reload: Callable[[], Awaitable[object]]) -> None:
        """Call `reload` at each SIGHUP from now on, unless that is ignored, as after `nohup`.

        One that comes while it works has it called once more.
        """
        wanted = asyncio.Event()

        async def work() -> None:
            while await wanted.wait():
                wanted.clear()
                tell_manager(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
                try:
                    await reload()
                except Exception:  # a bug: the next SIGHUP is to be heard all the same
                    logger.exception("the files of the server could not be read again")
                finally:
                    tell_manager("READY=1")

        def take() -> None:
            if self._has_terminal and not has_terminal():
                self._end_by(signal.SIGHUP)
            else:
                wanted.set()

        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and not self.stop.is_set():
            self._reloading = self._loop.create_task(work())
            self._loop.add_signal_handler(signal.SIGHUP, take)


def has_terminal() -> bool:
    """Whether this process can be reached from a terminal, which is not closed."""
    with suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        return True
    return False


def tell_manager(state: str) -> None:
    """Tell the service manager that started this process a state, such as `READY=1`, if it wants to know."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        to.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)
