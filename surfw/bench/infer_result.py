"""Makes the result of `infer` from the outcomes of all rounds. No I/O."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surfw.bench.comparison import Measurement
from surfw.bench.process import Outcome
from surfw.bench.result import summarise
from surfw.config import GB

SURFW = "surfw"


@dataclass(frozen=True, kw_only=True, slots=True)
class InferRow:
    """The result of surfw or a peer; only `name` and `failed` are set if it could not be measured.

    Attributes:
        name: as in `--against`, or `surfw`.
        value: tokens per second of the whole generation, prompt included: the median of all rounds.
        unit: of value, low, high, decode_value and ceiling.
        low: the slowest round.
        high: the fastest round.
        surfw_ratio: surfw's value ÷ this value: how many times as fast surfw is.
        decode_value: tokens per second after the first token.
        streamed_bytes_per_token: bytes of weights fetched per token after the first; None for peers, which do not
            report it.
        ceiling: the highest possible decode_value: bandwidth ÷ streamed_bytes_per_token, the median of all rounds; None
            if nothing was streamed or the bandwidth is unknown.
        share: decode_value ÷ ceiling, the median of all rounds.
        ttft_seconds: time to first token, after a warm-up.
        peak_rss_bytes: peak resident memory of its process in any round, mapped files included.
        peak_group_bytes: the same with its page cache; None without a cap, whose control group measures it.
        new_tokens: number of generated tokens.
        token_ids: the tokens of its first round.
        same_tokens: whether its tokens agree with the others' in every round.
        failed: why it could not be measured.
    """

    name: str
    value: float | None = None
    unit: str = "tokens/s"
    low: float | None = None
    high: float | None = None
    surfw_ratio: float | None = None
    decode_value: float | None = None
    streamed_bytes_per_token: float | None = None
    ceiling: float | None = None
    share: float | None = None
    ttft_seconds: float | None = None
    peak_rss_bytes: int | None = None
    peak_group_bytes: int | None = None
    new_tokens: int | None = None
    token_ids: list[int] | None = None
    same_tokens: bool | None = None
    failed: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class InferResult:
    """The results of surfw and its peers, surfw first.

    Attributes:
        benchmark: `infer`.
        machine: the machine they were measured on.
        work: the requested model, prompt and new tokens, rounds, cap and budget.
        bandwidth_bytes_per_second: the bandwidth behind the ceilings: the median of all rounds, or the given one.
        rows: surfw and its peers.
        notes: which peers are missing and why, and how to read the numbers.
    """

    benchmark: str
    machine: dict[str, str]
    work: dict[str, Any]
    bandwidth_bytes_per_second: float | None
    rows: tuple[InferRow, ...]
    notes: tuple[str, ...]


def make_rows(
    outcomes: Mapping[str, Sequence[Outcome[Measurement]]], bandwidths: Sequence[float | None]
) -> tuple[InferRow, ...]:
    """Make a row for surfw and each peer.

    Args:
        outcomes: the outcome of each round, by name, surfw first.
        bandwidths: bytes per second in each round; None where unknown.
    """
    measured = {name: [one.found for one in all_of if one.found is not None] for name, all_of in outcomes.items()}
    failed = {name: one.failed for name, all_of in outcomes.items() for one in all_of if one.failed is not None}
    expected = _expected_tokens([measured[name][0].token_ids for name in outcomes if name not in failed])
    rates = {name: [len(one.token_ids) / one.seconds for one in measured[name]] for name in outcomes}
    surfw = next(iter(outcomes))
    rows = []
    for name, all_of in outcomes.items():
        if name in failed:
            rows.append(InferRow(name=name, failed=failed[name]))
            continue
        found = measured[name]
        spread = summarise(rates[name])
        rows.append(
            InferRow(
                name=name,
                **spread.figures(),
                surfw_ratio=statistics.median(rates[surfw]) / spread.value if surfw not in failed else None,
                **_decode(found, bandwidths),
                ttft_seconds=statistics.median(one.ttft_seconds for one in found),
                peak_rss_bytes=max(one.peak_rss_bytes for one in found),
                peak_group_bytes=max((one.peak_group_bytes for one in all_of if one.peak_group_bytes), default=None),
                new_tokens=len(found[0].token_ids),
                token_ids=found[0].token_ids,
                same_tokens=all(_agree(one.token_ids, expected) for one in found),
            )
        )
    return tuple(rows)


def make_notes(rows: Sequence[InferRow], bandwidth: float | None, *, measured: bool) -> list[str]:
    """Make the notes, which explain the rows.

    Args:
        rows: the result of `make_rows`.
        bandwidth: bytes per second, if known.
        measured: whether the bandwidth was measured rather than given.
    """
    notes = [f"{row.name}: {row.failed}" for row in rows if row.failed is not None]
    others = [row.name for row in rows if row.same_tokens is False]
    if others:
        notes.append(f"other tokens than the rest gave: {', '.join(others)}")
    elif sum(row.same_tokens is True for row in rows) > 1:
        notes.append("all that ran gave the same tokens")
    most = max((row.new_tokens or 0 for row in rows), default=0)
    notes += [
        f"{row.name} generated {row.new_tokens} tokens, not {most}, because it is slow"
        for row in rows
        if row.new_tokens is not None and row.new_tokens < most
    ]
    streams = [row for row in rows if row.streamed_bytes_per_token]
    if streams and bandwidth:
        how = "direct reads of the store's files, two at a time, by a process of its own" if measured else "given"
        notes.append(f"ceiling: {bandwidth / GB:.2f} GB/s ({how}) ÷ what is streamed per token")
    elif streams:
        notes.append("no ceiling, because the bandwidth of the source is not known; give it")
    return notes + [
        f"{row.name} streamed nothing after the first token: everything fits, and only computing limits it"
        for row in rows
        if row.streamed_bytes_per_token == 0
    ]


def _decode(found: Sequence[Measurement], bandwidths: Sequence[float | None]) -> dict[str, Any]:
    """Return the fields about tokens after the first; each round's ceiling uses its own bandwidth."""
    steps = len(found[0].token_ids) - 1
    rates = [steps / one.decode_seconds for one in found]
    facts: dict[str, Any] = {"decode_value": statistics.median(rates)}
    streamed = [one.streamed_bytes / steps for one in found if one.streamed_bytes is not None]
    if not streamed:
        return facts
    facts["streamed_bytes_per_token"] = statistics.median(streamed)
    ceilings = [rate / size for rate, size in zip(bandwidths, streamed, strict=True) if rate and size]
    if len(ceilings) == len(found):
        facts["ceiling"] = statistics.median(ceilings)
        facts["share"] = statistics.median(rate / most for rate, most in zip(rates, ceilings, strict=True))
    return facts


def _expected_tokens(answers: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return the answer that agrees with the most others; in a tie, the longest."""
    return max(answers, key=lambda one: (sum(_agree(one, other) for other in answers), len(one)), default=())


def _agree(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether one is a prefix of the other."""
    shared = min(len(one), len(other))
    return list(one[:shared]) == list(other[:shared])
