"""The quality of a model's quantised forms: each against the unquantised model, on the same text, in the same run.

llama.cpp with its own forms is measured as well, if it is installed and the checkpoint can be converted for it. It
reads the same token ids in its own process, because its kernels have been seen to crash.
"""

import asyncio
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from surfw.bench.peers import LLAMA_CRASH, PEERS, llama_logits
from surfw.bench.peers.gguf_file import check_gguf, write_gguf
from surfw.bench.process import run_peer
from surfw.bench.result import describe_machine
from surfw.codec import PACKED_CODECS, choose_form, for_run, has_exact_forms, stored_packed_codecs
from surfw.config import CodecChoice, display_url
from surfw.errors import ConfigurationError, SurfwError, UnsupportedModelError
from surfw.manifest import Manifest
from surfw.models.client import WeightClient
from surfw.models.quality import Quality, Reference, held_out_text
from surfw.models.streaming import StreamingModel
from surfw.storage import open_backend

_STRANGE_PERPLEXITY = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRow:
    """The quality of one form; for all fields but `name`, `stored_bytes` and `failed`, see `Quality`.

    Attributes:
        name: `unquantised`, a codec, or llama.cpp with one of its forms.
        stored_bytes: size of all weights in this form; for llama.cpp, the size of its file.
        failed: why it could not be measured; all fields but `name` are then None.
    """

    name: str
    stored_bytes: int | None = None
    tokens: int | None = None
    perplexity: float | None = None
    kl: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    relative_error: float | None = None
    failed: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityResult:
    """The quality of a model's forms, the unquantised one first.

    Attributes:
        benchmark: `quality`.
        machine: the machine they were measured on.
        work: model, class, source, text, and its numbers of passages and tokens.
        rows: one row per form.
        notes: what is missing and why, and how to read the numbers.
    """

    benchmark: str
    machine: dict[str, str]
    work: dict[str, Any]
    rows: tuple[QualityRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityWork:
    """What to measure.

    Attributes:
        checkpoint: a local directory; None for a model in a store.
        source: the store, if there is no checkpoint.
        model: the model's name in the store; None for its only model.
        codecs: the forms to measure; None for all quantised forms in the store, or all that can be made of the
            checkpoint.
        text: a text file in paragraphs; None for the text that comes with surfw.
        memory_budget: budget for the weights of one form, such as `1.5GB`; None lets surfw choose.
        folder: where to write temporary files; None for the temporary folder.
        storage_options: storage options for the store.
    """

    checkpoint: str | None = None
    source: str | None = None
    model: str | None = None
    codecs: Sequence[str] | None = None
    text: str | None = None
    memory_budget: str | None = None
    folder: str | None = None
    storage_options: Mapping[str, Any] | None = None


def bench_quality(work: QualityWork, *, on_progress: Callable[[str], None] = lambda _: None) -> QualityResult:
    """Run the benchmark.

    Args:
        work: what to measure.
        on_progress: called with a line whenever a step starts.

    Raises:
        ConfigurationError: the text, a codec or the folder is unusable, or there are no exact weights to compare with.
        UnsupportedModelError: the model takes no text.
        SurfwError: the model cannot be read, chunked or run.
    """
    if wrong := [name for name in work.codecs or () if name not in PACKED_CODECS]:
        raise ConfigurationError(
            f"codec {wrong[0]!a:.40} loses nothing, or is not known; expected {' or '.join(PACKED_CODECS)}"
        )
    if work.folder is not None and not Path(work.folder).is_dir():
        raise ConfigurationError(f"{work.folder} is not a folder; expected one with room for a copy of the model")
    text = _read_text(work.text)
    with tempfile.TemporaryDirectory(prefix="surfw-bench-", dir=work.folder) as folder:
        scratch = Path(folder)
        source = work.source
        if work.checkpoint is not None:
            source = str(scratch / "store")
            on_progress(f"chunking {display_url(work.checkpoint)}")
            asyncio.run(_chunk(work.checkpoint, work.model, source, work.codecs or PACKED_CODECS))
        assert source is not None, "a model is in a store or a checkpoint"
        options = None if work.checkpoint else work.storage_options
        with WeightClient(source, storage_options=options) as client:
            return _measure(work, client, text, scratch, on_progress)


async def _chunk(checkpoint: str, name: str | None, store: str, codecs: Sequence[str]) -> None:
    from surfw.chunking import prepare_model, write_model

    with await asyncio.to_thread(prepare_model, checkpoint, name=name) as prepared:
        await write_model(prepared, open_backend(store), codecs=("none", *codecs))


def _read_text(path: str | None) -> str:
    if path is None:
        return held_out_text()
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"the text {path} cannot be read: {reason}; expected a text file in UTF-8") from exc


def _measure(
    work: QualityWork, client: WeightClient, text: str, scratch: Path, on_progress: Callable[[str], None]
) -> QualityResult:
    name = client.run(lambda source: source.resolve(work.model))
    manifest = client.run(lambda source: source.manifest(name))
    codecs = _choose_codecs(work, manifest, where=client.url)

    def step(name: str) -> Callable[[str], None]:
        return lambda batch: on_progress(f"{name}: {batch}")

    def open_form(codec: CodecChoice) -> StreamingModel:
        return StreamingModel.open(client, name, codec=codec, memory_budget=work.memory_budget)

    kept = scratch / "reference"
    kept.mkdir()
    with open_form("auto") as model:
        reference = Reference(model, text, kept, on_step=step("unquantised"))
    rows = [_row("unquantised", reference.quality, _stored_bytes(manifest, "none"))]
    for codec in codecs:
        with open_form(codec) as model:
            rows.append(
                _row(codec, reference.compare(reference.outputs_of(model, step(codec))), _stored_bytes(manifest, codec))
            )
    notes = [note for note in (_how_to_read(reference.quality, rows[-1]),) if note]
    if (reason := _without_peer(work)) is None:
        rows += _run_peers(work, reference, scratch, on_progress)
        notes += [f"{row.name}: {row.failed}" for row in rows if row.failed is not None]
        notes += [LLAMA_CRASH] if any("was ended by" in note for note in notes) else []
    else:
        notes.append(f"not compared with llama.cpp: {reason}")
    return QualityResult(
        benchmark="quality",
        machine=describe_machine("llama_cpp_python"),
        work={
            "model": manifest.name,
            "class_name": manifest.class_name,
            "source": None if work.source is None else display_url(work.source),
            "text": work.text,
            "passages": len(reference.passages),
            "tokens": reference.quality.tokens,
        },
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _choose_codecs(work: QualityWork, manifest: Manifest, *, where: str) -> Sequence[CodecChoice]:
    """The codecs to measure.

    Raises:
        ConfigurationError: the model has no exact form, or lacks a requested one.
    """
    codecs = work.codecs or stored_packed_codecs(manifest) or PACKED_CODECS
    if not has_exact_forms(manifest):
        raise ConfigurationError(
            f"{manifest.name} is stored in {where} without its exact weights, which are what forms are compared with; "
            "name its checkpoint, of which all forms are made for the measurement"
        )
    for codec in codecs:
        for_run(manifest, codec, where=where)
    return cast("Sequence[CodecChoice]", [codec for codec in PACKED_CODECS if codec in codecs])


def _stored_bytes(manifest: Manifest, codec: str) -> int:
    return sum(choose_form(chunk, codec).stored_bytes for chunk in manifest.chunks)


def _row(name: str, quality: Quality, stored_bytes: int) -> QualityRow:
    return QualityRow(name=name, stored_bytes=stored_bytes, **asdict(quality))


def _how_to_read(own: Quality, form: QualityRow) -> str | None:
    """A note on how to read the numbers, if one is needed."""
    if form.cosine is not None:
        return "it generates nothing, so compared are its last hidden states, and their mean over a passage (cosine)"
    if own.perplexity is None:
        return "no perplexity, because the encoder reads the text that the decoder continues"
    if own.perplexity <= _STRANGE_PERPLEXITY:
        return None
    return (
        f"the model hardly knows this text (a perplexity of {own.perplexity:.0f}): many next tokens are nearly as "
        "likely as others, and other arithmetic alone changes some; a text of the kind it was made for says more"
    )


def _without_peer(work: QualityWork) -> str | None:
    """Why llama.cpp is not measured; None if it is."""
    if reason := PEERS["llama.cpp"].installed():
        return reason
    if work.checkpoint is None:
        return "the model is in a store; name its checkpoint, which is converted for it"
    return check_gguf(work.checkpoint)


def _run_peers(
    work: QualityWork, reference: Reference, scratch: Path, on_progress: Callable[[str], None]
) -> Iterator[QualityRow]:
    assert work.checkpoint is not None, "only a checkpoint is converted"
    passages, file, out = scratch / "passages.json", scratch / "model.gguf", scratch / "logits"
    passages.write_text(json.dumps(reference.passages), "utf-8")
    kinds = {name: peer.gguf_kind for name, peer in PEERS.items() if peer.gguf_kind is not None}
    for name, kind in kinds.items():  # unquantised first: what different arithmetic alone changes
        on_progress(name)
        try:
            write_gguf(Path(work.checkpoint), file, kind, head=None if kind == "bf16" else "q8_0")
        except (ImportError, ValueError, UnsupportedModelError) as exc:
            yield QualityRow(name=name, failed=f"the checkpoint could not be converted: {exc}")
            continue
        outcome = run_peer(
            "llama_logits",
            llama_logits.Work(gguf=str(file), passages=str(passages), out=str(out), folder=str(scratch)),
            llama_logits.Logits,
        )
        if outcome.found is None:
            yield QualityRow(name=name, failed=outcome.failed)
            continue
        shape = (outcome.found.tokens, outcome.found.vocabulary)
        logits = torch.from_file(str(out), size=shape[0] * shape[1], dtype=torch.float32).view(shape)
        try:
            yield _row(name, reference.compare(reference.split(logits)), file.stat().st_size)
        except SurfwError as exc:
            yield QualityRow(name=name, failed=str(exc))
