"""Stored bytes ⇄ tensor bytes. A codec is known by the name its forms carry; `none` stores the payload itself.

`none` and `lossless` are exact. `int8` and `int4` are not: nothing takes them unless they are asked for, or all that
there is.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from operator import is_

from surfw.errors import ConfigurationError, ManifestError
from surfw.manifest import Chunk, Form, Manifest

PACKED_CODECS: Sequence[str] = ("int8", "int4")
"""The codecs whose forms hold quantised weights, the more exact first."""

CODECS: Sequence[str] = ("none", "lossless", *PACKED_CODECS)
"""The codecs this surfw can read: those that need no decoding first, those that are not exact last."""

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


def exact_forms(chunk: Chunk) -> tuple[Form, ...]:
    """The forms of a chunk that its payload can be had from."""
    return tuple(form for form in chunk.forms if not form.is_packed)


def has_exact_forms(manifest: Manifest) -> bool:
    """Whether every payload of a model can be had from what is stored."""
    return all(map(exact_forms, manifest.chunks))


def stored_codecs(manifest: Manifest) -> tuple[str, ...]:
    """The codecs that any chunk of a model has a form of, in the order of `CODECS`."""
    stored = {form.codec for chunk in manifest.chunks for form in chunk.forms}
    return tuple(sorted(stored, key=lambda codec: [*CODECS, codec].index(codec)))


def stored_packed_codecs(manifest: Manifest) -> tuple[str, ...]:
    """Those of them that are packed."""
    return tuple(codec for codec in stored_codecs(manifest) if codec in PACKED_CODECS)


def form_bytes(manifest: Manifest) -> dict[str, int]:
    """How many bytes are stored in forms of each codec."""
    found: Counter[str] = Counter()
    for chunk in manifest.chunks:
        found.update({form.codec: form.stored_bytes for form in chunk.forms})
    return dict(found)


def packed_codec(manifest: Manifest) -> str | None:
    """The packed codec that a run of this manifest reads, as `for_run` made it; None if all weights are exact."""
    return next((form.codec for chunk in manifest.chunks for form in chunk.forms if form.is_packed), None)


def for_run(manifest: Manifest, codec: str, *, where: str) -> Manifest:
    """The manifest with the forms that a run may read: the exact ones, or those of the packed codec it asks for.

    Chunks without weights to quantise have exact forms only, and those are read beside packed ones. `auto` reads packed
    forms only where a model has no exact ones. What is left is one packed form of a chunk, or exact ones.

    Args:
        manifest: as the source has it; returned as it is if there is nothing to leave out.
        codec: what was asked for: `auto`, or one of `CODECS`.
        where: the source, for errors.

    Raises:
        ConfigurationError: the model is not stored so.
    """
    stored = stored_codecs(manifest)
    if codec == "auto" and not has_exact_forms(manifest):
        codec = next(iter(stored_packed_codecs(manifest)), codec)
    chunks = []
    for chunk in manifest.chunks:
        packed = chunk.form(codec) if codec in PACKED_CODECS else None
        forms = (packed,) if packed else exact_forms(chunk)
        chunks.append(chunk if forms == chunk.forms else replace(chunk, forms=forms))
    if not all(chunk.forms for chunk in chunks) or (codec in PACKED_CODECS and codec not in stored):
        advice = f"store it so: surfw chunk {manifest.name} --from {where} --codec {','.join([*stored, codec])}"
        if not has_exact_forms(manifest):
            stored = stored_packed_codecs(manifest)  # the exact ones are of some chunks only
            advice = "ask for one of these, or chunk its checkpoint again"
        raise ConfigurationError(
            f"{manifest.name} is stored as {', '.join(stored)} in {where}, not as {codec}; {advice}"
        )
    return manifest if all(map(is_, chunks, manifest.chunks)) else replace(manifest, chunks=tuple(chunks))
