"""The bandwidth is measured by reading every byte of the model's own files."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from surfw.bench.peers.reads import _files, _read, _takes_direct_reads, measure_reads
from surfw.chunking.library import ModelChunker
from surfw.errors import NotAStoreError, UnknownModelError
from surfw.runtime.buffers import Buffer
from tests.checkpoints import save_llama


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a small LLaMA."""
    place = tmp_path_factory.mktemp("reads")
    ModelChunker(save_llama(place / "tiny"), place / "store").chunk_model_sync()
    return place / "store"


def test_a_rate_comes_of_it(store: Path) -> None:
    found = measure_reads(str(store), "tiny", seconds=0.01)
    assert found.bytes_per_second > 0
    assert found.direct == all(_takes_direct_reads(path) for path in asyncio.run(_files(str(store), "tiny")))


def test_the_files_are_those_of_the_chunks(store: Path) -> None:
    files = asyncio.run(_files(str(store), "tiny"))
    assert len(files) == len(set(files))
    assert set(files) == set((store / "blobs").rglob("*.safetensors"))


@pytest.mark.parametrize("size", [1, 4096, (8 << 20) + 4096 + 5, 16 << 20])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
def test_a_file_is_read_to_its_end(tmp_path: Path, size: int, direct: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    if direct and not _takes_direct_reads(path):
        pytest.skip("the file system of the temporary folder takes no direct reads")
    with ThreadPoolExecutor(2) as readers:
        assert _read(path, Buffer(size).view, readers, direct=direct) == size


def test_what_is_not_there_is_named(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="tiny"):
        measure_reads(str(store), "huge")
    with pytest.raises(NotAStoreError):
        measure_reads(str(tmp_path), "tiny")
