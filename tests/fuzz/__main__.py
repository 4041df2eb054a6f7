"""Fuzz the parsers of untrusted bytes, guided by the code they reach: first `pip install "surfw[fuzz]"`.

    python -m tests.fuzz manifest --seconds 3600     one parser, for an hour
    python -m tests.fuzz --seconds 120               all of them, two minutes in all
    python -m tests.fuzz gguf --runs 1000000         this number of inputs
    python -m tests.fuzz --plant manifest            with a planted bug, which must be found

Inputs that reach new code are kept in `--corpus FOLDER` for later runs; `--keep` copies the smallest to
`tests/fuzz/kept`. An input that violates the promise is written to `found/` in that folder, and the exit code is 1.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.folder import in_memory
from tests.fuzz.kept import cases, keep, kept
from tests.fuzz.parser import MOST_BYTES
from tests.fuzz.parsers import PARSERS
from tests.fuzz.plants import PLANTS, plant

_INPUT_SECONDS = 20
"""How long one input may take on a busy machine."""

_ROOT = Path(__file__).parent.parent.parent
_RATE = re.compile(rb"stat::number_of_executed_units:\s+(\d+)")


class Outcome(NamedTuple):
    """How a run ended: the number of inputs, the seconds, and what was found."""

    runs: int
    seconds: float
    found: Path | None
    said: str


def fuzz(name: str, folder: Path, *, seconds: float | None, runs: int | None, surfw: Path | None = None) -> Outcome:
    """Fuzz a parser.

    Args:
        name: of `PARSERS`.
        folder: has its corpus in a folder of its name, and gets what is found.
        seconds: how long, or None.
        runs: how many inputs, or None.
        surfw: where the package is imported from, if not from here.
    """
    corpus, found = folder / name, folder / "found"
    for place in (corpus, found):
        place.mkdir(parents=True, exist_ok=True)
    parser = PARSERS[name]()
    for data in [*parser.seeds, *kept(name), *cases(name)]:
        if len(data) <= MOST_BYTES:
            (corpus / blake2b(data, digest_size=16).hexdigest()).write_bytes(data)
    words = folder / f"{name}.words"
    escaped = ("".join(map("\\x{:02x}".format, word)) for word in parser.words)
    words.write_text("".join(f'"{word}"\n' for word in escaped))
    options = [
        f"-max_len={MOST_BYTES}", f"-timeout={_INPUT_SECONDS}", "-rss_limit_mb=0", "-print_final_stats=1",
        f"-artifact_prefix={found / name}-", "-reload=0", *([f"-dict={words}"] if parser.words else []),
        *([f"-max_total_time={seconds:.0f}"] if seconds else []), *([f"-runs={runs}"] if runs else []),
    ]  # fmt: skip
    before, started = set(found.iterdir()), time.monotonic()
    child = _guided(folder, name, *options, str(corpus), surfw=surfw)
    taken = time.monotonic() - started
    units, new = _RATE.search(child.stderr), sorted(set(found.iterdir()) - before)
    said = _explain((child.stdout + child.stderr).decode(errors="replace")) if child.returncode else ""
    return Outcome(int(units[1]) if units else 0, taken, new[0] if new else None, said)


def _guided(folder: Path, name: str, *options: str, surfw: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run a process that fuzzes a parser, until it ends."""
    paths = [str(one) for one in (surfw, _ROOT) if one] + [os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-P", "-m", "tests.fuzz.guided", name, *options]
    with tempfile.TemporaryDirectory(prefix="surfw-fuzz-", dir=in_memory()) as files:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": files}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)


def _explain(output: str) -> str:
    """The relevant part of a run's output: the exception and its traceback, or the end."""
    _, mark, rest = output.partition("=== Uncaught Python exception: ===")
    return rest.partition("\n\n")[0].strip() if mark else output[-3000:]


def main() -> int:
    """Read the command line and fuzz; return the exit code."""
    parse = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition(":")[0])
    parse.add_argument("names", nargs="*", metavar="NAME", help=f"parsers, all without: {', '.join(PARSERS)}")
    parse.add_argument("--seconds", type=float, help="how long in all; 60 by default")
    parse.add_argument("--runs", type=int, help="how many inputs of each")
    parse.add_argument("--corpus", type=Path, help="where corpora grow from run to run; a new folder by default")
    parse.add_argument("--keep", action="store_true", help="take the smallest of what was reached into tests/fuzz/kept")
    parse.add_argument("--plant", action="store_true", help=f"put a bug in, which has to be found: {', '.join(PLANTS)}")
    given = parse.parse_args()
    names = given.names or list(PLANTS if given.plant else PARSERS)
    if unknown := [name for name in names if name not in PARSERS or (given.plant and name not in PLANTS)]:
        parse.error(f"there is no {unknown[0]!r}")
    if find_spec("atheris") is None:
        print('fuzzing needs a package: pip install -e ".[fuzz]"', file=sys.stderr)  # noqa: T201
        return 2
    return _run(names, given)


def _run(names: list[str], given: argparse.Namespace) -> int:
    failed = 0
    total = given.seconds or (None if given.runs else 60.0)
    with tempfile.TemporaryDirectory(prefix="surfw-fuzz-") as temporary:
        folder = (given.corpus or Path(temporary)).absolute()
        for name in names:
            source = plant(name, Path(temporary) / f"plant-{name}") if given.plant else None
            share = (total if given.plant else total / len(names)) if total else None
            outcome = fuzz(name, folder, seconds=share, runs=given.runs, surfw=source)
            rate = outcome.runs / max(outcome.seconds, 1)
            print(f"{name:16} {outcome.runs:>9,} inputs  {outcome.seconds:6.1f} s  {rate:8,.0f} a second", end="")  # noqa: T201
            is_right = bool(outcome.said) == given.plant
            failed += not is_right
            print("" if is_right and not given.plant else f"  {'found' if given.plant and is_right else 'FAILED'}")  # noqa: T201
            if not is_right:
                print(f"{outcome.said or 'the bug was not found'}\ninput: {outcome.found}")  # noqa: T201
                if outcome.found is not None:
                    print(ascii(outcome.found.read_bytes())[:5000])  # noqa: T201
            sys.stdout.flush()
            if given.keep and is_right and not given.plant:
                print(f"{name:16} {keep(name, _smallest(name, folder))} kept")  # noqa: T201
    return 1 if failed else 0


def _smallest(name: str, folder: Path) -> list[bytes]:
    """The smallest inputs of a corpus that reach all the code it reaches, found by libFuzzer's merge."""
    with tempfile.TemporaryDirectory() as merged:
        _guided(folder, name, "-merge=1", "-rss_limit_mb=0", merged, str(folder / name)).check_returncode()
        return [one.read_bytes() for one in Path(merged).iterdir()]


if __name__ == "__main__":
    sys.exit(main())
