"""Stored bytes ⇄ tensor bytes. A codec is known by the name its forms carry; `none` stores the payload itself."""

from collections.abc import Sequence

from surfw.errors import ConfigurationError, ManifestError
from surfw.manifest import Chunk, Form

CODECS: Sequence[str] = ("none", "lossless")
"""The codecs this surfw can decode, those that need no decoding first."""

DEFAULT_CODECS = ("none", "lossless")
"""The forms that are stored of a model. A coded one is kept where it is at least 10 % smaller."""


def check_codecs(names: Sequence[str]) -> tuple[str, ...]:
    """The codecs of these names, those that need no decoding first.

    Raises:
        ConfigurationError: there are none, or it is none of them.
    """
    wrong = [name for name in names if name not in CODECS]
    if wrong or not names:
        seen = f"codec {wrong[0]!a:.80} is not known" if wrong else "no codec is named"
        raise ConfigurationError(f"{seen}; expected {' or '.join(CODECS)}, or several")
    return tuple(codec for codec in CODECS if codec in names)


def choose_form(chunk: Chunk, codec: str = "none") -> Form:
    """The form of a chunk to fetch: that of the codec, or else the first that can be decoded.

    Raises:
        ManifestError: the chunk has no form that this surfw can decode.
    """
    for known in (codec, *CODECS):
        if form := chunk.form(known):
            return form
    offered = ", ".join(form.codec for form in chunk.forms)
    raise ManifestError(f"chunk {chunk.name} is stored as {offered}; this surfw decodes {', '.join(CODECS)}")
