"""`bench chunk`: both sides write every byte."""

from dataclasses import asdict
from pathlib import Path

import pytest

from surfw.bench.chunk import bench_chunk
from tests.checkpoints import save_llama


def test_rows_compare_with_cp(tmp_path: Path) -> None:
    checkpoint = save_llama(tmp_path / "tiny")
    (tmp_path / "work").mkdir()
    result = bench_chunk(str(checkpoint), folder=str(tmp_path / "work"), rounds=1)
    copied, chunked, memory = result.rows
    assert result.benchmark == "chunk"
    assert chunked.baseline == copied.value > 0
    assert chunked.ratio == pytest.approx(chunked.value / copied.value)
    assert chunked.low == chunked.value == chunked.high, "there was one round"
    assert memory.unit == "MB"
    assert not list((tmp_path / "work").iterdir()), "what was written for the measurement is gone"
    assert asdict(result).keys() == {"benchmark", "machine", "rows"}
    assert asdict(result)["rows"][1].keys() == {
        "name", "value", "unit", "low", "high", "baseline", "ratio", "ceiling", "share", "verified", "note", "ratios",
    }  # fmt: skip
