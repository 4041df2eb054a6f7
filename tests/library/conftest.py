"""A store with small models of each family, and a real server for it in a separate process."""

import asyncio
import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from surfw import ModelChunker
from surfw.runtime.buffers import Buffer
from tests.checkpoints import save_bert, save_llama
from tests.exactness.families import FAMILIES
from tests.servers import Served, serve


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints named bert, gpt2, llama and t5."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_llama(folder / "llama", layers=6)
    save_bert(folder / "bert")
    for name in ("gpt2", "t5"):
        torch.manual_seed(3)
        FAMILIES[name].build().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def store(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all of them."""
    path = tmp_path_factory.mktemp("library") / "store"
    for folder in sorted(checkpoints.iterdir()):
        ModelChunker(folder, path).chunk_model_sync()
    return path


@pytest.fixture(scope="session")
def server(store: Path) -> Iterator[Served]:
    """A server of the store in a separate process."""
    with serve(store) as served:
        yield served


def leftovers() -> list[str]:
    """Threads, sockets, and buffers of surfw that still exist; only buffers made since `gc.freeze`."""
    gc.collect()
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("surfw")]
    sockets = [link for fd in Path("/proc/self/fd").iterdir() if (link := _target(fd)).startswith("socket:")]
    buffers = [f"a buffer of {one.capacity_bytes} bytes" for one in gc.get_objects() if type(one) is Buffer]
    return threads + sockets + buffers


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


@pytest.fixture(scope="module", autouse=True)
def _thaw() -> Iterator[None]:
    """Undo the `gc.freeze` of `_nothing_is_left`."""
    yield
    gc.unfreeze()
    gc.collect()


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves no new thread, socket or buffer of surfw behind."""
    before = leftovers()
    gc.freeze()  # existing objects, millions of torch's, are not searched again, which would take a second per test
    yield

    def left() -> list[str]:
        new = sorted(set(leftovers()) - set(before))
        # the S3 client keeps its connections
        return [one for one in new if not (one.startswith("socket:") and "s3" in request.fixturenames)]

    # a model closed from one of its own threads could not wait for that thread
    until = time.monotonic() + 5
    while left() and time.monotonic() < until:
        time.sleep(0.01)
    assert left() == []


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """A working directory for the test."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def run(work: object) -> None:
    """Run a coroutine function, and check that none of its tasks is left."""

    async def main() -> None:
        await work()  # type: ignore[operator]
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    asyncio.run(main())
