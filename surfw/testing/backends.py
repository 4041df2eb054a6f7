"""A test suite for storage backends, for backend authors. It needs pytest.

Subclass the suite in a test file and provide the backend as a fixture:

    from surfw.testing import StorageBackendSuite

    class TestMyBackend(StorageBackendSuite):
        @pytest.fixture
        def backend(self):
            return MyBackend(...)

Call `pytest.register_assert_rewrite("surfw.testing")` before the import to see the values of failed assertions.
For a read-only storage, store `OBJECTS` in it and subclass `ReadOnlyStorageBackendSuite`.

A backend that implements only the four required methods passes. The suite tests a backend as surfw uses it: keys are
validated before they reach it, foreign exceptions become surfw's, and missing operations are built from the existing
ones. Every operation runs on its own event loop, because surfw may use one backend on several loops in succession.
"""

import asyncio
import io
from array import array
from typing import Any

from surfw.errors import NotFoundError, StorageError
from surfw.storage import StorageBackend, adapt_backend

try:
    import pytest
except ModuleNotFoundError as exc:
    raise ImportError("surfw.testing needs pytest, which is not installed; run: pip install pytest") from exc

__all__ = ["KEY", "OBJECTS", "BrokenStream", "ReadOnlyStorageBackendSuite", "StorageBackendSuite"]

KEY = "blobs/ab/abcd.bin"
"""The key that most tests use."""

_EVERY_BYTE = bytes(range(256))
_LARGE = array("Q", range((33 << 17) + 3)).tobytes()

OBJECTS = {
    KEY: _EVERY_BYTE,
    "blobs/ab/empty.bin": b"",
    "blobs/large.bin": _LARGE,
    "models/a.json": b"{}",
    "models/org/b.json": b"{}",
    "modelsx": b"1",
}
"""The objects that a read-only storage has to hold for its tests, by key; one is larger than 32 MiB."""


class BrokenStream(io.RawIOBase):
    """A file that returns two pieces, then fails."""

    def __init__(self) -> None:
        self._left = 3

    def readable(self) -> bool:
        """Return true."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return a piece of 1000 bytes, whatever `size` is.

        Raises:
            OSError: on the third call, or if `size` is negative.
        """
        self._left -= 1
        if not self._left or size < 0:
            raise OSError(5, "Input/output error")
        return b"x" * 1000


class _Suite:
    @pytest.fixture
    def storage(self, backend: StorageBackend) -> StorageBackend:
        """The backend as surfw uses it."""
        return adapt_backend(backend)


class StorageBackendSuite(_Suite):
    """Tests for a writable backend, one behaviour each. Override the fixture `backend`."""

    @pytest.fixture
    def backend(self) -> StorageBackend:
        """The backend under test, empty; a new one for each test.

        Raises:
            NotImplementedError: the fixture was not overridden.
        """
        raise NotImplementedError("override the fixture 'backend': return an empty storage backend")

    def test_what_is_saved_is_loaded(self, storage: StorageBackend) -> None:
        """All byte values survive a round trip, and the size is known."""
        asyncio.run(storage.save(KEY, _EVERY_BYTE))
        assert asyncio.run(storage.load(KEY)) == _EVERY_BYTE
        assert asyncio.run(storage.size(KEY)) == 256
        assert asyncio.run(storage.exists(KEY)) is True

    def test_an_empty_object_is_an_object(self, storage: StorageBackend) -> None:
        """An empty object differs from a missing one."""
        asyncio.run(storage.save(KEY, b""))
        assert asyncio.run(storage.exists(KEY)) is True
        assert (asyncio.run(storage.load(KEY)), asyncio.run(storage.size(KEY))) == (b"", 0)

    def test_a_stream_is_saved_whole(self, storage: StorageBackend) -> None:
        """`save` also accepts a binary file."""
        data = _EVERY_BYTE * (3 << 12)
        asyncio.run(storage.save(KEY, io.BytesIO(data)))
        assert asyncio.run(storage.load(KEY)) == data

    def test_a_revision_changes_with_the_object_or_is_not_told(self, storage: StorageBackend) -> None:
        """A revision changes if and only if the object does; it may be None."""
        assert asyncio.run(storage.revision(KEY)) is None
        asyncio.run(storage.save(KEY, b"first"))
        first = asyncio.run(storage.revision(KEY))
        assert asyncio.run(storage.revision(KEY)) == first
        asyncio.run(storage.save(KEY, b"other"))
        assert first is None or asyncio.run(storage.revision(KEY)) not in {None, first}

    def test_saving_again_replaces(self, storage: StorageBackend) -> None:
        """Nothing of a longer previous object is left, even after range reads."""
        asyncio.run(storage.save(KEY, b"a long first one"))
        assert asyncio.run(storage.load_range(KEY, 2, 6)) == b"long"
        asyncio.run(storage.save(KEY, b"second"))
        assert asyncio.run(storage.load(KEY)) == b"second"
        assert asyncio.run(storage.load_range(KEY, 0, 3)) == b"sec"
        assert asyncio.run(storage.size(KEY)) == 6

    def test_a_stream_that_breaks_leaves_nothing(self, storage: StorageBackend) -> None:
        """A failed `save` creates no object."""
        stream: Any = BrokenStream()
        with pytest.raises(StorageError, match="Input/output error"):
            asyncio.run(storage.save(KEY, stream))
        assert asyncio.run(storage.exists(KEY)) is False
        assert asyncio.run(storage.list()) == []

    def test_a_stream_that_breaks_leaves_what_was_there(self, storage: StorageBackend) -> None:
        """A failed `save` changes nothing."""
        asyncio.run(storage.save(KEY, b"before"))
        stream: Any = BrokenStream()
        with pytest.raises(StorageError, match="Input/output error"):
            asyncio.run(storage.save(KEY, stream))
        assert asyncio.run(storage.load(KEY)) == b"before"

    def test_what_is_not_there(self, storage: StorageBackend) -> None:
        """A missing object raises `NotFoundError`, even if its key is a prefix of another."""
        asyncio.run(storage.save(KEY + ".more", b"1"))
        assert asyncio.run(storage.exists(KEY)) is False
        for work in (
            storage.load(KEY),
            storage.size(KEY),
            storage.load_range(KEY, 0, 1),
            storage.read_into(KEY, 0, memoryview(bytearray(1))),
        ):
            with pytest.raises(NotFoundError):
                asyncio.run(work)

    def test_a_part_of_a_key_is_no_object(self, storage: StorageBackend) -> None:
        """`blobs` and `blobs/ab` are no objects because `blobs/ab/abcd.bin` is one."""
        asyncio.run(storage.save(KEY, b"1"))
        assert asyncio.run(storage.exists("blobs/ab")) is False
        assert asyncio.run(storage.exists("blobs")) is False

    def test_ranges_are_end_exclusive(self, storage: StorageBackend) -> None:
        """Ranges exclude `stop`, as in Python."""
        asyncio.run(storage.save(KEY, _EVERY_BYTE))
        assert asyncio.run(storage.load_range(KEY, 0, 256)) == _EVERY_BYTE
        assert asyncio.run(storage.load_range(KEY, 10, 13)) == b"\x0a\x0b\x0c"
        assert asyncio.run(storage.load_range(KEY, 255, 256)) == b"\xff"

    def test_a_range_into_memory(self, storage: StorageBackend) -> None:
        """`read_into` writes exactly the destination."""
        asyncio.run(storage.save(KEY, _EVERY_BYTE))
        memory = bytearray(b"." * 6)
        asyncio.run(storage.read_into(KEY, 50, memoryview(memory)[1:5]))
        assert memory == b".2345."

    def test_a_pinned_read_is_of_that_revision_or_an_error(self, storage: StorageBackend) -> None:
        """A backend with revisions detects that an object was replaced."""
        asyncio.run(storage.save(KEY, b"first"))
        pinned = asyncio.run(storage.revision(KEY))
        memory = bytearray(5)
        asyncio.run(storage.read_into(KEY, 0, memoryview(memory), revision=pinned))
        assert memory == b"first"
        if pinned is not None:
            asyncio.run(storage.save(KEY, b"other"))
            with pytest.raises(StorageError, match="was changed"):
                asyncio.run(storage.read_into(KEY, 0, memoryview(memory), revision=pinned))

    def test_a_range_beyond_the_end_is_an_error(self, storage: StorageBackend) -> None:
        """A short read is an error."""
        asyncio.run(storage.save(KEY, b"1234"))
        with pytest.raises(StorageError):
            asyncio.run(storage.load_range(KEY, 2, 5))
        with pytest.raises(StorageError):
            asyncio.run(storage.load_range(KEY, 7, 9))
        with pytest.raises(StorageError):
            asyncio.run(storage.read_into(KEY, 2, memoryview(bytearray(3))))

    def test_ranges_read_at_once(self, storage: StorageBackend) -> None:
        """Many reads may be in flight on one loop."""
        data = _EVERY_BYTE * (1 << 12)
        asyncio.run(storage.save(KEY, data))
        step = len(data) // 22 + 1

        async def read() -> list[bytes]:
            starts = range(0, len(data), step)
            return await asyncio.gather(*(storage.load_range(KEY, at, min(at + step, len(data))) for at in starts))

        assert b"".join(asyncio.run(read())) == data

    def test_a_reader_sees_whole_objects_only(self, storage: StorageBackend) -> None:
        """While an object is replaced, a reader sees the old one or the new one."""
        objects = [bytes([value]) * 100_000 for value in range(8)]
        asyncio.run(storage.save(KEY, objects[0]))

        async def write_and_read() -> list[bytes]:
            writing = asyncio.gather(*(storage.save(KEY, data) for data in objects))
            seen = await asyncio.gather(*(storage.load(KEY) for _ in objects))
            await writing
            return seen

        assert set(asyncio.run(write_and_read())) <= set(objects)
        assert asyncio.run(storage.load(KEY)) in objects

    def test_what_is_removed_is_gone(self, backend: StorageBackend, storage: StorageBackend) -> None:
        """`remove` removes one object, and ignores a missing one. Skipped if the backend has no `remove`."""
        inner: StorageBackend = getattr(backend, "inner", backend)
        if type(inner).remove is StorageBackend.remove:
            with pytest.raises(StorageError, match="implement 'async def remove"):
                asyncio.run(storage.remove(KEY))
            pytest.skip("this backend cannot remove objects")
        for key in (KEY, KEY + ".more"):
            asyncio.run(storage.save(key, _EVERY_BYTE))
        assert asyncio.run(storage.load_range(KEY, 0, 2)) == b"\x00\x01"
        for _ in range(2):
            asyncio.run(storage.remove(KEY))
            assert asyncio.run(storage.exists(KEY)) is False
            assert asyncio.run(storage.list()) == [KEY + ".more"]
            with pytest.raises(NotFoundError):
                asyncio.run(storage.load_range(KEY, 0, 2))
        asyncio.run(storage.save(KEY, b"again"))
        assert asyncio.run(storage.load(KEY)) == b"again"

    def test_keys_are_listed_by_prefix(self, storage: StorageBackend) -> None:
        """A prefix is a string prefix, not a folder."""
        assert asyncio.run(storage.list()) == []
        assert asyncio.run(storage.list("models/")) == []
        for key in ("models/org/b.json", "models/a.json", "modelsx", "blobs/aa/x"):
            asyncio.run(storage.save(key, b"1"))
        assert asyncio.run(storage.list()) == ["blobs/aa/x", "models/a.json", "models/org/b.json", "modelsx"]
        assert asyncio.run(storage.list("models/")) == ["models/a.json", "models/org/b.json"]
        assert asyncio.run(storage.list("models/o")) == ["models/org/b.json"]
        assert asyncio.run(storage.list("mod")) == ["models/a.json", "models/org/b.json", "modelsx"]

    def test_a_listing_is_never_stale(self, storage: StorageBackend) -> None:
        """An object saved after a listing is in the next one."""
        assert asyncio.run(storage.list("models/")) == []
        asyncio.run(storage.save("models/a.json", b"1"))
        assert asyncio.run(storage.list("models/")) == ["models/a.json"]
        asyncio.run(storage.save("models/b.json", b"1"))
        assert asyncio.run(storage.list("models/")) == ["models/a.json", "models/b.json"]

    def test_a_foreign_key_is_what_does_not_belong(self, storage: StorageBackend) -> None:
        """`find_foreign_key` ignores the prefix: surfw checks for foreign objects before it creates a store."""
        assert asyncio.run(storage.find_foreign_key("partial/")) is None
        asyncio.run(storage.save("partial/x", b"1"))
        assert asyncio.run(storage.find_foreign_key("partial/")) is None
        asyncio.run(storage.save("thesis.doc", b"1"))
        assert asyncio.run(storage.find_foreign_key("partial/")) == "thesis.doc"

    def test_a_finished_file_is_adopted(self, storage: StorageBackend) -> None:
        """A file in the spool is moved into the storage."""
        spooled = storage.spool() / "1.tmp"
        spooled.parent.mkdir(parents=True, exist_ok=True)
        spooled.write_bytes(b"finished")
        asyncio.run(storage.adopt(KEY, spooled))
        assert asyncio.run(storage.load(KEY)) == b"finished"
        assert not spooled.exists()

    def test_closing(self, storage: StorageBackend) -> None:
        """`close` works before any use, after use, and twice."""
        asyncio.run(storage.close())
        asyncio.run(storage.save(KEY, b"1"))
        asyncio.run(storage.close())
        asyncio.run(storage.close())


class ReadOnlyStorageBackendSuite(_Suite):
    """Tests for a read-only backend. Override the fixture `backend`."""

    @pytest.fixture
    def backend(self) -> StorageBackend:
        """The backend under test, which holds exactly `OBJECTS`.

        Raises:
            NotImplementedError: the fixture was not overridden.
        """
        raise NotImplementedError("override the fixture 'backend': return a storage backend that holds OBJECTS")

    @pytest.mark.parametrize("key", OBJECTS)
    def test_an_object_is_loaded_whole(self, storage: StorageBackend, key: str) -> None:
        """Every byte is loaded, and the size is known."""
        assert asyncio.run(storage.load(key)) == OBJECTS[key]
        assert asyncio.run(storage.size(key)) == len(OBJECTS[key])
        assert asyncio.run(storage.exists(key)) is True

    @pytest.mark.parametrize("key", ["blobs/ab/nothing.bin", "blobs/ab/abcd", "blobs/ab", "blobs", "nothing/at.all"])
    def test_what_is_not_there(self, storage: StorageBackend, key: str) -> None:
        """Missing objects raise `NotFoundError`, and a part of a key is not an object."""
        assert asyncio.run(storage.exists(key)) is False
        assert asyncio.run(storage.revision(key)) is None
        for work in (storage.load(key), storage.size(key), storage.load_range(key, 0, 1)):
            with pytest.raises(NotFoundError):
                asyncio.run(work)

    @pytest.mark.parametrize(("start", "stop"), [(0, 256), (10, 13), (255, 256)])
    def test_ranges_are_end_exclusive(self, storage: StorageBackend, start: int, stop: int) -> None:
        """Ranges exclude `stop`, and `read_into` writes exactly the destination."""
        assert asyncio.run(storage.load_range(KEY, start, stop)) == _EVERY_BYTE[start:stop]
        memory = bytearray(b"." * (stop - start + 2))
        asyncio.run(storage.read_into(KEY, start, memoryview(memory)[1:-1]))
        assert memory == b"." + _EVERY_BYTE[start:stop] + b"."

    @pytest.mark.parametrize(("start", "stop"), [(254, 257), (300, 301)])
    def test_a_range_beyond_the_end_is_an_error(self, storage: StorageBackend, start: int, stop: int) -> None:
        """A short read is an error."""
        with pytest.raises(StorageError):
            asyncio.run(storage.load_range(KEY, start, stop))

    def test_a_large_read(self, storage: StorageBackend) -> None:
        """A large read is correct, even if the backend splits it into ranges."""
        memory = bytearray(len(_LARGE) - 7)
        asyncio.run(storage.read_into("blobs/large.bin", 3, memoryview(memory)[:-4]))
        assert memory[:-4] == _LARGE[3:-8]
        assert memory[-4:] == bytes(4)

    def test_reads_at_once(self, storage: StorageBackend) -> None:
        """Many reads may be in flight on one loop."""

        async def read() -> list[bytes]:
            return await asyncio.gather(*(storage.load_range("blobs/large.bin", at, at + 9) for at in range(24)))

        assert asyncio.run(read()) == [_LARGE[at : at + 9] for at in range(24)]

    def test_a_revision_stays_as_long_as_the_object_does(self, storage: StorageBackend) -> None:
        """A read pinned to another revision is an error."""
        pinned = asyncio.run(storage.revision(KEY))
        assert asyncio.run(storage.revision(KEY)) == pinned
        memory = memoryview(bytearray(256))
        asyncio.run(storage.read_into(KEY, 0, memory, revision=pinned))
        assert memory == _EVERY_BYTE
        with pytest.raises(StorageError, match="was changed"):
            asyncio.run(storage.read_into(KEY, 0, memory, revision='"another"'))

    def test_keys_are_listed_by_prefix(self, storage: StorageBackend) -> None:
        """A prefix is a string prefix, not a folder."""
        assert asyncio.run(storage.list()) == sorted(OBJECTS)
        assert asyncio.run(storage.list("models/")) == ["models/a.json", "models/org/b.json"]
        assert asyncio.run(storage.list("models/o")) == ["models/org/b.json"]
        assert asyncio.run(storage.list("mod")) == ["models/a.json", "models/org/b.json", "modelsx"]
        assert asyncio.run(storage.list("nothing/")) == []

    def test_writing_is_refused(self, storage: StorageBackend) -> None:
        """`save` raises `StorageError` and creates nothing."""
        for data in (b"1", io.BytesIO(b"1")):
            with pytest.raises(StorageError):
                asyncio.run(storage.save("blobs/new", data))
        assert asyncio.run(storage.exists("blobs/new")) is False

    def test_closing(self, storage: StorageBackend) -> None:
        """`close` works before any use, after use, and twice."""
        asyncio.run(storage.close())
        asyncio.run(storage.load(KEY))
        asyncio.run(storage.close())
        asyncio.run(storage.close())
