"""The messages of `surfw.v1`, each declared once as a class, with its fields and their bounds.

`PROTOCOL.md` has the same list.

A message is a JSON object; `type` names it, and the other fields are those of its class below. Binary frames, which
follow `Data`, have no header of their own besides WebSocket's. Rules:

- `parse_client_message` and `parse_server_message` return a message or raise `RemoteProtocolError`, whatever the text.
- Unknown fields are ignored, so that later versions may add some; unknown types are refused. A field with a default may
  be missing.
- Texts are bounded and encodable; those that people see are printable.
- Sizes and ids are from 0 to 2^53, which every JSON implementation represents exactly.

To add a message, add a class here and to a union below the classes and, for a request or a message of an answer, an
entry to the tables of `sessions.py`. To add a field, add a line here with a default that is not None; older peers omit
it. Fields are sent and read in `client/wire_source.py` and `server/connection.py`.
"""

import json
import re
import reprlib
import struct
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from typing import Annotated, Any, ClassVar, get_args

from surfw.errors import RemoteProtocolError

PROTOCOL = "surfw.v1"
"""The WebSocket subprotocol that both sides ask for."""

MAX_SIZE = 1 << 53
MAX_PRIORITY = 1 << 31
MOST_SCHEDULED = 1024
"""The most chunks in each list of a schedule."""
_NAME_LENGTH = 256
_ID_LENGTH = 64
_TEXT_LENGTH = 4096

_SHORT = reprlib.Repr()
"""Shortens values for a close reason, which must be short."""
_SHORT.maxlevel = 1
_SHORT.maxstring = 40

_SURROGATE = re.compile("[\ud800-\udfff]")
"""JSON can contain lone surrogates, but UTF-8 cannot."""

_FINAL_BINARY = 0x82
"""The first byte of an unfragmented binary frame: RFC 6455, section 5.2."""


def _unexpected(value: object, expected: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"{_SHORT.repr(value)}, expected {expected}")


def _integer(low: int, high: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _unexpected(value, f"an integer from {low} to {high}")
        return value

    return check


def _text(longest: int, *, shown: bool = False) -> Callable[[object], str]:
    """Return a check for texts; those `shown` to people must not contain terminal control characters."""

    def check(value: object) -> str:
        if not isinstance(value, str) or len(value) > longest or _SURROGATE.search(value):
            raise _unexpected(value, f"a text of at most {longest} characters")
        if shown and not value.isprintable():
            raise _unexpected(value, "a text of printable characters")
        return value

    return check


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _unexpected(value, "a list of texts")
    return tuple(map(_text(_NAME_LENGTH, shown=True), value))


def _chunks(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MOST_SCHEDULED:
        raise _unexpected(value, f"a list of at most {MOST_SCHEDULED} ids of chunks")
    return tuple(map(_text(_ID_LENGTH), value))


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise _unexpected(value, "true or false")
    return value


Size = Annotated[int, _integer(0, MAX_SIZE)]
"""Bytes, an offset, a count or an id."""
Priority = Annotated[int, _integer(-MAX_PRIORITY, MAX_PRIORITY)]
Name = Annotated[str, _text(_NAME_LENGTH)]
"""A lookup key."""
ShownName = Annotated[str, _text(_NAME_LENGTH, shown=True)]
ShownText = Annotated[str, _text(_TEXT_LENGTH, shown=True)]
Names = Annotated[tuple[str, ...], _names]
Chunks = Annotated[tuple[str, ...], _chunks]
"""Chunk ids."""
Flag = Annotated[bool, _flag]


@dataclass(frozen=True, slots=True)
class ClientHello:
    """The client's first message: its name and version, its window, and whether it accepts `progress`."""

    type: ClassVar[str] = "hello"
    client: ShownName
    window_bytes: Size
    progress: Flag = False


@dataclass(frozen=True, slots=True)
class ListModels:
    """Requests the names of the models."""

    type: ClassVar[str] = "models"
    id: Size


@dataclass(frozen=True, slots=True)
class GetManifest:
    """Requests a model's manifest, without locations."""

    type: ClassVar[str] = "manifest"
    id: Size
    model: Name


@dataclass(frozen=True, slots=True)
class GetFile:
    """Requests a tokenizer file that the model's manifest lists."""

    type: ClassVar[str] = "file"
    id: Size
    model: Name
    path: Name


@dataclass(frozen=True, slots=True)
class GetDigests:
    """Requests the digests of a chunk whose manifest has none; the server reads the whole chunk first."""

    type: ClassVar[str] = "digests"
    id: Size
    model: Name
    chunk: Name


@dataclass(frozen=True, slots=True)
class Get:
    """Requests bytes `start` to `stop` of a form of a chunk, given by its id. Lower priorities are sent first.

    `fresh` bypasses the server's cache, after bytes from it arrived damaged.
    """

    type: ClassVar[str] = "get"
    id: Size
    model: Name
    chunk: Name
    form: Name
    start: Size
    stop: Size
    priority: Priority = 0
    fresh: Flag = False


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancels a request. The server answers with `error`, unless the answer was already complete."""

    type: ClassVar[str] = "cancel"
    id: Size


@dataclass(frozen=True, slots=True)
class Schedule:
    """Announces the cycle in which a client uses the chunks of a model, and which of them it keeps in memory.

    It replaces the client's previous schedule for the model, has no answer, and is only a hint.
    """

    type: ClassVar[str] = "schedule"
    model: Name
    cycle: Chunks
    kept: Chunks


@dataclass(frozen=True, slots=True)
class Credit:
    """The client has received `bytes`, and the server may announce that many more."""

    type: ClassVar[str] = "credit"
    bytes: Size


@dataclass(frozen=True, slots=True)
class ServerHello:
    """The server's first message: its name and version, the limits of both sides, whether it accepts `schedule`."""

    type: ClassVar[str] = "hello"
    protocol: Name
    server: ShownName
    frame_bytes: Size
    window_bytes: Size
    requests: Size
    schedules: Flag = False


@dataclass(frozen=True, slots=True)
class Models:
    """Answers `models`."""

    type: ClassVar[str] = "models"
    id: Size
    models: Names


@dataclass(frozen=True, slots=True)
class Begin:
    """Begins the answer to `manifest`, `file` and `digests`, with its size and BLAKE3."""

    type: ClassVar[str] = "begin"
    id: Size
    size: Size
    digest: Name


@dataclass(frozen=True, slots=True)
class Data:
    """Announces a run: the next `stop - start` binary bytes are bytes `start` to `stop` of the answer to `id`."""

    type: ClassVar[str] = "data"
    id: Size
    start: Size
    stop: Size


@dataclass(frozen=True, slots=True)
class Progress:
    """An open request is waiting for the storage, which has read `bytes` for it so far. The count only rises."""

    type: ClassVar[str] = "progress"
    id: Size
    bytes: Size


@dataclass(frozen=True, slots=True)
class Failed:
    """Ends a request before its answer is complete. `code` is for programs, `message` for people."""

    type: ClassVar[str] = "error"
    id: Size
    code: ShownName
    message: ShownText


Request = ListModels | GetManifest | GetFile | GetDigests | Get
ClientMessage = ClientHello | Request | Cancel | Credit | Schedule
AnswerMessage = Models | Begin | Data | Progress | Failed
"""The server's messages that belong to a request."""
ServerMessage = ServerHello | AnswerMessage


_FieldCheck = tuple[str, object, Callable[[object], object]]
"""A field: its name, the value used if it is missing, and its check."""


def _declared(messages: Any) -> dict[str, tuple[type, list[_FieldCheck]]]:
    """Return the classes of a union by `type`, with their fields."""
    return {
        kind.type: (kind, [(one.name, _default(one), get_args(one.type)[1]) for one in fields(kind)])
        for kind in get_args(messages)
    }


def _default(field: "Field[Any]") -> object:
    return None if field.default is MISSING else field.default


_FROM_CLIENT = _declared(ClientMessage)
_FROM_SERVER = _declared(ServerMessage)
_TYPE = _text(32)


def encode(message: ClientMessage | ServerMessage) -> str:
    """Return the message as JSON text. False fields are omitted, so that messages are the same as older peers'."""
    values = {name: value for name in message.__slots__ if (value := getattr(message, name)) is not False}
    return json.dumps({"type": message.type} | values, separators=(",", ":"))


def parse_client_message(text: str) -> ClientMessage:
    """Parse a message from a client.

    Raises:
        RemoteProtocolError: the text is not a client's message.
    """
    message: ClientMessage = _parse(text, _FROM_CLIENT)
    return message


def parse_server_message(text: str) -> ServerMessage:
    """Parse a message from a server.

    Raises:
        RemoteProtocolError: the text is not a server's message.
    """
    message: ServerMessage = _parse(text, _FROM_SERVER)
    return message


def binary_header(length: int) -> bytes:
    """Return the header of an unmasked binary frame with `length` bytes of payload.

    A server writes it before the cached bytes, to avoid copying them into a frame.
    """
    if length < 126:
        return struct.pack("!BB", _FINAL_BINARY, length)
    if length < 1 << 16:
        return struct.pack("!BBH", _FINAL_BINARY, 126, length)
    return struct.pack("!BBQ", _FINAL_BINARY, 127, length)


def _parse(text: str, declared: dict[str, tuple[type, list[_FieldCheck]]]) -> Any:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise RemoteProtocolError(f"a message is not JSON: {_SHORT.repr(text)}") from exc
    if not isinstance(document, dict):
        raise RemoteProtocolError(f"a message is not a JSON object: {_SHORT.repr(text)}")
    message, field = "message", "type"  # what an error names
    try:
        message = _TYPE(document.get(field))
        kind, checks = declared.get(message, (None, []))
        values = [check(document.get(field := name, default)) for name, default, check in checks]
    except RemoteProtocolError as exc:
        raise RemoteProtocolError(f"{message}: field {field!r} is {exc}") from None
    if kind is None:
        raise RemoteProtocolError(f"unknown message type {message!a}")
    return kind(*values)
