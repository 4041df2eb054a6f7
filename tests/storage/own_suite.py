"""Additional checks for surfw's own backends: they validate keys themselves, and name missing objects."""

import asyncio
import itertools
from pathlib import Path

import pytest

from surfw.config import BLOCK_BYTES
from surfw.errors import IntegrityError, NotFoundError, StorageError
from surfw.storage import StorageBackend
from surfw.storage.base import RangedBackend
from surfw.storage.ranges import ObjectRange
from surfw.testing import KEY, StorageBackendSuite


def check_pieces(backend: RangedBackend, key: str, data: bytes) -> None:
    """Check that an object is read from its fourth byte on, in pieces of memory, with its progress reported."""
    sizes, heard = (BLOCK_BYTES - 5, 17, len(data) - 3 - BLOCK_BYTES - 12), list[int]()
    memory = [memoryview(bytearray(size)) for size in sizes]
    asyncio.run(backend.read_pieces(key, 3, iter(memory), heard.append))
    assert b"".join(memory) == data[3:]
    assert heard == sorted(heard)
    assert heard[-1] == len(data) - 3


class OwnBackendSuite(StorageBackendSuite):
    """One behaviour per test; the backend is not wrapped."""

    @pytest.fixture
    def storage(self, backend: StorageBackend) -> StorageBackend:
        return backend

    def test_errors_name_the_object_and_what_is_wrong(self, backend: StorageBackend) -> None:
        asyncio.run(backend.save("x", b"1234"))
        for work in (backend.load(KEY), backend.size(KEY), backend.load_range(KEY, 0, 1)):
            with pytest.raises(NotFoundError, match=r"abcd\.bin.*not found"):
                asyncio.run(work)
        with pytest.raises(StorageError, match=r"x.* ends"):
            asyncio.run(backend.load_range("x", 2, 5))

    def test_bytes_are_verified_in_whole_blocks_each_once(self, backend: StorageBackend) -> None:
        data = bytes(range(251)) * (5 * BLOCK_BYTES // 502)
        asyncio.run(backend.save("x", data))
        seen: list[tuple[int, bytes]] = []
        memory = memoryview(bytearray(len(data) - 3))
        part = ObjectRange("x", 3, len(memory))
        asyncio.run(backend.read_range(part, memory, lambda at, piece: seen.append((at, bytes(piece)))))
        assert memory == data[3:] == b"".join(piece for _, piece in seen)
        assert [at for at, _ in seen] == [*itertools.accumulate((len(piece) for _, piece in seen[:-1]), initial=0)]
        assert not any(at % BLOCK_BYTES for at, _ in seen)

        def refuse(at: int, piece: memoryview) -> None:
            raise IntegrityError("damaged")

        with pytest.raises(IntegrityError, match=r"^damaged$"):
            asyncio.run(backend.read_range(part, memory, refuse))

    def test_pieces_of_memory_are_filled_in_order_each_told_of(self, backend: StorageBackend) -> None:
        data = bytes(range(251)) * (2 * BLOCK_BYTES // 251)
        asyncio.run(backend.save("x", data))
        assert isinstance(backend, RangedBackend)
        check_pieces(backend, "x", data)
        with pytest.raises(StorageError, match=r"x.* ends"):
            asyncio.run(backend.read_pieces("x", len(data) - 3, [memoryview(bytearray(2))] * 2, lambda _: None))

    @pytest.mark.parametrize("key", ["../x", "/etc/passwd", "", "a//b", "a/../../x", "a\\b", "a\0b", ".hidden", "a/"])
    def test_keys_that_lead_elsewhere_reach_nothing(self, backend: StorageBackend, key: str, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("canary")
        for work in (
            backend.load(key), backend.save(key, b"!"), backend.exists(key), backend.size(key),
            backend.load_range(key, 0, 1), backend.read_into(key, 0, memoryview(bytearray(1))),
            backend.adopt(key, tmp_path / "x"), backend.revision(key),
            backend.remove(key), backend.read_pieces(key, 0, [memoryview(bytearray(1))], print),
        ):  # fmt: skip
            with pytest.raises(StorageError, match=r"storage key .* is refused"):
                asyncio.run(work)
        with pytest.raises(StorageError, match="is refused"):
            backend.local_path(key)
        assert (tmp_path / "x").read_text() == "canary"
        assert asyncio.run(backend.list()) == []

    @pytest.mark.parametrize("prefix", ["../", "/etc/", "a/../", "models/../../x", "..", "a//", "/", "a\0"])
    def test_prefixes_that_lead_elsewhere_are_refused(self, backend: StorageBackend, prefix: str) -> None:
        with pytest.raises(StorageError, match="is refused"):
            asyncio.run(backend.list(prefix))
