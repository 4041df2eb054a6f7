"""A server's process as a service: how it handles signals, and what it reports to the service manager.

- Before the server is up, SIGINT, SIGTERM and SIGHUP end it at once.
- Later, SIGINT and SIGTERM end it once what is in flight is finished; a second signal ends it at once.
- SIGHUP reloads what may have changed. The system also sends SIGHUP when a terminal is closed; then it ends the server
  that was started there.

systemd (`Type=notify`) is notified when the server is up, reloads, or stops; see sd_notify(3).
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
    """Handles signals in the running event loop.

    Attributes:
        stop: set when the server is to end.
        is_ended_by_signal: whether a signal has set `stop`.
    """

    def __init__(self, give_up: Callable[[], object]) -> None:
        """Install the signal handlers; `give_up` is called when the server is to end."""
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
        """Call `reload` on each SIGHUP from now on, unless SIGHUP is ignored, as under `nohup`.

        Signals during a reload cause one more.
        """
        wanted = asyncio.Event()

        async def work() -> None:
            while await wanted.wait():
                wanted.clear()
                tell_manager(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
                try:
                    await reload()
                except Exception:  # a bug; the next SIGHUP must work nevertheless
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
    """Whether this process has a controlling terminal that is not closed."""
    with suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        return True
    return False


def tell_manager(state: str) -> None:
    """Send a state, such as `READY=1`, to the service manager if it set `NOTIFY_SOCKET`."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        to.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)
