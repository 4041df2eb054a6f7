"""surfw against its peers on the same generation, in the same run, under the same memory cap.

Everything runs in its own process. Each round runs every peer once, so that other load on the machine affects all of
them alike; the first of a round is the last of the next. Just before and after surfw, a process under the same cap
reads the store's files for a few seconds: its rate is the bandwidth of that round, measured while no model and no
imports take memory.
"""

import asyncio
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from surfw.bench.comparison import Bandwidth, Comparison, Measurement
from surfw.bench.infer_result import SURFW, InferResult, make_notes, make_rows
from surfw.bench.peers import LLAMA_CRASH, PEERS, STREAMING
from surfw.bench.process import Outcome, run_peer
from surfw.bench.result import describe_machine
from surfw.codec import DEFAULT_CODECS
from surfw.config import display_url, format_size, is_server_url
from surfw.storage import Store, open_backend
from surfw.storage.store import MARKER

_LIBRARIES = ("accelerate", "airllm", "llama_cpp_python")
_READS_MODULE = "reads"


def bench_infer(comparison: Comparison, *, on_progress: Callable[[str], None] = lambda _: None) -> InferResult:
    """Run the benchmark.

    Args:
        comparison: what to compare.
        on_progress: called with a line whenever a step starts.

    Raises:
        ConfigurationError: the comparison has an argument that cannot be used.
        SurfwError: the checkpoint cannot be chunked.
    """
    comparison.check()
    names, absent = _choose(comparison)
    # One folder for all temporary files: an interruption while a peer's folder is created leaves nothing behind.
    with tempfile.TemporaryDirectory(prefix="surfw-bench-", dir=comparison.folder) as folder:
        source, model = comparison.source, comparison.model or Path(comparison.model_dir).resolve().name
        if source is None:
            source = comparison.store or str(Path(folder) / "store")
            model = asyncio.run(_chunk(comparison.model_dir, model, source, _codecs(names), on_progress))
        work = replace(comparison, source=source, model=model, folder=folder)
        works = {name: _work_of(name, work, on_progress) for name in names}
        outcomes, bandwidths = _run_rounds(works, on_progress)
    return _conclude(comparison, model, outcomes, bandwidths, absent)


def _choose(comparison: Comparison) -> tuple[list[str], list[str]]:
    """The names that run, surfw first, and a note for each peer that does not."""
    names, absent = [SURFW], []
    usual = [name for name, peer in PEERS.items() if peer.is_usual]
    for name in usual if comparison.against is None else dict.fromkeys(comparison.against):
        reason = PEERS[name].installed() or PEERS[name].missing(comparison)
        if reason is None:
            names.append(name)
        else:
            absent.append(f"not compared with {name}: {reason}")
    return names, absent


def _codecs(names: Sequence[str]) -> tuple[str, ...]:
    """The forms that the store needs for these names."""
    named = {PEERS[name].options.get("codec") for name in names if name != SURFW}
    return (*DEFAULT_CODECS, *(codec for codec in PEERS if codec in named and codec not in DEFAULT_CODECS))


def _work_of(name: str, work: Comparison, on_progress: Callable[[str], None]) -> Comparison:
    """The `Comparison` for one name; makes llama.cpp's file if none was given."""
    peer = PEERS.get(name, STREAMING)
    if peer.gguf_kind is None or (peer.is_usual and work.gguf is not None):
        return replace(work, **peer.options)  # type: ignore[arg-type]  # strings are checked when the model is opened
    from surfw.bench.peers.gguf_file import write_gguf

    on_progress(f"converting the checkpoint for {name}")
    file = write_gguf(Path(work.model_dir), Path(work.folder or ".") / f"{peer.gguf_kind}.gguf", peer.gguf_kind)
    return replace(work, gguf=str(file))


async def _chunk(
    model_dir: str, name: str, place: str, codecs: Sequence[str], on_progress: Callable[[str], None]
) -> str:
    """Make sure that the store has the model; return its name there: this one, or the one that chunking gives it."""
    from surfw.chunking import prepare_model, write_model

    backend = open_backend(place)
    if await backend.exists(MARKER):
        store = Store(backend)
        await store.check()
        if name in await store.models():
            on_progress(f"{name} is in {place} already")
            return name
    on_progress(f"chunking {model_dir}")
    with await asyncio.to_thread(prepare_model, model_dir) as prepared:
        await write_model(prepared, backend, codecs=codecs)
        return prepared.name


def _run_rounds(
    works: Mapping[str, Comparison], on_progress: Callable[[str], None]
) -> tuple[dict[str, list[Outcome[Measurement]]], list[float | None]]:
    """Run all rounds; return the outcomes by name, and each round's bandwidth. What fails does not run again."""
    outcomes: dict[str, list[Outcome[Measurement]]] = {name: [] for name in works}
    work = works[SURFW]
    bandwidths: list[float | None] = []
    for number in range(1, work.rounds + 1):
        where = f"round {number} of {work.rounds}"
        before = after = None
        turn = (number - 1) % len(works)
        for name in [*list(works)[turn:], *list(works)[:turn]]:
            if name == SURFW:
                before = _bandwidth(work, where, on_progress)
            if all(one.failed is None for one in outcomes[name]):
                on_progress(f"{where}: {name}")
                outcomes[name].append(run_peer(PEERS.get(name, STREAMING).module, works[name], Measurement))
                if name == SURFW and before is not None and work.bandwidth_bytes is None:
                    after = _bandwidth(work, where, on_progress)
        bandwidths.append(before if before is None or after is None else (before + after) / 2)
    return outcomes, bandwidths


def _bandwidth(work: Comparison, where: str, on_progress: Callable[[str], None]) -> float | None:
    """The source's bandwidth in bytes per second; None if it is neither given nor measurable."""
    if work.bandwidth_bytes is not None:
        return float(work.bandwidth_bytes)
    if work.source is None or is_server_url(work.source) or "://" in work.source:
        return None
    on_progress(f"{where}: reads of the store")
    outcome = run_peer(_READS_MODULE, work, Bandwidth)
    if outcome.found is None:
        on_progress(f"{where}: the reads could not be measured: {outcome.failed}")
        return None
    return outcome.found.bytes_per_second


def _conclude(
    comparison: Comparison,
    model: str,
    outcomes: Mapping[str, Sequence[Outcome[Measurement]]],
    bandwidths: Sequence[float | None],
    absent: Sequence[str],
) -> InferResult:
    rows = make_rows(outcomes, bandwidths)
    known = [one for one in bandwidths if one is not None]
    bandwidth = statistics.median(known) if known else None
    notes = [*absent, *make_notes(rows, bandwidth, measured=comparison.bandwidth_bytes is None)]
    if any(PEERS[row.name].gguf_kind and "was ended by" in (row.failed or "") for row in rows if row.name in PEERS):
        notes.append(LLAMA_CRASH)
    if comparison.cap_bytes is not None:
        notes.append(f"every process could have {format_size(comparison.cap_bytes)}, its page cache included")
        if not all(one.cold for all_of in outcomes.values() for one in all_of):
            notes.append("the page cache could not be dropped, so files in it did not count; run this as root")
    return InferResult(
        benchmark="infer",
        machine=describe_machine(*_LIBRARIES),
        work={
            "model": model,
            "source": None if comparison.source is None else display_url(comparison.source),
            "prompt_tokens": comparison.prompt_tokens,
            "new_tokens": comparison.new_tokens,
            "rounds": comparison.rounds,
            "cap_bytes": comparison.cap_bytes,
            "memory_budget": comparison.memory_budget,
        },
        bandwidth_bytes_per_second=bandwidth,
        rows=rows,
        notes=tuple(notes),
    )
