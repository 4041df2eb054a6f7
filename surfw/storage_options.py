"""Storage options: parameters of a storage besides its URL, given as `KEY=VALUE` or as a table in a settings file.

For S3, surfw accepts its own names; for other storages, options are passed to fsspec unchanged. Secrets are refused on
the command line, where every user of the machine could see them. Only values of options known to be harmless are ever
displayed.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from surfw.config import display_url
from surfw.errors import ConfigurationError

S3_WORDS = {
    "region": "region_name", "profile": "profile_name", "anon": "anonymous",
    "key": "aws_access_key_id", "secret": "aws_secret_access_key", "token": "aws_session_token",
    "username": "aws_access_key_id", "password": "aws_secret_access_key",
}  # fmt: skip
"""Aliases for arguments of `S3Backend`: shorter names, and those of s3fs."""

_HARMLESS = {
    "addressing_style", "anon", "anonymous", "endpoint_url", "max_concurrency", "profile", "region", "requester_pays",
    "silence_timeout", "sse", "sse_kms_key_id",
}  # fmt: skip
_TUNING = {
    "addressing_style", "anonymous", "aws_access_key_id", "config_kwargs", "headers", "max_concurrency",
    "requester_pays", "s3_additional_kwargs", "silence_timeout", "sse", "sse_kms_key_id",
}  # fmt: skip
"""Options that do not change which object a URL refers to."""

_FROM_ENVIRONMENT: dict[str, dict[str, tuple[str, ...]]] = {
    "s3": {
        "endpoint_url": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "profile_name": ("AWS_PROFILE", "AWS_DEFAULT_PROFILE"),
    },
    "hf": {"endpoint": ("HF_ENDPOINT",)},
}
"""Options that the libraries read from the environment if they are not given, with the variables."""

_SWITCHES = {"true": True, "false": False}
_SECRET = re.compile(
    r"secret|passw|passphrase|token|credential|signature|private|connection_string|(account|access|api)_?key$|^sas|^key$",
    re.IGNORECASE,
)
_MOST_CONNECTIONS = 256
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def parse_options(given: Iterable[str]) -> dict[str, Any]:
    """Parse `KEY=VALUE` options from the command line; `true` and `false` become booleans.

    Raises:
        ConfigurationError: an option is malformed, or is a secret.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, mark, value = text.partition("=")
        if not mark or not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"storage option {name[:40]!r} is not understood; write KEY=VALUE, such as region=eu-central-1"
            )
        if _SECRET.search(name):
            raise ConfigurationError(
                f"storage option {name} is a secret, which does not belong on the command line, where others see it; "
                "put it into the environment, a profile, or [tool.surfw.storage_options] of a settings file"
            )
        found[name] = _SWITCHES.get(value.lower(), value)
    return found


def scheme_of(url: str) -> str:
    """The scheme of a URL in lower case; empty for a folder."""
    scheme, mark, _ = url.partition("://")
    return scheme.lower() if mark else ""


def is_options(given: object) -> bool:
    """Whether a value is a mapping from valid option names."""
    return isinstance(given, Mapping) and all(isinstance(name, str) and _NAME.fullmatch(name) for name in given)


def shown_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a form that is safe to display."""
    return {
        name: (display_url(value) if isinstance(value, str) else value) if name in _HARMLESS else "***"
        for name, value in given.items()
    }


def identify_place(url: str, options: Mapping[str, Any]) -> str:
    """A text that identifies a storage: its URL, and the options that may change which objects the URL refers to.

    Secrets and tuning options are left out, so that new credentials do not make a new place.
    """
    scheme = scheme_of(url)
    if scheme in {"", "file"}:
        return url  # folders take no options
    said = {S3_WORDS.get(name, name) if scheme == "s3" else name: value for name, value in options.items()}
    for name, variables in _FROM_ENVIRONMENT.get(scheme, {}).items():
        if said.get(name) is None:
            said[name] = next((os.environ[one] for one in variables if os.environ.get(one)), None)
    told = _identifying(said)
    return f"{url} {json.dumps(told, sort_keys=True)}" if told else url


def _identifying(options: Mapping[Any, Any]) -> dict[str, Any]:
    told = {str(name): value for name, value in options.items() if not _SECRET.search(str(name))}
    found = {name: _plain(value) for name, value in told.items() if name not in _TUNING}
    return {name: value for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _identifying(value) or None
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def s3_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert storage options to arguments of `S3Backend`.

    Raises:
        ConfigurationError: an option is part of the URL, is given under two names, or should be true or false.
    """
    arguments: dict[str, Any] = {}
    for name, value in options.items():
        argument = S3_WORDS.get(name, name)
        if argument in {"bucket_name", "prefix", "url"}:
            raise ConfigurationError(f"storage option {name} is part of the URL: s3://bucket/prefix; leave it out")
        if argument in arguments:
            first = next(one for one in options if S3_WORDS.get(one, one) == argument)
            raise ConfigurationError(f"storage options {first} and {name} say the same; give one of them")
        arguments[argument] = value
    for switch in ("anonymous", "requester_pays"):
        if not isinstance(arguments.get(switch, False), bool):
            raise ConfigurationError(f"storage option {switch} is {arguments[switch]!a:.80}, expected true or false")
    return arguments


def connections_of(max_concurrency: object) -> int:
    """Parse `max_concurrency`, a number or a text of digits.

    Raises:
        ConfigurationError: it is not a number from 1 to 256.
    """
    given = max_concurrency
    if isinstance(given, str) and given.isdecimal() and len(given) < 4:
        given = int(given)
    if isinstance(given, int) and not isinstance(given, bool) and 1 <= given <= _MOST_CONNECTIONS:
        return given
    raise ConfigurationError(
        f"storage option max_concurrency is {max_concurrency!a:.80}, expected a number from 1 to {_MOST_CONNECTIONS}"
    )


def seconds_of(silence_timeout: object) -> float:
    """Parse `silence_timeout`, a number or a text of one, in seconds.

    Raises:
        ConfigurationError: it is not a finite number over 0.
    """
    given = silence_timeout
    with suppress(ValueError):
        given = float(given) if isinstance(given, str) else given
    if isinstance(given, int | float) and not isinstance(given, bool) and 0 < given < float("inf"):
        return float(given)
    raise ConfigurationError(
        f"storage option silence_timeout is {silence_timeout!a:.80}, expected a number of seconds over 0"
    )
