"""What a command sets in its process while it opens a model lasts no longer than that."""

import gc
import sys
from pathlib import Path

import pytest

from surfw.cli.sources import open_model
from surfw.errors import UnknownModelError
from surfw.models.client import WeightClient
from surfw.settings import Settings
from tests.checkpoints import save_llama


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
