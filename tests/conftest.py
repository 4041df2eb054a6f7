"""Fixtures for all tests: no hub, no progress bars, a temporary home, and what to do if a service is missing."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from surfw.files import user_name
from surfw.settings import CONFIG_VARIABLE, SETTINGS, TOKEN_VARIABLE
from tests.services.redis import redis_url
from tests.services.s3 import _botocore_reads_its_data_once, s3

__all__ = ["_botocore_reads_its_data_once", "redis_url", "s3"]

TESTS = Path(__file__).parent
_NOBODY = 65534

# Compiled files are kept (.gitignore names them), even if PYTHONDONTWRITEBYTECODE is set. Otherwise each process of
# xdist would spend 5 seconds on the tests' own files, and each command a tenth of a second on surfw's.
sys.dont_write_bytecode = False
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Several processes share the CPUs, so each computes with one thread. Two threads that wait for each other beside other
# work took several times as long. Waiting threads sleep. Torch reads this once, when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
hypothesis_settings.register_profile("surfw", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("surfw")  # no test depends on the speed of the machine

LONG = (
    "models/test_bounded", "bench/test_infer", "cli/test_signals", "cli/test_commands", "library/test_examples",
    "test_house", "cli/test_errors", "models/test_needs", "cli/", "exactness/", "library/", "in_place/",
    "storage/test_s3", "bench/", "demo/", "models/",
)  # fmt: skip
"""The files that take longest. They run first, so that no single process of xdist still runs one at the end."""


def pytest_configure(config: pytest.Config) -> None:
    """Without this, xdist would start with the files that have the most tests."""
    config.option.loadscopereorder = False


def pytest_xdist_auto_num_workers() -> int:
    """Use one process more than there are CPUs: tests often wait for processes, servers and time limits."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With xdist, run the longest files first."""
    if hasattr(config, "workerinput"):
        items.sort(key=_rank)  # within a file, the order is unchanged


def _rank(item: pytest.Item) -> int:
    name = item.path.relative_to(TESTS).as_posix()
    return next((rank for rank, long in enumerate(LONG) if name.startswith(long)), len(LONG))


def require(reason: str) -> NoReturn:
    """Skip a test that cannot run here; fail it if all services are required (`SURFW_REQUIRE_SERVICES`)."""
    if os.environ.get("SURFW_REQUIRE_SERVICES"):
        pytest.fail(f"SURFW_REQUIRE_SERVICES is set, but {reason}")
    pytest.skip(reason)


@contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Take the rights to a folder from this process, which is not root meanwhile; yields its user's name."""
    is_root = os.geteuid() == 0
    folder.chmod(0)
    if is_root:
        os.seteuid(_NOBODY)
    try:
        yield user_name()
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o700)


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a temporary home: the tester's home and settings are neither read nor changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURFW_HOME", str(tmp_path_factory.mktemp("home")))
        for name in (CONFIG_VARIABLE, TOKEN_VARIABLE, *(setting.variable for setting in SETTINGS.values())):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        require("only root can mount a small tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        require(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_known_of_all_models() -> Iterator[None]:
    """Forget what transformers stores on PreTrainedModel, because all derived classes would inherit it."""
    yield
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    noted = "_can_set_experts_implementation_cached_value"
    if base is not None and noted in vars(base):
        delattr(base, noted)
