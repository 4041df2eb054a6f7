"""The output of `chunk`: a plan, a copy, or what was written."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from surfw.cli import chunk_quality, render
from surfw.codec import PACKED_CODECS, count_weights, form_bytes, has_exact_forms, name_forms, stored_packed_codecs
from surfw.config import count, format_size
from surfw.manifest import LEAST_WEIGHTS

if TYPE_CHECKING:
    from surfw.chunking import Outcome, PreparedModel
    from surfw.manifest import Kind, Manifest, Reason
    from surfw.models.planned import FormNeeds, PlannedForms, PlannedModel
    from surfw.models.quality import Quality

logger = logging.getLogger("surfw.chunking")

_KINDS: Mapping["Kind", str] = {"int4": "4 bits", "int8": "8 bits"}
_REASONS: Mapping["Reason", str] = {
    "vectors": "of one dimension, such as norms",
    "small": f"of fewer than {LEAST_WEIGHTS} elements",
    "shapes": "of a shape that no kernel takes",
    "dtypes": "of a dtype that is not quantised",
    "others": "of modules that are not quantised",
}


def show_result(
    facts: Mapping[str, Any],
    manifest: "Manifest",
    outcomes: "Counter[Outcome]",
    place: str,
    *,
    is_in_place: bool = False,
    quality: "Mapping[str, Quality]",
    json: bool,
) -> None:
    """Show what was written: as one JSON object, or as a line and one more per quantised form that was measured."""
    if not has_exact_forms(manifest):
        codecs = ",".join(["none", *stored_packed_codecs(manifest)])
        said = "%s: no exact weights are stored; to have them too, chunk the checkpoint with --codec %s"
        logger.warning(said, manifest.name, codecs)
    if json:
        counts = {"unchanged_chunks": outcomes["unchanged"], "replaced_chunks": outcomes["replaced"]}
        forms = {"form_bytes": form_bytes(manifest), **weight_facts(manifest)}
        measured = chunk_quality.facts(quality)
        key = {"key_id": manifest.key_id} if manifest.key_id else {}
        key |= {"signed_by": manifest.signature.key_id} if manifest.signature else {}
        render.print_json({**facts, "store": place, "digest": manifest.digest, **key, **counts, **forms, **measured})
        return
    how = ", which points at the checkpoint" if is_in_place else _tell(outcomes)
    render.say(
        f"{manifest.name}: {count(len(manifest.chunks), 'chunk')} ({count(manifest.layer_count, 'layer')}), "
        f"{_describe_forms(manifest)} in {place}{how}"
    )
    if manifest.key_id:
        render.say(f"encrypted with key {manifest.key_id}; nobody can run the model without it, so keep a copy safe")
    if manifest.signature:
        render.say(f"signed with key {manifest.signature.key_id}")
    for line in _describe_weights(manifest):
        render.say(line)
    for codec, one in quality.items():
        render.say(chunk_quality.describe(codec, one))
    has_text = any(word in file.path for file in manifest.files for word in ("token", "vocab", ".model"))
    if not has_text and manifest.base is None:
        logger.warning("%s has no tokenizer, so it takes --prompt-ids only", manifest.name)


def _describe_forms(manifest: "Manifest") -> str:
    """Describe the size of the exact weights, if they are stored, and of each other form."""
    sizes = form_bytes(manifest)
    words = {"lossless": "compressed without loss", "int8": "as int8", "int4": "as int4"}
    others = [f"{format_size(sizes[codec])} {text}" for codec, text in words.items() if codec in sizes]
    if has_exact_forms(manifest):
        others.insert(0, format_size(manifest.payload_bytes))
    *first, last = others
    return f"{', '.join(first)}, and {last}," if first else last


def weight_facts(manifest: "Manifest") -> dict[str, Any]:
    """Return what `--json` prints about packed forms: how many weights are quantised, and why the others are not."""
    found = [
        {"codec": codec, "int4": counts["int4"], "int8": counts["int8"]}
        | {"exact": {reason: counts[reason] for reason in _REASONS}}
        for codec in stored_packed_codecs(manifest)
        for counts in [count_weights(manifest, codec)]
    ]
    return {"packed_weights": found} if found else {}


def _describe_weights(manifest: "Manifest") -> Iterator[str]:
    """Yield the facts of `weight_facts` as a line per packed codec."""
    for codec in stored_packed_codecs(manifest):
        counts = count_weights(manifest, codec)
        parts = [f"{counts[kind]} in {bits}" for kind, bits in _KINDS.items() if counts[kind]]
        exact = {reason: counts[reason] for reason in _REASONS if counts[reason]}
        why = ": " + "; ".join(f"{number} {_REASONS[reason]}" for reason, number in exact.items()) if exact else ""
        yield f"{codec}: of {counts.total()} weights, {', '.join(parts)}, {sum(exact.values())} exact{why}"


def _tell(outcomes: "Counter[Outcome]") -> str:
    """Describe the outcomes of the chunks; empty if all are new."""
    if outcomes.keys() <= {"new"}:
        return ""
    if outcomes.keys() == {"unchanged"}:
        return "; all chunks were there already"
    words: Mapping[Outcome, str] = {
        "new": "new", "unchanged": "there already", "replaced": "damaged in the store and replaced",
    }  # fmt: skip
    return "; " + ", ".join(f"{outcomes[outcome]} {text}" for outcome, text in words.items() if outcomes[outcome])


def adapter_facts(prepared: "PreparedModel") -> dict[str, Any]:
    """Return what `--json` prints for an adapter, under the same keys as for a model."""
    return {
        "model": prepared.name,
        "name": prepared.name,
        "base": prepared.base.name if prepared.base else None,
        "class": prepared.class_name,
        "class_name": prepared.class_name,
        "dtype": prepared.dtype,
        "payload_bytes": prepared.plan.payload_bytes,
        "layers": _layer_count(prepared),
        "chunks": len(prepared.plan.chunks),
    }


def plan_facts(planned: "PlannedModel", codecs: Sequence[str]) -> dict[str, Any]:
    """Return what `--json` prints for a plan; some facts are repeated under the keys that `show` uses."""
    prepared = planned.prepared
    parts = [
        {
            "name": one.name,
            "kind": one.kind,
            "tensors": len(one.tensors),
            "bytes": one.payload_bytes,
            "payload_bytes": one.payload_bytes,
        }
        for one in prepared.plan.chunks
    ]
    return {
        "model": prepared.name,
        "name": prepared.name,
        "class": prepared.class_name,
        "class_name": prepared.class_name,
        "dtype": prepared.dtype,
        "payload_bytes": prepared.plan.payload_bytes,
        "layers": _layer_count(prepared),
        "least_budget_bytes": planned.least_budget_bytes(codecs),
        "kv_token_bytes": planned.token_bytes,
        "chunks": parts,
    }


def show_plan(
    planned: "PlannedModel", facts: Mapping[str, Any], forms: "PlannedForms", codecs: Sequence[str], *, json: bool
) -> None:
    """Show what would be written with these codecs, and all forms that the checkpoint could be stored in."""
    if json:
        render.print_json({**facts, **_form_facts(forms, codecs), **weight_facts(planned.manifest(codecs))})
        return
    prepared = planned.prepared
    chunks = prepared.plan.chunks
    rows = [(one.name, one.kind, str(len(one.tensors)), format_size(one.payload_bytes)) for one in chunks]
    render.print_table(("chunk", "kind", "tensors", "size"), rows, numbers=("tensors", "size"))
    render.say("")
    _show_forms(forms)
    manifest = planned.manifest(codecs)
    for line in _describe_weights(manifest):
        render.say(line)
    if "lossless" in codecs and "lossless" not in form_bytes(manifest):
        codecs = [codec for codec in codecs if codec != "lossless"]
        render.say(
            "lossless is not stored beside none: each chunk is smaller than 1 MiB; --codec lossless stores it alone"
        )
    least, per_token = format_size(facts["least_budget_bytes"]), facts["kv_token_bytes"]
    for_tokens = f", and {format_size(per_token)} for each token of a generation" if per_token else ""
    render.say(
        f"{prepared.name} ({prepared.class_name}, {prepared.dtype}): {count(len(chunks), 'chunk')}, "
        f"{count(_layer_count(prepared), 'layer')}, {format_size(prepared.plan.payload_bytes)}, as "
        f"{name_forms(codecs)}; "
        f"the smallest budget for weights that can run it: {least}{for_tokens}. Nothing was written."
    )


def _form_facts(forms: "PlannedForms", codecs: Sequence[str]) -> dict[str, Any]:
    """Return what `--json` prints about all forms, and about the requested ones."""
    found: dict[str, Any] = {
        "forms": [asdict(one) for one in forms.needs],
        "unit": forms.unit,
        "disk_bytes_per_second": None if forms.disk is None else forms.disk.bytes_per_second,
    }
    if forms.coded and "lossless" in codecs:
        found["lossless_estimate_bytes"] = forms.coded.stored_bytes
    packed = [one for one in forms.needs if one.codec in codecs and one.codec in PACKED_CODECS]
    if packed:
        found["packed_forms"] = [
            {"codec": one.codec, "bytes": one.bytes, "least_budget_bytes": one.least_budget_bytes} for one in packed
        ]
    return found


def _show_forms(forms: "PlannedForms") -> None:
    """Show all forms side by side, and where their rates come from."""
    headings = ["form", "size", "smallest budget", "read in a pass", f"{forms.unit}/s"]
    rows = [
        (
            one.codec,
            format_size(one.bytes),
            format_size(one.least_budget_bytes),
            format_size(one.bytes_per_pass),
            f"{one.reading_ceiling:.2f}" if one.reading_ceiling else "",
        )
        for one in forms.needs
    ]
    width = len(headings) if forms.disk else len(headings) - 1
    render.print_table(headings[:width], [row[:width] for row in rows], numbers=headings[1:width])
    if larger := _larger_when_packed(forms.needs):
        render.say(
            f"{' and '.join(larger)}: the smallest budget includes space to unpack a piece of a matrix at a time, "
            "which here is more than the form saves"
        )
    if forms.disk is None:
        render.say(f"how fast a pass is with that budget is not known: {forms.unknown}")
    else:
        rate = format_size(forms.disk.bytes_per_second)
        render.say(f"{forms.unit}/s are the most with that budget from this disk, which reads {rate}/s just now")


def _larger_when_packed(needs: "Sequence[FormNeeds]") -> list[str]:
    """Return the packed codecs that need a larger budget than the weights as they are."""
    plain = next((one.least_budget_bytes for one in needs if one.codec == "none"), None)
    if plain is None:
        return []
    return [one.codec for one in needs if one.codec in PACKED_CODECS and one.least_budget_bytes > plain]


def _layer_count(prepared: "PreparedModel") -> int:
    return sum(chunk.kind == "layer" for chunk in prepared.plan.chunks)


def copy_facts(manifest: "Manifest", name: str) -> dict[str, Any]:
    """Return what `--json` prints for a copy: the facts of a plan that need no torch."""
    parts = [
        {"name": one.name, "kind": one.kind, "tensors": len(one.tensors), "payload_bytes": one.payload_bytes}
        for one in manifest.chunks
    ]
    return {
        "model": name,
        "name": name,
        "class": manifest.class_name,
        "class_name": manifest.class_name,
        "dtype": manifest.dtype,
        "payload_bytes": manifest.payload_bytes,
        "layers": manifest.layer_count,
        "chunks": parts,
    }


def show_copy(manifest: "Manifest") -> None:
    """Show what copying a chunked model would write."""
    rows = [
        (one.name, one.kind, ", ".join(form.codec for form in one.forms), format_size(one.payload_bytes))
        for one in manifest.chunks
    ]
    render.print_table(("chunk", "kind", "forms", "size"), rows, numbers=("size",))
    render.say(
        f"{manifest.name} ({manifest.class_name}, {manifest.dtype}): {count(len(manifest.chunks), 'chunk')}, "
        f"{format_size(manifest.payload_bytes)}. Nothing was written."
    )
