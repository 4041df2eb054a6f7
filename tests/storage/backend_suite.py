"""What every storage backend has to do. Subclass `BackendSuite` and give it a `backend` fixture."""

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest

from surfw.errors import NotFoundError, StorageError
from surfw.storage import StorageBackend

KEY = "blobs/ab/abcd.bin"


class BrokenStream(io.RawIOBase):
    """Gives a few bytes, then fails."""

    def __init__(self) -> None:
        self.left = 3

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self.left -= 1
        if not self.left:
            raise OSError(5, "Input/output error")
        return b"x" * 1000


class BackendSuite:
    """One behaviour of the interface for each test."""

    def test_what_is_saved_is_loaded(self, backend: StorageBackend) -> None:
        asyncio.run(backend.save(KEY, b"payload"))
        assert asyncio.run(backend.load(KEY)) == b"payload"
        assert asyncio.run(backend.size(KEY)) == 7
        assert asyncio.run(backend.exists(KEY))

    def test_an_empty_object_is_an_object(self, backend: StorageBackend) -> None:
        asyncio.run(backend.save(KEY, b""))
        assert asyncio.run(backend.exists(KEY))
        assert (asyncio.run(backend.load(KEY)), asyncio.run(backend.size(KEY))) == (b"", 0)

    def test_a_stream_is_saved_whole(self, backend: StorageBackend) -> None:
        asyncio.run(backend.save(KEY, io.BytesIO(b"ab" * 5000)))
        assert asyncio.run(backend.load(KEY)) == b"ab" * 5000

    def test_saving_again_replaces(self, backend: StorageBackend) -> None:
        asyncio.run(backend.save(KEY, b"a long first one"))
        asyncio.run(backend.save(KEY, b"second"))
        assert asyncio.run(backend.load(KEY)) == b"second"

    def test_a_stream_that_breaks_leaves_nothing(self, backend: StorageBackend) -> None:
        stream: Any = BrokenStream()
        with pytest.raises(StorageError, match="Input/output error"):
            asyncio.run(backend.save(KEY, stream))
        assert not asyncio.run(backend.exists(KEY))
        assert asyncio.run(backend.list()) == []

    def test_a_stream_that_breaks_leaves_what_was_there(self, backend: StorageBackend) -> None:
        asyncio.run(backend.save(KEY, b"before"))
        stream: Any = BrokenStream()
        with pytest.raises(StorageError, match="Input/output error"):
            asyncio.run(backend.save(KEY, stream))
        assert asyncio.run(backend.load(KEY)) == b"before"

    def test_what_is_not_there(self, backend: StorageBackend) -> None:
        assert not asyncio.run(backend.exists(KEY))
        for work in (backend.load(KEY), backend.size(KEY), backend.load_range(KEY, 0, 1)):
            with pytest.raises(NotFoundError, match=r"abcd\.bin.*not found"):
                asyncio.run(work)

    def test_ranges_are_end_exclusive(self, backend: StorageBackend) -> None:
        asyncio.run(backend.save(KEY, bytes(range(100))))
        assert asyncio.run(backend.load_range(KEY, 0, 100)) == bytes(range(100))
        assert asyncio.run(backend.load_range(KEY, 10, 13)) == b"\x0a\x0b\x0c"
        assert asyncio.run(backend.load_range(KEY, 99, 100)) == b"\x63"

    def test_a_range_into_memory(self, backend: StorageBackend) -> None:
        asyncio.run(backend.save(KEY, bytes(range(100))))
        memory = bytearray(b"." * 6)
        asyncio.run(backend.read_into(KEY, 50, memoryview(memory)[1:5]))
        assert memory == b".2345."

    def test_a_range_beyond_the_end_is_an_error(self, backend: StorageBackend) -> None:
        asyncio.run(backend.save(KEY, b"1234"))
        with pytest.raises(StorageError, match="ends"):
            asyncio.run(backend.load_range(KEY, 2, 5))
        with pytest.raises(StorageError, match="ends"):
            asyncio.run(backend.read_into(KEY, 2, memoryview(bytearray(3))))

    def test_a_revision_changes_with_the_object_or_is_not_told(self, backend: StorageBackend) -> None:
        assert asyncio.run(backend.revision(KEY)) is None
        asyncio.run(backend.save(KEY, b"first"))
        first = asyncio.run(backend.revision(KEY))
        assert asyncio.run(backend.revision(KEY)) == first
        asyncio.run(backend.save(KEY, b"other"))
        assert first is None or asyncio.run(backend.revision(KEY)) not in {None, first}

    def test_keys_are_listed_by_prefix_and_sorted(self, backend: StorageBackend) -> None:
        assert asyncio.run(backend.list()) == []
        assert asyncio.run(backend.list("models/")) == []
        for key in ("models/org/b.json", "models/a.json", "modelsx", "blobs/aa/x"):
            asyncio.run(backend.save(key, b"1"))
        assert asyncio.run(backend.list()) == ["blobs/aa/x", "models/a.json", "models/org/b.json", "modelsx"]
        assert asyncio.run(backend.list("models/")) == ["models/a.json", "models/org/b.json"]
        assert asyncio.run(backend.list("models/o")) == ["models/org/b.json"]
        assert asyncio.run(backend.list("mod")) == ["models/a.json", "models/org/b.json", "modelsx"]

    def test_a_stranger_is_what_does_not_belong(self, backend: StorageBackend) -> None:
        assert asyncio.run(backend.stranger("partial/")) is None
        asyncio.run(backend.save("partial/x", b"1"))
        assert asyncio.run(backend.stranger("partial/")) is None
        asyncio.run(backend.save("thesis.doc", b"1"))
        assert asyncio.run(backend.stranger("partial/")) == "thesis.doc"

    def test_a_finished_file_is_adopted(self, backend: StorageBackend) -> None:
        spooled = backend.spool() / "1.tmp"
        spooled.parent.mkdir(parents=True, exist_ok=True)
        spooled.write_bytes(b"finished")
        asyncio.run(backend.adopt(KEY, spooled))
        assert asyncio.run(backend.load(KEY)) == b"finished"
        assert not spooled.exists()

    @pytest.mark.parametrize("key", ["../x", "/etc/passwd", "", "a//b", "a/../../x", "a\\b", "a\0b", ".hidden", "a/"])
    def test_keys_that_lead_elsewhere_reach_nothing(self, backend: StorageBackend, key: str, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("canary")
        for work in (
            backend.load(key), backend.save(key, b"!"), backend.exists(key), backend.size(key),
            backend.load_range(key, 0, 1), backend.read_into(key, 0, memoryview(bytearray(1))),
            backend.adopt(key, tmp_path / "x"), backend.revision(key),
        ):  # fmt: skip
            with pytest.raises(StorageError, match=r"storage key .* is refused"):
                asyncio.run(work)
        with pytest.raises(StorageError, match="is refused"):
            backend.local_path(key)
        assert (tmp_path / "x").read_text() == "canary"
        assert asyncio.run(backend.list()) == []

    @pytest.mark.parametrize("prefix", ["../", "/etc/", "a/../", "models/../../x"])
    def test_prefixes_that_lead_elsewhere_are_refused(self, backend: StorageBackend, prefix: str) -> None:
        with pytest.raises(StorageError, match="is refused"):
            asyncio.run(backend.list(prefix))

    def test_closing(self, backend: StorageBackend) -> None:
        asyncio.run(backend.close())
