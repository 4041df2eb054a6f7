"""Convert between stored bytes and tensor bytes. Codecs are identified by name; `none` stores the payload itself.

`none` and `lossless` are exact. `int8` and `int4` are not: they are used only if requested, or if a model is stored in
nothing else.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from operator import is_

from surfw.config import display_url, is_server_url
from surfw.errors import ConfigurationError, ManifestError
from surfw.manifest import Chunk, Form, Kind, Manifest, Reason, why_exact

PACKED_CODECS: Sequence[str] = ("int8", "int4")
"""The codecs that quantise weights, most exact first."""

CODECS: Sequence[str] = ("none", "lossless", *PACKED_CODECS)
"""The supported codecs: those that need no decoding first, inexact ones last."""

DEFAULT_CODECS = ("none", "lossless")
"""The forms that are stored by default. `lossless` is kept only where it is at least 10 % smaller."""


def check_codecs(names: Sequence[str]) -> tuple[str, ...]:
    """Check the names of codecs and return them in the order of `CODECS`.

    Raises:
        ConfigurationError: there are no names, or one is unknown.
    """
    wrong = [name for name in names if name not in CODECS]
    if wrong or not names:
        seen = f"codec {wrong[0]!a:.80} is not known" if wrong else "no codec is named"
        raise ConfigurationError(f"{seen}; expected {' or '.join(CODECS)}, or several")
    return tuple(codec for codec in CODECS if codec in names)


def name_forms(codecs: Sequence[str]) -> str:
    """Return words for the forms of these codecs, to follow `as`: for `none`, "it is (none)"."""
    return " and as ".join("it is (none)" if codec == "none" else codec for codec in codecs)


def choose_form(chunk: Chunk, codec: str = "none") -> Form:
    """Return the form of a chunk to fetch: that of the codec, or else the first that can be decoded.

    Raises:
        ManifestError: the chunk has no form that this surfw can decode.
    """
    for known in (codec, *CODECS):
        if form := chunk.form(known):
            return form
    offered = ", ".join(form.codec for form in chunk.forms)
    raise ManifestError(f"chunk {chunk.name} is stored as {offered}; this surfw decodes {', '.join(CODECS)}")


def exact_forms(chunk: Chunk) -> tuple[Form, ...]:
    """Return the forms of a chunk from which its payload can be restored exactly."""
    return tuple(form for form in chunk.forms if not form.is_packed)


def has_exact_forms(manifest: Manifest) -> bool:
    """Whether every chunk of a model has an exact form."""
    return all(map(exact_forms, manifest.chunks))


def stored_codecs(manifest: Manifest) -> tuple[str, ...]:
    """Return the codecs for which any chunk of a model has a form, in the order of `CODECS`."""
    stored = {form.codec for chunk in manifest.chunks for form in chunk.forms}
    return tuple(sorted(stored, key=lambda codec: [*CODECS, codec].index(codec)))


def stored_packed_codecs(manifest: Manifest) -> tuple[str, ...]:
    """Return the packed ones among `stored_codecs`."""
    return tuple(codec for codec in stored_codecs(manifest) if codec in PACKED_CODECS)


def whole_codecs(manifest: Manifest) -> tuple[str, ...]:
    """Return those of `stored_codecs` in which a model can run: its other chunks, if any, have exact forms."""
    return tuple(one for one in stored_codecs(manifest) if all(_run_forms(chunk, one) for chunk in manifest.chunks))


def form_bytes(manifest: Manifest) -> dict[str, int]:
    """Return the stored bytes of all forms of each codec."""
    found: Counter[str] = Counter()
    for chunk in manifest.chunks:
        found.update({form.codec: form.stored_bytes for form in chunk.forms})
    return dict(found)


def count_weights(manifest: Manifest, codec: str) -> Counter[Kind | Reason]:
    """Count the tensors of a model by kind (int4, int8) in a packed codec, and the exact ones by reason."""
    found: Counter[Kind | Reason] = Counter()
    for chunk in manifest.chunks:
        form = chunk.form(codec)
        kinds: Sequence[Kind] = form.kinds if form else ["raw"] * len(chunk.tensors)
        found.update(why_exact(one) if kind == "raw" else kind for one, kind in zip(chunk.tensors, kinds, strict=True))
    return found


def packed_codec(manifest: Manifest) -> str | None:
    """Return the packed codec of a manifest made by `for_run`; None if all weights are exact."""
    return next((form.codec for chunk in manifest.chunks for form in chunk.forms if form.is_packed), None)


def for_run(manifest: Manifest, codec: str, *, where: str) -> Manifest:
    """Return the manifest with only the forms that a run may read: exact ones, or those of the requested packed codec.

    Chunks without weights to quantise have only exact forms, which are read together with packed ones. `auto` reads
    packed forms only if a model has no exact ones; then it takes the most exact codec that covers all weights. Each
    chunk keeps one packed form or its exact ones; two packed codecs are never mixed.

    Args:
        manifest: the source's manifest; returned unchanged if there is nothing to leave out.
        codec: the requested codec: `auto`, or one of `CODECS`.
        where: the source, for errors.

    Raises:
        ConfigurationError: the model is not stored in this codec.
    """
    whole = [one for one in whole_codecs(manifest) if one in PACKED_CODECS]
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
    """Return the forms of a chunk that a run with this codec may read."""
    packed = chunk.form(codec) if codec in PACKED_CODECS else None
    return (packed,) if packed else exact_forms(chunk)


def _not_stored(manifest: Manifest, codec: str, whole: Sequence[str], where: str) -> str:
    """Build the error message; `whole` has the packed codecs in which the model can run."""
    stored = stored_codecs(manifest)
    remark = ""
    if manifest.origin is not None:  # a model that was not copied has only one form
        source = display_url(manifest.origin.url)
    elif is_server_url(where):
        source = f"{manifest.name} --from {where} --store STORE"
        remark = " (STORE is the store that the server serves)"
    else:
        source = f"{manifest.name} --from {where} --store {where}"
    advice = f"store it so: surfw chunk {source} --codec {','.join([*stored, codec])}{remark}"
    if not has_exact_forms(manifest):
        stored = tuple(whole)  # only some chunks have exact forms
        advice = "ask for one of these, or chunk its checkpoint again"
    if not stored:
        missing = [next(chunk.name for chunk in manifest.chunks if not _run_forms(chunk, one)) for one in PACKED_CODECS]
        lacks = " and ".join(f"{name} is not there as {one}" for one, name in zip(PACKED_CODECS, missing, strict=True))
        return (
            f"no form that {manifest.name} has in {where} holds all of its weights: {lacks}; chunk its checkpoint again"
        )
    return f"{manifest.name} is stored as {name_forms(stored)} in {where}, not as {name_forms([codec])}; {advice}"
