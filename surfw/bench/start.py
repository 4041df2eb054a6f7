"""From pressing return to the first token: `surfw infer` against transformers, which needs the whole model first.

Each start is a new process, run as a user would type it. Starts alternate, so that other load on the machine and the
link affects all of them alike. The trace of one more start shows where the time goes.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from surfw.bench.process import describe_end
from surfw.bench.result import Result, Row, describe_machine, summarise
from surfw.codec import DEFAULT_CODECS
from surfw.config import CodecChoice
from surfw.errors import ConfigurationError, SurfwError
from surfw.files import expand_home
from surfw.timeline import read_run

CODECS: Sequence[str] = get_args(CodecChoice)
EXACT: Sequence[str] = ("auto", *(codec for codec in CODECS if codec in DEFAULT_CODECS))
_PROMPT_IDS = "1,2,3,4,5,6,7,8"
_DOWNLOAD = "download, then transformers"
_LOCAL = "transformers, from the same folder"
_PLAIN = "surfw, codec none"
_PARTS = {"import": "starting Python, and imports", "connect": "connecting, and the manifest", "prepare": "building"}
"""What each phase of a trace means for a start."""


def bench_start(
    source: str,
    *,
    model: str | None = None,
    download: str | None = None,
    codecs: Sequence[str] = EXACT,
    arguments: Sequence[str] = (),
    rounds: int = 3,
    on_progress: Callable[[str], object] = lambda _: None,
) -> Result:
    """Run the benchmark.

    Args:
        source: a server, a store or a checkpoint's folder, as for `surfw infer --source`.
        model: the model's name at the source; None for its only model.
        download: URL or folder of the checkpoint's own files behind the same link, which are copied first. Without it,
            transformers loads a source that is a checkpoint's folder in place; any other source is compared with codec
            `none` only.
        codecs: the values of `--codec` to measure.
        arguments: more arguments for `surfw infer`, such as `--memory-budget`.
        rounds: number of starts of each; medians are reported.
        on_progress: called with a line whenever a step starts.

    Raises:
        ConfigurationError: a codec is unknown.
        SurfwError: a start failed.
    """
    if unknown := [codec for codec in codecs if codec not in CODECS]:
        raise ConfigurationError(f"codec {unknown[0]!a:.40} is not known; expected some of {', '.join(CODECS)}")
    infer = [sys.executable, "-m", "surfw", "infer", "--source", source, "--prompt-ids", _PROMPT_IDS]
    infer += [*(("--model", model) if model else ()), "--max-new-tokens", "1", "--quiet", *arguments]
    commands = {f"surfw, codec {codec}": [*infer, "--codec", codec] for codec in codecs}
    peer = [sys.executable, "-m", "surfw.bench.peers.download"]
    if download is not None:
        commands[_DOWNLOAD] = [*peer, download if "://" in download else Path(download).resolve().as_uri(), _PROMPT_IDS]
    elif (folder := expand_home(source) / "config.json").is_file():
        commands[_LOCAL] = [*peer, str(folder.parent), _PROMPT_IDS]
    else:
        on_progress("without the checkpoint's own files (--download), nothing is compared with transformers")
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds):
        turn = list(commands) if number % 2 == 0 else list(reversed(commands))
        for name in turn:
            on_progress(f"round {number + 1} of {rounds}: {name}")
            seconds[name].append(_time_to_first_byte(name, commands[name]))
    what = next((name for name in (_DOWNLOAD, _LOCAL, _PLAIN) if name in seconds), None)
    base = None if what is None else summarise(seconds[what])
    baseline = None if base is None else base.value
    rows = []
    for name, taken in seconds.items():
        spread = summarise(taken)
        ratio = None if baseline is None else baseline / spread.value
        note = "the baseline of all others" if name == what else ""
        faster = () if base is None or name == what else base.ratios(spread)
        figures = spread.figures()
        rows.append(Row(name=name, unit="s", **figures, baseline=baseline, ratio=ratio, ratios=faster, note=note))
    first = next(iter(commands))
    on_progress(f"where the time goes: {first}")
    rows += _split(first, commands[first])
    return Result(benchmark="start", machine=describe_machine(), rows=tuple(rows))


def _split(name: str, command: list[str]) -> list[Row]:
    """Trace one more start, and return where its time goes."""
    with tempfile.TemporaryDirectory(prefix="surfw-bench-") as folder:
        trace = Path(folder) / "run.json"
        _time_to_first_byte(name, [*command, "--trace", str(trace)])
        run = read_run(trace)
    seconds = {kind: sum(one.seconds for one in run.phases if one.kind == kind) for kind in _PARTS}
    ending = sum(one.seconds for one in run.phases if one.name == "finishing")
    seconds["prepare"] -= ending
    rows = [Row(name=f"{name}: {what}", unit="s", value=seconds[kind]) for kind, what in _PARTS.items()]
    if run.first_token is not None:
        rows.append(Row(name=f"{name}: the first pass", unit="s", value=run.first_token.seconds))
    return rows


def _time_to_first_byte(name: str, command: list[str]) -> float:
    """Seconds from the start of a process to its first byte on stdout."""
    begin = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said) as process,
    ):
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        taken = time.perf_counter() - begin
        process.communicate()
        said.seek(0)
        if not first or process.returncode:
            raise SurfwError(f"{name} {describe_end(process.returncode, said.read())}")
    return taken
