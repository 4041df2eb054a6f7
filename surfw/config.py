"""Sizes with units, folders, limits, and the defaults that several rooms share.

Knows nothing of torch or the network. Values are frozen and keyword-only; a room takes the value object it needs.
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
"""What is read, digested or written of a file or object at a time, while the piece before it is worked on."""

ALIGNMENT = 64
"""Tensors lie at multiples of this in memory, whatever computes with them; see `aligned`."""

MIN_FRAME_BYTES, MAX_FRAME_BYTES = 128 * KIB, 512 * KIB
"""What the protocol allows for the payload of a binary frame."""

SHARED_LOADS_BYTES = 256 * MB
"""Whole objects that are kept for the ranges of them that are still to be read, in a storage that knows no ranges."""

PAGE_BYTES = 4 * MIB
"""A server reads its storage, and caches it, in pages of at most this size."""

PROGRESS_BYTES = 64 * 1024
"""So many bytes of an answer, or all that is left of it, are progress; fewer do not reset anybody's patience."""

DAMAGE_RETRIES = 2
"""How often the same block is fetched again because it arrived damaged."""

MANIFEST_BYTES = 64 * MIB
"""The largest manifest, in a store (with the line that has its digest) and from a server."""

FILE_BYTES = 256 * MIB
"""The largest file of a tokenizer."""

MAX_JSON_DEPTH = 64
"""How deep objects and lists may be nested in a JSON document that somebody else wrote."""

MAX_JSON_PARTS, MAX_JSON_VALUES = 1_000_000, 4_000_000
"""The most objects and lists, and values, of such a document: each takes up to a hundred times its bytes in memory."""

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
"""What to do about weights that a model's class has and its checkpoint or manifest has not."""

Policy = Literal["auto", "lru"]
"""Which layers stay in memory: those that a plan chose for the order they run in, or those that were used last."""

SourceOrder = Literal["given", "speed"]
"""Which of several sources is asked first."""

CachePolicy = Literal["schedule", "lru"]
"""What a server's cache keeps: what clients need soonest, as they announce it, or what was used last."""

LogFormat = Literal["text", "json"]
"""How a server logs without its screen: lines for people, or one JSON object a line."""

CodecChoice = Literal["auto", "none", "lossless", "int8", "int4"]
"""Which form of a chunk is read: the one that a run is faster with, as measured, or that of one codec."""

DTYPES = {
    "float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16", "bfloat16": "bfloat16",
    "bf16": "bfloat16", "float64": "float64",
}  # fmt: skip
"""What models can compute with: torch's names, by the names that are understood."""

_UNITS = {
    "": 1, "B": 1, "KB": KB, "MB": MB, "GB": GB, "TB": 1000**4, "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 1024**4,
}  # fmt: skip
_SECRET = re.compile(r"[^/]*@|[^/@]*:.*@")
"""What stands before the host: `user@`, or `user:password@` whose password may have been left unquoted."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>)]+")

_CHAIN = re.compile(r"::(?=[A-Za-z0-9+.-]+://)")
"""Between the links of a chained URL, such as `simplecache::s3://bucket`."""

_LEAST_MEGABYTES = 128
"""From this number on, whoever forgot the unit of a memory size probably thought of megabytes, not of gigabytes."""

_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMGT]?I?B?)\s*", re.IGNORECASE)


def aligned(place: int) -> int:
    """The first place from this one on where a tensor may begin."""
    return -(-place // ALIGNMENT) * ALIGNMENT


def parse_size(text: str) -> int:
    """Bytes from a size such as `200MB`, `1.5GiB` or `4096`.

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
    """Whether a text is a size that a server may be limited to per second: at least 1 MB."""
    return is_size(text) and parse_size(text) >= MB


def suggest_size(text: str) -> str | None:
    """The size that was probably meant by a number without a unit that is too small for anything; else None."""
    number = text.strip()
    if not is_size(number) or not number.replace(".", "").isdigit() or parse_size(number) >= MB:
        return None
    return f"{number}{'GB' if parse_size(number) < _LEAST_MEGABYTES else 'MB'}"


def format_size(count_bytes: float) -> str:
    """A size for people, in decimal units: `88.1 MB`."""
    value = float(count_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def count(number: int, one: str, more: str = "") -> str:
    """A number of things for people: `1 model`, `2 models`; `more` is the plural where it is not one with s."""
    return f"{number} {one if number == 1 else more or f'{one}s'}"


def check_on_missing(choice: str) -> None:
    """Make sure that it is a choice there is.

    Raises:
        ConfigurationError: it is not.
    """
    _check_choice("on_missing", choice, get_args(OnMissing))


def check_dtype(name: str) -> None:
    """Make sure that models can compute with a dtype of this name.

    Raises:
        ConfigurationError: they cannot.
    """
    if name not in DTYPES:
        raise ConfigurationError(f"dtype {name!a:.80} is not one of {', '.join(DTYPES)}")


def check_policy(choice: str) -> None:
    """Make sure that it is a policy there is.

    Raises:
        ConfigurationError: it is not.
    """
    _check_choice("policy", choice, get_args(Policy))


def check_source_order(choice: str) -> None:
    """Make sure that it is an order there is.

    Raises:
        ConfigurationError: it is not.
    """
    _check_choice("source_order", choice, get_args(SourceOrder))


def check_cache_policy(choice: str) -> None:
    """Make sure that it is a policy of a server's cache.

    Raises:
        ConfigurationError: it is not.
    """
    _check_choice("cache_policy", choice, get_args(CachePolicy))


def check_codec(choice: str) -> None:
    """Check which form of chunks is to be read.

    Raises:
        ConfigurationError: it is something else.
    """
    _check_choice("codec", choice, get_args(CodecChoice))


def _check_choice(name: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise ConfigurationError(f"{name} is {choice!a:.80}; expected one of {', '.join(choices)}")


def is_server_url(place: str) -> bool:
    """Whether an address is that of a surfw server; others are stores."""
    return place[:6].lower().startswith(("ws://", "wss://"))


def is_loopback(host: str) -> bool:
    """Whether the host is this machine and no other."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def display_url(url: str) -> str:
    """The URL as it may be shown: without the user and password, and without the values of its query.

    A path that is no URL stays as it is. More may be hidden than is secret, never less.
    """
    return "::".join(_without_secrets(link) for link in _CHAIN.split(url))


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFiles:
    """Certificates in PEM files: what `ssl=` takes besides an `ssl.SSLContext`. Nothing is read here.

    A server reads them again when they change, a client whenever it connects.

    Attributes:
        certfile: the certificate to show, followed by those that lead to its issuer. A server needs one.
        keyfile: its private key, without a passphrase; None if that is in `certfile`.
        ca_certs: the issuers to trust. With them, a server lets in only clients that show a certificate of theirs;
            for a client, they take the place of those that the system trusts.

    Raises:
        ConfigurationError: one is no path, or there is a key without a certificate.
    """

    certfile: str | Path | None = None
    keyfile: str | Path | None = None
    ca_certs: str | Path | None = None

    def __post_init__(self) -> None:
        """Check the paths."""
        for name in ("certfile", "keyfile", "ca_certs"):
            expect(name, getattr(self, name), str | Path | None, "the path of a file, or None")
        if self.keyfile is not None and self.certfile is None:
            raise ConfigurationError(
                f"the private key {self.keyfile} has no certificate; name it with --ssl-certfile (certfile=)"
            )


def expect(name: str, value: object, kind: type | UnionType, what: str) -> None:
    """Make sure that an argument has a type that can be used; a `bool` is no number.

    Raises:
        ConfigurationError: it has another.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigurationError(f"{name} is {value!a:.80}, expected {what}")


def display_text(text: str) -> str:
    """A text of others, such as an exception's, with every URL in it as it may be shown."""
    return _URL.sub(lambda found: display_url(found[0]), text)


def printable(text: str, *, lines: bool = False) -> str:
    """A text from anywhere, with `?` for the characters that could steer a terminal or mislead whoever reads it.

    Args:
        text: what a peer, a file or a model says.
        lines: the text may have several lines, and be in any script: only control characters but newline and tab,
            other ends of lines, and what turns the direction of writing around are replaced. Without it, everything
            that Python does not call printable is, so that the result is one line.
    """
    if lines:
        return _STEERING.sub("?", text)
    return text if text.isprintable() else "".join(one if one.isprintable() else "?" for one in text)


DEQUANTISED = ("compressed-tensors", "fp8", "mxfp4", "mxfp8")
"""Methods of quantised checkpoints that transformers makes dense weights of on a CPU, as configurations name them."""


def is_crowded(document: bytes) -> bool:
    """Whether JSON has more objects, lists or values than may be parsed; no document that is meant well has."""
    parts = document.count(b"{") + document.count(b"[")
    return parts > MAX_JSON_PARTS or document.count(b",") > MAX_JSON_VALUES


def quote(name: object) -> str:
    """A name from a file as it may stand in an error: quoted, on one line, of bounded length."""
    return ascii(str(name)[:120])


def escape_json(text: str) -> str:
    """JSON with escapes for the characters that JSON allows in its strings, and that could steer a terminal."""
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
    """The folder for everything surfw keeps: `$SURFW_HOME`, else `surfw` in the user's cache folder."""
    if home := os.environ.get("SURFW_HOME"):
        return expand_home(home)
    from platformdirs import user_cache_path

    return user_cache_path("surfw")


def default_store() -> str:
    """Where `chunk` writes and `serve` reads unless told otherwise: `$SURFW_HOME/store`."""
    return str(surfw_home() / "store")


@dataclass(frozen=True, kw_only=True, slots=True)
class WireLimits:
    """Sizes that both sides of a connection hold each other to, in bytes unless the name says otherwise.

    Attributes:
        frame_bytes: payload of one binary frame; the last one of a run may be smaller.
        run_bytes: the most that a server announces, and sends of one request, at a time; less where links are slow.
        window_bytes: how much a server may have sent that the client has not yet credited.
        control_bytes: the largest JSON message either side accepts.
        requests_in_flight: the most requests a client may have open on one connection.
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
        """Refuse limits that the protocol rules out, or that would block a transfer."""
        if not MIN_FRAME_BYTES <= self.frame_bytes <= MAX_FRAME_BYTES:
            raise ConfigurationError(f"frame_bytes is {self.frame_bytes}; frames have from 128 to 512 KiB")
        if self.run_bytes < self.frame_bytes or self.window_bytes < 2 * self.frame_bytes:
            raise ConfigurationError(
                f"run_bytes {self.run_bytes} and window_bytes {self.window_bytes} are too small for "
                f"frames of {self.frame_bytes}: a run holds at least one frame, a window two"
            )
