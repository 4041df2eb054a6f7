"""One run of a model, and the way to stop it from outside."""

import threading
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any


class Run:
    """A forward, or a generation, that another thread may interrupt.

    What runs calls `check` at every layer, and waits with `wait_for`, so that it ends within one layer's computation.

    Attributes:
        prefetch: whether layers are fetched ahead of their use in this run.
    """

    def __init__(self, *, prefetch: bool = True) -> None:
        """Begin; nothing has interrupted it."""
        self.prefetch = prefetch
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

    def wait_for(self, future: "Future[Any]") -> None:
        """Wait until a future is done, however it ends.

        Raises:
            Exception: what the run was interrupted with in the meantime.
        """
        wait([future, self._stop], return_when=FIRST_COMPLETED)
        self.check()
