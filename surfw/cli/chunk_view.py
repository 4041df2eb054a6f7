"""What `chunk` shows of a plan, of a copy, and of what it has written."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surfw.cli import chunk_quality, render
from surfw.codec import form_bytes, has_exact_forms, stored_packed_codecs
from surfw.config import count, format_size

if TYPE_CHECKING:
    from surfw.chunking import Outcome, PreparedModel
    from surfw.manifest import Manifest
    from surfw.models.quality import Quality

logger = logging.getLogger("surfw.chunking")


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
    """Show what was written: one JSON object, or a line, and one for each quantised form that was measured."""
    if not has_exact_forms(manifest):
        codecs = ",".join(["none", *stored_packed_codecs(manifest)])
        said = "%s: no exact weights are stored; to have them too, chunk the checkpoint with --codec %s"
        logger.warning(said, manifest.name, codecs)
    if json:
        counts = {"unchanged_chunks": outcomes["unchanged"], "replaced_chunks": outcomes["replaced"]}
        forms = {"form_bytes": form_bytes(manifest)}
        measured = chunk_quality.facts(quality)
        render.print_json({**facts, "store": place, "digest": manifest.digest, **counts, **forms, **measured})
        return
    how = ", which points at the checkpoint" if is_in_place else _tell(outcomes)
    render.say(
        f"{manifest.name}: {count(len(manifest.chunks), 'chunk')} ({count(manifest.layer_count, 'layer')}), "
        f"{_describe_forms(manifest)} in {place}{how}"
    )
    for codec, one in quality.items():
        render.say(chunk_quality.describe(codec, one))
    if not any(word in file.path for file in manifest.files for word in ("token", "vocab", ".model")):
        logger.warning("%s has no tokenizer, so it takes --prompt-ids only", manifest.name)


def _describe_forms(manifest: "Manifest") -> str:
    """The size of the weights, and of each form besides the plain one."""
    sizes = form_bytes(manifest)
    words = {"lossless": "compressed without loss", "int8": "as int8", "int4": "as int4"}
    others = [f"{format_size(sizes[codec])} {text}" for codec, text in words.items() if codec in sizes]
    if has_exact_forms(manifest):
        others.insert(0, format_size(manifest.payload_bytes))
    *first, last = others
    return f"{', '.join(first)}, and {last}," if first else last


def _tell(outcomes: "Counter[Outcome]") -> str:
    """Say what became of the chunks; nothing where all are new."""
    if outcomes.keys() <= {"new"}:
        return ""
    if outcomes.keys() == {"unchanged"}:
        return "; all chunks were there already"
    words: Mapping[Outcome, str] = {
        "new": "new", "unchanged": "there already", "replaced": "damaged in the store and replaced",
    }  # fmt: skip
    return "; " + ", ".join(f"{outcomes[outcome]} {text}" for outcome, text in words.items() if outcomes[outcome])


def plan_facts(prepared: "PreparedModel", least_bytes: int, token_bytes: int) -> dict[str, Any]:
    """What `--json` prints of the plan: also under the keys that `show` has for the same things."""
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
        "least_budget_bytes": least_bytes,
        "kv_token_bytes": token_bytes,
        "chunks": parts,
    }


def show_plan(prepared: "PreparedModel", facts: Mapping[str, Any]) -> None:
    """Show what would be written of a checkpoint."""
    chunks = prepared.plan.chunks
    rows = [(one.name, one.kind, str(len(one.tensors)), format_size(one.payload_bytes)) for one in chunks]
    render.print_table(("chunk", "kind", "tensors", "size"), rows, numbers=("tensors", "size"))
    least, per_token = format_size(facts["least_budget_bytes"]), facts["kv_token_bytes"]
    for_tokens = f", and {format_size(per_token)} for each token of a generation" if per_token else ""
    coded = facts.get("lossless_estimate_bytes")
    without_loss = f", and about {format_size(coded)} compressed without loss" if coded else ""
    for form in facts.get("packed_forms", ()):
        least_of_form = format_size(form["least_budget_bytes"])
        render.say(f"as {form['codec']}: {format_size(form['bytes'])}; the smallest budget: {least_of_form}")
    render.say(
        f"{prepared.name} ({prepared.class_name}, {prepared.dtype}): {count(len(chunks), 'chunk')}, "
        f"{count(_layer_count(prepared), 'layer')}, {format_size(prepared.plan.payload_bytes)}{without_loss}; "
        f"the smallest budget for weights that can run it: {least}{for_tokens}. Nothing was written."
    )


def _layer_count(prepared: "PreparedModel") -> int:
    return sum(chunk.kind == "layer" for chunk in prepared.plan.chunks)


def copy_facts(manifest: "Manifest", name: str) -> dict[str, Any]:
    """What `--json` prints of a copy: what it prints of a plan, without what takes torch to know."""
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
    """Show what would be written of a model that is chunked already."""
    rows = [
        (one.name, one.kind, ", ".join(form.codec for form in one.forms), format_size(one.payload_bytes))
        for one in manifest.chunks
    ]
    render.print_table(("chunk", "kind", "forms", "size"), rows, numbers=("size",))
    render.say(
        f"{manifest.name} ({manifest.class_name}, {manifest.dtype}): {count(len(manifest.chunks), 'chunk')}, "
        f"{format_size(manifest.payload_bytes)}. Nothing was written."
    )
