"""Coordinates builds with runs in other threads, because torch's default dtype is process-wide.

Transformers sets the default dtype while it builds a class, here as in `from_pretrained`. Runs of surfw's models in
other threads wait meanwhile, see `Runs`. Other torch code in those threads, like `from_pretrained`, is not protected.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

from surfw.errors import ModelError

if TYPE_CHECKING:
    import torch

_POLL_SECONDS = 0.05
"""How often a waiting thread checks whether its work is still wanted."""

_LAYER_SECONDS = 300.0
"""How long a build waits for runs in other threads to reach their next layer; longer than any layer takes."""


class Runs:
    """Tracks the threads that compute with surfw's models, and the thread that builds under another default dtype.

    During a build, a run waits at its next layer (`Run.pause`). The build does not wait for threads that are `resting`;
    they resume computing only when no build is active. A lock that is held for a whole run or build must be taken with
    `holding`: otherwise a build would wait forever for a thread that counts as computing while it waits for the lock.

    Attributes:
        build: a future that is done when the current build has ended; None if there is no build.
        builder: the id of the building thread, once all runs wait; else None.
    """

    def __init__(self) -> None:
        self.build: Future[None] | None = None
        self.builder: int | None = None
        self._computing: set[int] = set()
        self._changed = threading.Condition()

    def computing(self) -> AbstractContextManager[None]:
        """Mark this thread as computing: the default dtype must not change meanwhile."""
        return self._marked(computes=True)

    def resting(self) -> AbstractContextManager[None]:
        """Mark this thread as waiting, within a run or outside: it computes nothing meanwhile."""
        return self._marked(computes=False)

    @contextmanager
    def holding(
        self, lock: "threading.Lock | threading.RLock", check: Callable[[], object] = lambda: None
    ) -> Iterator[None]:
        """Hold a lock, resting while waiting for it; `check` is polled and may raise to cancel the wait."""
        with ExitStack() as held:
            with self.resting():
                while not lock.acquire(timeout=_POLL_SECONDS):
                    check()
                held.callback(lock.release)
            yield

    @contextmanager
    def building(self, dtype: "torch.dtype", check: Callable[[], object], *, where: str) -> Iterator[None]:
        """Make runs in other threads wait, if `dtype` is not the current default. Only one thread may build at a time.

        Raises:
            ModelError: a run neither reaches its next layer nor ends.
            Exception: raised by `check`.
        """
        from torch import get_default_dtype  # here, so that this module can be used without torch

        if dtype == get_default_dtype():
            yield
            return
        me, until = threading.get_ident(), time.monotonic() + _LAYER_SECONDS
        self.build = build = Future[None]()
        try:
            with self._changed:
                while self._computing - {me}:
                    self._changed.wait(_POLL_SECONDS)
                    check()
                    if time.monotonic() > until:
                        raise ModelError(
                            f"{where} cannot be built: for {_LAYER_SECONDS:.0f} s, a run of another model has neither "
                            "reached its next layer nor ended, and would compute in another dtype; if a hook or "
                            "callback of it waits for this one, open this one before it"
                        )
                self.builder = me
            yield
        finally:
            with self._changed:
                self.build = self.builder = None
                self._changed.notify_all()
            build.set_result(None)

    @contextmanager
    def _marked(self, *, computes: bool) -> Iterator[None]:
        before = threading.get_ident() in self._computing
        try:
            self._mark(computes=computes)
            yield
        finally:
            self._mark(computes=before)

    def _mark(self, *, computes: bool) -> None:
        if computes is ((me := threading.get_ident()) in self._computing):
            return
        with self._changed:
            if not computes:
                self._computing.remove(me)
                self._changed.notify_all()
                return
            try:
                self._changed.wait_for(lambda: self.builder in {None, me})
            finally:  # also after a KeyboardInterrupt, restore the thread's state
                self._computing.add(me)


runs = Runs()
