"""`bench device` completes on the simulated device, where its times mean nothing, but other facts are right."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from surfw.bench import device as bench
from surfw.bench import device_model, device_streaming
from surfw.cli.app import app
from surfw.errors import ConfigurationError
from surfw.runtime import exponents

TOY = {
    "hidden_size": 64, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 20_000, "max_position_embeddings": 128,
}  # fmt: skip
FORMS = ("bf16", "int8", "int4", "lossless")


def test_every_part_runs_and_each_figure_is_written_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(device_model.SHAPES, "tiny", TOY)
    monkeypatch.setattr(exponents, "PIECE_WORDS", 128 << 10)  # so that coding takes less memory than a layer
    monkeypatch.setattr(device_streaming, "NEW_TOKENS", 6)
    monkeypatch.setattr(exponents, "_STEP_WORDS", 4 << 10)
    lines = tmp_path / "lines"
    command = ["bench", "device", "--device", "simulated", "--shape", "tiny", "--lines", str(lines), "--json"]
    command += ["--folder", str(tmp_path), "--disk", str(tmp_path), "--parts", "streamed,half,whole,packed,disk,70b"]
    done = CliRunner().invoke(app, command)
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows) == [json.loads(line)["name"] for line in lines.read_text().splitlines()]
    assert [row["note"] for row in rows.values() if "failed" in row["note"]] == []
    equal = {name: row["value"] for name, row in rows.items() if row["unit"] == "equal"}
    assert set(equal.values()) == {1.0}
    assert len(equal) == 9, "streamed alone and in a batch, half, three quarters, everything; the part in four forms"
    assert all(row["share"] <= 1 for name, row in rows.items() if "peak of device memory" in name)
    assert rows["half on the device"]["note"].startswith("4 of 8 layers stay")
    sizes = [float(rows[f"a part of the model in {form}, streamed"]["ceiling"]) for form in FORMS]
    assert sizes[1] > 1.8 * sizes[0], "fewer bytes are copied"
    assert sizes[2] > 3 * sizes[0]
    assert sizes[3] > 1.3 * sizes[0]
    assert "4 layers, 4 of them coded" in rows["a part of the model in lossless, streamed"]["note"]
    assert float(rows["a 70B shape in lossless, in 16 GB"]["ceiling"]) > float(
        rows["a 70B shape in bf16, in 16 GB"]["ceiling"]
    )
    assert rows["a part of the model in int8, streamed"]["baseline"]
    assert "same tokens as resident: True" in rows["from disk, host memory capped"]["note"]
    assert [path.name for path in tmp_path.iterdir()] == ["lines"], "nothing is left"


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(ConfigurationError, match="shape 'huge' is not known; expected one of tiny, 1b, 8b"):
        bench.bench_device("simulated", shape="huge")
    with pytest.raises(ConfigurationError, match="device 'cpu' is the CPU"):
        bench.bench_device("cpu")
    with pytest.raises(ConfigurationError, match="part 'all' is not known; expected some of streamed, accelerate, h"):
        bench.bench_device("simulated", parts=["all"])
    with pytest.raises(ConfigurationError, match=r"part 'disk' needs a folder on a disk \(disk, --disk\)"):
        bench.bench_device("simulated", parts=["disk"])
