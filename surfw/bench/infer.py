"""surfw against its peers on the same generation, in the same run, under the same cap on memory.

Every contender runs in a process of its own. A round lets each of them run once, so that whatever else the machine does
falls on all of them. Just before surfw, a process under the same cap reads the store's files for a moment: its rate is
the bandwidth of that round, measured while neither a model nor imports of one press on the memory.
"""

import asyncio
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from surfw.bench.cap import memory_group
from surfw.bench.contenders import PEERS, SURFW
from surfw.bench.contenders.work import Work
from surfw.bench.infer_result import InferResult, make_notes, make_rows
from surfw.bench.process import Outcome, run_contender
from surfw.bench.reads import READS
from surfw.bench.result import describe_machine
from surfw.config import display_url, format_size, is_server_url, parse_size
from surfw.errors import ConfigurationError
from surfw.storage import Store, open_backend
from surfw.storage.store import MARKER

PATIENCE_SECONDS = 1800.0
_LIBRARIES = ("accelerate", "airllm", "llama_cpp_python")
_GGUF_ADVICE = (
    "llama.cpp needs the model as a GGUF file (gguf, --gguf FILE); llama.cpp's own converter makes one: "
    "convert_hf_to_gguf.py MODEL_DIR --outtype bf16 --outfile FILE"
)
_AIRLLM_ADVICE = (
    "airllm writes into the checkpoint that it is given: name a copy of it, with room for a second one (airllm_dir, "
    "--airllm-dir COPY)"
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, and how.

    Attributes:
        model_dir: the checkpoint, in a local directory.
        against: names of `PEERS`; None for all that can run.
        gguf: the same model for llama.cpp.
        airllm_dir: a copy of `model_dir` for AirLLM, which writes into it.
        cap_bytes: all the memory that each contender can have, page cache included; None for no cap.
        memory_budget: what surfw's weights may take, as `1.5GB`; None for its own choice.
        store: a folder that is, or becomes, surfw's store, and stays; None for one that is removed afterwards.
        folder: where to write what is removed afterwards; None for the temporary folder.
        source: a server or a store that surfw reads in place of `store`.
        bandwidth_bytes: bytes per second of that source's link; None for a local store, which is measured.
        prompt_tokens: of the prompt, whose ids are 1, 2, 3 and so on.
        new_tokens: to generate; 2 or more.
        rounds: how often each contender runs; medians are reported.
        patience_seconds: how long one of them may take in one round.
    """

    model_dir: str
    against: Sequence[str] | None = None
    gguf: str | None = None
    airllm_dir: str | None = None
    cap_bytes: int | None = None
    memory_budget: str | None = None
    store: str | None = None
    folder: str | None = None
    source: str | None = None
    bandwidth_bytes: int | None = None
    prompt_tokens: int = 16
    new_tokens: int = 16
    rounds: int = 3
    patience_seconds: float = PATIENCE_SECONDS

    def check(self) -> None:
        """Refuse what cannot be compared.

        Raises:
            ConfigurationError: an argument cannot be used, or a peer that was named lacks what it needs.
        """
        if not (Path(self.model_dir) / "config.json").is_file():
            raise ConfigurationError(
                f"{self.model_dir} is no checkpoint in a local directory (it has no config.json); peers need one there"
            )
        if unknown := sorted(set(self.against or ()) - PEERS.keys()):
            raise ConfigurationError(f"{unknown[0]!r:.80} is no peer; there are {', '.join(PEERS)}")
        for name in self.against or ():
            if lack := self.lacks(name):
                raise ConfigurationError(lack)
        self._check_places()
        if self.memory_budget is not None:
            parse_size(self.memory_budget)
        if self.cap_bytes is not None:
            with memory_group(self.cap_bytes):
                pass  # it can be made: nothing is ever run without the cap that was asked for

    def _check_places(self) -> None:
        for what, path in (("gguf file", self.gguf), ("airllm_dir", self.airllm_dir), ("folder", self.folder)):
            if path is not None and not Path(path).exists():
                raise ConfigurationError(f"the {what} {path} is not there; name one that is")
        if self.airllm_dir is not None and Path(self.airllm_dir).resolve() == Path(self.model_dir).resolve():
            raise ConfigurationError(_AIRLLM_ADVICE)
        if self.store is not None and self.source is not None:
            raise ConfigurationError("store and source exclude each other; give one of them")

    def lacks(self, name: str) -> str | None:
        """What a peer needs and was not given; None if it has everything."""
        if name == "llama.cpp" and self.gguf is None:
            return _GGUF_ADVICE
        if name == "airllm" and self.airllm_dir is None:
            return _AIRLLM_ADVICE
        return None


def bench_infer(comparison: Comparison, *, on_progress: Callable[[str], None] = lambda _: None) -> InferResult:
    """Measure.

    Args:
        comparison: what is compared.
        on_progress: called with a line whenever something begins.

    Raises:
        ConfigurationError: something of it cannot be used.
        SurfwError: the checkpoint cannot be chunked.
    """
    comparison.check()
    names, absent = _choose(comparison)
    with ExitStack() as stack:
        source, model = comparison.source, Path(comparison.model_dir).resolve().name
        if source is None:
            source = comparison.store or stack.enter_context(
                tempfile.TemporaryDirectory(prefix="surfw-bench-", dir=comparison.folder)
            )
            model = asyncio.run(_chunk(comparison.model_dir, model, source, on_progress))
        work = Work(
            model_dir=comparison.model_dir,
            source=source,
            model=model,
            memory_budget=comparison.memory_budget,
            gguf=comparison.gguf,
            airllm_dir=comparison.airllm_dir,
            prompt_tokens=comparison.prompt_tokens,
            new_tokens=comparison.new_tokens,
        )
        outcomes, bandwidths = _run_rounds(comparison, work, names, on_progress)
    return _conclude(comparison, work, outcomes, bandwidths, absent)


def _choose(comparison: Comparison) -> tuple[list[str], list[str]]:
    """Who runs, surfw first, and a remark for each peer that does not."""
    names, absent = [SURFW], []
    for name in PEERS if comparison.against is None else dict.fromkeys(comparison.against):
        reason = PEERS[name].installed() or comparison.lacks(name)
        if reason is None:
            names.append(name)
        else:
            absent.append(f"not compared with {name}: {reason}")
    return names, absent


async def _chunk(model_dir: str, name: str, place: str, on_progress: Callable[[str], None]) -> str:
    """Make sure that the model is in the store, under this name or the one that chunking gives it; its name there."""
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
        await write_model(prepared, backend)
        return prepared.name


def _run_rounds(
    comparison: Comparison, work: Work, names: Sequence[str], on_progress: Callable[[str], None]
) -> tuple[dict[str, list[Outcome]], list[float | None]]:
    """The outcomes of every contender, and the bandwidth, in each round. Whoever fails is not asked again."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    bandwidths: list[float | None] = []
    for number in range(1, comparison.rounds + 1):
        where = f"round {number} of {comparison.rounds}"
        before = _measure_bandwidth(comparison, work, where, on_progress)
        after = None
        for name in names:
            if all(one.failed is None for one in outcomes[name]):
                on_progress(f"{where}: {name}")
                outcomes[name].append(_run(comparison, name, work))
                if name == SURFW and before is not None and comparison.bandwidth_bytes is None:
                    after = _measure_bandwidth(comparison, work, where, on_progress)
        bandwidths.append(before if before is None or after is None else (before + after) / 2)
    return outcomes, bandwidths


def _measure_bandwidth(
    comparison: Comparison, work: Work, where: str, on_progress: Callable[[str], None]
) -> float | None:
    """Bytes per second; None if it is neither given nor can be measured."""
    if comparison.bandwidth_bytes is not None:
        return float(comparison.bandwidth_bytes)
    if is_server_url(work.source) or "://" in work.source:
        return None
    on_progress(f"{where}: reads of the store")
    outcome = _run(comparison, READS, work)
    if outcome.found is None:
        on_progress(f"{where}: the reads could not be measured: {outcome.failed}")
        return None
    return float(outcome.found["bytes_per_second"])


def _run(comparison: Comparison, name: str, work: Work) -> Outcome:
    return run_contender(
        name,
        work,
        cap_bytes=comparison.cap_bytes,
        patience_seconds=comparison.patience_seconds,
        folder=comparison.folder,
    )


def _conclude(
    comparison: Comparison,
    work: Work,
    outcomes: Mapping[str, Sequence[Outcome]],
    bandwidths: Sequence[float | None],
    absent: Sequence[str],
) -> InferResult:
    rows = make_rows(outcomes, bandwidths)
    known = [one for one in bandwidths if one is not None]
    bandwidth = statistics.median(known) if known else None
    notes = [*absent, *make_notes(rows, bandwidth, measured=comparison.bandwidth_bytes is None)]
    if comparison.cap_bytes is not None:
        notes.append(f"every process could have {format_size(comparison.cap_bytes)}, its page cache included")
        if not all(one.cold for all_of in outcomes.values() for one in all_of):
            notes.append("the page cache could not be dropped, so files in it did not count; run this as root")
    return InferResult(
        benchmark="infer",
        machine=describe_machine(*_LIBRARIES),
        work={
            "model": work.model,
            "source": None if comparison.source is None else display_url(comparison.source),
            "prompt_tokens": work.prompt_tokens,
            "new_tokens": work.new_tokens,
            "rounds": comparison.rounds,
            "cap_bytes": comparison.cap_bytes,
            "memory_budget": comparison.memory_budget,
        },
        bandwidth_bytes_per_second=bandwidth,
        rows=rows,
        notes=tuple(notes),
    )
