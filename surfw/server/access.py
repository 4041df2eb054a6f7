"""Who is admitted, and which models each may read: one token for everyone, or a file of named tokens.

    [ci]
    token = "7Gk…"
    models = ["org/*", "demo"]      # patterns as for file names; without this line, all models
    expires = 2027-01-31            # at 00:00 UTC; or a time such as 2027-01-31T18:00:00+01:00

Tokens are kept in memory as SHA-256 and compared in constant time. Permissions are checked for each request, so that a
token that expires or is removed from the file is refused new requests at once.
"""

import fnmatch
import hashlib
import hmac
import logging
import re
import stat
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from surfw.config import count, expect, printable
from surfw.errors import ConfigurationError, RefusedError
from surfw.files import expand_home, read_regular
from surfw.server.journal import Journal
from surfw.server.reloading import FromFiles
from surfw.wire import ServerStats, check_token, shown_token

_MOST_BYTES = 1 << 20
_MOST_NAME, _MOST_PATTERN = 64, 256
_KEYS = ("token", "models", "expires")
_EXAMPLE = 'expected one token alone, or a table for each, such as [ci] with a line token = "…"'
_TOML_PLACE = re.compile(r"\((at [a-z0-9 ,]+)\)$")


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token permits.

    Attributes:
        name: the name of the token; empty if it has none.
        digest: the SHA-256 of the token.
        models: the names of the models that may be read, as a pattern; None for all.
        expires: the expiry time, in seconds since 1970; None for never.
    """

    name: str = ""
    digest: bytes = field(default=b"", repr=False)
    models: re.Pattern[str] | None = None
    expires: float | None = None

    @property
    def shown(self) -> str:
        """The token's name for messages."""
        return f"token {self.name!a}" if self.name else "the token"

    @property
    def has_expired(self) -> bool:
        """Whether the token has expired."""
        return self.expires is not None and time.time() >= self.expires

    def may_read(self, model: str) -> bool:
        """Whether the token permits reading the model."""
        return self.models is None or self.models.match(model) is not None

    def choose(self, models: Iterable[str]) -> list[str]:
        """Return those of the models that the token permits reading."""
        return [model for model in models if self.may_read(model)]

    def limit(self, stats: ServerStats) -> ServerStats:
        """Return the statistics without other models, their heat and their readers, and without events."""
        if self.models is None:
            return stats
        limited = stats.copy()
        limited["models"] = self.choose(stats["models"])
        limited["connections"] = [one for one in stats.get("connections", []) if self.may_read(one["model"])]
        limited["events"] = []
        limited["heat"] = [one for one in stats.get("heat", []) if self.may_read(one["model"])]
        if "cache_shortage" in limited and not self.may_read(limited["cache_shortage"]["model"]):
            del limited["cache_shortage"]
        return limited


EVERYTHING = Grant()
"""The grant of everyone on a server without tokens."""


class Access:
    """The tokens of a server.

    Attributes:
        is_open: whether no token is needed.
        file: the token file, to be read before the first request and when it changes; None without one.
    """

    def __init__(self, token: str | None, token_file: str | Path | None, journal: Journal) -> None:
        """Admit this token, or those in the file, or everyone.

        Raises:
            ConfigurationError: both are given, or the token is invalid.
        """
        expect("token", token, str | None, "a text or None")
        expect("token_file", token_file, str | Path | None, "the path of a file, or None")
        if token is not None and token_file is not None:
            raise ConfigurationError("token and token_file exclude each other; give one of them")
        self.is_open = token is None and token_file is None
        self.file = None if token_file is None else _TokenFile(expand_home(token_file), self._replace, journal)
        self._grants: Mapping[bytes, Grant] = {}
        if token is not None:
            self._replace([_grant(check_token(token))])

    def _replace(self, grants: Sequence[Grant]) -> None:
        self._grants = {grant.digest: grant for grant in grants}

    def find(self, shown: Sequence[str]) -> Grant | None:
        """Return the grant for a request's `Authorization` headers, which may have expired; None if it has none."""
        if self.is_open:
            return EVERYTHING
        token = shown_token(shown)
        digest = hashlib.sha256((token or "").encode(errors="surrogatepass")).digest()
        found = None
        for grant in self._grants.values():  # all of them, so that the time taken reveals nothing
            if hmac.compare_digest(grant.digest, digest):
                found = grant
        return None if token is None else found

    def check(self, admitted: Grant, model: str | None) -> Grant:
        """Return the current grant of a connection.

        Args:
            admitted: the grant it was admitted with.
            model: the model it wants to read, if any.

        Raises:
            RefusedError: its token has expired, was removed, or may not read the model.
        """
        if self.is_open:
            return EVERYTHING
        grant = self._grants.get(admitted.digest)
        if grant is None:
            raise RefusedError(f"{admitted.shown} was withdrawn; connect with another", code="not-allowed")
        if grant.has_expired:
            raise RefusedError(f"{grant.shown} has expired; connect with another", code="not-allowed")
        if model is not None and not grant.may_read(model):
            raise RefusedError(f"{grant.shown} may not read model {model[:80]!a}", code="not-allowed")
        return grant


class _TokenFile(FromFiles):
    """A file with one token, or with a table for each of several."""

    shown = "the token file"

    def __init__(self, path: Path, replace: Callable[[Sequence[Grant]], None], journal: Journal) -> None:
        self._path = path
        self._replace = replace
        self._journal = journal
        self._mode = 0
        self._warned = False

    def contents(self) -> bytes:
        try:
            self._mode = stat.S_IMODE(self._path.stat().st_mode)
            return read_regular(self._path, _MOST_BYTES)
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or type(exc).__name__
            raise ConfigurationError(
                f"token_file {self._path} cannot be read: {reason}; name a file that holds tokens"
            ) from exc

    def load(self, contents: bytes) -> Callable[[], str]:
        grants = parse_tokens(contents, f"token_file {self._path}")
        mode = self._mode

        def put_in_force() -> str:
            self._replace(grants)
            if mode & (stat.S_IRWXG | stat.S_IRWXO) and not self._warned:
                self._warned = True
                self._journal.note(
                    "access",
                    "others on the server's machine may read or change its token file",
                    f"{self._path} has mode {mode:04o}; chmod 600 leaves it to you alone",
                    level=logging.WARNING,
                )
            expired = sum(grant.has_expired for grant in grants)
            return count(len(grants), "token") + (f", {expired} of them expired" if expired else "")

        return put_in_force


def parse_tokens(contents: bytes, where: str) -> list[Grant]:
    """Parse the tokens in a file; `where` names it in errors, which never show a token.

    Raises:
        ConfigurationError: it holds neither one token nor a table for each of several.
    """
    try:
        text = contents.decode()
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{where} is not UTF-8, {_EXAMPLE}") from exc
    if not text.strip():
        raise ConfigurationError(f"{where} is empty, {_EXAMPLE}")
    if len(text.split()) == 1 and not text.lstrip().startswith("["):
        return [_grant(_check(text.strip(), where))]
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:
        place = _TOML_PLACE.search(str(exc))
        raise ConfigurationError(f"{where} is not TOML{f' {place[1]}' if place else ''}, {_EXAMPLE}") from None
    if not tables or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigurationError(f"{where} has lines that belong to no table, {_EXAMPLE}")
    grants = [_parse_table(name, table, where) for name, table in tables.items()]
    names: dict[bytes, str] = {}
    for grant in grants:
        if (other := names.setdefault(grant.digest, grant.name)) != grant.name:
            raise ConfigurationError(f"{where}: {other} and {grant.name} have the same token; give each its own")
    return grants


def _parse_table(name: str, table: Mapping[str, Any], where: str) -> Grant:
    here = f"{where}: [{printable(name)[:_MOST_NAME]}]"
    if not name.isprintable() or not 0 < len(name) <= _MOST_NAME:
        raise ConfigurationError(f"{here} is no name for a token, expected up to {_MOST_NAME} printable characters")
    for key in table.keys() - set(_KEYS):
        near = get_close_matches(key, _KEYS, 1)
        more = f"; is {near[0]} meant?" if near else ""
        raise ConfigurationError(f"{here} has an entry that is none of {', '.join(_KEYS)}{more}")
    token, models, expires = (table.get(key) for key in _KEYS)
    if not isinstance(token, str):
        raise ConfigurationError(f'{here} has no token, expected a line such as token = "…"')
    patterns: list[str] | None = models
    if models is not None and not (
        isinstance(models, list) and all(isinstance(one, str) and 0 < len(one) <= _MOST_PATTERN for one in models)
    ):
        raise ConfigurationError(f'{here} has models that are no list of patterns, expected such as ["org/*", "demo"]')
    return _grant(_check(token, here), name, patterns, _read_time(expires, here))


def _check(token: str, where: str) -> str:
    try:
        return check_token(token)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{where}: {exc}") from exc


def _grant(token: str, name: str = "", patterns: Sequence[str] | None = None, expires: float | None = None) -> Grant:
    models = None if patterns is None else re.compile("|".join(map(fnmatch.translate, patterns)) or "(?!)")
    return Grant(name, hashlib.sha256(token.encode()).digest(), models, expires)


def _read_time(value: object, where: str) -> float | None:
    """Return seconds since 1970 for a TOML date, which means 00:00 UTC, or a time with its zone."""
    if value is None:
        return None
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value.timestamp()
    if isinstance(value, date) and not isinstance(value, datetime):
        return datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    raise ConfigurationError(
        f"{where} has a time in expires that cannot be used, expected a date such as 2027-01-31, or a time with its "
        "zone such as 2027-01-31T18:00:00Z, without quotation marks"
    )
