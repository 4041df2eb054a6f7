"""The JSON messages of `surfw.v1` as values. README has the same table for people.

A message is a JSON object; `type` names it, and the other fields are those of the class below. Rules:

- `parse_client_message` and `parse_server_message` return a message or raise `RemoteProtocolError`, whatever the text.
- Fields that a class does not have are ignored, so that a later surfw may say more; unknown types are refused.
- Texts are bounded and encodable, and those that people see printable.
- Sizes and ids lie in 0 … 2^53, which every JSON implementation keeps exactly.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from surfw.errors import RemoteProtocolError

PROTOCOL = "surfw.v1"
"""The WebSocket subprotocol that both sides ask for."""

MAX_SIZE = 1 << 53
MAX_PRIORITY = 1 << 31
_NAME_LENGTH = 256
_TEXT_LENGTH = 4096


@dataclass(frozen=True, slots=True)
class ClientHello:
    """The client's first message: who it is, the most bytes it wants uncredited, and whether it takes `progress`."""

    type: ClassVar[str] = "hello"
    client: str
    window_bytes: int
    progress: bool = False


@dataclass(frozen=True, slots=True)
class ListModels:
    """Asks for the names of the models."""

    type: ClassVar[str] = "models"
    id: int


@dataclass(frozen=True, slots=True)
class GetManifest:
    """Asks for a model's manifest, without locations."""

    type: ClassVar[str] = "manifest"
    id: int
    model: str


@dataclass(frozen=True, slots=True)
class GetFile:
    """Asks for a tokenizer file that the model's manifest lists."""

    type: ClassVar[str] = "file"
    id: int
    model: str
    path: str


@dataclass(frozen=True, slots=True)
class GetDigests:
    """Asks for the digests of a chunk that has none in its manifest; the server reads all of it first."""

    type: ClassVar[str] = "digests"
    id: int
    model: str
    chunk: str


@dataclass(frozen=True, slots=True)
class Get:
    """Asks for bytes `start` to `stop` of a form of a chunk (by its identity). Lower priorities are sent first.

    `fresh` wants them read from the storage again: those that the server has kept arrived damaged.
    """

    type: ClassVar[str] = "get"
    id: int
    model: str
    chunk: str
    form: str
    start: int
    stop: int
    priority: int = 0
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Cancel:
    """Gives up a request. The server answers with `error` unless its answer was already complete."""

    type: ClassVar[str] = "cancel"
    id: int


@dataclass(frozen=True, slots=True)
class Credit:
    """Lets the server send so many bytes more: the client has taken them in."""

    type: ClassVar[str] = "credit"
    bytes: int


@dataclass(frozen=True, slots=True)
class ServerHello:
    """The server's first message: who it is, and the limits it holds to and holds the client to."""

    type: ClassVar[str] = "hello"
    protocol: str
    server: str
    frame_bytes: int
    window_bytes: int
    requests: int


@dataclass(frozen=True, slots=True)
class Models:
    """Answers `models`."""

    type: ClassVar[str] = "models"
    id: int
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Begin:
    """Opens the answer to `manifest`, `file` and `digests`: how many bytes will come, and their BLAKE3."""

    type: ClassVar[str] = "begin"
    id: int
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Data:
    """Announces a run: the next `stop - start` binary bytes are bytes `start` to `stop` of the answer to `id`."""

    type: ClassVar[str] = "data"
    id: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Says that an open request waits for the storage: so many bytes were read for it so far; the count only rises."""

    type: ClassVar[str] = "progress"
    id: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Ends a request without the rest of its answer; `code` is for machines, `message` for people."""

    type: ClassVar[str] = "error"
    id: int
    code: str
    message: str


Request = ListModels | GetManifest | GetFile | GetDigests | Get
ClientMessage = ClientHello | Request | Cancel | Credit
ServerMessage = ServerHello | Models | Begin | Data | Progress | Failed


def encode(message: ClientMessage | ServerMessage) -> str:
    """The message as JSON text. A field that is false is left out, as peers that do not know it do."""
    fields = {name: value for name in message.__slots__ if (value := getattr(message, name)) is not False}
    return json.dumps({"type": message.type} | fields, separators=(",", ":"))


def parse_client_message(text: str) -> ClientMessage:
    """A message that a client may send.

    Raises:
        RemoteProtocolError: the text is none.
    """
    return _parse(text, _FROM_CLIENT)


def parse_server_message(text: str) -> ServerMessage:
    """A message that a server may send.

    Raises:
        RemoteProtocolError: the text is none.
    """
    return _parse(text, _FROM_SERVER)


class _Fields:
    """A JSON object whose fields are checked as they are read; whatever is wrong is a `RemoteProtocolError`."""

    def __init__(self, text: str) -> None:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise RemoteProtocolError(f"a message is not JSON: {_short(text)}") from exc
        if not isinstance(document, dict):
            raise RemoteProtocolError(f"a message is not a JSON object: {_short(text)}")
        self._document: dict[str, Any] = document
        self.type = "message"  # what errors call it until its type is known
        self.type = self.text("type", 32)

    def text(self, name: str, longest: int = _NAME_LENGTH) -> str:
        return self._checked_text(name, self._document.get(name), longest)

    def shown(self, name: str, longest: int = _NAME_LENGTH) -> str:
        """A text that people see: it may do nothing to their terminals."""
        return self._printable(name, self.text(name, longest))

    def texts(self, name: str) -> tuple[str, ...]:
        values = self._document.get(name)
        if not isinstance(values, list):
            raise self._unexpected(name, values, "a list of texts")
        return tuple(self._printable(name, self._checked_text(name, value, _NAME_LENGTH)) for value in values)

    def size(self, name: str) -> int:
        return self.integer(name, 0, MAX_SIZE)

    def integer(self, name: str, low: int, high: int, *, default: int | None = None) -> int:
        value = self._document.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._unexpected(name, value, f"an integer from {low} to {high}")
        return value

    def flag(self, name: str) -> bool:
        value = self._document.get(name, False)
        if not isinstance(value, bool):
            raise self._unexpected(name, value, "true or false")
        return value

    def _checked_text(self, name: str, value: object, longest: int) -> str:
        if not isinstance(value, str) or len(value) > longest or not _encodable(value):
            raise self._unexpected(name, value, f"a text of at most {longest} characters")
        return value

    def _printable(self, name: str, value: str) -> str:
        if not value.isprintable():
            raise self._unexpected(name, value, "a text of printable characters")
        return value

    def _unexpected(self, name: str, value: object, expected: str) -> RemoteProtocolError:
        return RemoteProtocolError(f"{self.type}: field {name!r} is {_short(value)}, expected {expected}")


Message = TypeVar("Message")

_FROM_CLIENT: dict[str, Callable[[_Fields], ClientMessage]] = {
    ClientHello.type: lambda fields: ClientHello(
        fields.shown("client"), fields.size("window_bytes"), fields.flag("progress")
    ),
    ListModels.type: lambda fields: ListModels(fields.size("id")),
    GetManifest.type: lambda fields: GetManifest(fields.size("id"), fields.text("model")),
    GetFile.type: lambda fields: GetFile(fields.size("id"), fields.text("model"), fields.text("path")),
    GetDigests.type: lambda fields: GetDigests(fields.size("id"), fields.text("model"), fields.text("chunk")),
    Get.type: lambda fields: Get(
        fields.size("id"),
        fields.text("model"),
        fields.text("chunk"),
        fields.text("form"),
        fields.size("start"),
        fields.size("stop"),
        fields.integer("priority", -MAX_PRIORITY, MAX_PRIORITY, default=0),
        fields.flag("fresh"),
    ),
    Cancel.type: lambda fields: Cancel(fields.size("id")),
    Credit.type: lambda fields: Credit(fields.size("bytes")),
}

_FROM_SERVER: dict[str, Callable[[_Fields], ServerMessage]] = {
    ServerHello.type: lambda fields: ServerHello(
        fields.text("protocol"),
        fields.shown("server"),
        fields.size("frame_bytes"),
        fields.size("window_bytes"),
        fields.size("requests"),
    ),
    Models.type: lambda fields: Models(fields.size("id"), fields.texts("models")),
    Begin.type: lambda fields: Begin(fields.size("id"), fields.size("size"), fields.text("digest")),
    Data.type: lambda fields: Data(fields.size("id"), fields.size("start"), fields.size("stop")),
    Progress.type: lambda fields: Progress(fields.size("id"), fields.size("bytes")),
    Failed.type: lambda fields: Failed(fields.size("id"), fields.shown("code"), fields.shown("message", _TEXT_LENGTH)),
}


def _parse(text: str, messages: Mapping[str, Callable[[_Fields], Message]]) -> Message:
    fields = _Fields(text)
    if fields.type not in messages:
        raise RemoteProtocolError(f"unknown message type {fields.type!a}")
    return messages[fields.type](fields)


def printable(text: str) -> str:
    """The text with `?` for what is not printable: a peer's words, as people may see them."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _encodable(value: str) -> bool:
    """Whether the text is free of lone surrogates, which JSON can carry and UTF-8 cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: object) -> str:
    """A value as it may stand in a reason, which has little room."""
    match value:
        case str():
            return ascii(value[:40]) + ("…" if len(value) > 40 else "")
        case None | bool() | float():
            return repr(value)
        case int():
            return repr(value) if abs(value) <= MAX_SIZE else "a huge integer"
        case list():
            return "a list"
    return "an object"
