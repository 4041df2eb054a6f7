"""One run of a model, and the way to stop it from outside."""

import threading
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextvars import ContextVar
from typing import Any

from surfw.skeleton.default_dtype import runs

current_run: "ContextVar[Run | None]" = ContextVar("surfw_run", default=None)
"""The run that this thread works for, so that whoever waits for the thread can interrupt it."""


class Run:
    """A forward, or a generation, that another thread may interrupt.

    What runs calls `pause` at every layer, and waits with `wait_for`, so that it ends within one layer's computation.
    """

    def __init__(self) -> None:
        """Begin; nothing has interrupted it."""
        self._stop: Future[None] = Future()
        self._lock = threading.Lock()

    def interrupt(self, error: Exception) -> None:
        """Make the run end with this error; the first one counts."""
        with self._lock:
            if not self._stop.done():
                self._stop.set_exception(error)

    def check(self) -> None:
        """Go on, unless the run was interrupted.

        Raises:
            Exception: what it was interrupted with.
        """
        if self._stop.done():
            self._stop.result()

    def pause(self) -> None:
        """As `check`, but first wait while another thread builds a model under another default dtype."""
        while (build := runs.build) is not None and runs.builder != threading.get_ident():
            self.wait_for(build)
        self.check()

    def wait_for(self, future: "Future[Any]") -> None:
        """Wait until a future is done, however it ends.

        Raises:
            Exception: what the run was interrupted with in the meantime.
        """
        with runs.resting():
            wait([future, self._stop], return_when=FIRST_COMPLETED)
        self.check()
