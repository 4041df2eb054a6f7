"""The public suite for backends: it says what it needs, and finds backends that break the rules."""

import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
from surfw.storage import StorageBackend
from surfw.testing import StorageBackendSuite
import pytest

class Forgetful(StorageBackend):
    objects = {{}}
    async def load(self, key):
        return self.objects[key]
    async def save(self, key, data):
        self.objects[key] = {save}
    async def exists(self, key):
        return key in self.objects
    async def list(self, prefix=""):
        return [{listed} for key in self.objects if key.startswith(prefix)]

class TestForgetful(StorageBackendSuite):
    {fixture}
    def backend(self):
        Forgetful.objects = {{}}
        return Forgetful()
"""
RIGHT = {"save": "data if isinstance(data, bytes) else data.read()", "listed": "key", "fixture": "@pytest.fixture"}


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, set()),
        ({"save": "data"}, {"test_a_stream_is_saved_whole", "test_a_finished_file_is_adopted"}),
        ({"listed": "key.removeprefix(prefix)"}, {"test_keys_are_listed_by_prefix", "test_a_listing_is_never_stale"}),
    ],
)
def test_the_suite_finds_what_is_wrong(tmp_path: Path, change: dict[str, str], failing: set[str]) -> None:
    file = tmp_path / "test_mine.py"
    file.write_text(SUITE.format(**RIGHT | change))
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "-c", "/dev/null", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = {line.split("::")[-1].split(" ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert failing <= found, done.stdout[-2000:]
    assert bool(found) == bool(failing)
    assert done.returncode == (1 if failing else 0)


def test_without_pytest_one_line_says_what_to_install() -> None:
    script = "import sys; sys.modules['pytest'] = None\nimport surfw.testing"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: surfw.testing needs pytest, which is not installed; run: pip install pytest"
