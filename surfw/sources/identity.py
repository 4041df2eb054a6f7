"""Compare two manifests: the same model has equal config, files and payloads, in any location and form."""

from dataclasses import replace

from surfw.manifest import Chunk, Manifest


def find_difference(one: Manifest, other: Manifest) -> str | None:
    """Return where the models of two manifests differ; None if they are the same model, with equal identities."""
    for what, mine, theirs in (
        ("the class", one.class_name, other.class_name),
        ("the dtype", one.dtype, other.dtype),
        ("the configuration", one.config, other.config),
        ("the generation settings", one.generation_config, other.generation_config),
        ("the ties", one.ties, other.ties),
        ("the execution order", one.order, other.order),
        ("the base", one.base, other.base),
        ("the encryption key", one.key_id, other.key_id),
    ):
        if mine != theirs:
            return what
    files = [{file.path: (file.size, file.digest) for file in manifest.files} for manifest in (one, other)]
    for path in sorted(set(files[0]) | set(files[1])):
        if files[0].get(path) != files[1].get(path):
            return f"the file {path}"
    for name in dict.fromkeys([*one.by_name, *other.by_name]):
        if name not in one.by_name or name not in other.by_name:
            return f"chunk {name}"
        first, second = one.by_name[name], other.by_name[name]
        if first.forms[0].is_known != second.forms[0].is_known:
            return f"chunk {name}, of which one of them knows no digests yet"
        if _facts(first) != _facts(second):
            return f"chunk {name}"
    return None if list(one.by_name) == list(other.by_name) else "the order of its chunks"


def _facts(chunk: Chunk) -> tuple[object, ...]:
    return chunk.id, chunk.kind, chunk.payload_bytes, chunk.tensors


def share_forms(manifest: Manifest, others: list[Manifest]) -> Manifest:
    """Reduce each chunk to the forms that all manifests have; a chunk without common forms is left unchanged."""
    chunks = []
    for chunk in manifest.chunks:
        there = [{(form.codec, form.digest) for form in other.by_name[chunk.name].forms} for other in others]
        forms = tuple(form for form in chunk.forms if all((form.codec, form.digest) in one for one in there))
        chunks.append(replace(chunk, forms=forms or chunk.forms))
    return replace(manifest, chunks=tuple(chunks))
