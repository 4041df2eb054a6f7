"""The two sides of a session, sans-I/O: text and sizes go in, messages and positions come out.

The first message of each side is its hello, which comes only once. Both sides use two tables: `ANSWER_STARTS` maps
each request to the first state of its answer; `ANSWERS` maps each state to the messages allowed in it and the state
after each. Any other message breaks the protocol. `cancel`, `credit` and `schedule` belong to no answer and are not in
the tables. The sessions check what is counted: ids, open requests, frames, and the window. A session that has raised
`RemoteProtocolError` is over.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar, Self

from surfw.config import MAX_FRAME_BYTES, MIN_FRAME_BYTES, WireLimits, printable
from surfw.errors import LocalProtocolError, RemoteProtocolError
from surfw.wire.messages import (
    PROTOCOL,
    AnswerMessage,
    Begin,
    Cancel,
    ClientHello,
    ClientMessage,
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
    Schedule,
    ServerHello,
    ServerMessage,
    encode,
    parse_client_message,
    parse_server_message,
)

_SHOWN = 40


class AnswerState(Enum):
    """The state of an answer: on the server by what was sent, on the client by what was received."""

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
# A cancelled request has no state of its own: runs and the end of its answer may already be in flight.
ANSWERS: dict[AnswerState, dict[type, AnswerState]] = {
    _NAMES: {Models: _DONE, Progress: _NAMES, Failed: _DONE},
    _DOCUMENT: {Begin: _BYTES, Progress: _DOCUMENT, Failed: _DONE},
    _BYTES: {Data: _BYTES, Progress: _BYTES, Failed: _DONE},
    _DONE: {},
}
"""Not in the table: the `data` whose `stop` is the end of the answer leads to `DONE` (see `Exchange.take`)."""


@dataclass(slots=True)
class Exchange:
    """A request and the state of its answer.

    Attributes:
        request: the request.
        state: decides which message may come next; see `ANSWERS`.
        at: the offset of the next byte to announce.
        stop: the end of the answer, known in the state `BYTES`.
        read_bytes: the count in the last `progress`.
    """

    request: Request
    state: AnswerState
    at: int = 0
    stop: int = 0
    read_bytes: int = 0

    @classmethod
    def to(cls, request: Request) -> Self:
        """Return the exchange that a request begins."""
        state = ANSWER_STARTS[type(request)]
        return cls(request, state, request.start, request.stop) if isinstance(request, Get) else cls(request, state)

    def take(self, message: AnswerMessage) -> bool:
        """Advance by one message of the answer; return False, without any change, if it may not come now."""
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
        """Whether the run starts where the last one ended. A run is empty only if the whole answer is."""
        return run.start == self.at and (run.start < run.stop <= self.stop or run.start == run.stop == self.stop)


@dataclass(frozen=True, slots=True)
class Arrival:
    """Bytes `start` to `stop` of the answer to `id` were received; `last` if they complete it."""

    id: int
    start: int
    stop: int
    last: bool


class _Session:
    """What both sides track: whether the peer has sent its hello, and the open exchanges."""

    _no_hello: ClassVar[tuple[str, int]]
    """The error text and close code for a peer that does not begin with its hello."""

    def __init__(self, limits: WireLimits) -> None:
        self.limits = limits
        self._greeted = False
        self._exchanges: dict[int, Exchange] = {}

    def is_open(self, request_id: int) -> bool:
        """Whether the answer to a request is still incomplete."""
        return request_id in self._exchanges

    def _check_length(self, text: str) -> None:
        if len(text) > self.limits.control_bytes:
            raise RemoteProtocolError(f"a message is longer than {self.limits.control_bytes} bytes", close_code=1009)

    def _check_hello(self, received: ClientMessage | ServerMessage) -> None:
        if isinstance(received, ClientHello | ServerHello) == self._greeted:
            text, code = ("a second hello", 1002) if self._greeted else self._no_hello
            raise RemoteProtocolError(text, close_code=code)
        self._greeted = True

    def _advance(self, message: AnswerMessage, wrong: type[LocalProtocolError | RemoteProtocolError]) -> Exchange:
        """Advance the exchange that a message belongs to; raise `wrong` if the message may not come now."""
        exchange = self._exchanges.get(message.id)
        if exchange is None:
            raise wrong(f"{message.type} for id {message.id}, which is not open")
        if not exchange.take(message):
            raise wrong(f"{message.type} is out of order, for id {message.id}")
        return exchange


class ClientSession(_Session):
    """The client's side: parses the server's messages and encodes the client's.

    Attributes:
        requests: the maximum number of open requests, by both sides' limits; 0 before the server's hello.
        offered: the protocol named in the server's hello, even if it is not ours; "" before.
        takes_schedules: whether the server accepts `schedule`.
        next_id: the id for the next request.
    """

    _no_hello = (f"the first message of a server is hello for {PROTOCOL}", 1002)

    def __init__(self, limits: WireLimits, *, client: str) -> None:
        """Begin a session; `client` is the name and version sent in the hello."""
        super().__init__(limits)
        self.requests = 0
        self.offered = ""
        self.takes_schedules = False
        self.next_id = 0
        self._client = client
        self._frame_bytes = 0
        self._window_bytes = 0
        self._uncredited_bytes = 0
        self._run: Data | None = None  # the announced run; only its binary frames may come until it is complete
        self._run_at = 0

    def hello(self) -> str:
        """Return the reply to the server's hello."""
        return encode(ClientHello(self._client, self.limits.window_bytes, progress=True))

    def receive(self, text: str) -> ServerMessage:
        """Parse and apply one text message from the server.

        Raises:
            RemoteProtocolError: the message is malformed, or may not come now.
        """
        self._check_length(text)
        if self._run is not None:
            raise RemoteProtocolError(f"a message within a run of {self._run.stop - self._run.start} bytes")
        message = parse_server_message(text)
        self._check_hello(message)
        match message:
            case ServerHello():
                self._greet(message)
            case Data():
                self._announced(message)
            case _:
                self._take(message)
        return message

    def _greet(self, message: ServerHello) -> None:
        self.offered = message.protocol
        if self.offered != PROTOCOL:
            raise RemoteProtocolError(f"hello for {printable(self.offered[:_SHOWN])}, expected {PROTOCOL}")
        if not MIN_FRAME_BYTES <= message.frame_bytes <= MAX_FRAME_BYTES:
            raise RemoteProtocolError(f"hello: frames of {message.frame_bytes} bytes; they have from 128 to 512 KiB")
        window = min(message.window_bytes, self.limits.window_bytes)
        if window < 2 * message.frame_bytes or not message.requests:
            raise RemoteProtocolError(f"hello: a window of {window} bytes and {message.requests} requests do not work")
        self._frame_bytes, self._window_bytes = message.frame_bytes, window
        self.requests = min(message.requests, self.limits.requests_in_flight)
        self.takes_schedules = message.schedules

    def _take(self, message: AnswerMessage) -> None:
        exchange = self._advance(message, RemoteProtocolError)
        if isinstance(message, Begin):
            manifest = isinstance(exchange.request, GetManifest)
            most = self.limits.manifest_bytes if manifest else self.limits.file_bytes
            if message.size > most:
                raise RemoteProtocolError(f"begin: {message.size} bytes, more than the {most} taken", close_code=1009)
        if exchange.state is AnswerState.DONE and not isinstance(message, Data):  # its bytes follow
            del self._exchanges[message.id]

    def _announced(self, run: Data) -> None:
        self._take(run)
        length = run.stop - run.start
        if self._uncredited_bytes + length > self._window_bytes:
            raise RemoteProtocolError(f"data: {length} bytes more than the window of {self._window_bytes} lets through")
        self._run, self._run_at = run, run.start
        if not length:
            self._end_run(run)

    def _end_run(self, run: Data) -> bool:
        """Complete the run; return whether that completes its answer."""
        self._run = None
        done = self._exchanges[run.id].state is AnswerState.DONE
        if done:
            del self._exchanges[run.id]
        return done

    def place(self, size: int) -> tuple[int, int]:
        """Return where a binary frame of `size` bytes belongs: the id of its request, and the offset in its answer.

        Raises:
            RemoteProtocolError: no such frame may come now.
        """
        if self._run is None:
            raise RemoteProtocolError("binary data that no message announced")
        if size > self._frame_bytes or size > self._run.stop - self._run_at:
            raise RemoteProtocolError(
                f"a binary frame of {size} bytes; {self._run.stop - self._run_at} are left of the run, "
                f"frames have at most {self._frame_bytes}"
            )
        return self._run.id, self._run_at

    def receive_binary(self, size: int) -> Arrival:
        """Account for a binary frame of `size` bytes.

        Raises:
            RemoteProtocolError: no such frame may come now.
        """
        request_id, start = self.place(size)
        stop = self._run_at = start + size
        self._uncredited_bytes += size
        last = self._run is not None and stop == self._run.stop and self._end_run(self._run)
        return Arrival(request_id, start, stop, last)

    def credit(self) -> str | None:
        """Return the credit to send now, if half the window was received since the last one."""
        if 2 * self._uncredited_bytes < self._window_bytes:
            return None
        message, self._uncredited_bytes = Credit(self._uncredited_bytes), 0
        return encode(message)

    def send(self, message: Request | Cancel | Schedule) -> str:
        """Encode a request, a cancel or a schedule.

        Raises:
            LocalProtocolError: it may not be sent now.
        """
        if isinstance(message, Schedule):
            if not self.takes_schedules:
                raise LocalProtocolError("the server takes no schedules")
            return encode(message)
        if isinstance(message, Cancel):
            if message.id not in self._exchanges:
                raise LocalProtocolError(f"cancel of id {message.id}, which is not open")
            return encode(message)
        if message.id != self.next_id or len(self._exchanges) >= self.requests:
            raise LocalProtocolError(
                f"{message.type} with id {message.id}, {len(self._exchanges)} requests open; "
                f"expected id {self.next_id}, and fewer than {self.requests} open"
            )
        self.next_id += 1
        self._exchanges[message.id] = Exchange.to(message)
        return encode(message)


class ServerSession(_Session):
    """The server's side: parses the client's messages and encodes the server's.

    Attributes:
        credit_bytes: how many bytes may be announced before the client sends more credit; 0 before its hello.
        credited_bytes: how many bytes the client has credited so far.
        takes_progress: whether the client accepts `progress`.
        client: the name in the client's hello; "" before.
    """

    _no_hello = ("the first message of a client is hello", 1008)

    def __init__(self, limits: WireLimits, *, server: str, takes_schedules: bool = False) -> None:
        """Begin a session; `server` (name and version) and `takes_schedules` are sent in the hello."""
        super().__init__(limits)
        self.credit_bytes = self.credited_bytes = 0
        self.takes_progress = False
        self.client = ""
        self._server = server
        self._takes_schedules = takes_schedules
        self._window_bytes = 0
        self._last_id = -1

    def hello(self) -> str:
        """Return the first message to send."""
        limits = self.limits
        return encode(
            ServerHello(
                PROTOCOL,
                self._server,
                limits.frame_bytes,
                limits.window_bytes,
                limits.requests_in_flight,
                self._takes_schedules,
            )
        )

    def receive(self, message: str | bytes) -> Request | Cancel | Credit | Schedule | None:
        """Parse and apply one message from the client; return it if the application has to act on it.

        Raises:
            RemoteProtocolError: the message is malformed, or may not come now.
        """
        if isinstance(message, bytes):
            raise RemoteProtocolError("a client sends no binary messages", close_code=1003)
        self._check_length(message)
        parsed = parse_client_message(message)
        self._check_hello(parsed)
        match parsed:
            case ClientHello():
                self._greet(parsed)
                return None
            case Credit():
                return self._credited(parsed)
            case Cancel():
                return parsed if parsed.id in self._exchanges else None
            case Schedule():
                return parsed
        return self._asked(parsed)

    def _greet(self, message: ClientHello) -> None:
        if message.window_bytes < 2 * self.limits.frame_bytes:
            raise RemoteProtocolError(
                f"hello: a window of {message.window_bytes} bytes holds less than two frames", close_code=1008
            )
        self.takes_progress = message.progress
        self.client = message.client
        self._window_bytes = self.credit_bytes = min(message.window_bytes, self.limits.window_bytes)

    def _credited(self, message: Credit) -> Credit:
        if not 0 < message.bytes <= self._window_bytes - self.credit_bytes:
            raise RemoteProtocolError(
                f"credit of {message.bytes} bytes, while {self._window_bytes - self.credit_bytes} are not credited"
            )
        self.credit_bytes += message.bytes
        self.credited_bytes += message.bytes
        return message

    def _asked(self, request: Request) -> Request:
        if request.id <= self._last_id:
            raise RemoteProtocolError(f"{request.type}: id {request.id} does not rise above {self._last_id}")
        if len(self._exchanges) >= self.limits.requests_in_flight:
            raise RemoteProtocolError(f"more than {self.limits.requests_in_flight} requests at a time", close_code=1008)
        self._last_id = request.id
        self._exchanges[request.id] = Exchange.to(request)
        return request

    def send(self, message: ServerMessage) -> str:
        """Encode a message of an answer.

        Raises:
            LocalProtocolError: it may not be sent now.
        """
        if isinstance(message, ServerHello):
            raise LocalProtocolError("a second hello")
        length = message.stop - message.start if isinstance(message, Data) else 0
        if length > self.credit_bytes or (isinstance(message, Progress) and not self.takes_progress):
            raise LocalProtocolError(f"the client does not take {message}")
        exchange = self._advance(message, LocalProtocolError)
        self.credit_bytes -= length
        if exchange.state is AnswerState.DONE:
            del self._exchanges[message.id]
        return encode(message)
