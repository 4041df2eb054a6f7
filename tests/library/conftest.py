"""A store with small models of each family, and a real server of it in a process of its own."""

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
    """A store that holds them all."""
    path = tmp_path_factory.mktemp("library") / "store"
    for folder in sorted(checkpoints.iterdir()):
        ModelChunker(folder, path).chunk_model_sync()
    return path


@pytest.fixture(scope="session")
def server(store: Path) -> Iterator[Served]:
    """A server of the store, in a process of its own."""
    with serve(store) as served:
        yield served


def leftovers() -> list[str]:
    """Threads, sockets, and buffers of surfw that are still there; of buffers, those made since `gc.freeze`."""
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
    """What `_nothing_is_left` has frozen can be collected again."""
    yield
    gc.unfreeze()
    gc.collect()


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does, no thread, socket or buffer of surfw is left after it that was not there before."""
    before = leftovers()
    gc.freeze()  # what is there already, millions of objects of torch, is not looked at again: a second per test
    yield

    def left() -> list[str]:
        new = sorted(set(leftovers()) - set(before))
        # the client of S3 keeps its connections
        return [one for one in new if not (one.startswith("socket:") and "s3" in request.fixturenames)]

    # a model that was closed from one of its own threads could not wait for that thread's end
    until = time.monotonic() + 5
    while left() and time.monotonic() < until:
        time.sleep(0.01)
    assert left() == []


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """A working directory of its own."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def run(work: object) -> None:
    """Run a coroutine function, and see that no task of it stays behind."""

    async def main() -> None:
        await work()  # type: ignore[operator]
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    asyncio.run(main())
