"""Blocks of a chunk arrive in one fetch, verified and counted, and nobody waits for what is no longer wanted."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch.nn.functional import embedding

from surfw.config import MIB
from surfw.errors import IntegrityError, ManifestError, ModelClosedError, ModelError
from surfw.manifest import Manifest
from surfw.runtime.rows import plain_form
from surfw.source import Read
from tests.runtime.parts import Parts, parts_of
from tests.toys import Gate, damage

WIDTH = 4
SIZE = 3 * MIB + 100
TABLE = (torch.arange(SIZE) * 7919 >> 5).to(torch.uint8).reshape(-1, WIDTH)


def after_fetches(parts: Parts, ended: Callable[[BaseException | None], None]) -> None:
    """Tell how each fetch of the source ended, just before it does."""
    fetch = parts.source.fetch

    async def watched(manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        try:
            await fetch(manifest, reads, priority=priority)
        except BaseException as exc:
            ended(exc)
            raise
        ended(None)

    parts.source.fetch = watched  # type: ignore[method-assign]


def test_runs_arrive_in_one_fetch_and_are_counted() -> None:
    with parts_of(TABLE) as parts:
        fetches: list[BaseException | None] = []
        after_fetches(parts, fetches.append)
        ids = torch.tensor([3 * MIB + 96, 4, 2 * MIB]) // WIDTH
        assert torch.equal(parts.reader().lookup("t0", ids), embedding(ids, TABLE))
        assert parts.blocks_read() == [[0], [2, 3]]
        assert fetches == [None]
        assert parts.metrics.count("fetched_bytes") == 2 * MIB + 100
        assert parts.metrics.latency("fetch").count == 1


def test_a_run_that_is_not_whole_blocks_is_refused() -> None:
    with parts_of(TABLE) as parts, pytest.raises(ValueError, match="range 0-5 of chunk c is not made of whole blocks"):
        Read(parts.chunk, plain_form(parts.chunk), 0, 5, memoryview(bytearray(5)))


def test_damage_is_reported_to_who_waits_and_not_counted() -> None:
    with parts_of(TABLE) as parts:
        with pytest.raises(IntegrityError, match="chunk c from toys is damaged: block 0 has BLAKE3"):
            parts.reader(chunk=damage(parts.chunk)).lookup("t0", torch.tensor([0]))
        assert parts.metrics.count("fetched_bytes") == 0


def test_waiting_is_a_stall_and_ends_when_the_run_is_interrupted() -> None:
    gate, ends = Gate(), threading.Semaphore(0)
    with parts_of(TABLE) as parts:
        parts.source.gate = gate
        ended: list[BaseException | None] = []
        after_fetches(parts, lambda exc: (ended.append(exc), ends.release())[1])

        def interrupt() -> None:
            gate.wait_for("c")
            parts.run.interrupt(ModelError("no longer wanted"))

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(ModelError, match="no longer wanted"):
            parts.reader().lookup("t0", torch.tensor([0]))
        thread.join()
        assert ends.acquire(timeout=60)
        assert [type(exc) for exc in ended] == [asyncio.CancelledError]
        assert "stall" in parts.metrics.snapshot()["seconds"]
        assert parts.metrics.count("fetched_bytes") == 0


def test_an_interrupted_run_does_not_even_take_what_is_there() -> None:
    with parts_of(TABLE) as parts:
        after_fetches(parts, lambda _: parts.run.interrupt(ModelError("no longer wanted")))
        with pytest.raises(ModelError, match="no longer wanted"):
            parts.reader().lookup("t0", torch.tensor([0]))
        assert parts.blocks_read() == [[0]]


def test_a_source_that_is_closed_is_a_clear_error() -> None:
    gate = Gate()
    with parts_of(TABLE) as parts:
        parts.source.gate = gate

        def close() -> None:
            gate.wait_for("c")
            parts.io.close()

        thread = threading.Thread(target=close)
        thread.start()
        with pytest.raises(ModelClosedError, match="the source of toy was closed while it was read"):
            parts.reader().lookup("t0", torch.tensor([0]))
        thread.join()
        with pytest.raises(ModelClosedError, match="the client has been closed; open it again"):
            parts.reader().lookup("t0", torch.tensor([0]))


def test_a_chunk_that_is_stored_otherwise_has_no_parts() -> None:
    error = "chunk c is stored as lossless, expected none: its parts cannot be read alone"
    with parts_of(TABLE, codec="lossless") as parts:
        with pytest.raises(ManifestError, match=error):
            plain_form(parts.chunk)
        with pytest.raises(ManifestError, match=error):
            parts.reader().lookup("t0", torch.tensor([0]))
