"""Through a network that delays, cuts, damages and repeats, a model gives the resident model's bits, or one error."""

import asyncio
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

from surfw import RetryPolicy
from surfw.chunking.chunker import prepare_model, write_model
from surfw.errors import SurfwError
from surfw.models import StreamingModel
from surfw.storage import Store, open_backend
from tests.exactness.families import FAMILIES
from tests.exactness.test_families import inputs
from tests.servers import serve
from tests.services.faults import DOWN, Fault, faults_before, make_schedule

NAMES = ("llama", "bert-mlm", "t5")
TOGETHER = 10
SCHEDULES = 300
EQUAL_AT_LEAST = 3
PATIENCE = RetryPolicy(attempts=4, first_delay_seconds=0.01, backoff=2)

pytestmark = pytest.mark.timeout(180)  # a schedule that hangs ends here; one that does not takes a few seconds at most


@dataclass(frozen=True)
class Served:
    """A served model, what goes into it, and what comes out of the resident one."""

    url: str
    given: dict[str, torch.Tensor]
    logits: torch.Tensor
    payload_bytes: int


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """The models, behind one real server."""
    store, made = tmp_path_factory.mktemp("faults") / "store", {}
    asyncio.run(Store(open_backend(store)).create())
    with serve(store) as server, torch.no_grad():
        for name in NAMES:
            torch.manual_seed(0)
            path = tmp_path_factory.mktemp(name)
            FAMILIES[name].build().save_pretrained(path)
            resident: Any = copy.deepcopy(getattr(transformers, FAMILIES[name].class_name).from_pretrained(path))
            manifest = asyncio.run(write_model(prepare_model(str(path), name=name), open_backend(store)))
            given = inputs(resident, 1)
            made[name] = Served(server.url, given, resident(**given).logits, manifest.payload_bytes)
        yield made


def run_through(seed: int, name: str, served: Served) -> SurfwError | None:
    """One schedule: its error; None if the model gave the bits that it should."""
    schedule = make_schedule(seed, served.payload_bytes)
    what = f"seed {seed}, {name}: {schedule}"
    with faults_before(served.url, schedule) as proxy:
        try:
            with StreamingModel.open(
                proxy.url,
                name,
                cache_size=1 + seed % 3,
                retry=PATIENCE,
                connect_timeout=0.7,
                silence_timeout=0.7,
            ) as streaming:
                seen = streaming(**served.given).logits
        except SurfwError as exc:
            return exc
        except Exception as exc:
            raise AssertionError(what) from exc
    assert torch.equal(seen, served.logits), what
    return None


@pytest.mark.parametrize("first", range(0, SCHEDULES, TOGETHER))
def test_through_faults_a_model_is_exact_or_fails_with_one_error(first: int, models: dict[str, Served]) -> None:
    """Ten seeds: `run_through` runs any of them alone."""
    errors = []
    for seed in range(first, first + TOGETHER):
        name = NAMES[seed % len(NAMES)]
        errors.append(run_through(seed, name, models[name]))
    texts = [str(error) for error in errors if error]
    assert all(text.isprintable() for text in texts), texts
    assert TOGETHER - len(texts) >= EQUAL_AT_LEAST, texts


def test_a_flip_in_a_chunk_costs_a_block_and_is_told(models: dict[str, Served]) -> None:
    served = models["llama"]
    flip = Fault("flip", DOWN, served.payload_bytes // 2, b"", 3)
    with faults_before(served.url, [[flip]]) as proxy, StreamingModel.open(proxy.url, "llama") as streaming:
        assert torch.equal(streaming(**served.given).logits, served.logits)
        statistics = streaming.statistics()
    assert statistics["cache"]["refetched_blocks"] == 1
    assert streaming.statistics()["cache"]["refetched_blocks"] == 1
