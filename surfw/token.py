"""The token that clients show a server: where it is kept, and what one looks like.

It is no setting: it is read when it is asked for, stands in no list of processes, and is never shown.
"""

import os
from pathlib import Path

from surfw.errors import ConfigurationError

TOKEN_VARIABLE = "SURFW_TOKEN"  # noqa: S105 - a name
"""Holds the token itself: the one variable that has no option and no key."""

_MOST_TOKEN_BYTES = 64 * 1024


def read_token(token_file: str | None) -> str | None:
    """What a file holds, else what `$SURFW_TOKEN` holds, else None.

    Raises:
        ConfigurationError: the file cannot be read, or holds no token.
    """
    if token_file is None:
        given = os.environ.get(TOKEN_VARIABLE)
        return _check_token(given, TOKEN_VARIABLE) if given else None
    path = Path(token_file).expanduser()
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_TOKEN_BYTES).decode(errors="replace")
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or type(exc).__name__
        raise ConfigurationError(
            f"token_file {path} cannot be read: {reason}; name a file that holds the token"
        ) from exc
    return _check_token(text, f"token_file {path}")


def _check_token(text: str, where: str) -> str:
    """The token without white space around it; errors do not show it."""
    token = text.strip()
    if not token:
        raise ConfigurationError(f"{where} is empty, expected a token; put one in, or unset it")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigurationError(f"{where} holds no token, expected one word of printable ASCII characters")
    return token
