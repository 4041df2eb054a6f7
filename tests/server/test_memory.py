"""The memory that clients can make a server keep: cache, windows, and a constant; measured from outside the process."""

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from surfw.bench.raw_peer import RawPeer, message
from surfw.config import MB, MIB
from surfw.manifest import Manifest
from tests.servers import Served, serve
from tests.stores import make_store

PAGE_BYTES = 4 * MIB
CLIENTS, GETS = 64, 64
WINDOW_BYTES = 2 * 512 * 1024
"""The smallest window: two frames."""
CACHE_MB = 34


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Four chunks of slightly more than seven pages: three times the cache."""
    path = tmp_path_factory.mktemp("memory")
    return path, make_store(path, sizes=[7 * PAGE_BYTES + 999] * 4, files={})


@pytest.fixture
def served(stored: tuple[Path, Manifest]) -> Iterator[Served]:
    with serve(stored[0], "--cache-mb", str(CACHE_MB), "--clients", str(CLIENTS)) as served:
        yield served


def peak_bytes(process: psutil.Process) -> int:
    """The peak memory of the process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def from_the_end_of_a_page(manifest: Manifest, number: int) -> dict[str, object]:
    """A `get` of the last byte of a page and the rest of its chunk."""
    chunk = manifest.chunks[number % 4]
    start = (number // 4 % 7 + 1) * PAGE_BYTES - 1
    asked = {"model": manifest.name, "chunk": chunk.id, "form": "none", "start": start, "stop": chunk.payload_bytes}
    return asked | {"priority": -number}  # the first byte of each request is sent before any of them continues


def come_and_go(served: Served, process: psutil.Process, manifest: Manifest) -> int:
    """Let many clients request much and read little, all at once; return the process's memory after they have left."""
    port = int(served.url.rpartition(":")[2])
    most = CACHE_MB * MB + CLIENTS * WINDOW_BYTES + 64 * MB
    clients = [RawPeer(port, receive_bytes=4096).shake_hands() for _ in range(CLIENTS)]
    for shift, client in enumerate(clients):
        client.greet(WINDOW_BYTES)
        asked = [
            message("get", id=number, **from_the_end_of_a_page(manifest, number + shift)) for number in range(GETS)
        ]
        client.send(b"".join(asked))
    for _ in range(3):  # each reads half a window, and lets the server send as much again
        for client in clients:
            taken = 0
            while taken < WINDOW_BYTES // 2:
                heard = client.hear()
                taken += len(heard) if isinstance(heard, bytes) else 0
            client.send(message("credit", bytes=taken))
            assert process.memory_info().rss < most, "the peak is past the bound"
    assert peak_bytes(process) < most
    for client in clients:
        client.close()
    deadline = time.monotonic() + 60
    while served.stats()["clients"]:
        assert time.monotonic() < deadline, "the server keeps clients that have left"
        time.sleep(0.1)
    return int(process.memory_info().rss)


def test_many_slow_clients_with_small_windows(stored: tuple[Path, Manifest], served: Served) -> None:
    """Their memory is returned, or reused by later clients: Python keeps the memory of 4,096 small tasks."""
    process = psutil.Process(served.process.pid)
    first, *later = [come_and_go(served, process, stored[1]) for _ in range(3)]
    assert first < (CACHE_MB + 112) * MB, "what the clients took is not given back"
    assert max(later) < first + CLIENTS * WINDOW_BYTES // 4, "each time, something is kept"
