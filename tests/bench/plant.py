"""Check that `--compare` finds a slowdown of 20 % and no false ones. Run it on an idle machine:

    python -m tests.bench.plant wire codec

Each benchmark is measured once, then five times unchanged, and five times with work that takes 20 % longer.
"""

import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from surfw.bench import codec, wire
from surfw.bench.compare import Comparison, compare
from surfw.bench.result import Result

_SLOWER = 0.2
_RUNS = 5


def _slow(work: Callable[..., Any]) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        start = time.perf_counter()
        done = work(*given)
        until = time.perf_counter() + _SLOWER * (time.perf_counter() - start)
        while time.perf_counter() < until:
            pass
        return done

    return run


async def _fetch_slowly(*given: Any) -> None:
    start = time.perf_counter()
    await wire.fetch_chunk(*given)
    time.sleep(_SLOWER * (time.perf_counter() - start))  # noqa: ASYNC251 - nothing else goes on


def _wire_slowly() -> Result:
    return wire.bench_wire(fetch=_fetch_slowly)


def _codec_slowly() -> Result:
    with patch.object(codec, "decode_frame", _slow(codec.decode_frame)):
        return codec.bench_codec()


_PLANTED: dict[str, tuple[Callable[[], Result], Callable[[], Result], str]] = {
    "wire": (wire.bench_wire, _wire_slowly, "verified"),
    "codec": (codec.bench_codec, _codec_slowly, "decode"),
}


def _tell(what: str, found: Comparison, row: str) -> bool:
    change = next(one for one in found.changes if one.name == row)
    worse = [one.name for one in found.worse]
    shown = f"{change.change or 0:+.1%} ({change.low or 0:+.1%} … {change.high or 0:+.1%})"
    sys.stdout.write(f"  {what}: {row} {shown}; worse: {', '.join(worse) or 'none'}\n")
    sys.stdout.flush()
    return bool(worse)


def main(names: list[str]) -> None:
    """Measure, and print how often a slowdown was reported."""
    for name in names or list(_PLANTED):
        measure, measure_slowly, row = _PLANTED[name]
        before = measure()
        silent = sum(not _tell("the same", compare(before, measure()), row) for _ in range(_RUNS))
        seen = sum(_tell("20 % longer", compare(before, measure_slowly()), row) for _ in range(_RUNS))
        sys.stdout.write(f"bench {name}: seen in {seen} of {_RUNS}, silent in {silent} of {_RUNS}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
