"""From pressing return to the first token: `surfw infer` beside downloading everything and loading it then.

Each start is a process of its own, as somebody would type it. They take turns, so that whatever else the machine and
the link do falls on all of them.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import get_args

from surfw.bench.process import describe_end
from surfw.bench.result import Result, Row, describe_machine, summarise
from surfw.config import CodecChoice
from surfw.errors import ConfigurationError, SurfwError

CODECS: Sequence[str] = get_args(CodecChoice)
_PROMPT_IDS = "1,2,3,4,5,6,7,8"
_DOWNLOAD = "download, then transformers"
_PLAIN = "surfw, codec none"


def bench_start(
    source: str,
    *,
    model: str | None = None,
    download: str | None = None,
    codecs: Sequence[str] = CODECS,
    arguments: Sequence[str] = (),
    rounds: int = 3,
    on_progress: Callable[[str], object] = lambda _: None,
) -> Result:
    """Measure.

    Args:
        source: a server or a store, as for `surfw infer --source`.
        model: its name there; None for the only one.
        download: the URL or folder of the checkpoint's own files behind the same link; None to compare with codec
            `none` only.
        codecs: the values of `--codec` to measure.
        arguments: further ones of `surfw infer`, such as `--memory-budget`.
        rounds: how often each starts; medians are reported.
        on_progress: called with a line whenever something begins.

    Raises:
        ConfigurationError: there is no such codec.
        SurfwError: one of them failed.
    """
    if unknown := [codec for codec in codecs if codec not in CODECS]:
        raise ConfigurationError(f"codec {unknown[0]!a:.40} is not known; expected some of {', '.join(CODECS)}")
    infer = [sys.executable, "-m", "surfw", "infer", "--source", source, "--prompt-ids", _PROMPT_IDS]
    infer += [*(("--model", model) if model else ()), "--max-new-tokens", "1", "--quiet", *arguments]
    commands = {f"surfw, codec {codec}": [*infer, "--codec", codec] for codec in codecs}
    if download is not None:
        commands[_DOWNLOAD] = [sys.executable, "-m", "surfw.bench.peers.download", download, _PROMPT_IDS]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds):
        turn = list(commands) if number % 2 == 0 else list(reversed(commands))
        for name in turn:
            on_progress(f"round {number + 1} of {rounds}: {name}")
            seconds[name].append(_time_to_first_byte(name, commands[name]))
    baselines = [seconds[name] for name in (_DOWNLOAD, _PLAIN) if name in seconds]
    baseline = summarise(baselines[0]).value if baselines else None
    what = _DOWNLOAD if _DOWNLOAD in seconds else _PLAIN
    notes = {what: "the baseline of all others"} if baselines else {}
    rows = []
    for name, taken in seconds.items():
        spread = summarise(taken)
        ratio = None if baseline is None else baseline / spread.value
        rows.append(
            Row(name=name, unit="s", **spread._asdict(), baseline=baseline, ratio=ratio, note=notes.get(name, ""))
        )
    return Result(benchmark="start", machine=describe_machine(), rows=tuple(rows))


def _time_to_first_byte(name: str, command: list[str]) -> float:
    """Seconds from the start of a process until it has written to stdout."""
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
