"""Runs of blocks arrive where they shall, verified and counted, and nobody waits for what is no longer wanted."""

import threading
from concurrent.futures import CancelledError

import pytest
import torch

from surfw.config import MIB
from surfw.errors import IntegrityError, ManifestError, ModelClosedError, ModelError
from surfw.runtime.rows import plain_form
from tests.runtime.nets import raw
from tests.runtime.parts import parts_of
from tests.toys import Gate, damage

SIZE = 3 * MIB + 100
BYTES = (torch.arange(SIZE) * 7919 >> 5).to(torch.uint8)


def test_runs_arrive_in_one_fetch_and_are_counted() -> None:
    with parts_of(BYTES) as parts:
        first, last = bytearray(2 * MIB), bytearray(100)
        job = parts.blocks.start(parts.chunk, [(1, memoryview(first)), (3, memoryview(last))])
        parts.blocks.wait(job)
        assert bytes(first) == raw(BYTES)[MIB : 3 * MIB]
        assert bytes(last) == raw(BYTES)[3 * MIB :]
        assert parts.blocks_read() == [[1, 2], [3]]
        assert parts.metrics.count("fetched_bytes") == 2 * MIB + 100
        assert parts.metrics.latency("fetch").count == 1


def test_a_run_that_is_not_whole_blocks_is_refused() -> None:
    with parts_of(BYTES) as parts, pytest.raises(ValueError, match="range 0-5 of chunk c is not made of whole blocks"):
        parts.blocks.start(parts.chunk, [(0, memoryview(bytearray(5)))])


def test_damage_is_reported_to_who_waits_and_not_counted() -> None:
    with parts_of(BYTES) as parts:
        job = parts.blocks.start(damage(parts.chunk), [(0, memoryview(bytearray(MIB)))])
        with pytest.raises(IntegrityError, match="chunk c from toys is damaged: block 0 has BLAKE3"):
            parts.blocks.wait(job)
        assert parts.metrics.count("fetched_bytes") == 0


def test_waiting_is_a_stall_and_ends_when_the_run_is_interrupted() -> None:
    gate = Gate()
    with parts_of(BYTES) as parts:
        parts.source.gate = gate
        job = parts.blocks.start(parts.chunk, [(0, memoryview(bytearray(MIB)))])

        def interrupt() -> None:
            gate.wait_for("c")
            parts.run.interrupt(ModelError("no longer wanted"))

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(ModelError, match="no longer wanted"):
            parts.blocks.wait(job)
        thread.join()
        with pytest.raises(CancelledError):
            job.result(60)
        assert "stall" in parts.metrics.snapshot()["seconds"]
        assert parts.metrics.count("fetched_bytes") == 0


def test_an_interrupted_run_does_not_even_take_what_is_there() -> None:
    with parts_of(BYTES) as parts:
        job = parts.blocks.start(parts.chunk, [(0, memoryview(bytearray(MIB)))])
        job.result(60)
        parts.run.interrupt(ModelError("no longer wanted"))
        with pytest.raises(ModelError, match="no longer wanted"):
            parts.blocks.wait(job)


def test_a_source_that_is_closed_is_a_clear_error() -> None:
    gate = Gate()
    with parts_of(BYTES) as parts:
        parts.source.gate = gate
        job = parts.blocks.start(parts.chunk, [(0, memoryview(bytearray(MIB)))])
        gate.wait_for("c")
        parts.io.close()
        with pytest.raises(ModelClosedError, match="the source of toy was closed while it was read"):
            parts.blocks.wait(job)
        with pytest.raises(ModelClosedError, match="the client has been closed; open it again"):
            parts.blocks.start(parts.chunk, [(0, memoryview(bytearray(MIB)))])


def test_a_chunk_that_is_stored_otherwise_has_no_parts() -> None:
    error = "chunk c is stored as lossless, expected none: its parts cannot be read alone"
    with parts_of(BYTES, codec="lossless") as parts, pytest.raises(ManifestError, match=error):
        plain_form(parts.chunk)
