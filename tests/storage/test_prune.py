"""Pruning removes exactly the unneeded blobs, in whatever order its steps and those of writers run."""

import asyncio
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surfw.chunking.plan import ChunkPlan, PlannedChunk, PlannedTensor
from surfw.chunking.write import ChunkWriter
from surfw.errors import NotAStoreError, StorageError, UnknownModelError
from surfw.manifest import Manifest, decode_line
from surfw.storage import FilesystemBackend, StorageBackend, Store, adapt_backend
from surfw.storage.housekeeping import Housekeeping, leases
from surfw.storage.housekeeping.leases import ABANDONED_SECONDS, SILENT_SECONDS, TRUSTED_SECONDS, Lease, PruneLease
from surfw.storage.housekeeping.prune import prune
from surfw.storage.store import manifest_key, objects_of
from tests.storage.dict_backend import DictBackend, RemovingBackend
from tests.storage.stage import Stage
from tests.stores import make_store
from tests.toys import toy_chunk, toy_manifest

POOL = [toy_chunk(f"layers.{index}", [("U8", (10 + index,))], seed=index) for index in range(5)]
"""The chunks of models; models share some of them."""


class Pool:
    """The writers' source of bytes."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def read_into(self, chunk: PlannedChunk, start: int, destination: memoryview) -> None:
        self.read.append(chunk.name)
        payload = next(payload for toy, payload in POOL if toy.name == chunk.name)
        destination[:] = payload[start : start + len(destination)]


async def write(
    backend: StorageBackend, name: str, layers: Sequence[int], *, source: Pool | None = None, publish: bool = True
) -> Manifest:
    """Write a model as `surfw chunk` does."""
    store = Store(backend)
    await store.create()
    chunks = tuple(
        PlannedChunk(toy.name, toy.kind, tuple(PlannedTensor(info, info.name) for info in toy.tensors))
        for toy, _ in (POOL[index] for index in layers)
    )
    key = f"{hash((name, *layers)) & (1 << 128) - 1:032x}"
    writer = ChunkWriter(store.backend, source or Pool(), model=name, key=key, progress=lambda *_: None)
    with writer.locked():
        async with writer.lease.renewed():
            manifest = toy_manifest(await writer.write(ChunkPlan(chunks, ())), name=name)
            if publish:
                await writer.publish(store, manifest)
    return manifest


async def prune_it(backend: StorageBackend) -> Any:
    return await prune(Store(backend), dry_run=False, progress=lambda *_: None)


def blobs(objects: dict[str, bytes]) -> set[str]:
    return {key for key in objects if key.startswith("blobs/")}


def needs(layers: Sequence[int]) -> set[str]:
    return {f"blobs/{POOL[index][0].id[:2]}/{POOL[index][0].id}.safetensors" for index in layers}


async def check_whole(objects: dict[str, bytes], models: dict[str, Sequence[int]]) -> None:
    """Check that these models are complete, and that a last prune leaves exactly what they need."""
    async with Housekeeping(RemovingBackend(objects)) as house:
        verified = await house.verify()
        assert (verified.models, verified.damage) == (tuple(sorted(models)), ())
        await house.prune()
        assert blobs(objects) == set().union(*(needs(layers) for layers in models.values()))
        assert (await house.verify()).damage == ()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_LOOK_SECONDS", 0)


def test_every_place_where_a_pruner_can_come_between(tmp_path: Path) -> None:
    """One actor runs this far, then the other, then both in turn. The blob exists before, without a model."""
    before: dict[str, bytes] = {}
    asyncio.run(write(RemovingBackend(before), "gone", [0, 1]))
    del before[manifest_key("gone")]
    outcomes = set()

    async def meet(first: str, second: str, one: int, other: int) -> None:
        objects = dict(before)
        stage = Stage(objects, tmp_path / f"{first} {one} {other}")
        stage.enter("writer", write(stage.machine("writer"), "kept", [0]))
        stage.enter("pruner", prune_it(stage.machine("pruner")))
        await stage.play([*itertools.repeat(first, one), *itertools.repeat(second, other)])
        ended = await stage.finish()
        assert isinstance(ended["writer"], Manifest), ended
        assert needs([1]) <= set(stage.removed)
        outcomes.add(ended["pruner"].blobs)
        await check_whole(objects, {"kept": [0]})

    for first, second in (("writer", "pruner"), ("pruner", "writer")):
        for one in range(16):
            for other in range(14):
                asyncio.run(meet(first, second, one, other))
    assert outcomes == {1, 2}, "the blob was removed before it was relied on, or kept because it was"


models = st.lists(st.sampled_from(range(5)), min_size=1, max_size=4, unique=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    there=st.dictionaries(st.sampled_from("abc"), models, max_size=3),
    gone=st.sets(st.sampled_from("abc")),
    writing=st.dictionaries(st.sampled_from("bcd"), models, min_size=1, max_size=2),
    pruners=st.integers(1, 2),
    dies=st.integers(0, 40),
    schedule=st.lists(st.integers(0, 3), max_size=80),
)
def test_no_model_ever_lacks_a_blob_and_nothing_else_stays(
    tmp_path_factory: pytest.TempPathFactory,
    there: dict[str, list[int]],
    gone: set[str],
    writing: dict[str, list[int]],
    pruners: int,
    dies: int,
    schedule: list[int],
) -> None:
    folder = tmp_path_factory.mktemp("stage")

    async def play() -> None:
        objects: dict[str, bytes] = {}
        stage = Stage(objects, folder)
        await Store(RemovingBackend(objects)).create()
        for name, layers in there.items():
            await write(RemovingBackend(objects), name, layers)
        for name in gone & set(there):
            del objects[manifest_key(name)]
        orphans = blobs(objects)
        backends = {name: stage.machine(name) for name in writing}
        for name, layers in writing.items():
            stage.enter(name, write(backends[name], name, layers))
        for number in range(pruners):
            stage.enter(f"pruner {number}", prune_it(stage.machine(f"pruner {number}")))
        actors = [*writing, *(f"pruner {number}" for number in range(pruners))]
        killed = next(iter(writing))
        for at, turn in enumerate(schedule):
            if at == dies:
                stage.kill(killed)
            await stage.step(actors[turn % len(actors)])
        ended = await stage.finish()
        died = isinstance(ended[killed], StorageError)
        assert died == (str(ended[killed]) == f"{killed} was killed"), ended
        assert not [one for name, one in ended.items() if isinstance(one, BaseException) and name != killed], ended

        final = {name: layers for name, layers in there.items() if name not in gone} | writing
        if died:
            before = blobs(objects)
            done = {key for key in needs(writing[killed]) if key in set().union(*map(_held, objects.items()))}
            await prune_it(RemovingBackend(objects))
            assert done & before <= blobs(objects), "what a killed writer relied on stays"
            placed = _journal(folder / killed / "partial")
            source = Pool()
            stage.enter(killed, write(backends[killed], killed, writing[killed], source=source))
            assert isinstance((await stage.finish())[killed], Manifest)
            assert not placed & set(source.read), "what was done is not done again"
        needed = set().union(*(needs(layers) for layers in final.values()))
        assert not (blobs(objects) - needed - orphans)
        await check_whole(objects, final)

    asyncio.run(play())


def _held(item: tuple[str, bytes]) -> set[str]:
    key, data = item
    return set(json.loads(data)["objects"]) if key.startswith("leases/") else set()


def _journal(spool: Path) -> set[str]:
    """The chunks that a killed run had recorded as done."""
    lines = [line for file in spool.glob("*/journal.jsonl") for line in file.read_bytes().splitlines() if line]
    return {decode_line(line)["chunk"] for line in lines}


def orphaned() -> dict[str, bytes]:
    """A store with a blob that no model needs."""
    objects: dict[str, bytes] = {}
    for name, layers in (("gone", [0, 1]), ("kept", [1, 2])):
        asyncio.run(write(RemovingBackend(objects), name, layers))
    del objects[manifest_key("gone")]
    return objects


def test_a_dry_run_tells_and_does_nothing() -> None:
    objects = orphaned()
    before = dict(objects)
    told = asyncio.run(prune(Store(RemovingBackend(objects)), dry_run=True, progress=lambda *_: None))
    (orphan,) = needs([0])
    assert (told.blobs, told.blob_bytes, told.dry_run) == (1, len(objects[orphan]), True)
    assert objects == before
    done = asyncio.run(prune_it(RemovingBackend(objects)))
    assert (done.blobs, done.blob_bytes, done.dry_run) == (1, told.blob_bytes, False)
    assert before.keys() - objects.keys() == {orphan}


@pytest.mark.parametrize(
    ("key", "data", "complaint"),
    [
        ("models/x.json", b"{}", r"models/x\.json: the manifest from a dictionary, model x is not valid"),
        ("models/x.json", b'{"format": "surfw.manifest", "version": 9}', "format version '9'; this surfw reads"),
        ("models/x y.json", b"{}", r"models/x y\.json: model name 'x y' cannot be used"),
        ("leases/x.json", b"{}", r"leases/x\.json in a dictionary is not understood .KeyError: 'format'"),
        ("leases/x.json", b'{"format": "surfw.notice", "version": 9}', "expected the format 'surfw.notice', version 1"),
    ],
)  # fmt: skip
def test_what_is_not_understood_may_need_anything(key: str, data: bytes, complaint: str) -> None:
    objects = orphaned() | {key: data}
    before = dict(objects)
    with pytest.raises(StorageError, match=complaint):
        asyncio.run(prune_it(RemovingBackend(objects)))
    assert objects == before
    contents = asyncio.run(Housekeeping(RemovingBackend(objects)).contents())
    assert [model.name for model in contents.models] == ["kept"]
    assert contents.unneeded_blobs is None
    assert len(contents.complaints) == 1


def _folder(manifest: Path) -> None:
    manifest.mkdir()
    (manifest / "notes.txt").write_bytes(b"1")


def _link_to_folder(manifest: Path) -> None:
    manifest.symlink_to(manifest.parent, target_is_directory=True)


def _link_to_nothing(manifest: Path) -> None:
    manifest.symlink_to(manifest.parent / "nothing")


@pytest.mark.parametrize(
    ("put", "complaint"),
    [
        (Path.mkdir, "Is a directory"),
        (_folder, "Is a directory"),
        (_link_to_folder, "Is a directory"),
        (_link_to_nothing, "not found"),
        (os.mkfifo, "it is no regular file"),
    ],
)
def test_whatever_lies_in_the_place_of_a_manifest_is_one_that_cannot_be_read(
    put: Callable[[Path], None], complaint: str, tmp_path: Path
) -> None:
    make_store(tmp_path, "a", (5000,))
    manifest = tmp_path / "models" / "a.json"
    manifest.unlink()
    put(manifest)
    before = sorted(tmp_path.rglob("blobs/*/*"))
    told = rf"the manifest of model a cannot be read: .*{complaint}; move it away, and chunk the model again"
    with pytest.raises(StorageError, match=told):
        asyncio.run(prune_it(FilesystemBackend(tmp_path)))
    assert sorted(tmp_path.rglob("blobs/*/*")) == before
    contents = asyncio.run(Housekeeping(tmp_path).contents())
    assert (contents.unneeded_blobs, len(contents.complaints)) == (None, 1)
    (damage,) = asyncio.run(Housekeeping(tmp_path).verify()).damage
    assert (damage.model, damage.part) == ("a", "")
    assert complaint in damage.complaint


def test_links_to_folders_are_followed_and_a_link_to_nothing_hides_what_may_be_there(tmp_path: Path) -> None:
    store, models = tmp_path / "store", tmp_path / "models"
    make_store(store, "org/a", (5000,))
    (store / "models" / "org").rename(models)
    (store / "models" / "org").symlink_to(models, target_is_directory=True)
    assert asyncio.run(prune_it(FilesystemBackend(store))).blobs == 0
    models.rename(tmp_path / "away")
    with pytest.raises(StorageError, match="models/org leads to nothing"):
        asyncio.run(prune_it(FilesystemBackend(store)))
    (store / "models" / "org").unlink()
    (store / "models").rmdir()
    (store / "models").symlink_to(tmp_path / "not mounted", target_is_directory=True)
    with pytest.raises(StorageError, match=f"listing {store}/models: not found"):
        asyncio.run(prune_it(FilesystemBackend(store)))


def test_what_is_not_of_the_layout_is_named_and_stays() -> None:
    strange = {"notes.txt": b"1", "blobs/ab/readme": b"2", "blobs/ab/" + "c" * 64 + ".bin": b"3", "models/x.txt": b"4"}
    objects = orphaned() | strange
    pruned = asyncio.run(prune_it(RemovingBackend(objects)))
    assert pruned.left_alone == tuple(sorted(strange))
    assert strange.items() <= objects.items()


def test_what_is_no_store_is_not_pruned() -> None:
    objects = {f"blobs/ab/ab{'0' * 62}.bin": b"precious"}
    with pytest.raises(NotAStoreError):
        asyncio.run(prune_it(RemovingBackend(objects)))
    assert len(objects) == 1


def test_a_storage_that_cannot_remove_says_so_and_keeps_nothing_of_it() -> None:
    objects = orphaned()
    before = dict(objects)
    with pytest.raises(StorageError, match="DictBackend cannot do that; implement 'async def remove"):
        asyncio.run(prune_it(DictBackend(objects)))
    assert objects == before
    asyncio.run(write(DictBackend(objects), "more", [3]))
    asyncio.run(prune_it(RemovingBackend(objects)))
    asyncio.run(check_whole(objects, {"kept": [1, 2], "more": [3]}))
    assert not [key for key in objects if key.startswith(("leases/", "prunes/"))], "the overwritten lease went too"


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = time.time
    monkeypatch.setattr(leases.time, "time", lambda: now() + seconds)


def test_unfinished_work_holds_its_blobs_for_a_week(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    objects: dict[str, bytes] = {}
    asyncio.run(write(RemovingBackend(objects), "half", [0, 1], publish=False))
    (one,) = asyncio.run(Housekeeping(RemovingBackend(objects)).contents()).unfinished
    assert (one.name, one.at_work, one.blobs) == ("half", True, 2)
    later(monkeypatch, SILENT_SECONDS + 1)
    contents = asyncio.run(Housekeeping(RemovingBackend(objects)).contents())
    assert [(one.name, one.at_work) for one in contents.unfinished] == [("half", False)]
    assert asyncio.run(prune_it(RemovingBackend(objects))).blobs == 0
    later(monkeypatch, ABANDONED_SECONDS + 1)
    assert asyncio.run(prune_it(RemovingBackend(objects))).blobs == 2
    assert list(objects) == ["surfw.json"]


def test_removing_a_model_leaves_blobs_and_gives_unfinished_work_up(monkeypatch: pytest.MonkeyPatch) -> None:
    objects: dict[str, bytes] = {}
    backend = RemovingBackend(objects)
    house = Housekeeping(backend)
    asyncio.run(write(backend, "a", [0]))
    asyncio.run(write(backend, "b", [0, 1]))
    asyncio.run(write(backend, "b", [1, 2], publish=False))
    with pytest.raises(StorageError, match=r"b is being written into a dictionary by process \d+ on .*; stop that"):
        asyncio.run(house.remove("b"))
    assert manifest_key("b") in objects
    later(monkeypatch, SILENT_SECONDS + 1)
    removed = asyncio.run(house.remove("b"))
    assert (removed.model, removed.published, removed.given_up) == ("b", True, 1)
    assert blobs(objects) == needs([0, 1, 2])
    assert asyncio.run(house.prune()).blobs == 2
    asyncio.run(check_whole(objects, {"a": [0]}))
    with pytest.raises(UnknownModelError, match="has no model 'b'; it has: a"):
        asyncio.run(house.remove("b"))
    assert sorted(objects) == sorted([*needs([0]), "models/a.json", "surfw.json"])


def test_a_writer_whose_lease_was_given_up_does_not_publish_what_is_gone(tmp_path: Path) -> None:
    """As after a week of sleep: the lease was removed, the blobs were pruned, and then the writer continues."""
    objects: dict[str, bytes] = {}

    async def play() -> None:
        stage = Stage(objects, tmp_path)
        backend = stage.machine("writer")
        stage.enter("writer", write(backend, "late", [0, 1]))
        while len(blobs(objects)) < 2:
            await stage.step("writer")
        for key in [key for key in objects if key.startswith("leases/")]:
            del objects[key]
        assert (await prune_it(RemovingBackend(objects))).blobs == 2
        outcome = (await stage.finish())["writer"]
        assert isinstance(outcome, StorageError)
        assert "vanished from a dictionary while late was written; run the same command again" in str(outcome)
        assert manifest_key("late") not in objects
        stage.enter("writer", write(backend, "late", [0, 1]))
        assert isinstance((await stage.finish())["writer"], Manifest)
        await check_whole(objects, {"late": [0, 1]})

    asyncio.run(play())


def test_a_pruner_that_slept_removes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = orphaned()
    before = dict(objects)
    now = leases._clock

    class Sleepy(RemovingBackend):
        async def size(self, key: str) -> int:
            if key.startswith("blobs/"):
                monkeypatch.setattr(leases, "_clock", lambda: now() + TRUSTED_SECONDS + 1)
            return 0

    with pytest.raises(StorageError, match="was interrupted for so long that writers do not wait for it; start again"):
        asyncio.run(prune_it(Sleepy(objects)))
    assert objects == before


@pytest.mark.parametrize("sign", ["silence", "dead process"])
def test_a_pruner_that_died_does_not_stop_writers_for_ever(sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = orphaned()
    backend = RemovingBackend(objects)
    pruning = PruneLease(backend)
    asyncio.run(pruning.write())

    async def blocked() -> bool:
        writing = asyncio.create_task(write(backend, "new", [3]))
        done, _ = await asyncio.wait([writing], timeout=0.1)
        writing.cancel()
        await asyncio.wait([writing])
        return not done

    assert asyncio.run(blocked())
    if sign == "silence":
        later(monkeypatch, SILENT_SECONDS + 1)
    else:
        document = json.loads(objects[pruning.key])
        objects[pruning.key] = json.dumps(document | {"pid": 1 << 30}).encode()
    asyncio.run(write(backend, "new", [3]))
    asyncio.run(prune_it(backend))
    assert not [key for key in objects if key.startswith("prunes/")], "the next pruner clears it away"
    asyncio.run(check_whole(objects, {"kept": [1, 2], "new": [3]}))


def test_a_lease_is_renewed_while_it_is_needed_and_never_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.001)
    backend = RemovingBackend()

    async def play() -> None:
        mine = Lease(adapt_backend(backend), "leases/x.json", model="x")
        async with mine.renewed():
            await mine.write()
            first = backend.objects["leases/x.json"]
            while backend.objects["leases/x.json"] == first:  # noqa: ASYNC110 - the test is that this ends
                await asyncio.sleep(0.001)
            await mine.release()
            await asyncio.sleep(0.01)
        assert backend.objects == {}

    asyncio.run(play())


def test_leftovers_of_killed_runs_go_after_a_week_unless_someone_is_at_work(tmp_path: Path) -> None:
    make_store(tmp_path, "a", [10])
    backend = FilesystemBackend(tmp_path)
    spool = backend.spool()
    for name in ("0" * 32, "1" * 32, "2" * 32, "mine"):
        (spool / name).mkdir(parents=True)
        for file in ("lock", "journal.jsonl", "000001.tmp"):
            (spool / name / file).write_bytes(b"12345")
    (spool / f"{'3' * 32}.tmp").write_bytes(b"12345")
    (spool / f"{'4' * 32}.tmp").write_bytes(b"12345")
    old = time.time() - ABANDONED_SECONDS - 60
    for path in [*spool.rglob("*")]:
        if not path.is_relative_to(spool / ("1" * 32)) and path.name != f"{'4' * 32}.tmp":
            os.utime(path, (old, old))
    writer = ChunkWriter(backend, Pool(), model="x", key="2" * 32, progress=lambda *_: None)
    with writer.locked():
        pruned: Callable[[bool], Any] = lambda dry: asyncio.run(  # noqa: E731
            prune(Store(backend), dry_run=dry, progress=lambda *_: None)
        )
        assert (pruned(True).leftover_bytes, len(list(spool.iterdir()))) == (20, 6)
        assert pruned(False).leftover_bytes == 20
    assert sorted(path.name for path in spool.iterdir()) == ["1" * 32, "2" * 32, f"{'4' * 32}.tmp", "mine"]


def test_a_store_may_begin_with_what_is_in_progress() -> None:
    objects = {"leases/x.json": b"{}", "partial/x": b"", "prunes/y.json": b"{}"}
    asyncio.run(Store(RemovingBackend(objects)).create())
    with pytest.raises(NotAStoreError, match=r"such as thesis\.doc"):
        asyncio.run(Store(RemovingBackend({"leases/x.json": b"{}", "thesis.doc": b""})).create())


def test_what_is_needed_is_every_object_a_manifest_names(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, "a", [10, 20])
    found = objects_of(manifest)
    assert found == {key: (tmp_path / key).stat().st_size for key in found}
    assert set(found) == {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("blobs/*/*")}
