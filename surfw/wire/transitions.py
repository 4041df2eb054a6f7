"""Which message may come when: the tables that both sessions run on, and README's rules of order as data.

A connection has a state on each side, and so has every answer. What has no entry in the row of the present state breaks
the protocol. Keys are classes of messages; `RunEnd` and `AnswerEnd` are no messages, but what their docstrings say.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Self, get_args

from surfw.wire.messages import (
    AnswerMessage,
    Begin,
    Cancel,
    ClientHello,
    Credit,
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
    ServerHello,
)


class ConnectionState(Enum):
    """What one side has heard from the other."""

    GREETING = auto()
    """No hello yet. The server speaks first."""
    OPEN = auto()
    """Hellos were exchanged; any message may come."""
    RUN = auto()
    """`data` was announced: its binary frames come, and nothing else before they are complete."""


class AnswerState(Enum):
    """How far the answer to one request has come: on the server what it sent, on the client what it received."""

    LISTED = auto()
    """`models` is the whole answer."""
    DOCUMENT = auto()
    """`begin` comes first, and says how long the answer is."""
    BYTES = auto()
    """Runs of `data` follow, in order and without gaps."""
    DONE = auto()
    """The id is not open any more."""


class RunEnd:
    """The last byte of a run came, or a run of no bytes was announced."""


class AnswerEnd:
    """A run was announced that reaches the end of its answer."""


_GREETING, _OPEN, _RUN = ConnectionState
_LISTED, _DOCUMENT, _BYTES, _DONE = AnswerState

CLIENT_RECEIVES: dict[ConnectionState, dict[type, ConnectionState]] = {
    _GREETING: {ServerHello: _OPEN},  # which the client answers with its own
    _OPEN: dict.fromkeys(get_args(AnswerMessage), _OPEN) | {Data: _RUN},
    _RUN: {RunEnd: _OPEN},
}
SERVER_RECEIVES: dict[ConnectionState, dict[type, ConnectionState]] = {
    _GREETING: {ClientHello: _OPEN},
    _OPEN: dict.fromkeys(get_args(Request | Cancel | Credit), _OPEN),  # a cancel may come after the end of its answer
}

ANSWER_STARTS: dict[type, AnswerState] = {
    ListModels: _LISTED,
    GetManifest: _DOCUMENT,
    GetFile: _DOCUMENT,
    GetDigests: _DOCUMENT,
    Get: _BYTES,
}
# Being cancelled is no state of its own: runs, and the end of the answer, may have crossed the cancel.
ANSWERS: dict[AnswerState, dict[type, AnswerState]] = {
    _LISTED: {Models: _DONE, Progress: _LISTED, Failed: _DONE},
    _DOCUMENT: {Begin: _BYTES, Progress: _DOCUMENT, Failed: _DONE},
    _BYTES: {Data: _BYTES, AnswerEnd: _DONE, Progress: _BYTES, Failed: _DONE},
    _DONE: {},
}


@dataclass(slots=True)
class Exchange:
    """A request and how far its answer has come.

    Attributes:
        request: what was asked for.
        state: what may come next.
        at: the next byte of the answer that has to be announced.
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
        """Nothing of the answer is there yet."""
        state = ANSWER_STARTS[type(request)]
        return cls(request, state, request.start, request.stop) if isinstance(request, Get) else cls(request, state)

    def take(self, message: AnswerMessage) -> bool:
        """Go on by one message of the answer; False, and nothing has changed, if it may not come now."""
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
                    after = ANSWERS[self.state][AnswerEnd]
            case Progress():
                if message.bytes <= self.read_bytes:
                    return False
                self.read_bytes = message.bytes
        self.state = after
        return True

    def _continues(self, run: Data) -> bool:
        """Whether the run starts where the answer stopped, and has bytes; a run of none is a whole answer of none."""
        if self.stop is None or run.start != self.at:
            return False
        return run.start < run.stop <= self.stop or run.start == run.stop == self.stop
