"""Settings that a command makes in its process while it opens a model are undone afterwards."""

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest

from surfw import ModelChunker
from surfw.cli.sources import open_model
from surfw.errors import UnknownModelError
from surfw.models.client import WeightClient
from surfw.settings import Settings
from tests.checkpoints import save_llama
from tests.cli.run import SURFW, environment


@pytest.mark.parametrize("name", ["tiny", "nosuch"])
def test_while_a_model_is_opened_threads_get_their_turns_soon_and_no_garbage_is_looked_for(
    name: str, tmp_path: Path
) -> None:
    def now() -> tuple[float, bool]:
        return sys.getswitchinterval(), gc.isenabled()

    before, seen = now(), list[tuple[float, bool]]()
    with WeightClient(save_llama(tmp_path / "tiny")) as client:
        try:
            open_model(client, Settings(model=name), lambda _: seen.append(now())).close()
        except UnknownModelError:
            assert name == "nosuch"
    assert now() == before
    assert before[1]
    assert seen
    assert all(seconds < before[0] / 2 and not collects for seconds, collects in seen)


@pytest.mark.parametrize("place", ["./store", "./tiny"])
@pytest.mark.parametrize(
    ("options", "own", "spins"),
    [
        ((), {}, "300000"),
        (("--memory-budget", "1GB"), {}, "300000"),
        (("--memory-budget", "1500kB"), {}, "1000"),
        (("--cache-layers", "2"), {}, "1000"),
        (("--cache-layers", "2", "--dtype", "bfloat16"), {}, "300000"),
        (("--cache-layers", "2"), {"GOMP_SPINCOUNT": "5"}, "5"),
    ],
)
def test_idle_threads_sleep_where_weights_are_streamed(
    place: str, options: tuple[str, ...], own: dict[str, str], spins: str, home: Path
) -> None:
    clean = {name: value for name, value in environment(home).items() if "OMP" not in name}
    told = {"OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "2"}  # libgomp's own variable
    line = [SURFW, "infer", place, "--prompt-ids", "1,2", "--max-new-tokens", "2", "--quiet", *options]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=home, env=clean | told | own)
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)) == {spins}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "tiny", layers=12)
    ModelChunker(home / "tiny", home / "store").chunk_model_sync()
    return home
