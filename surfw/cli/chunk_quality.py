"""Measure the quality of the quantised forms that `chunk` has written, by running the model a layer at a time."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from surfw.cli.status import percent
from surfw.config import GB, format_size
from surfw.errors import SurfwError

if TYPE_CHECKING:
    from surfw.manifest import Manifest
    from surfw.models.client import Source
    from surfw.models.quality import Quality

logger = logging.getLogger("surfw.chunking")

_TOKENS = 512
_MOST_BYTES = 4 * GB
"""A larger model is not measured, since that takes minutes."""

Place = tuple["Source", Mapping[str, Any]]
"""A source of weights, and the options for opening a model there."""


def measure(
    manifest: "Manifest", codecs: Sequence[str], *, reference: Place, written: Place, step: Callable[[str], None]
) -> "dict[str, Quality]":
    """Measure the forms on a small text; if that is not possible, log a warning.

    Args:
        manifest: the manifest of the written model.
        codecs: the quantised forms; with an empty list, nothing is measured.
        reference: where the unquantised weights are.
        written: where the model was written.
        step: called with the current step.
    """
    if not codecs:
        return {}
    names = " and ".join(codecs)
    if manifest.payload_bytes > _MOST_BYTES:
        size, advice = format_size(manifest.payload_bytes), "'surfw bench quality' does it, which takes a while"
        logger.warning("the quality of %s was not measured, because the model has %s; %s", names, size, advice)
        return {}
    if not manifest.files:
        logger.warning("the quality of %s was not measured, because the model has no tokenizer to read a text", names)
        return {}
    from surfw.models.quality import measure_forms
    from surfw.models.streaming import StreamingModel

    try:
        return measure_forms(
            StreamingModel(reference[0], cache_size=1, **reference[1]),
            lambda codec: StreamingModel(written[0], codec=codec, cache_size=1, **written[1]),  # type: ignore[arg-type]
            codecs,
            most_tokens=_TOKENS,
            on_step=step,
        )
    except SurfwError as exc:
        logger.warning("the quality of %s could not be measured: %s", names, exc)
        return {}
    finally:
        step("")


def facts(found: "Mapping[str, Quality]") -> dict[str, Any]:
    """Return what `--json` prints for the measured qualities."""
    return {"quality": {codec: asdict(one) for codec, one in found.items()}} if found else {}


def describe(codec: str, one: "Quality") -> str:
    """Describe a form's quality in a line."""
    on = f"on {one.tokens} tokens"
    if one.kl is None:
        error = percent(one.relative_error or 0, 1)
        return f"{codec}: embeddings have the cosine {one.cosine or 0:.4f}, last hidden states are off by {error}, {on}"
    return f"{codec}: KL {one.kl:.2g}, next token as unquantised {percent(one.agreement or 0, 1)} {on}"
