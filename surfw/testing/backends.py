"""The tests that every storage backend has to pass, for those who write one. It needs pytest.

Subclass the suite in a test file of your own, and give it the backend:

    from surfw.testing import StorageBackendSuite

    class TestMyBackend(StorageBackendSuite):
        @pytest.fixture
        def backend(self):
            return MyBackend(...)

Put `pytest.register_assert_rewrite("surfw.testing")` before the import to see the values where an assertion fails.
For a storage that can only be read, prepare `OBJECTS` in it, and subclass `ReadOnlyStorageBackendSuite`.

A backend with only the four methods passes. It is tested as surfw uses it: keys are checked before they reach it,
foreign exceptions become surfw's, and what it does not implement is built on what it does. Every operation runs on an
event loop of its own, as surfw may use one backend on several loops, one after another.
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
"""The key that most of the tests use."""

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
"""What a storage that can only be read has to hold for its tests: by key, one of them larger than 32 MiB."""


class BrokenStream(io.RawIOBase):
    """A file that gives a few bytes, then fails."""

    def __init__(self) -> None:
        """Start with two pieces left to read."""
        self._left = 3

    def readable(self) -> bool:
        """It can be read, for a while."""
        return True

    def read(self, size: int = -1) -> bytes:
        """A piece.

        Raises:
            OSError: on the third call, and if all is asked for at once.
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
    """One behaviour of the interface for each test. Override the fixture `backend`."""

    @pytest.fixture
    def backend(self) -> StorageBackend:
        """The backend under test, empty; another one for each test.

        Raises:
            NotImplementedError: the fixture was not overridden.
        """
        raise NotImplementedError("override the fixture 'backend': return an empty storage backend")

    def test_what_is_saved_is_loaded(self, storage: StorageBackend) -> None:
        """All byte values come back, and the length is known."""
        asyncio.run(storage.save(KEY, _EVERY_BYTE))
        assert asyncio.run(storage.load(KEY)) == _EVERY_BYTE
        assert asyncio.run(storage.size(KEY)) == 256
        assert asyncio.run(storage.exists(KEY)) is True

    def test_an_empty_object_is_an_object(self, storage: StorageBackend) -> None:
        """No bytes are something else than no object."""
        asyncio.run(storage.save(KEY, b""))
        assert asyncio.run(storage.exists(KEY)) is True
        assert (asyncio.run(storage.load(KEY)), asyncio.run(storage.size(KEY))) == (b"", 0)

    def test_a_stream_is_saved_whole(self, storage: StorageBackend) -> None:
        """`save` takes a binary file too."""
        data = _EVERY_BYTE * (3 << 12)
        asyncio.run(storage.save(KEY, io.BytesIO(data)))
        assert asyncio.run(storage.load(KEY)) == data

    def test_a_revision_changes_with_the_object_or_is_not_told(self, storage: StorageBackend) -> None:
        """What is told stays the same as long as the object does, and no longer."""
        assert asyncio.run(storage.revision(KEY)) is None
        asyncio.run(storage.save(KEY, b"first"))
        first = asyncio.run(storage.revision(KEY))
        assert asyncio.run(storage.revision(KEY)) == first
        asyncio.run(storage.save(KEY, b"other"))
        assert first is None or asyncio.run(storage.revision(KEY)) not in {None, first}

    def test_saving_again_replaces(self, storage: StorageBackend) -> None:
        """Nothing of a longer predecessor is left, whichever way it was read before."""
        asyncio.run(storage.save(KEY, b"a long first one"))
        assert asyncio.run(storage.load_range(KEY, 2, 6)) == b"long"
        asyncio.run(storage.save(KEY, b"second"))
        assert asyncio.run(storage.load(KEY)) == b"second"
        assert asyncio.run(storage.load_range(KEY, 0, 3)) == b"sec"
        assert asyncio.run(storage.size(KEY)) == 6

    def test_a_stream_that_breaks_leaves_nothing(self, storage: StorageBackend) -> None:
        """An object is there whole, or not at all."""
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
        """A missing object is told from a storage that does not work; other objects change nothing about it."""
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
        """As in Python."""
        asyncio.run(storage.save(KEY, _EVERY_BYTE))
        assert asyncio.run(storage.load_range(KEY, 0, 256)) == _EVERY_BYTE
        assert asyncio.run(storage.load_range(KEY, 10, 13)) == b"\x0a\x0b\x0c"
        assert asyncio.run(storage.load_range(KEY, 255, 256)) == b"\xff"

    def test_a_range_into_memory(self, storage: StorageBackend) -> None:
        """Exactly the destination is written."""
        asyncio.run(storage.save(KEY, _EVERY_BYTE))
        memory = bytearray(b"." * 6)
        asyncio.run(storage.read_into(KEY, 50, memoryview(memory)[1:5]))
        assert memory == b".2345."

    def test_a_pinned_read_is_of_that_revision_or_an_error(self, storage: StorageBackend) -> None:
        """A backend that tells revisions notices that an object is another by now."""
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
        """A short answer is never taken for a whole one."""
        asyncio.run(storage.save(KEY, b"1234"))
        with pytest.raises(StorageError):
            asyncio.run(storage.load_range(KEY, 2, 5))
        with pytest.raises(StorageError):
            asyncio.run(storage.load_range(KEY, 7, 9))
        with pytest.raises(StorageError):
            asyncio.run(storage.read_into(KEY, 2, memoryview(bytearray(3))))

    def test_ranges_read_at_once(self, storage: StorageBackend) -> None:
        """Many reads may be under way on one loop."""
        data = _EVERY_BYTE * (1 << 12)
        asyncio.run(storage.save(KEY, data))
        step = len(data) // 22 + 1

        async def read() -> list[bytes]:
            starts = range(0, len(data), step)
            return await asyncio.gather(*(storage.load_range(KEY, at, min(at + step, len(data))) for at in starts))

        assert b"".join(asyncio.run(read())) == data

    def test_a_reader_sees_whole_objects_only(self, storage: StorageBackend) -> None:
        """While an object is replaced, a reader gets the old one or the new one."""
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
        """Exactly the object is removed; where there is none, nothing happens. Skipped without a `remove`."""
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
        """A prefix is the beginning of a text, not a folder."""
        assert asyncio.run(storage.list()) == []
        assert asyncio.run(storage.list("models/")) == []
        for key in ("models/org/b.json", "models/a.json", "modelsx", "blobs/aa/x"):
            asyncio.run(storage.save(key, b"1"))
        assert asyncio.run(storage.list()) == ["blobs/aa/x", "models/a.json", "models/org/b.json", "modelsx"]
        assert asyncio.run(storage.list("models/")) == ["models/a.json", "models/org/b.json"]
        assert asyncio.run(storage.list("models/o")) == ["models/org/b.json"]
        assert asyncio.run(storage.list("mod")) == ["models/a.json", "models/org/b.json", "modelsx"]

    def test_a_listing_is_never_stale(self, storage: StorageBackend) -> None:
        """What was saved after a listing is in the next one."""
        assert asyncio.run(storage.list("models/")) == []
        asyncio.run(storage.save("models/a.json", b"1"))
        assert asyncio.run(storage.list("models/")) == ["models/a.json"]
        asyncio.run(storage.save("models/b.json", b"1"))
        assert asyncio.run(storage.list("models/")) == ["models/a.json", "models/b.json"]

    def test_a_foreign_key_is_what_does_not_belong(self, storage: StorageBackend) -> None:
        """Surfw looks for other things before it makes a place its store."""
        assert asyncio.run(storage.find_foreign_key("partial/")) is None
        asyncio.run(storage.save("partial/x", b"1"))
        assert asyncio.run(storage.find_foreign_key("partial/")) is None
        asyncio.run(storage.save("thesis.doc", b"1"))
        assert asyncio.run(storage.find_foreign_key("partial/")) == "thesis.doc"

    def test_a_finished_file_is_adopted(self, storage: StorageBackend) -> None:
        """A file of the spool moves into the storage."""
        spooled = storage.spool() / "1.tmp"
        spooled.parent.mkdir(parents=True, exist_ok=True)
        spooled.write_bytes(b"finished")
        asyncio.run(storage.adopt(KEY, spooled))
        assert asyncio.run(storage.load(KEY)) == b"finished"
        assert not spooled.exists()

    def test_closing(self, storage: StorageBackend) -> None:
        """Closing works without a use, after one, and twice."""
        asyncio.run(storage.close())
        asyncio.run(storage.save(KEY, b"1"))
        asyncio.run(storage.close())
        asyncio.run(storage.close())


class ReadOnlyStorageBackendSuite(_Suite):
    """As `StorageBackendSuite`, for a storage that others fill. Override the fixture `backend`."""

    @pytest.fixture
    def backend(self) -> StorageBackend:
        """The backend under test, which holds `OBJECTS` and nothing else.

        Raises:
            NotImplementedError: the fixture was not overridden.
        """
        raise NotImplementedError("override the fixture 'backend': return a storage backend that holds OBJECTS")

    @pytest.mark.parametrize("key", OBJECTS)
    def test_an_object_is_loaded_whole(self, storage: StorageBackend, key: str) -> None:
        """Every byte, and the length is known."""
        assert asyncio.run(storage.load(key)) == OBJECTS[key]
        assert asyncio.run(storage.size(key)) == len(OBJECTS[key])
        assert asyncio.run(storage.exists(key)) is True

    @pytest.mark.parametrize("key", ["blobs/ab/nothing.bin", "blobs/ab/abcd", "blobs/ab", "blobs", "nothing/at.all"])
    def test_what_is_not_there(self, storage: StorageBackend, key: str) -> None:
        """Neither is a part of a key an object."""
        assert asyncio.run(storage.exists(key)) is False
        assert asyncio.run(storage.revision(key)) is None
        for work in (storage.load(key), storage.size(key), storage.load_range(key, 0, 1)):
            with pytest.raises(NotFoundError):
                asyncio.run(work)

    @pytest.mark.parametrize(("start", "stop"), [(0, 256), (10, 13), (255, 256)])
    def test_ranges_are_end_exclusive(self, storage: StorageBackend, start: int, stop: int) -> None:
        """As in Python; and exactly the destination is written."""
        assert asyncio.run(storage.load_range(KEY, start, stop)) == _EVERY_BYTE[start:stop]
        memory = bytearray(b"." * (stop - start + 2))
        asyncio.run(storage.read_into(KEY, start, memoryview(memory)[1:-1]))
        assert memory == b"." + _EVERY_BYTE[start:stop] + b"."

    @pytest.mark.parametrize(("start", "stop"), [(254, 257), (300, 301)])
    def test_a_range_beyond_the_end_is_an_error(self, storage: StorageBackend, start: int, stop: int) -> None:
        """A short answer is never taken for a whole one."""
        with pytest.raises(StorageError):
            asyncio.run(storage.load_range(KEY, start, stop))

    def test_a_large_read(self, storage: StorageBackend) -> None:
        """It may be cut into ranges: they are put together as they were."""
        memory = bytearray(len(_LARGE) - 7)
        asyncio.run(storage.read_into("blobs/large.bin", 3, memoryview(memory)[:-4]))
        assert memory[:-4] == _LARGE[3:-8]
        assert memory[-4:] == bytes(4)

    def test_reads_at_once(self, storage: StorageBackend) -> None:
        """Many may be under way on one loop."""

        async def read() -> list[bytes]:
            return await asyncio.gather(*(storage.load_range("blobs/large.bin", at, at + 9) for at in range(24)))

        assert asyncio.run(read()) == [_LARGE[at : at + 9] for at in range(24)]

    def test_a_revision_stays_as_long_as_the_object_does(self, storage: StorageBackend) -> None:
        """And a read of another one is an error."""
        pinned = asyncio.run(storage.revision(KEY))
        assert asyncio.run(storage.revision(KEY)) == pinned
        memory = memoryview(bytearray(256))
        asyncio.run(storage.read_into(KEY, 0, memory, revision=pinned))
        assert memory == _EVERY_BYTE
        with pytest.raises(StorageError, match="was changed"):
            asyncio.run(storage.read_into(KEY, 0, memory, revision='"another"'))

    def test_keys_are_listed_by_prefix(self, storage: StorageBackend) -> None:
        """A prefix is the beginning of a text, not a folder."""
        assert asyncio.run(storage.list()) == sorted(OBJECTS)
        assert asyncio.run(storage.list("models/")) == ["models/a.json", "models/org/b.json"]
        assert asyncio.run(storage.list("models/o")) == ["models/org/b.json"]
        assert asyncio.run(storage.list("mod")) == ["models/a.json", "models/org/b.json", "modelsx"]
        assert asyncio.run(storage.list("nothing/")) == []

    def test_writing_is_refused(self, storage: StorageBackend) -> None:
        """With surfw's own error."""
        for data in (b"1", io.BytesIO(b"1")):
            with pytest.raises(StorageError):
                asyncio.run(storage.save("blobs/new", data))
        assert asyncio.run(storage.exists("blobs/new")) is False

    def test_closing(self, storage: StorageBackend) -> None:
        """Closing works without a use, after one, and twice."""
        asyncio.run(storage.close())
        asyncio.run(storage.load(KEY))
        asyncio.run(storage.close())
        asyncio.run(storage.close())
