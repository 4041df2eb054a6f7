"""A catalog reads and parses a manifest once, and serves the current content of the store."""

import asyncio
import gc
import threading
import tracemalloc
from pathlib import Path

import pytest

from surfw.errors import RefusedError, StorageError
from surfw.server.catalog import Catalog
from surfw.server.journal import Journal
from surfw.storage import StorageBackend, Store
from surfw.wire import Get, GetFile
from tests.peers import until
from tests.server.backends import RecordingBackend
from tests.stores import make_store

MANIFEST = "models/a.json"


class Untold(RecordingBackend):
    """A storage that cannot tell whether an object has changed without reading it."""

    async def revision(self, key: str) -> str | None:
        return await StorageBackend.revision(self, key)


class Parsing(Store):
    """A store that records in which threads its manifests are parsed."""

    def __init__(self, backend: StorageBackend) -> None:
        super().__init__(backend)
        self.parsed: list[threading.Thread] = []

    def parse_manifest(self, model: str, data: bytes):  # type: ignore[no-untyped-def]
        self.parsed.append(threading.current_thread())
        return super().parse_manifest(model, data)


def test_a_manifest_is_parsed_once_as_long_as_it_stays_as_it_is(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, "a", [10])

    async def main() -> None:
        for backend, loads in ((RecordingBackend(tmp_path), 1), (Untold(tmp_path), 3)):
            store = Parsing(backend)
            catalog = Catalog(store)
            entries = [await catalog.read("a") for _ in range(3)]
            assert [entry.digest for entry in entries] == [manifest.digest] * 3
            assert entries[0].public is entries[2].public
            assert backend.asked.count(MANIFEST) == loads
            assert len(store.parsed) == 1
            assert store.parsed[0] is not threading.main_thread()

    asyncio.run(main())


@pytest.mark.parametrize("kind", [RecordingBackend, Untold])
def test_a_manifest_that_changes_is_read_again(tmp_path: Path, kind: type[RecordingBackend]) -> None:
    async def main() -> None:
        await asyncio.to_thread(make_store, tmp_path, "a", [10])
        catalog = Catalog(Store(kind(tmp_path)))
        before = await catalog.read("a")
        changed = await asyncio.to_thread(make_store, tmp_path, "a", [10], seed=1)
        after = await catalog.read("a")
        assert before.digest != after.digest == changed.digest
        assert (await catalog.entry("a")) is after

    asyncio.run(main())


def test_those_who_ask_at_once_share_one_read(tmp_path: Path) -> None:
    make_store(tmp_path, "a", [10])

    async def main() -> None:
        backend = Untold(tmp_path)
        catalog = Catalog(Store(backend))
        await catalog.models()
        entries = await asyncio.gather(*(catalog.read("a") for _ in range(5)))
        assert len({id(entry) for entry in entries}) == 1
        assert backend.asked == ["models/", MANIFEST]

    asyncio.run(main())


def test_looking_up_chunks_lists_nothing_while_the_listing_is_fresh(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, "a", [10])
    get = Get(0, "a", manifest.chunks[0].id, "none", 0, 10, 0)

    async def main() -> None:
        backend = RecordingBackend(tmp_path)
        catalog = Catalog(Store(backend), fresh_seconds=3600)
        for _ in range(3):
            assert (await catalog.chunk(get)).locations == manifest.chunks[0].forms[0].locations
            assert (await catalog.file(GetFile(1, "a", "vocab.txt")))[1] == manifest.files[1].digest
        assert backend.asked == ["models/", MANIFEST]

    asyncio.run(main())


def test_a_model_that_is_removed_is_refused(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, "a", [10])
    get = Get(0, "a", manifest.chunks[0].id, "none", 0, 10, 0)

    async def main() -> None:
        looking, reading = (Catalog(Store(RecordingBackend(tmp_path)), fresh_seconds=age) for age in (0, 3600))
        await looking.chunk(get)
        await reading.chunk(get)
        (tmp_path / MANIFEST).unlink()
        with pytest.raises(RefusedError, match="there is no model 'a' here"):
            await looking.chunk(get)
        with pytest.raises(RefusedError, match="there is no model 'a' here"):
            await reading.read("a")
        with pytest.raises(RefusedError, match="there is no model 'a' here"):
            await reading.chunk(get)
        await asyncio.to_thread(make_store, tmp_path, "a", [10])
        assert (await looking.read("a")).digest == (await reading.read("a")).digest == manifest.digest

    asyncio.run(main())


def test_what_is_known_is_served_while_the_storage_cannot_be_listed(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, "a", [10])
    get = Get(0, "a", manifest.chunks[0].id, "none", 0, 10, 0)

    class Unlisted(RecordingBackend):
        away = False

        async def list(self, prefix: str = "") -> list[str]:
            if self.away:
                raise StorageError("away")
            return await super().list(prefix)

    async def main() -> None:
        backend = Unlisted(tmp_path)
        journal = Journal()
        catalog = Catalog(Store(backend), journal, fresh_seconds=0)
        known = await catalog.chunk(get)
        backend.away = True
        assert await catalog.chunk(get) == known
        told = [(event["kind"], event["text"]) for event in journal.recent(details=True)]
        assert told == [("storage", "the models of the store cannot be listed: away")]
        with pytest.raises(StorageError, match="away"):
            await catalog.read("b")
        for _ in range(3):
            await catalog.chunk(get)
        backend.away = False
        await catalog.models()
        backend.away = True
        await catalog.chunk(get)
        await catalog.close()
        assert [event["text"] for event in journal.recent(details=True)] == [
            "the models of the store cannot be listed: away",
            "the models of the store cannot be listed: away (and 2 times more before)",
            "the models of the store cannot be listed: away",
        ]

    asyncio.run(main())


def test_closing_ends_reads_that_hang(tmp_path: Path) -> None:
    make_store(tmp_path, "a", [10])

    class Hanging(Untold):
        async def load(self, key: str) -> bytes:
            self.asked.append(key)
            await asyncio.Event().wait()
            return b""

    async def main() -> None:
        backend = Hanging(tmp_path)
        catalog = Catalog(Store(backend))
        reading = asyncio.create_task(catalog.read("a"))
        await until(lambda: MANIFEST in backend.asked)
        await catalog.close()
        await asyncio.wait([reading])
        assert reading.cancelled()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_what_is_kept_of_a_manifest_is_counted(tmp_path: Path) -> None:
    make_store(tmp_path, "a", [10] * 300)
    make_store(tmp_path, "b", [10])

    async def main() -> None:
        catalog = Catalog(Store(RecordingBackend(tmp_path)))
        await catalog.read("b")  # memory for imports and compilation does not count
        tracemalloc.start()
        entry = await catalog.read("a")
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(entry.public) < 0.7 * taken < entry.kept_bytes < 1.3 * taken, "each object counts once"
        assert catalog._entries.bytes == sum(catalog._entries[name].kept_bytes for name in tuple(catalog._entries))

    asyncio.run(main())


def test_a_manifest_that_is_sent_is_not_kept_for_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surfw.server.catalog._CACHE_BYTES", 1)
    monkeypatch.setattr("surfw.server.catalog._LEAST_KEPT", 1)
    make_store(tmp_path, "a", [10])
    make_store(tmp_path, "b", [10])

    async def main() -> None:
        backend = RecordingBackend(tmp_path)
        catalog = Catalog(Store(backend))
        document = await catalog.document("a")
        await catalog.document("b")
        assert list(catalog._entries) == ["b"], "one is kept, however large"
        assert bytes(await document.view(0, document.size)) == (await catalog.entry("a")).public
        assert backend.asked.count(MANIFEST) == 2
        await asyncio.to_thread(make_store, tmp_path, "a", [10], seed=1)
        await catalog.read("a")
        with pytest.raises(StorageError, match="was replaced while it was sent"):
            await document.view(0, 1)

    asyncio.run(main())


def test_a_few_models_stay_however_large_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surfw.server.catalog._CACHE_BYTES", 8)
    names = ("a", "b", "c", "d")
    for name in names:
        make_store(tmp_path, name, [10])

    async def main() -> None:
        store = Parsing(RecordingBackend(tmp_path))
        catalog = Catalog(store)
        documents = [await catalog.document(name) for name in names]
        for _ in range(3):
            for name, document in zip(names, documents, strict=True):
                await catalog.entry(name)
                assert len(await document.view(0, document.size)) == document.size
        assert len(store.parsed) == 4, "they are used in turns, and none makes room for another"

    asyncio.run(main())


def test_those_who_ask_for_the_models_at_once_share_a_listing(tmp_path: Path) -> None:
    make_store(tmp_path, "a", [10])

    async def main() -> None:
        backend = RecordingBackend(tmp_path)
        catalog = Catalog(Store(backend))
        first = asyncio.create_task(catalog.models())
        await until(lambda: "models/" in backend.asked)
        await asyncio.to_thread(make_store, tmp_path, "b", [10])
        later = [asyncio.create_task(catalog.models()) for _ in range(20)]
        assert set(await asyncio.gather(*later)) == {("a", "b")}, "they do not get what was listed before"
        await first
        assert backend.asked.count("models/") <= 3

    asyncio.run(main())
