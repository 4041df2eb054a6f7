"""The server's side of a session, sans-I/O.

    state   received                        state   what the application does
    ─────   ─────────────────────────────   ─────   ──────────────────────────────────────────────────────────
    HELLO   hello                           OPEN    –
    OPEN    models, manifest, file,         OPEN    answers; the id is open until the answer is complete
            digests, get
    OPEN    cancel of an open id            OPEN    stops the work and sends `error`
    OPEN    cancel of another id            OPEN    nothing: the answer was already complete
    OPEN    credit                          OPEN    may announce so much more: see `credit_bytes`
    any     anything else                   –       closes with the error's code

    request          answer                                                     complete with
    ──────────────   ────────────────────────────────────────────────────────   ──────────────────────────────
    models           models                                                     itself
    manifest, file,  begin, then data                                           the run that reaches its size
    digests
    get              data                                                       the run that reaches its stop
    any              error, at any time between two runs                        itself
    any              progress, at any time between two runs, if it rose         –

The server speaks first, with `hello`. After `data` it sends exactly the announced bytes in binary frames, and nothing
else until they are out. Ids are the client's, and rise: no id is used twice.
"""

from surfw.config import WireLimits
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
    Models,
    Progress,
    Request,
    ServerHello,
    ServerMessage,
    encode,
    parse_client_message,
)


class ServerSession:
    """Takes a client's messages, and turns the server's into text.

    Attributes:
        credit_bytes: bytes that may be announced before the client credits more; 0 until it said hello.
        takes_progress: whether the client's hello said so.
    """

    def __init__(self, limits: WireLimits, *, server: str) -> None:
        """Nothing was sent yet; `server` is the name and version to say hello with."""
        self.limits = limits
        self.credit_bytes = 0
        self.takes_progress = False
        self._server = server
        self._window_bytes = 0
        self._greeted = False
        self._last_id = -1
        self._answers: dict[int, Answer] = {}

    def hello(self) -> str:
        """The first message to send."""
        limits = self.limits
        return encode(
            ServerHello(PROTOCOL, self._server, limits.frame_bytes, limits.window_bytes, limits.requests_in_flight)
        )

    def is_open(self, request_id: int) -> bool:
        """Whether the answer to a request is not complete yet."""
        return request_id in self._answers

    def receive(self, message: str | bytes) -> Request | Cancel | Credit | None:
        """Take one message from the client; what it asks the application to do, if anything.

        Raises:
            RemoteProtocolError: a client may not send this, or not now.
        """
        if isinstance(message, bytes):
            raise RemoteProtocolError("a client sends no binary messages", close_code=1003)
        if len(message) > self.limits.control_bytes:
            raise RemoteProtocolError(f"a message is longer than {self.limits.control_bytes} bytes", close_code=1009)
        parsed = parse_client_message(message)
        if not self._greeted:
            self._greet(parsed)
            return None
        match parsed:
            case ClientHello():
                raise RemoteProtocolError("a second hello")
            case Credit():
                return self._credited(parsed)
            case Cancel():
                return parsed if parsed.id in self._answers else None
        return self._asked(parsed)

    def _greet(self, message: object) -> None:
        if not isinstance(message, ClientHello):
            raise RemoteProtocolError("the first message of a client is hello", close_code=1008)
        if message.window_bytes < 2 * self.limits.frame_bytes:
            raise RemoteProtocolError(
                f"hello: a window of {message.window_bytes} bytes holds less than two frames", close_code=1008
            )
        self._greeted = True
        self.takes_progress = message.progress
        self._window_bytes = self.credit_bytes = min(message.window_bytes, self.limits.window_bytes)

    def _credited(self, message: Credit) -> Credit:
        if not 0 < message.bytes <= self._window_bytes - self.credit_bytes:
            raise RemoteProtocolError(
                f"credit of {message.bytes} bytes, while {self._window_bytes - self.credit_bytes} are not credited"
            )
        self.credit_bytes += message.bytes
        return message

    def _asked(self, request: Request) -> Request:
        if request.id <= self._last_id:
            raise RemoteProtocolError(f"{request.type}: id {request.id} does not rise above {self._last_id}")
        if len(self._answers) >= self.limits.requests_in_flight:
            raise RemoteProtocolError(f"more than {self.limits.requests_in_flight} requests at a time", close_code=1008)
        self._last_id = request.id
        self._answers[request.id] = Answer.to(request)
        return request

    def send(self, message: ServerMessage) -> str:
        """The text of a message of ours, which must be in order.

        Raises:
            LocalProtocolError: it is not.
        """
        match message:
            case Models() | Failed():
                answer = self._answer(message)
                self._require(isinstance(message, Failed) or answer.is_names, message)
                del self._answers[message.id]
            case Begin():
                answer = self._answer(message)
                self._require(answer.may_begin, message)
                answer.stop = message.size
            case Data():
                self._announce(message)
            case Progress():
                answer = self._answer(message)
                self._require(self.takes_progress and answer.rises(message), message)
                answer.read = message.bytes
            case ServerHello():
                self._require(False, message)
        return encode(message)

    def _announce(self, message: Data) -> None:
        answer = self._answer(message)
        length = message.stop - message.start
        self._require(answer.continues(message) and length <= self.credit_bytes, message)
        self.credit_bytes -= length
        answer.at = message.stop
        if answer.at == answer.stop:
            del self._answers[message.id]

    def _answer(self, message: Models | Begin | Data | Progress | Failed) -> Answer:
        if message.id not in self._answers:
            raise LocalProtocolError(f"{message.type} for id {message.id}, which is not open")
        return self._answers[message.id]

    def _require(self, truth: bool, message: ServerMessage) -> None:
        if not truth:
            raise LocalProtocolError(f"{message.type} is out of order: {message}")
