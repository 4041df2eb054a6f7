"""The one thing that a build cannot keep to its own thread: the default dtype, which is the process's.

Transformers sets it while it builds a class, here as in `from_pretrained`. Runs of surfw's models in other threads wait
meanwhile, see `Runs`; whatever else computes with torch there, or loads with `from_pretrained`, is out of reach.
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
"""How often a thread that waits for others checks whether its work is still wanted."""

_LAYER_SECONDS = 300.0
"""How long a build waits for the runs of other threads to reach their next layer: longer than any layer takes."""


class Runs:
    """The threads that compute with models of surfw, and the one that builds a model under another default dtype.

    A run waits at its next layer (`Run.pause`). One that waits for something else (`resting`) is not waited for, and
    computes again only when no build is going on. Locks that are held throughout a run or a build are taken with
    `holding`: a build would wait forever for a thread that counts as computing while it waits for such a lock.

    Attributes:
        build: done when the present build has ended; None if there is none.
        builder: the thread that builds, once all others wait.
    """

    def __init__(self) -> None:
        """Begin without runs and builds."""
        self.build: Future[None] | None = None
        self.builder: int | None = None
        self._computing: set[int] = set()
        self._changed = threading.Condition()

    def computing(self) -> AbstractContextManager[None]:
        """Mark this thread as computing: it must not see another default dtype."""
        return self._marked(computes=True)

    def resting(self) -> AbstractContextManager[None]:
        """Mark this thread as waiting, within a run or not: it computes nothing meanwhile."""
        return self._marked(computes=False)

    @contextmanager
    def holding(
        self, lock: "threading.Lock | threading.RLock", check: Callable[[], object] = lambda: None
    ) -> Iterator[None]:
        """Hold a lock, and rest while waiting for it; `check` raises when it is no longer wanted."""
        with ExitStack() as held:
            with self.resting():
                while not lock.acquire(timeout=_POLL_SECONDS):
                    check()
                held.callback(lock.release)
            yield

    @contextmanager
    def building(self, dtype: "torch.dtype", check: Callable[[], object], *, where: str) -> Iterator[None]:
        """Make the runs of other threads wait, if this is not the default dtype now; one thread at a time.

        Raises:
            ModelError: they neither reach their next layer nor end.
            Exception: what `check` raised.
        """
        from torch import get_default_dtype  # here, so that sources are opened without torch, as runs of a kind

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
            finally:  # also after a KeyboardInterrupt, the thread is what it was
                self._computing.add(me)


runs = Runs()
