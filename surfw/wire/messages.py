"""The messages of `surfw.v1` as values, each declared once, with its fields and their bounds.

`PROTOCOL.md` has the same list.

A message is a JSON object; `type` names it, and the other fields are those of the class below. Binary frames, which
come after `Data`, have no header of their own but that of WebSocket. Rules:

- `parse_client_message` and `parse_server_message` return a message or raise `RemoteProtocolError`, whatever the text.
- Unknown fields are ignored, so that a later surfw may add some; unknown types are refused. A field with a default may
  be missing.
- Texts are bounded and encodable; those that people see are printable.
- Sizes and ids are from 0 to 2^53, which every JSON implementation keeps exactly.

A new message is a class here, a member of a union below the classes, and, if it is a request or belongs to an answer,
an entry in the tables of `sessions.py`. A new field is a line here with a default that is not None, which older peers
leave out; who sends and who reads it are in `client/wire_source.py` and `server/connection.py`.
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
"""The most chunks that each list of a schedule names."""
_NAME_LENGTH = 256
_ID_LENGTH = 64
_TEXT_LENGTH = 4096

_SHORT = reprlib.Repr()
"""Values as text for a close reason, which has little room."""
_SHORT.maxlevel = 1
_SHORT.maxstring = 40

_SURROGATE = re.compile("[\ud800-\udfff]")
"""JSON can carry lone surrogates, but UTF-8 cannot."""

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
    """Texts that are `shown` to people must not control their terminals."""

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
"""A text to look something up by."""
ShownName = Annotated[str, _text(_NAME_LENGTH, shown=True)]
ShownText = Annotated[str, _text(_TEXT_LENGTH, shown=True)]
Names = Annotated[tuple[str, ...], _names]
Chunks = Annotated[tuple[str, ...], _chunks]
"""Identities of chunks."""
Flag = Annotated[bool, _flag]


@dataclass(frozen=True, slots=True)
class ClientHello:
    """The client's first message: its name and version, its window, and whether it takes `progress`."""

    type: ClassVar[str] = "hello"
    client: ShownName
    window_bytes: Size
    progress: Flag = False


@dataclass(frozen=True, slots=True)
class ListModels:
    """Asks for the names of the models."""

    type: ClassVar[str] = "models"
    id: Size


@dataclass(frozen=True, slots=True)
class GetManifest:
    """Asks for a model's manifest, without locations."""

    type: ClassVar[str] = "manifest"
    id: Size
    model: Name


@dataclass(frozen=True, slots=True)
class GetFile:
    """Asks for a tokenizer file that the model's manifest lists."""

    type: ClassVar[str] = "file"
    id: Size
    model: Name
    path: Name


@dataclass(frozen=True, slots=True)
class GetDigests:
    """Asks for the digests of a chunk that has none in its manifest; the server reads all of it first."""

    type: ClassVar[str] = "digests"
    id: Size
    model: Name
    chunk: Name


@dataclass(frozen=True, slots=True)
class Get:
    """Asks for bytes `start` to `stop` of a form of a chunk, named by its identity. Lower priorities are sent first.

    `fresh` has them read from the storage again, after they arrived damaged from the server's cache.
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
    """Cancels a request. The server answers with `error`, unless its answer was already complete."""

    type: ClassVar[str] = "cancel"
    id: Size


@dataclass(frozen=True, slots=True)
class Schedule:
    """Announces which chunks of a model are used again and again, in which order, and which of them the client keeps.

    It takes the place of what was announced of this model before, has no answer, and binds nobody.
    """

    type: ClassVar[str] = "schedule"
    model: Name
    cycle: Chunks
    kept: Chunks


@dataclass(frozen=True, slots=True)
class Credit:
    """The client has taken in `bytes`, and the server may announce as many more."""

    type: ClassVar[str] = "credit"
    bytes: Size


@dataclass(frozen=True, slots=True)
class ServerHello:
    """The server's first message: its name and version, the limits for both sides, and whether it takes `schedule`."""

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
    """Begins the answer to `manifest`, `file` and `digests`: its size and BLAKE3."""

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
    """An open request waits for the storage, which has read `bytes` for it so far. The count only rises."""

    type: ClassVar[str] = "progress"
    id: Size
    bytes: Size


@dataclass(frozen=True, slots=True)
class Failed:
    """Ends a request without the rest of its answer. `code` is for programs, `message` for people."""

    type: ClassVar[str] = "error"
    id: Size
    code: ShownName
    message: ShownText


Request = ListModels | GetManifest | GetFile | GetDigests | Get
ClientMessage = ClientHello | Request | Cancel | Credit | Schedule
AnswerMessage = Models | Begin | Data | Progress | Failed
"""What a server says about one request."""
ServerMessage = ServerHello | AnswerMessage


_FieldCheck = tuple[str, object, Callable[[object], object]]
"""A field: its name, the value that stands for a missing one, and its check."""


def _declared(messages: Any) -> dict[str, tuple[type, list[_FieldCheck]]]:
    """The classes of a union by their `type`, with their fields."""
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
    """The message as JSON text. False fields are left out, so that older peers' messages and ours are the same."""
    values = {name: value for name in message.__slots__ if (value := getattr(message, name)) is not False}
    return json.dumps({"type": message.type} | values, separators=(",", ":"))


def parse_client_message(text: str) -> ClientMessage:
    """A message that a client may send.

    Raises:
        RemoteProtocolError: the text is not one.
    """
    message: ClientMessage = _parse(text, _FROM_CLIENT)
    return message


def parse_server_message(text: str) -> ServerMessage:
    """A message that a server may send.

    Raises:
        RemoteProtocolError: the text is not one.
    """
    message: ServerMessage = _parse(text, _FROM_SERVER)
    return message


def binary_header(length: int) -> bytes:
    """The header of an unmasked binary frame with `length` bytes of payload.

    A server writes it, and then the cached bytes themselves, without copying them into a frame.
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
