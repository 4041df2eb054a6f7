"""Decides whether a benchmark's ratios are worse than those of an earlier run; also saves and loads results.

Rates differ between machines, and from hour to hour on one machine. So a row is compared by its ratio to the baseline
of the same round. Every round of the earlier run is paired with every round of this run: the median of these changes is
the estimate (Hodges and Lehmann), and its 95 % interval is that of Mann and Whitney's test, which assumes nothing about
the distribution of rounds. A row is worse if its whole interval is worse than `MARGIN`, by which runs of the same code
may differ.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from surfw.bench.result import Result, Row
from surfw.errors import ConfigurationError
from surfw.files import read_regular

MARGIN = 0.08
VERDICT_FROM = (
    "the verdict is from the 95 % interval of the change over all pairs of rounds; before and now are ratios of "
    "medians, and may point the other way"
)
_Z = 1.96
_MOST_BYTES = 64_000_000
_LEAST_ROUNDS = 3

Verdict = Literal["worse", "better", "same", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The change of a row's ratio between two runs.

    Attributes:
        name: the row's name.
        before: its ratio of medians in the earlier run; None if that run lacks the row.
        now: its ratio of medians in this run; None if this run lacks the row.
        change: relative change of the rounds' ratios, by Hodges and Lehmann's estimate; negative is slower. None if
            unknown. It may differ from `now` ÷ `before`, even in direction.
        low, high: the 95 % confidence interval of the change; the verdict is from it.
        verdict: `same` if all of the interval is within the margin; `unknown` if it reaches beyond, or if a run lacks
            the row or has fewer than three rounds.
    """

    name: str
    before: float | None
    now: float | None
    change: float | None
    low: float | None
    high: float | None
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The changes of all rows with ratios, and the earlier run's machine if it was a different one.

    `verdict_from` says which figures of a change its verdict is from.
    """

    file: str
    margin: float
    other_machine: dict[str, str]
    changes: tuple[Change, ...]
    verdict_from: str = VERDICT_FROM

    @property
    def worse(self) -> list[Change]:
        """The rows that are worse."""
        return [one for one in self.changes if one.verdict == "worse"]


def save_results(results: Sequence[Result], path: Path) -> None:
    """Write results to a file.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    document = {"surfw_bench": 1, "results": [asdict(result) for result in results]}
    try:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be written: {exc.strerror or exc}; name another file") from exc


def read_results(path: Path) -> dict[str, Result]:
    """Read saved results, by the names of their benchmarks.

    Raises:
        ConfigurationError: the file cannot be read, or was not written by `save_results`.
    """
    try:
        document = json.loads(read_regular(path, _MOST_BYTES))
        results = [_result(one) for one in document["results"]]
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be read: {exc.strerror or exc}; name a file of saved results") from exc
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as exc:
        raise ConfigurationError(
            f"{path} holds no results of a benchmark; write them with 'surfw bench … --save FILE'"
        ) from exc
    return {one.benchmark: one for one in results}


def _result(document: dict[str, Any]) -> Result:
    machine = {str(name): str(value) for name, value in document["machine"].items()}
    return Result(
        benchmark=str(document["benchmark"]), machine=machine, rows=tuple(_row(one) for one in document["rows"])
    )


def _row(document: dict[str, Any]) -> Row:
    known = {one.name for one in fields(Row)}
    given = {name: value for name, value in document.items() if name in known}
    given |= {name: str(document[name]) for name in ("name", "unit")}
    given["ratios"] = tuple(float(one) for one in document.get("ratios", ()))
    for name in ("value", "ratio"):
        given[name] = None if document.get(name) is None else float(document[name])
    if not all(math.isfinite(one) and one > 0 for one in given["ratios"]):
        raise ValueError(document["name"])
    return Row(**given)


def compare(before: Result, now: Result, *, file: str = "", margin: float = MARGIN) -> Comparison:
    """Compare the rows that have ratios."""
    rows = {row.name: row for row in before.rows}
    changes = [_change(rows.get(row.name), row, margin) for row in now.rows if row.ratios]
    gone = [row for row in before.rows if row.ratios and row.name not in {one.name for one in now.rows}]
    changes += [_change(row, None, margin) for row in gone]
    other = {} if _hardware(before) == _hardware(now) else before.machine
    return Comparison(file=file, margin=margin, other_machine=other, changes=tuple(changes))


def _hardware(result: Result) -> list[str | None]:
    return [result.machine.get(name) for name in ("cpu", "cores", "memory")]


def _change(before: Row | None, now: Row | None, margin: float) -> Change:
    name = (now or before or Row(name="", value=0, unit="")).name
    ratios = [() if row is None else row.ratios for row in (before, now)]
    known = None
    if min(map(len, ratios)) >= _LEAST_ROUNDS:
        known = interval(*ratios)
    return Change(
        name=name,
        before=None if before is None else before.ratio,
        now=None if now is None else now.ratio,
        change=known[1] if known else None,
        low=known[0] if known else None,
        high=known[2] if known else None,
        verdict="unknown" if known is None else _verdict(known[0], known[2], margin),
    )


def _verdict(low: float, high: float, margin: float) -> Verdict:
    if high < -margin:
        return "worse"
    faster = 1 / (1 - margin) - 1
    if low > faster:
        return "better"
    return "same" if -margin <= low and high <= faster else "unknown"


def interval(before: Sequence[float], now: Sequence[float]) -> tuple[float, float, float]:
    """The relative change of values: the lower end of its interval, the estimate, and the upper end."""
    logs = sorted(math.log(one) - math.log(other) for one in now for other in before)
    pairs = len(logs)
    spread = _Z * math.sqrt(pairs * (len(before) + len(now) + 1) / 12)
    outer = max(0, min(round(pairs / 2 - spread) - 1, (pairs - 1) // 2))
    return math.expm1(logs[outer]), math.expm1(statistics.median(logs)), math.expm1(logs[pairs - 1 - outer])
