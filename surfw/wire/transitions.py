"""Which message may come when in an answer: the tables that both sessions run on, and README's rules of order as data.

A message without an entry in the row of the current state breaks the protocol.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Self

from surfw.wire.messages import (
    AnswerMessage,
    Begin,
    Data,
    Failed,
    Get,
    GetDigests,
    GetFile,
    GetManifest,
    ListModels,
    Models,
    Progress,
    Request,
)


class AnswerState(Enum):
    """How far the answer to a request has come: on the server by what was sent, on the client by what was received."""

    NAMES = auto()
    """`models` is the whole answer."""
    DOCUMENT = auto()
    """`begin` comes first, with the size of the answer."""
    BYTES = auto()
    """Runs of `data` follow, in order and without gaps."""
    DONE = auto()
    """The answer is complete, or failed."""


_NAMES, _DOCUMENT, _BYTES, _DONE = AnswerState

ANSWER_STARTS: dict[type, AnswerState] = {
    ListModels: _NAMES,
    GetManifest: _DOCUMENT,
    GetFile: _DOCUMENT,
    GetDigests: _DOCUMENT,
    Get: _BYTES,
}
# A cancelled request has no state of its own: runs, and the end of its answer, may have crossed the cancel.
ANSWERS: dict[AnswerState, dict[type, AnswerState]] = {
    _NAMES: {Models: _DONE, Progress: _NAMES, Failed: _DONE},
    _DOCUMENT: {Begin: _BYTES, Progress: _DOCUMENT, Failed: _DONE},
    _BYTES: {Data: _BYTES, Progress: _BYTES, Failed: _DONE},
    _DONE: {},
}
"""The `data` that reaches the end of the answer leads to `DONE` too."""


@dataclass(slots=True)
class Exchange:
    """A request and how far its answer has come.

    Attributes:
        request: what was asked for.
        state: what may come next; see `ANSWERS`.
        at: the next byte of the answer to announce.
        stop: the end of the answer; None until it is known.
        read_bytes: the count of the last `progress`.
    """

    request: Request
    state: AnswerState
    at: int = 0
    stop: int | None = None
    read_bytes: int = 0

    @classmethod
    def to(cls, request: Request) -> Self:
        """The exchange that begins with a request."""
        state = ANSWER_STARTS[type(request)]
        return cls(request, state, request.start, request.stop) if isinstance(request, Get) else cls(request, state)

    def take(self, message: AnswerMessage) -> bool:
        """Advance by one message of the answer; False, without any change, if it may not come now."""
        after = ANSWERS[self.state].get(type(message))
        if after is None:
            return False
        match message:
            case Begin():
                self.stop = message.size
            case Data():
                if not self._continues(message):
                    return False
                self.at = message.stop
                if self.at == self.stop:
                    after = AnswerState.DONE
            case Progress():
                if message.bytes <= self.read_bytes:
                    return False
                self.read_bytes = message.bytes
        self.state = after
        return True

    def _continues(self, run: Data) -> bool:
        """Whether the run starts where the last one ended. It has bytes, unless the answer has none at all."""
        if self.stop is None or run.start != self.at:
            return False
        return run.start < run.stop <= self.stop or run.start == run.stop == self.stop
