"""How far the answer to a request has come: the same bookkeeping for the side that sends and the side that takes."""

from dataclasses import dataclass
from typing import Self

from surfw.wire.messages import Data, Get, ListModels, Progress, Request


@dataclass(slots=True)
class Answer:
    """An answer that is not complete: the next byte is `at`, the last one before `stop`.

    `stop` is None as long as it is not known: before `begin`, and for `models`, which is answered without bytes.
    `read` is the count of the last `progress`.
    """

    request: Request
    at: int = 0
    stop: int | None = None
    read: int = 0

    @classmethod
    def to(cls, request: Request) -> Self:
        """Nothing of the answer is there yet."""
        return cls(request, request.start, request.stop) if isinstance(request, Get) else cls(request)

    @property
    def is_names(self) -> bool:
        """Whether `models` is the answer."""
        return isinstance(self.request, ListModels)

    @property
    def may_begin(self) -> bool:
        """Whether `begin` is the next message."""
        return self.stop is None and not self.is_names

    def continues(self, run: Data) -> bool:
        """Whether the run starts where the answer stopped, and has bytes; a run of none is a whole answer of none."""
        if self.stop is None or run.start != self.at:
            return False
        return run.start < run.stop <= self.stop or run.start == run.stop == self.stop

    def rises(self, progress: Progress) -> bool:
        """Whether more was read than was said before."""
        return progress.bytes > self.read
