"""Runs a peer in its own process, optionally under a memory cap, until it ends or is killed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Generic, TypeVar

from surfw.bench.cap import drop_page_cache, memory_group
from surfw.bench.comparison import Comparison
from surfw.bench.peers import llama_logits
from surfw.config import format_size

T = TypeVar("T")
_SHOWN = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome(Generic[T]):
    """The outcome of a run.

    Attributes:
        found: its result; None if it failed.
        failed: why it failed.
        peak_group_bytes: peak memory of its control group, page cache included; None without a cap.
        cold: whether the page cache was dropped before the run, so that all files it read counted; False without a cap.
    """

    found: T | None = None
    failed: str | None = None
    peak_group_bytes: int | None = None
    cold: bool = False


def run_peer(module: str, work: Comparison | llama_logits.Work, kind: type[T]) -> Outcome[T]:
    """Run a module of `surfw.bench.peers`; leave no process and no file behind, however the run ends.

    Args:
        module: the module's name.
        work: the module's argument, which also sets the cap and the timeout.
        kind: the class of its result.

    Raises:
        ConfigurationError: the cap cannot be set.
    """
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="surfw-bench-", dir=work.folder))
        text = json.dumps(asdict(replace(work, folder=scratch)))
        command = [sys.executable, "-m", "surfw.bench.peers", module, text]
        if work.cap_bytes is None:
            return _run(command, work.patience_seconds, kind)
        group = stack.enter_context(memory_group(work.cap_bytes))
        cold = drop_page_cache()
        outcome = _run(group.command(command), work.patience_seconds, kind)
        if outcome.failed and group.kills:
            outcome = Outcome(failed=f"was killed: a cap of {format_size(work.cap_bytes)} is too small for it")
        return replace(outcome, peak_group_bytes=group.peak_bytes, cold=cold)


def _run(command: list[str], patience_seconds: float, kind: type[T]) -> Outcome[T]:
    """Run a process that exits when its stdin closes, also if this function is interrupted while starting it."""
    reading, writing = os.pipe()
    try:
        with subprocess.Popen(
            command,
            stdin=reading,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=patience_seconds)
            except subprocess.TimeoutExpired:
                text = f"was stopped after {patience_seconds:g} seconds; give it more time, or less to do"
                return Outcome(failed=text)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        os.close(reading)
        os.close(writing)
    lines = out.splitlines()
    if process.returncode == 0 and lines:
        found = json.loads(lines[-1])
        failed = found.get("failed")
        return Outcome(failed=str(failed)[:_SHOWN]) if failed else Outcome(found=kind(**found))
    return Outcome(failed=describe_end(process.returncode, err))


def describe_end(returncode: int, err: str) -> str:
    """Describe how a process failed: its exit code or signal, and the last line it wrote to stderr."""
    last = next((line.strip() for line in reversed(err.splitlines()) if line.strip()), "it said nothing")
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}; its last words: {last[:_SHOWN]}"
    return f"ended with exit code {returncode}; its last words: {last[:_SHOWN]}"
