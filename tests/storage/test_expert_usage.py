"""The saved expert usage is read back as it was written, or not at all."""

from pathlib import Path

import pytest

from surfw.storage.expert_usage import ExpertUsage, keep_usage, read_usage
from tests.test_manifest import experts_manifest

USAGE = ExpertUsage(7, {"layers.0.experts": (6.5, 0.5)})


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary home."""
    monkeypatch.setenv("SURFW_HOME", str(tmp_path))
    return tmp_path


def test_it_is_kept() -> None:
    manifest = experts_manifest()
    assert read_usage(manifest) is None
    keep_usage(manifest, ExpertUsage(1, {"layers.0.experts": (0.0, 1.0)}))
    keep_usage(manifest, USAGE)
    assert read_usage(manifest) == USAGE
    assert USAGE.concentration() == 6.5 / 7


@pytest.mark.parametrize(
    "counts", [{"layers.0.experts": (1.0,)}, {"layers.0.experts": (1.0, -1.0)}, {"layers.1.experts": (1.0, 1.0)}]
)
def test_what_does_not_fit_the_model_does_not_count(counts: dict[str, tuple[float, ...]]) -> None:
    keep_usage(experts_manifest(), ExpertUsage(1, counts))
    assert read_usage(experts_manifest()) is None


def test_what_is_damaged_does_not_count(home: Path) -> None:
    keep_usage(experts_manifest(), USAGE)
    (file,) = (home / "experts").iterdir()
    data = bytearray(file.read_bytes())
    data[-10] ^= 1
    file.write_bytes(data)
    assert read_usage(experts_manifest()) is None
    file.unlink()
    file.symlink_to("/dev/zero")
    assert read_usage(experts_manifest()) is None


def test_a_place_that_cannot_be_written_is_no_error(home: Path) -> None:
    (home / "experts").write_text("")
    keep_usage(experts_manifest(), USAGE)
    assert read_usage(experts_manifest()) is None
