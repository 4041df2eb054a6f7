"""Which message may come when: the tables that both sessions run on, and README's rules of order as data.

A connection has a state on each side, and so has every answer. A message without an entry in the row of the current
state breaks the protocol. `RunEnd` and `AnswerEnd` stand for events that are not messages.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Self, get_args

from surfw.wire.messages import (
    AnswerMessage,
    Begin,
    ClientHello,
    ClientMessage,
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
    """No hello has come yet. The server speaks first."""
    OPEN = auto()
    """Messages may come."""
    RUN = auto()
    """`data` came: the binary frames of the run follow, and nothing else before they are complete."""


class AnswerState(Enum):
    """How far the answer to a request has come: on the server by what was sent, on the client by what was received."""

    LISTED = auto()
    """`models` is the whole answer."""
    DOCUMENT = auto()
    """`begin` comes first, with the size of the answer."""
    BYTES = auto()
    """Runs of `data` follow, in order and without gaps."""
    DONE = auto()
    """The answer is complete, or failed."""


class RunEnd:
    """The last byte of a run came, or a run of no bytes was announced."""


class AnswerEnd:
    """A run was announced that reaches the end of its answer."""


_GREETING, _OPEN, _RUN = ConnectionState
_LISTED, _DOCUMENT, _BYTES, _DONE = AnswerState

CLIENT_RECEIVES: dict[ConnectionState, dict[type, ConnectionState]] = {
    _GREETING: {ServerHello: _OPEN},  # the client answers with its own hello
    _OPEN: dict.fromkeys(get_args(AnswerMessage), _OPEN) | {Data: _RUN},
    _RUN: {RunEnd: _OPEN},
}
SERVER_RECEIVES: dict[ConnectionState, dict[type, ConnectionState]] = {
    _GREETING: {ClientHello: _OPEN},
    _OPEN: {kind: _OPEN for kind in get_args(ClientMessage) if kind is not ClientHello},
}

ANSWER_STARTS: dict[type, AnswerState] = {
    ListModels: _LISTED,
    GetManifest: _DOCUMENT,
    GetFile: _DOCUMENT,
    GetDigests: _DOCUMENT,
    Get: _BYTES,
}
# A cancelled request has no state of its own: runs, and the end of its answer, may have crossed the cancel.
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
                    after = ANSWERS[self.state][AnswerEnd]
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
