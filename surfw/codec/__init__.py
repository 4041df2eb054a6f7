"""Stored bytes ⇄ tensor bytes. A codec is known by the name its forms carry; `none` stores the payload itself."""

from collections.abc import Sequence

from surfw.errors import ManifestError
from surfw.manifest import Chunk, Form

CODECS: Sequence[str] = ("none",)
"""The codecs this surfw can decode, best first."""


def choose_form(chunk: Chunk) -> Form:
    """The form of a chunk to fetch.

    Raises:
        ManifestError: the chunk has no form that this surfw can decode.
    """
    for codec in CODECS:
        if form := chunk.form(codec):
            return form
    offered = ", ".join(form.codec for form in chunk.forms)
    raise ManifestError(f"chunk {chunk.name} is stored as {offered}; this surfw decodes {', '.join(CODECS)}")
