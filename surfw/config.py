"""Shared constants, defaults and limits; sizes with units, folders, and text that is safe to display.

Depends on neither torch nor the network. Value objects are frozen and keyword-only.
"""

import ipaddress
import os
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import UnionType
from typing import Literal, get_args

from surfw.errors import ConfigurationError
from surfw.files import expand_home

KB, MB, GB = 1000, 1000**2, 1000**3
KIB, MIB, GIB = 1024, 1024**2, 1024**3

BLOCK_BYTES = MIB
"""Stored bytes are digested in blocks of this size, so that any range of blocks can be verified alone."""

PIECE_BYTES = 8 * MIB
"""The size of the pieces in which files and objects are read, digested and written, as a pipeline."""

ALIGNMENT = 64
"""The alignment of tensors in memory, in bytes; see `aligned`."""

MIN_FRAME_BYTES, MAX_FRAME_BYTES = 128 * KIB, 512 * KIB
"""The payload sizes that the protocol allows for a binary frame."""

SHARED_LOADS_BYTES = 256 * MB
"""The most memory for whole objects with ranges still to be read, if a storage does not support range reads."""

PAGE_BYTES = 4 * MIB
"""A server reads its storage, and caches it, in pages of at most this size."""

PROGRESS_BYTES = 64 * 1024
"""The least number of received bytes that resets a silence timeout; fewer count only if they complete the answer."""

DAMAGE_RETRIES = 2
"""How often the same block is fetched again because it arrived damaged."""

MANIFEST_BYTES = 64 * MIB
"""The largest manifest, in a store (including its digest line) and from a server."""

FILE_BYTES = 256 * MIB
"""The largest tokenizer file."""

MAX_JSON_DEPTH = 64
"""The deepest nesting of objects and lists in an untrusted JSON document."""

MAX_JSON_PARTS, MAX_JSON_VALUES = 1_000_000, 4_000_000
"""The most objects and lists, and values, in untrusted JSON; each takes up to 100 times its size in memory."""

_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8765
DEFAULT_CACHE_MB = 200
DEFAULT_CLIENTS = 64
DEFAULT_CONNECT_SECONDS = 5.0
DEFAULT_SILENCE_SECONDS = 30.0
DEFAULT_SLOW_SECONDS = 120.0
DEFAULT_DRAIN_SECONDS = 10.0

OnMissing = Literal["error", "uninitialized"]
"""What to do about weights that the model's class has but its checkpoint or manifest lacks."""

Policy = Literal["auto", "lru"]
"""Which layers stay resident: those that a plan chose from the execution order, or the most recently used."""

SourceOrder = Literal["given", "speed"]
"""Which of several sources is asked first."""

CachePolicy = Literal["schedule", "lru"]
"""What a server's cache keeps: what clients announced that they need soonest, or the most recently used."""

LogFormat = Literal["text", "json"]
"""How a server logs without its screen: as text, or as one JSON object per line."""

CodecChoice = Literal["auto", "none", "lossless", "int8", "int4"]
"""Which form of a chunk is read: the one measured to be fastest, or that of one codec."""

DTYPES = {
    "float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16", "bfloat16": "bfloat16",
    "bf16": "bfloat16", "float64": "float64",
}  # fmt: skip
"""The dtypes that models can compute with: accepted names mapped to torch's."""

_UNITS = {
    "": 1, "B": 1, "KB": KB, "MB": MB, "GB": GB, "TB": 1000**4, "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 1024**4,
}  # fmt: skip
_SECRET = re.compile(r"[^/]*@|[^/@]*:.*@")
"""Matches the part of a URL before the host: `user@`, or `user:password@` with a password that may be unquoted."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>)]+")

_CHAIN = re.compile(r"::(?=[A-Za-z0-9+.-]+://)")
"""Matches the separator in a chained URL, such as `simplecache::s3://bucket`."""

_LEAST_MEGABYTES = 128
"""A memory size without a unit probably means megabytes from this number on, and gigabytes below it."""

_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMGT]?I?B?)\s*", re.IGNORECASE)


def aligned(place: int) -> int:
    """Round an offset up to the next one at which a tensor may begin."""
    return -(-place // ALIGNMENT) * ALIGNMENT


def parse_size(text: str) -> int:
    """Parse a size such as `200MB`, `1.5GiB` or `4096` into bytes.

    Raises:
        ConfigurationError: the text is not a size.
    """
    match = _SIZE.fullmatch(text)
    unit = match[2].upper() if match else ""
    if unit in {"K", "M", "G", "T"}:
        unit += "B"
    if match is None or unit not in _UNITS:
        raise ConfigurationError(f"size {text!r} is not understood; write a number and a unit, such as 200MB or 1.5GiB")
    return int(Decimal(match[1]) * _UNITS[unit])


def is_device(name: str) -> bool:
    """Whether a text names a device that models compute on: `cpu`, `cuda`, `cuda:1`, or `auto`."""
    return re.fullmatch(r"cpu|auto|cuda(:\d{1,3})?", name) is not None


def is_size(text: str) -> bool:
    """Whether a text is a size of one byte or more."""
    try:
        return parse_size(text) > 0
    except ConfigurationError:
        return False


def is_rate(text: str) -> bool:
    """Whether a text is a size that can limit a server's bytes per second: at least 1 MB."""
    return is_size(text) and parse_size(text) >= MB


def suggest_size(text: str) -> str | None:
    """Suggest a size with a unit for a bare number under 1 MB, which is too small to be meant; else None."""
    number = text.strip()
    if not is_size(number) or not number.replace(".", "").isdigit() or parse_size(number) >= MB:
        return None
    return f"{number}{'GB' if parse_size(number) < _LEAST_MEGABYTES else 'MB'}"


def format_size(count_bytes: float) -> str:
    """Format a size for display, in decimal units: `88.1 MB`."""
    value = float(count_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def count(number: int, one: str, more: str = "") -> str:
    """Format a count for display: `1 model`, `2 models`; `more` is an irregular plural."""
    return f"{number} {one if number == 1 else more or f'{one}s'}"


def check_on_missing(choice: str) -> None:
    """Check that `choice` is an `OnMissing` value.

    Raises:
        ConfigurationError: it is not.
    """
    _check_choice("on_missing", choice, get_args(OnMissing))


def check_dtype(name: str) -> None:
    """Check that models can compute with a dtype of this name.

    Raises:
        ConfigurationError: they cannot.
    """
    if name not in DTYPES:
        raise ConfigurationError(f"dtype {name!a:.80} is not one of {', '.join(DTYPES)}")


def check_policy(choice: str) -> None:
    """Check that `choice` is a `Policy` value.

    Raises:
        ConfigurationError: it is not.
    """
    _check_choice("policy", choice, get_args(Policy))


def check_source_order(choice: str) -> None:
    """Check that `choice` is a `SourceOrder` value.

    Raises:
        ConfigurationError: it is not.
    """
    _check_choice("source_order", choice, get_args(SourceOrder))


def check_cache_policy(choice: str) -> None:
    """Check that `choice` is a `CachePolicy` value.

    Raises:
        ConfigurationError: it is not.
    """
    _check_choice("cache_policy", choice, get_args(CachePolicy))


def check_codec(choice: str) -> None:
    """Check that `choice` is a `CodecChoice` value.

    Raises:
        ConfigurationError: it is not.
    """
    _check_choice("codec", choice, get_args(CodecChoice))


def _check_choice(name: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise ConfigurationError(f"{name} is {choice!a:.80}; expected one of {', '.join(choices)}")


def is_server_url(place: str) -> bool:
    """Whether an address is that of a surfw server; otherwise it is a store."""
    return place[:6].lower().startswith(("ws://", "wss://"))


def is_loopback(host: str) -> bool:
    """Whether the host is a loopback address or `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def display_url(url: str) -> str:
    """The URL in a form that is safe to display: without user, password, and the values of its query.

    A path that is not a URL is returned unchanged. This may hide more than is secret, never less.
    """
    return "::".join(_without_secrets(link) for link in _CHAIN.split(url))


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFiles:
    """Paths of PEM files for TLS, an alternative to an `ssl.SSLContext` for `ssl=`. Nothing is read here.

    A server rereads the files when they change, a client on every connection.

    Attributes:
        certfile: the certificate to present, followed by its chain. A server needs one.
        keyfile: its private key, without a passphrase; None if it is in `certfile`.
        ca_certs: the issuers to trust. A server with `ca_certs` accepts only clients with a certificate from one of
            them; a client uses them instead of the system's.

    Raises:
        ConfigurationError: a value is not a path, or there is a key without a certificate.
    """

    certfile: str | Path | None = None
    keyfile: str | Path | None = None
    ca_certs: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("certfile", "keyfile", "ca_certs"):
            expect(name, getattr(self, name), str | Path | None, "the path of a file, or None")
        if self.keyfile is not None and self.certfile is None:
            raise ConfigurationError(
                f"the private key {self.keyfile} has no certificate; name it with --ssl-certfile (certfile=)"
            )


def expect(name: str, value: object, kind: type | UnionType, what: str) -> None:
    """Check the type of an argument; a `bool` is not a number.

    Raises:
        ConfigurationError: it has another type.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigurationError(f"{name} is {value!a:.80}, expected {what}")


def display_text(text: str) -> str:
    """A foreign text, such as an exception's, with every URL in it made safe to display; see `display_url`."""
    return _URL.sub(lambda found: display_url(found[0]), text)


def printable(text: str, *, lines: bool = False) -> str:
    """An untrusted text with `?` for characters that could control a terminal or mislead a reader.

    Args:
        text: a text from a peer, a file or a model.
        lines: allow several lines and any script: replace only control characters other than newline and tab, other
            line separators, and bidirectional controls. If false, everything that Python calls unprintable is
            replaced, so that the result is one line.
    """
    if lines:
        return _STEERING.sub("?", text)
    return text if text.isprintable() else "".join(one if one.isprintable() else "?" for one in text)


DEQUANTISED = ("compressed-tensors", "fp8", "mxfp4", "mxfp8")
"""Quantisation methods, by their names in configurations, that transformers can dequantise on a CPU."""


def is_crowded(document: bytes) -> bool:
    """Whether a JSON document has too many objects, lists or values to be parsed safely."""
    parts = document.count(b"{") + document.count(b"[")
    return parts > MAX_JSON_PARTS or document.count(b",") > MAX_JSON_VALUES


def quote(name: object) -> str:
    """Quote a name from a file for an error: on one line, of bounded length."""
    return ascii(str(name)[:120])


def escape_json(text: str) -> str:
    """Escape characters that JSON allows in strings but that could control a terminal."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _without_secrets(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    if secret := _SECRET.match(rest):
        rest = f"***@{rest[secret.end() :]}"
    rest, asked, query = rest.partition("?")
    shown = "&".join(f"{field.partition('=')[0]}=***" if "=" in field else "***" for field in query.split("&"))
    return f"{scheme}{mark}{rest}?{shown}" if asked else f"{scheme}{mark}{rest}"


def surfw_home() -> Path:
    """The folder for surfw's files: `$SURFW_HOME`, else `surfw` in the user's cache folder."""
    if home := os.environ.get("SURFW_HOME"):
        return expand_home(home)
    from platformdirs import user_cache_path

    return user_cache_path("surfw")


def default_store() -> str:
    """The default store: `$SURFW_HOME/store`."""
    return str(surfw_home() / "store")


@dataclass(frozen=True, kw_only=True, slots=True)
class WireLimits:
    """Limits that both sides of a connection enforce, in bytes unless the name says otherwise.

    Attributes:
        frame_bytes: the payload of one binary frame; the last frame of a run may be smaller.
        run_bytes: the most that a server announces and sends for one request at a time; less on slow links.
        window_bytes: the most bytes that a server may have sent without credit from the client.
        control_bytes: the largest JSON message either side accepts.
        requests_in_flight: the most open requests of a client on one connection.
        manifest_bytes: the largest manifest a client accepts.
        file_bytes: the largest tokenizer file a client accepts.
    """

    frame_bytes: int = 512 * KIB
    run_bytes: int = 4 * MIB
    window_bytes: int = 8 * MIB
    control_bytes: int = 256 * KIB
    requests_in_flight: int = 64
    manifest_bytes: int = MANIFEST_BYTES
    file_bytes: int = FILE_BYTES

    def __post_init__(self) -> None:
        """Validate the limits.

        Raises:
            ConfigurationError: the protocol does not allow them, or they would block a transfer.
        """
        if not MIN_FRAME_BYTES <= self.frame_bytes <= MAX_FRAME_BYTES:
            raise ConfigurationError(f"frame_bytes is {self.frame_bytes}; frames have from 128 to 512 KiB")
        if self.run_bytes < self.frame_bytes or self.window_bytes < 2 * self.frame_bytes:
            raise ConfigurationError(
                f"run_bytes {self.run_bytes} and window_bytes {self.window_bytes} are too small for "
                f"frames of {self.frame_bytes}: a run holds at least one frame, a window two"
            )
