"""`bench start` times whole processes to their first token, beside downloading the checkpoint."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest

from surfw.bench import start
from surfw.bench.start import bench_start
from surfw.errors import ConfigurationError, SurfwError
from tests.checkpoints import save_llama
from tests.cli.run import surfw
from tests.services import warm
from tests.stores import make_store


def _start(command: list[str], *, stdin: int, stdout: int, stderr: IO[str]) -> warm.Process:
    return warm.start(command, stdin=stdin, stdout=stdout, stderr=stderr.fileno())


@pytest.mark.parametrize(
    ("download", "name"), [(True, "download, then transformers"), (False, "transformers, from the same folder")]
)
def test_each_way_is_timed_and_compared_with_transformers(
    download: bool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses processes that have their imports done; the next test starts one as users do."""
    instead = {"Popen": _start, "PIPE": subprocess.PIPE, "DEVNULL": subprocess.DEVNULL}
    monkeypatch.setattr(start, "subprocess", SimpleNamespace(**instead))
    checkpoint = save_llama(tmp_path / "tiny")
    if download:
        assert surfw(tmp_path, "chunk", str(checkpoint)).returncode == 0
    said: list[str] = []
    source, files = (tmp_path / "store", str(checkpoint)) if download else (checkpoint, None)
    found = bench_start(str(source), download=files, codecs=["none"], rounds=1, on_progress=said.append)
    ours, theirs, *parts = found.rows
    assert (ours.name, theirs.name) == ("surfw, codec none", name)
    assert ours.ratio == pytest.approx(theirs.value / ours.value)
    assert (ours.unit, theirs.ratio, theirs.note) == ("s", 1.0, "the baseline of all others")
    last = "where the time goes: surfw, codec none"
    assert said == ["round 1 of 1: surfw, codec none", f"round 1 of 1: {name}", last]
    assert [one.name.partition(": ")[2] for one in parts] == [
        "starting Python, and imports", "connecting, and the manifest", "building", "the first pass",
    ]  # fmt: skip
    assert all(one.value >= 0 and one.unit == "s" for one in parts)


def test_what_fails_is_named_with_its_last_words(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    says = r"surfw, codec none ended with exit code 1; its last words: surfw: error: .* has no model 'nope'"
    said: list[str] = []
    with pytest.raises(SurfwError, match=says):
        bench_start(str(tmp_path / "store"), model="nope", codecs=["none"], rounds=1, on_progress=said.append)
    assert said[0] == "without the checkpoint's own files (--download), nothing is compared with transformers"
    with pytest.raises(ConfigurationError, match="codec 'zip' is not known; expected some of auto, none, lossless"):
        bench_start(str(tmp_path / "store"), codecs=["zip"])
