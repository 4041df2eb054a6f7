"""Stored bytes ⇄ tensor bytes. A codec is known by the name its forms carry; `none` stores the payload itself.

`none` and `lossless` are exact. `int8` and `int4` are not: nothing takes them unless they are asked for, or all that
there is.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from operator import is_

from surfw.errors import ConfigurationError, ManifestError
from surfw.manifest import Chunk, Form, Kind, Manifest, Reason, why_exact

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


def count_weights(manifest: Manifest, codec: str) -> Counter[Kind | Reason]:
    """How many weights of a model are int4 and int8 in the forms of a packed codec, and how many are exact, and why."""
    found: Counter[Kind | Reason] = Counter()
    for chunk in manifest.chunks:
        form = chunk.form(codec)
        kinds: Sequence[Kind] = form.kinds if form else ["raw"] * len(chunk.tensors)
        found.update(why_exact(one) if kind == "raw" else kind for one, kind in zip(chunk.tensors, kinds, strict=True))
    return found


def packed_codec(manifest: Manifest) -> str | None:
    """The packed codec that a run of this manifest reads, as `for_run` made it; None if all weights are exact."""
    return next((form.codec for chunk in manifest.chunks for form in chunk.forms if form.is_packed), None)


def for_run(manifest: Manifest, codec: str, *, where: str) -> Manifest:
    """The manifest with the forms that a run may read: the exact ones, or those of the packed codec it asks for.

    Chunks without weights to quantise have exact forms only, and those are read beside packed ones. `auto` reads packed
    forms only where a model has no exact ones: the most exact codec that all weights are stored in. What is left is one
    packed form of a chunk, or exact ones; two packed codecs are never mixed.

    Args:
        manifest: as the source has it; returned as it is if there is nothing to leave out.
        codec: what was asked for: `auto`, or one of `CODECS`.
        where: the source, for errors.

    Raises:
        ConfigurationError: the model is not stored so.
    """
    whole = [one for one in stored_packed_codecs(manifest) if all(_run_forms(chunk, one) for chunk in manifest.chunks)]
    if codec == "auto" and not has_exact_forms(manifest):
        codec = next(iter(whole), codec)
    forms = [_run_forms(chunk, codec) for chunk in manifest.chunks]
    if not all(forms) or (codec in PACKED_CODECS and codec not in whole):
        raise ConfigurationError(_not_stored(manifest, codec, whole, where))
    chunks = [
        chunk if kept == chunk.forms else replace(chunk, forms=kept)
        for chunk, kept in zip(manifest.chunks, forms, strict=True)
    ]
    return manifest if all(map(is_, chunks, manifest.chunks)) else replace(manifest, chunks=tuple(chunks))


def _run_forms(chunk: Chunk, codec: str) -> tuple[Form, ...]:
    """The forms of a chunk that a run may read."""
    packed = chunk.form(codec) if codec in PACKED_CODECS else None
    return (packed,) if packed else exact_forms(chunk)


def _not_stored(manifest: Manifest, codec: str, whole: Sequence[str], where: str) -> str:
    """What is wrong, and what to do; `whole` names the packed codecs that the model can be run in."""
    stored = stored_codecs(manifest)
    advice = f"store it so: surfw chunk {manifest.name} --from {where} --codec {','.join([*stored, codec])}"
    if not has_exact_forms(manifest):
        stored = tuple(whole)  # exact ones are of some chunks only
        advice = "ask for one of these, or chunk its checkpoint again"
    if not stored:
        missing = [next(chunk.name for chunk in manifest.chunks if not _run_forms(chunk, one)) for one in PACKED_CODECS]
        lacks = " and ".join(f"{name} is not there as {one}" for one, name in zip(PACKED_CODECS, missing, strict=True))
        return (
            f"no form that {manifest.name} has in {where} holds all of its weights: {lacks}; chunk its checkpoint again"
        )
    return f"{manifest.name} is stored as {', '.join(stored)} in {where}, not as {codec}; {advice}"
