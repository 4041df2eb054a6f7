"""The client's side of a session, sans-I/O.

    state   received                                   state   what the application does
    ─────   ────────────────────────────────────────   ─────   ──────────────────────────────────────────────
    HELLO   hello                                      OPEN    sends its own hello
    OPEN    models                                     OPEN    has the names
    OPEN    begin of an open manifest, file, digests   OPEN    makes room for `size` bytes
    OPEN    data of an open id, where it stopped       RUN     `place` says where the bytes belong; of no bytes: OPEN
    OPEN    progress of an open id, if it rose         OPEN    waits on: the server reads for the request
    OPEN    error of an open id                        OPEN    the request failed, or was cancelled
    RUN     binary within the run                      RUN     OPEN after the run's last byte; sends credit when due
    any     anything else                              –       closes with the error's code

A request that was cancelled stays open, and its runs are taken in and credited like others, until its last run or its
error has come: it may have crossed the cancel.
"""

from dataclasses import dataclass

from surfw.config import MAX_FRAME_BYTES, MIN_FRAME_BYTES, WireLimits
from surfw.errors import LocalProtocolError, RemoteProtocolError
from surfw.wire.answers import Answer
from surfw.wire.messages import (
    PROTOCOL,
    Begin,
    Cancel,
    ClientHello,
    Credit,
    Data,
    Failed,
    GetManifest,
    Models,
    Progress,
    Request,
    ServerHello,
    ServerMessage,
    encode,
    parse_server_message,
)

_SHOWN = 40


@dataclass(frozen=True, slots=True)
class Arrival:
    """Binary bytes that were taken in: bytes `start` to `stop` of the answer to `id`; `last` if it is complete now."""

    id: int
    start: int
    stop: int
    last: bool


class ClientSession:
    """Takes a server's messages, and turns the client's into text.

    Attributes:
        requests: the most requests to have open at a time, by both sides' limits; 0 until the server said hello.
        offered: the protocol that the server's hello named, spoken here or not; "" until there was one.
    """

    def __init__(self, limits: WireLimits, *, client: str) -> None:
        """Nothing was received yet; `client` is the name and version to say hello with."""
        self.limits = limits
        self.requests = 0
        self.offered = ""
        self._client = client
        self._frame_bytes = 0
        self._window_bytes = 0
        self._uncredited = 0
        self._next_id = 0
        self._answers: dict[int, Answer] = {}
        self._run: Data | None = None
        self._run_at = 0

    def hello(self) -> str:
        """The message to answer the server's hello with."""
        return encode(ClientHello(self._client, self.limits.window_bytes, progress=True))

    def next_id(self) -> int:
        """The id for the next request."""
        return self._next_id

    def receive(self, text: str) -> ServerMessage:
        """Take one text message from the server.

        Raises:
            RemoteProtocolError: a server may not send this, or not now.
        """
        if len(text) > self.limits.control_bytes:
            raise RemoteProtocolError(f"a message is longer than {self.limits.control_bytes} bytes", close_code=1009)
        if self._run is not None:
            raise RemoteProtocolError(f"a message within a run of {self._run.stop - self._run.start} bytes")
        message = parse_server_message(text)
        if not self.requests:
            return self._greet(message)
        match message:
            case ServerHello():
                raise RemoteProtocolError("a second hello")
            case Models():
                answer = self._answer(message)
                self._require(answer.is_names, message)
                del self._answers[message.id]
            case Failed():
                self._answer(message)
                del self._answers[message.id]
            case Begin():
                self._begin(message)
            case Data():
                self._announced(message)
            case Progress():
                answer = self._answer(message)
                self._require(answer.rises(message), message)
                answer.read = message.bytes
        return message

    def _greet(self, message: ServerMessage) -> ServerHello:
        if not isinstance(message, ServerHello):
            raise RemoteProtocolError(f"the first message of a server is hello for {PROTOCOL}")
        self.offered = message.protocol
        if self.offered != PROTOCOL:
            raise RemoteProtocolError(f"hello for {self.offered[:_SHOWN]}, expected {PROTOCOL}")
        if not MIN_FRAME_BYTES <= message.frame_bytes <= MAX_FRAME_BYTES:
            raise RemoteProtocolError(f"hello: frames of {message.frame_bytes} bytes; they have from 128 to 512 KiB")
        window = min(message.window_bytes, self.limits.window_bytes)
        if window < 2 * message.frame_bytes or not message.requests:
            raise RemoteProtocolError(f"hello: a window of {window} bytes and {message.requests} requests do not work")
        self._frame_bytes, self._window_bytes = message.frame_bytes, window
        self.requests = min(message.requests, self.limits.requests_in_flight)
        return message

    def _begin(self, message: Begin) -> None:
        answer = self._answer(message)
        self._require(answer.may_begin, message)
        manifest = isinstance(answer.request, GetManifest)
        most = self.limits.manifest_bytes if manifest else self.limits.file_bytes
        if message.size > most:
            raise RemoteProtocolError(f"begin: {message.size} bytes, more than the {most} taken", close_code=1009)
        answer.stop = message.size

    def _announced(self, message: Data) -> None:
        answer = self._answer(message)
        length = message.stop - message.start
        self._require(answer.continues(message), message)
        if self._uncredited + length > self._window_bytes:
            raise RemoteProtocolError(f"data: {length} bytes more than the window of {self._window_bytes} lets through")
        if length:
            self._run, self._run_at = message, message.start
        else:
            del self._answers[message.id]

    def place(self, size: int) -> tuple[int, int]:
        """Where a binary frame of `size` bytes belongs: the id of its request, and the offset in its answer.

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
        """Take a binary frame of `size` bytes, which `place` told the place of.

        Raises:
            RemoteProtocolError: no such frame may come now.
        """
        request_id, start = self.place(size)
        stop = self._run_at = start + size
        self._uncredited += size
        if self._run is not None and stop == self._run.stop:
            self._run = None
        answer = self._answers[request_id]
        answer.at = stop
        last = stop == answer.stop
        if last:
            del self._answers[request_id]
        return Arrival(request_id, start, stop, last)

    def credit(self) -> str | None:
        """The credit to send now, if it is due: half the window was taken in since the last."""
        if 2 * self._uncredited < self._window_bytes:
            return None
        message, self._uncredited = Credit(self._uncredited), 0
        return encode(message)

    def send(self, message: Request | Cancel) -> str:
        """The text of a request or of a cancel, which must be in order.

        Raises:
            LocalProtocolError: it is not.
        """
        if isinstance(message, Cancel):
            if message.id not in self._answers:
                raise LocalProtocolError(f"cancel of id {message.id}, which is not open")
            return encode(message)
        if message.id != self._next_id or len(self._answers) >= self.requests:
            raise LocalProtocolError(
                f"{message.type} with id {message.id}, {len(self._answers)} requests open; "
                f"expected id {self._next_id}, and fewer than {self.requests} open"
            )
        self._next_id += 1
        self._answers[message.id] = Answer.to(message)
        return encode(message)

    def is_open(self, request_id: int) -> bool:
        """Whether the answer to a request is not complete yet."""
        return request_id in self._answers

    def _answer(self, message: Models | Begin | Data | Progress | Failed) -> Answer:
        if message.id not in self._answers:
            raise RemoteProtocolError(f"{message.type} for id {message.id}, which is not open")
        return self._answers[message.id]

    def _require(self, truth: bool, message: ServerMessage) -> None:
        if not truth:
            raise RemoteProtocolError(f"{message.type} is out of order")
