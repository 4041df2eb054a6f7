"""Chunking against `cp` of the same bytes: both write to the same file system and sync, in alternation."""

import asyncio
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from surfw.bench.result import Result, Row, describe_machine, rate_row, summarise_rates
from surfw.chunking import PreparedModel, prepare_model, write_model
from surfw.config import MB
from surfw.errors import ConfigurationError
from surfw.runtime.memory import peak_rss_bytes
from surfw.storage import open_backend


def bench_chunk(model: str, *, folder: str | None = None, rounds: int = 3) -> Result:
    """Measure the byte phase of chunking: after imports and skeleton, until every byte is durable.

    Args:
        model: a hub id or a local directory.
        folder: where to write; must have space for one copy.
        rounds: alternations with the baseline; medians are reported.
    """
    if folder is not None and not Path(folder).is_dir():
        raise ConfigurationError(f"{folder} is not a folder; expected one with room for a copy of the model")
    with prepare_model(model) as prepared:
        return _measure(prepared, folder, rounds)


def _measure(prepared: PreparedModel, folder: str | None, rounds: int) -> Result:
    size = prepared.plan.payload_bytes
    ours, theirs = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="surfw-bench-", dir=folder) as place:
            theirs.append(_copy(prepared, Path(place)))
        with tempfile.TemporaryDirectory(prefix="surfw-bench-", dir=folder) as place:
            start = time.perf_counter()
            asyncio.run(write_model(prepared, open_backend(Path(place) / "store")))
            ours.append(time.perf_counter() - start)
    rate, base = summarise_rates(size, ours), summarise_rates(size, theirs)
    rows = (
        rate_row("cp, synced", base),
        rate_row("chunk, synced", rate, base, verified=True),
        Row(name="peak resident memory of chunking", value=peak_rss_bytes() / MB, unit="MB"),
    )
    return Result(benchmark="chunk", machine=describe_machine(), rows=rows)


def _copy(prepared: PreparedModel, place: Path) -> float:
    """Return the seconds that it takes to copy the shards with `cp` and sync them."""
    cp = shutil.which("cp") or "cp"
    shards = [str(shard.path) for shard in prepared.checkpoint.shards]
    start = time.perf_counter()
    subprocess.run([cp, "--reflink=never", *shards, str(place)], check=True)
    for copied in place.iterdir():
        fd = os.open(copied, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return time.perf_counter() - start
