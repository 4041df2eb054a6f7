"""What a command sets in its process while it opens a model lasts no longer than that."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from surfw.cli.sources import open_model
from surfw.errors import UnknownModelError
from surfw.models.client import WeightClient
from surfw.settings import Settings
from tests.checkpoints import save_llama
from tests.cli.run import environment


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


@pytest.mark.parametrize(
    ("options", "own", "spins"),
    [
        ((), {}, None),
        (("--memory-budget", "900kB"), {}, None),
        (("--cache-layers", "2"), {}, "1000"),
        (("--cache-layers", "2"), {"OMP_WAIT_POLICY": "active"}, None),
        (("--cache-layers", "2"), {"GOMP_SPINCOUNT": "5"}, "5"),
    ],
)
def test_idle_threads_sleep_where_weights_are_streamed(
    options: tuple[str, ...], own: dict[str, str], spins: str | None, tmp_path: Path
) -> None:
    save_llama(tmp_path / "tiny")
    line = ["infer", "./tiny", "--prompt-ids", "1,2", "--max-new-tokens", "2", "--quiet", *options]
    code = (
        "import os, sys\n"
        "from surfw.cli.main import main\n"
        "sys.argv[1:] = " + repr(line) + "\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(os.environ.get('GOMP_SPINCOUNT'), file=sys.stderr)\n"
    )
    clean = {name: value for name, value in environment(tmp_path).items() if "OMP" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=clean | own
    )
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (0, [str(spins)]), done.stderr
