"""With delayed, cut, damaged or repeated transfers, a model gives the resident model's bits, or one error."""

import asyncio
import contextlib
import copy
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from websockets.frames import Opcode

from surfw import RetryPolicy
from surfw.checkpoint import demo_checkpoint
from surfw.chunking import prepare_model, write_model
from surfw.config import DAMAGE_RETRIES
from surfw.errors import IntegrityError, ModelError, SurfwError, WireError
from surfw.models import StreamingModel
from surfw.storage import Store, open_backend
from surfw.testing.faults import DOWN, UP, Fault, FaultProxy
from tests.cli.run import complaint, surfw
from tests.exactness.families import FAMILIES, MIXTURES
from tests.exactness.test_families import inputs
from tests.servers import serve

NAMES = ("llama", "bert-mlm", "t5", "qwen3-moe")
"""One of them is a mixture, each of whose experts is a separate chunk."""
TOGETHER, AT_ONCE = 10, 3
SCHEDULES = 300
EQUAL_AT_LEAST = 3
HARMLESS = {"delay", "throttle", "cut"}
DEADLINE_SECONDS = 15
GUARD_SECONDS = 60
"""The time limit of a schedule; one that does not hang takes a few seconds at most."""


@dataclass(frozen=True)
class Served:
    """A served model, its inputs, and the resident model's outputs."""

    url: str
    given: dict[str, torch.Tensor]
    logits: torch.Tensor
    payload_bytes: int


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """The models, on one real server."""
    store, made = tmp_path_factory.mktemp("faults") / "store", {}
    asyncio.run(Store(open_backend(store)).create())
    with serve(store) as server, torch.no_grad():
        for name in NAMES:
            torch.manual_seed(0)
            path = tmp_path_factory.mktemp(name)
            family = (FAMILIES | MIXTURES)[name]
            family.build().save_pretrained(path)
            resident: Any = copy.deepcopy(getattr(transformers, family.class_name).from_pretrained(path))
            manifest = asyncio.run(write_model(prepare_model(str(path), name=name), open_backend(store)))
            given = inputs(resident, 1)
            made[name] = Served(server.url, given, resident(**given).logits, manifest.payload_bytes)
        yield made


def run_through(seed: int, name: str, served: Served) -> SurfwError | None:
    """Run one schedule; return its error if it may have one, or None if the model gave the right bits."""
    schedule = Fault.draw(seed, served.payload_bytes)
    kinds = {fault.kind for faults in schedule for fault in faults}
    what = f"seed {seed}, {name}: {schedule}"
    seconds = 30 if kinds <= HARMLESS else 0.7

    def run(url: str) -> torch.Tensor:
        with StreamingModel.open(
            url,
            name,
            cache_size=1 + seed % 3,
            retry=RetryPolicy(attempts=max(4, 2 * len(schedule)), first_delay_seconds=0.01, backoff=2),
            connect_timeout=seconds,
            silence_timeout=seconds,
        ) as streaming:
            logits: torch.Tensor = streaming(**served.given).logits
            return logits

    with FaultProxy(served.url, schedule) as proxy:
        try:
            seen = within(GUARD_SECONDS, lambda: run(proxy.url))
        except (WireError, IntegrityError, ModelError) as exc:
            error: SurfwError = exc
        except Exception as exc:
            raise AssertionError(what) from exc
        else:
            assert torch.equal(seen, served.logits), what
            return None
    up = any(fault.kind == "flip" and fault.direction == UP for faults in schedule for fault in faults)
    in_payload = not up and all(is_payload(sent, place) for sent, place in proxy.flips)
    must_pass = kinds <= HARMLESS | {"flip"} and in_payload and len(proxy.flips) <= DAMAGE_RETRIES
    assert not must_pass, f"{what}: {error}"
    return error


def within(seconds: float, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run this in another thread; the test fails if it hangs."""
    settled: Future[torch.Tensor] = Future()

    def run() -> None:
        try:
            settled.set_result(work())
        except BaseException as exc:  # noqa: BLE001 - whoever waits gets it
            settled.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return settled.result(seconds)


def is_payload(sent: bytes | bytearray, place: int) -> bool:
    """Whether this byte of the server's output is in the payload of a binary frame."""
    at = sent.find(b"\r\n\r\n") + 4
    while 4 <= at <= place and at + 2 <= len(sent):
        size, head = sent[at + 1], 2
        if size in {126, 127}:
            head = 4 if size == 126 else 10
            size = int.from_bytes(sent[at + 2 : at + head])
        if at <= place < at + head + size:
            return sent[at] & 15 == Opcode.BINARY and place >= at + head
        at += head + size
    return False


def run_through_two(seed: int, name: str, served: Served, folder: Path) -> SurfwError | None:
    """Use two sources with their own schedules; every third seed has a disk cache, which is correct afterwards."""
    schedules = [Fault.draw(seed, served.payload_bytes), Fault.draw(seed + 1_000_000, served.payload_bytes)]
    what = f"seed {seed}, {name}: {schedules}"
    cache: dict[str, Any] = {"disk_cache": "1GB", "cache_dir": folder, "offline": False} if seed % 3 == 0 else {}

    def run(source: str | list[str], **options: Any) -> torch.Tensor:
        with StreamingModel.open(source, name, cache_size=1 + seed % 3, **options, **cache) as streaming:
            logits: torch.Tensor = streaming(**served.given).logits
            return logits

    with FaultProxy(served.url, schedules[0]) as one, FaultProxy(served.url, schedules[1]) as other:
        patience: dict[str, Any] = {"connect_timeout": 0.7, "silence_timeout": 0.7, "deadline": DEADLINE_SECONDS}
        began = time.monotonic()
        error: SurfwError | None = None
        try:
            seen = within(
                GUARD_SECONDS,
                lambda: run([one.url, other.url], retry=RetryPolicy(first_delay_seconds=0.01, backoff=2), **patience),
            )
            assert torch.equal(seen, served.logits), what
        except SurfwError as exc:
            error = exc
        except Exception as exc:
            raise AssertionError(what) from exc
        assert time.monotonic() - began < GUARD_SECONDS, what
    if cache:
        assert not list(folder.rglob(".*")), what
        assert torch.equal(run(served.url), served.logits), what
    return error


def open_files() -> set[str]:
    """This process's open files, except those that Python opens to list them."""
    found = set()
    for number in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(f"{number.name} {number.readlink()}")
    return {one for one in found if "/proc/" not in one}


@pytest.mark.parametrize("seed", range(20 if os.environ.get("SURFW_TEST_LONG") else 1))
def test_through_faults_of_two_sources_the_command_line_says_the_same_or_one_error(seed: int, tmp_path: Path) -> None:
    """As above, with `surfw infer` and the model that comes with surfw."""
    assert surfw(tmp_path, "chunk", str(demo_checkpoint()), "--name", "toy", "-q").returncode == 0
    schedules = [Fault.draw(seed, 3_500_000), Fault.draw(seed + 1_000_000, 3_500_000)]
    common = ("--prompt-ids", "1,2,3", "--max-new-tokens", "3", "--cache-layers", "2", "-q")
    patience = ("--deadline", str(DEADLINE_SECONDS), "--silence-timeout", "0.7", "--connect-timeout", "1")
    with (
        serve(tmp_path / "store") as server,
        FaultProxy(server.url, schedules[0]) as one,
        FaultProxy(server.url, schedules[1]) as other,
    ):
        expected = surfw(tmp_path, "infer", "--source", server.url, *common)
        done = surfw(tmp_path, "infer", "--source", one.url, "--source", other.url, *patience, *common)
    assert expected.stdout
    if done.returncode:
        assert complaint(done)
    else:
        assert done.stdout == expected.stdout, f"seed {seed}: {schedules}"


def is_left(thread: threading.Thread) -> bool:
    """Whether a thread belongs to surfw."""
    return thread.name.startswith("surfw")


@pytest.mark.parametrize("first", range(0, 300 if os.environ.get("SURFW_TEST_LONG") else TOGETHER, TOGETHER))
def test_through_faults_of_two_sources_a_model_is_exact_or_fails_with_one_error(
    first: int, models: dict[str, Served], tmp_path: Path
) -> None:
    def run(seed: int) -> SurfwError | None:
        name = NAMES[seed % len(NAMES)]
        return run_through_two(seed, name, models[name], tmp_path / str(seed))

    before = open_files()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        errors = list(threads.map(run, range(first, first + TOGETHER)))
    texts = [str(error) for error in errors if error]
    assert all(text.isprintable() for text in texts), texts
    assert TOGETHER - len(texts) >= EQUAL_AT_LEAST, texts
    gc.collect()
    assert not list(filter(is_left, threading.enumerate()))
    left = {one for one in open_files() - before if "socket:" in one or str(tmp_path) in one}
    assert not left


@pytest.mark.parametrize("first", range(0, SCHEDULES, TOGETHER))
def test_through_faults_a_model_is_exact_or_fails_with_one_error(first: int, models: dict[str, Served]) -> None:
    """Ten seeds, a few at a time because they mostly wait; `run_through` runs any of them alone."""

    def run(seed: int) -> SurfwError | None:
        name = NAMES[seed % len(NAMES)]
        return run_through(seed, name, models[name])

    with ThreadPoolExecutor(AT_ONCE) as threads:
        errors = list(threads.map(run, range(first, first + TOGETHER)))
    texts = [str(error) for error in errors if error]
    assert all(text.isprintable() for text in texts), texts
    assert TOGETHER - len(texts) >= EQUAL_AT_LEAST, texts


def test_a_flip_in_a_chunk_costs_a_block_and_is_told(models: dict[str, Served]) -> None:
    served = models["llama"]
    flip = Fault("flip", DOWN, served.payload_bytes // 2, b"", 3)
    with FaultProxy(served.url, [[flip]]) as proxy, StreamingModel.open(proxy.url, "llama") as streaming:
        assert torch.equal(streaming(**served.given).logits, served.logits)
        statistics = streaming.statistics()
    assert statistics["cache"]["refetched_blocks"] == 1
    assert streaming.statistics()["cache"]["refetched_blocks"] == 1
