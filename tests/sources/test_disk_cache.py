"""The disk cache: fetched data is read from disk, is correct despite any damage, and stays within its budget."""

import asyncio
import contextlib
import errno
import fcntl
import logging
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from surfw.config import MB, MIB
from surfw.errors import ConfigurationError, IntegrityError, NotFoundError, UnknownModelError
from surfw.manifest import Manifest, Signature, count_blocks
from surfw.models.read_ahead import ReadAhead
from surfw.source import Read
from surfw.sources.disk import CacheFolder
from surfw.sources.disk_cache import DiskCache
from tests.sources.counted import CountedSource, read_all, whole
from tests.stores import TOKENIZER, make_store, payload

SIZES = [1, MIB, MIB + 1, 3 * MIB + 5, 11 * MIB + 4096]
URL = "ws://far.example:8765"
LONG = bool(os.environ.get("SURFW_TEST_LONG"))
"""Run many seeds, for hours, instead of a few."""


@asynccontextmanager
async def cached(
    tmp_path: Path, *, source: CountedSource | None = None, budget: int | None = None, url: str = URL
) -> AsyncIterator[DiskCache]:
    """A cache in the folder `cache`; offline if no source is given."""
    cache = DiskCache(source, CacheFolder(tmp_path / "cache", budget), url)
    await cache.open()
    async with cache:
        yield cache


def right(store: Path, manifest: Manifest) -> dict[str, bytes]:
    """The correct contents of the chunks."""
    return {chunk.name: payload(store, chunk) for chunk in manifest.chunks}


def fill(tmp_path: Path, name: str, *, budget: int | None = None) -> CountedSource:
    """Read a whole model of the store `store` through the cache."""
    source = CountedSource(tmp_path / "store")

    async def main() -> None:
        async with cached(tmp_path, source=source, budget=budget) as cache:
            await read_all(cache, await cache.manifest(name))

    asyncio.run(main())
    return source


def test_a_second_run_asks_for_nothing_and_a_third_needs_no_source(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", sizes=SIZES)
    expected = right(tmp_path / "store", made)
    sources = [CountedSource(tmp_path / "store") for _ in range(2)]

    async def main(source: CountedSource | None) -> tuple[int, int]:
        async with cached(tmp_path, source=source) as cache:
            assert await cache.models() == [made.name]
            manifest = await cache.manifest(await cache.resolve("model"))
            assert manifest.digest == made.digest
            assert {file.path: await cache.file(manifest, file.path) for file in manifest.files} == TOKENIZER
            assert await read_all(cache, manifest) == expected
            return cache.near_bytes, cache.far_bytes

    assert asyncio.run(main(sources[0])) == (0, sum(SIZES))
    assert asyncio.run(main(sources[1])) == (sum(SIZES), 0)
    assert asyncio.run(main(None)) == (sum(SIZES), 0)
    assert set(sources[0].asked.values()) == {1}
    assert sorted(sources[0].files) == sorted(TOKENIZER)
    assert not sources[1].asked
    assert not sources[1].files


def test_all_of_a_form_is_mapped_once_it_is_there(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", sizes=SIZES)
    source = CountedSource(tmp_path / "store")

    async def main() -> None:
        async with cached(tmp_path, source=source) as cache:
            manifest = await cache.manifest(made.name)
            for chunk in manifest.chunks:
                assert cache.near(manifest, chunk) == ()
                assert await cache.view(manifest, chunk, chunk.forms[0]) is None
                assert await cache.keep(manifest, chunk, chunk.forms[0])
                assert cache.near(manifest, chunk) == chunk.forms
                view = await cache.view(manifest, chunk, chunk.forms[0])
                assert view is not None
                assert view.is_mapped
                assert bytes(view.memory) == payload(tmp_path / "store", chunk)
                view.expect_unchanged()
        assert set(source.asked.values()) == {1}

    asyncio.run(main())


def test_what_others_kept_meanwhile_is_near(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", sizes=SIZES)

    async def main() -> None:
        sources = [CountedSource(tmp_path / "store") for _ in range(2)]
        async with cached(tmp_path, source=sources[0]) as one, cached(tmp_path, source=sources[1]) as other:
            manifest = await one.manifest(made.name)
            for chunk in (await other.manifest(made.name)).chunks:
                assert await one.keep(manifest, chunk, chunk.forms[0])
                assert other.near(manifest, chunk) == ()
                assert await other.keep(manifest, chunk, chunk.forms[0])
                assert other.near(manifest, chunk) == chunk.forms
            assert other.kept_bytes == 0, "all of it was there"

    asyncio.run(main())


def test_the_disk_is_filled_ahead_of_a_run_and_while_it_goes_on(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", sizes=SIZES)
    source = CountedSource(tmp_path / "store")

    async def main(*, goes_on: bool) -> int:
        async with cached(tmp_path, source=source) as cache:
            manifest = await cache.manifest(made.name)
            ahead = ReadAhead(cache, manifest, None, goes_on=goes_on)
            await ahead.begin(memory_bytes=0)
            first = whole(manifest.chunks[0])
            await ahead.view(manifest, first.chunk, first.form)  # nothing is read ahead, so no part of it can be either
            await ahead.fetch(manifest, [first])
            assert bool(ahead._kept) is goes_on
            assert bytes(first.destination) == payload(tmp_path / "store", manifest.chunks[0])
            waits = 0
            while goes_on and not all(cache.near(manifest, chunk) for chunk in manifest.chunks) and waits < 1000:
                await asyncio.sleep(0.01)
                waits += 1
            await ahead.close()
            return cache.kept_bytes

    assert asyncio.run(main(goes_on=False)) < sum(SIZES)
    assert asyncio.run(main(goes_on=True)) <= sum(SIZES)
    assert set(source.asked.values()) == {1}
    assert len(source.asked) == sum(count_blocks(size) for size in SIZES)


def test_only_the_blocks_that_are_missing_are_asked_for(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", sizes=[11 * MIB + 5])
    source = CountedSource(tmp_path / "store")

    async def main() -> None:
        async with cached(tmp_path, source=source) as cache:
            manifest = await cache.manifest(made.name)
            (chunk,) = manifest.chunks
            part = Read(chunk, chunk.forms[0], 3 * MIB, 5 * MIB, memoryview(bytearray(2 * MIB)))
            await cache.fetch(manifest, [part, part])
            assert bytes(part.destination) == payload(tmp_path / "store", chunk)[3 * MIB : 5 * MIB]
            assert cache.near(manifest, chunk) == chunk.forms
            assert await read_all(cache, manifest) == right(tmp_path / "store", manifest)
        assert source.asked == {(chunk.name, block): 1 for block in range(12)}

    asyncio.run(main())


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", sizes=[4 * MIB] * 6)
    sources = [CountedSource(tmp_path / "store") for _ in range(2)]

    async def main(source: CountedSource, *, until: int) -> None:
        async with cached(tmp_path, source=source) as cache:
            manifest = await cache.manifest(made.name)

            async def run() -> None:
                for chunk in manifest.chunks:
                    await cache.fetch(manifest, [whole(chunk)])

            task = asyncio.create_task(run())
            while cache.kept_bytes < until:  # noqa: ASYNC110 - there is nothing to wait for
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            kept.append(cache.kept_bytes)

    kept: list[int] = []
    asyncio.run(main(sources[0], until=9 * MIB))
    assert kept[0] < 24 * MIB

    async def again() -> None:
        async with cached(tmp_path, source=sources[1]) as cache:
            manifest = await cache.manifest(made.name)
            assert await read_all(cache, manifest) == right(tmp_path / "store", manifest)
            assert cache.near_bytes == kept[0]
            assert cache.far_bytes == 24 * MIB - kept[0]

    asyncio.run(again())


def damage(folder: Path, draw: random.Random) -> str:
    """Damage one file of a cache in one of several realistic ways."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in {"surfw-cache", "lock"})
    path = draw.choice(files)
    size = path.stat().st_size
    how = draw.choice(["flip", "flip", "flip", "cut", "zero", "grow", "remove"])
    if how == "remove":
        path.unlink()
    elif how == "cut":
        os.truncate(path, draw.randrange(size) if size else 0)
    elif how == "grow":
        os.truncate(path, size + draw.choice([1, 4096]))
    elif size:
        at = draw.randrange(size)
        with path.open("r+b") as file:
            file.seek(at)
            old = file.read(1 if how == "flip" else 5000)
            file.seek(at)
            file.write(bytes([old[0] ^ 1 << draw.randrange(8)]) if how == "flip" else bytes(len(old)))
    return f"{how} {path.relative_to(folder)}"


@pytest.mark.filterwarnings("ignore")
def test_damage_is_found_and_healed(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", sizes=SIZES)
    expected = right(tmp_path / "store", made)
    fill(tmp_path, made.name)

    async def main(source: CountedSource | None) -> None:
        async with cached(tmp_path, source=source) as cache:
            manifest = await cache.manifest(made.name)
            assert manifest.digest == made.digest
            assert {file.path: await cache.file(manifest, file.path) for file in manifest.files} == TOKENIZER
            for chunk in manifest.chunks:
                view = await cache.view(manifest, chunk, chunk.forms[0])
                assert view is None or bytes(view.memory) == expected[chunk.name]
            assert await read_all(cache, manifest) == expected

    draw = random.Random(18)
    for _ in range(200 if LONG else 30):
        what = [damage(tmp_path / "cache", draw) for _ in range(draw.choice([1, 1, 3]))]
        try:
            with contextlib.suppress(IntegrityError, NotFoundError, UnknownModelError):
                asyncio.run(main(None))  # damaged data is not used
            asyncio.run(main(CountedSource(tmp_path / "store")))
            asyncio.run(main(None))  # the damage is repaired
        except BaseException as exc:
            exc.add_note(f"after {what}")
            raise


def test_damage_offline_is_an_error_that_says_so(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", sizes=[3 * MIB])
    fill(tmp_path, made.name)
    (blob,) = (path for path in (tmp_path / "cache" / "blobs").rglob("*") if path.is_file())
    with blob.open("r+b") as file:
        file.seek(5)
        file.write(b"?!")

    async def main() -> None:
        async with cached(tmp_path) as cache:
            await read_all(cache, await cache.manifest(made.name))

    with pytest.raises(IntegrityError, match=r"chunk layers\.0 is damaged in the disk cache in .* run it once online"):
        asyncio.run(main())


def test_offline_only_what_the_source_had_is_found(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", sizes=[3 * MIB])
    with pytest.raises(ConfigurationError, match="there is no disk cache in"):
        asyncio.run(DiskCache(None, CacheFolder(tmp_path / "cache", None), URL).open())
    fill(tmp_path, made.name)

    async def main() -> None:
        async with cached(tmp_path, url="ws://other.example:1") as cache:
            assert await cache.models() == []
            with pytest.raises(UnknownModelError, match="the disk cache in"):
                await cache.manifest(made.name)

    asyncio.run(main())


def test_offline_a_manifest_of_which_nothing_was_asked_for_is_unknown(tmp_path: Path) -> None:
    """A reader of the manifest may refuse it: because of another pin, or a missing signature."""
    make_store(tmp_path / "refused", sizes=[MIB])
    made = make_store(tmp_path / "store", sizes=[3 * MIB])

    async def main() -> None:
        fresh = CountedSource(tmp_path / "store")
        async with cached(tmp_path, source=fresh) as cache:
            accepted = await cache.manifest(made.name)
            fresh.manifest = CountedSource(tmp_path / "refused").manifest  # type: ignore[method-assign]
            assert (await cache.manifest(made.name)).digest != made.digest
            await read_all(cache, accepted)
        async with cached(tmp_path, source=CountedSource(tmp_path / "store")) as cache:
            await read_all(cache, await cache.manifest(made.name))
        async with cached(tmp_path, source=CountedSource(tmp_path / "refused")) as cache:
            await cache.manifest(made.name)
        async with cached(tmp_path) as cache:
            assert (await cache.manifest(made.name)).digest == made.digest
        assert len(CacheFolder(tmp_path / "cache", None).models()) == 1

    asyncio.run(main())


def test_what_reads_a_part_of_a_model_keeps_its_manifest(tmp_path: Path) -> None:
    """As for a stage of a pipeline; a manifest that was refused is not kept."""
    made = make_store(tmp_path / "store", sizes=[MIB] * 3)
    forged = replace(made, signature=Signature("0" * 32, {}, bytes(64)))

    async def main() -> None:
        source = CountedSource(tmp_path / "store")
        async with cached(tmp_path, source=source) as cache:
            whole = await cache.manifest(made.name)

            async def forge(_: str) -> Manifest:
                return forged

            source.manifest = forge  # type: ignore[method-assign]
            await cache.manifest(made.name)
            await read_all(cache, replace(whole, chunks=whole.chunks[:1]))
            assert [cache.folder.in_use(one.manifest.digest) for one in cache.folder.models()] == [True]
        async with cached(tmp_path) as cache:
            assert (await cache.manifest(made.name)).digest == made.digest

    asyncio.run(main())


def test_what_learns_the_digests_of_a_model_keeps_its_manifest(tmp_path: Path) -> None:
    """As for the ranks of a job with a checkpoint that is read in place."""
    made = make_store(tmp_path / "store", sizes=[MIB] * 2)
    chunks = [replace(one, id="0" * 64, forms=(replace(one.forms[0], digest="", blocks=b""),)) for one in made.chunks]
    unknown = replace(made, chunks=tuple(chunks))

    async def main() -> None:
        source = CountedSource(tmp_path / "store")

        async def manifest(_: str) -> Manifest:
            return unknown

        source.manifest = manifest  # type: ignore[method-assign]
        async with cached(tmp_path, source=source) as cache:
            await cache.manifest(made.name)
            await read_all(cache, made)
            assert cache.folder.in_use(unknown.digest)

    asyncio.run(main())


def test_a_model_larger_than_the_budget_is_kept_in_part_and_thrashes_nothing(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", sizes=[MB] * 22)

    async def main() -> None:
        source = CountedSource(tmp_path / "store")
        folder = CacheFolder(tmp_path / "cache", 10 * MB + 10)
        cache = DiskCache(source, folder, URL)
        await cache.open()
        async with cache:
            manifest = await cache.manifest(made.name)
            for _ in range(3):
                for chunk in manifest.chunks:
                    await cache.fetch(manifest, [whole(chunk)])
            assert folder.evicted_blobs == 0
            assert folder.used_bytes() == 10 * (MB + 1)
            near = [chunk.name for chunk in manifest.chunks if cache.near(manifest, chunk)]
            assert near == [f"layers.{index}" for index in range(10)]
            assert {name: times for (name, _), times in source.asked.items() if name in near} == dict.fromkeys(near, 1)
            assert cache.near_bytes == 2 * 10 * MB

    asyncio.run(main())


def test_models_make_room_for_others_by_last_use_unless_they_are_pinned_or_in_use(tmp_path: Path) -> None:
    for name in "abcd":
        make_store(tmp_path / "store", name, [MB] * 4, seed=ord(name))
    folder = CacheFolder(tmp_path / "cache", 12 * MB + 100)

    def held() -> dict[str, int]:
        return {one.manifest.name: one.held_bytes // MB for one in folder.models()}

    for name in "abc":
        fill(tmp_path, name, budget=folder.budget_bytes)
        time.sleep(0.01)  # so that their times of use differ
    assert held() == {"a": 4, "b": 4, "c": 4}
    a, b, _ = (one.manifest for one in folder.models())
    folder.pin(a)
    folder.use(b)
    fill(tmp_path, "d", budget=folder.budget_bytes)
    assert held() == {"a": 4, "b": 4, "c": 0, "d": 4}
    time.sleep(0.01)
    folder.close()
    fill(tmp_path, "c", budget=folder.budget_bytes)
    assert held() == {"a": 4, "b": 4, "c": 4, "d": 0}  # d was used before b was released
    assert folder.remove(a) == 4 * (MB + 1)
    assert held() == {"b": 4, "c": 4, "d": 0}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    made = make_store(tmp_path / "store", sizes=SIZES)
    source = CountedSource(tmp_path / "store")

    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    async def main() -> None:
        async with cached(tmp_path, source=source) as cache:
            manifest = await cache.manifest(made.name)
            monkeypatch.setattr(os, "pwrite", refuse)
            for _ in range(2):
                assert await read_all(cache, manifest) == right(tmp_path / "store", manifest)
            assert cache.kept_bytes == 0

    with caplog.at_level(logging.WARNING, "surfw.cache"):
        asyncio.run(main())
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        f"{os.strerror(code)}; what is missing there is fetched at every use"
    ]


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "letters.txt").write_text("mine")
    cache = DiskCache(CountedSource(tmp_path), CacheFolder(tmp_path / "cache", None), URL)
    with pytest.raises(ConfigurationError, match="is no disk cache, and not empty"):
        asyncio.run(cache.open())
    asyncio.run(cache.close())
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["letters.txt"]


def test_a_folder_that_another_process_is_making_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    path.mkdir()
    (path / ".surfw-cache.1.2").touch()  # the marker is being written, or its writer was killed
    CacheFolder(path, None).create()
    (path / "surfw-cache").unlink()
    iterate = Path.iterdir

    def make_meanwhile(folder: Path) -> Iterator[Path]:
        (path / "surfw-cache").write_bytes(b"")
        return iterate(folder)

    monkeypatch.setattr(Path, "iterdir", make_meanwhile)
    CacheFolder(path, None).create()


def test_who_looks_whether_a_model_is_used_does_not_hide_that_it_is(tmp_path: Path) -> None:
    manifest = make_store(tmp_path / "store", sizes=[1])
    one, other = CacheFolder(tmp_path / "cache", None), CacheFolder(tmp_path / "cache", None)
    one.create()
    looks = os.open(tmp_path / "cache" / "models" / f"{manifest.digest}.use", os.O_RDWR | os.O_CREAT)
    fcntl.flock(looks, fcntl.LOCK_EX)
    using = threading.Thread(target=one.use, args=(manifest,))
    using.start()
    using.join(0.05)
    os.close(looks)
    using.join()
    assert other.in_use(manifest.digest)
    one.close()
    assert not other.in_use(manifest.digest)


READER = """
import asyncio, sys
from pathlib import Path
from surfw.sources.disk import CacheFolder
from surfw.sources.disk_cache import DiskCache
from tests.sources.counted import CountedSource, whole

async def main(root):
    cache = DiskCache(CountedSource(root / "store"), CacheFolder(root / "cache", None), "ws://far.example:8765")
    await cache.open()
    async with cache:
        manifest = await cache.manifest("toy/model")
        print("ready", flush=True)
        sys.stdin.readline()
        for chunk in manifest.chunks:
            await cache.fetch(manifest, [whole(chunk)])
        print(cache.far_bytes, flush=True)

asyncio.run(main(Path(sys.argv[1])))
"""


def start_reader(tmp_path: Path) -> subprocess.Popen[str]:
    """Start a process that opens the cache, and reads the model when it is told to."""
    command = [sys.executable, "-c", READER, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_processes_at_once_fetch_each_block_once(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", sizes=[5 * MIB + 7] * 8)
    processes = [start_reader(tmp_path) for _ in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum(map(int, outputs)) == sum(chunk.payload_bytes for chunk in made.chunks)


def test_blocks_are_written_from_wherever_they_lie_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_store(tmp_path / "store", sizes=[3 * MIB + 4096 + 5])
    form, data = made.chunks[0].forms[0], payload(tmp_path / "store", made.chunks[0])
    folder = CacheFolder(tmp_path / "cache", None)
    folder.create()
    write, direct, most = os.pwrite, list[int](), 0

    def watched(fd: int, piece: memoryview, start: int) -> int:
        is_direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        written = write(fd, piece[:most] if is_direct and most is not None else piece, start)
        direct.extend([written] * is_direct)
        return written

    monkeypatch.setattr(os, "pwrite", watched)
    probe = os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT)
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_DIRECT))
        is_allowed = True
    except OSError:
        is_allowed = False
    os.close(probe)
    for skipped, most in ((0, None), (0, 8192), (0, 0), (1, None)):  # a direct write may write only a part, or nothing
        direct.clear()
        memory = memoryview(mmap.mmap(-1, 4 * MIB))[skipped : skipped + len(data)]
        memory[:] = data
        with contextlib.closing(folder.open_blob(form, create=True)) as blob:
            blob.write(1, memory[MIB:], is_mapped_next=False)
            assert sum(direct) == (2 * MIB + 4096) * (is_allowed and skipped == 0 and most != 0)
            direct.clear()
            blob.write(0, memory[:MIB], is_mapped_next=True)
            assert direct == []
            assert blob.present() == b"\1" * 4
        assert blob.path.read_bytes() == data + b"\1" * 4
        blob.path.unlink()


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_wrong(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", sizes=[5 * MIB + 7] * 12)
    expected = right(tmp_path / "store", made)

    async def main() -> int:
        async with cached(tmp_path, source=CountedSource(tmp_path / "store")) as cache:
            manifest = await cache.manifest(made.name)
            assert await read_all(cache, manifest) == expected
            return cache.healed_blocks

    draw = random.Random(9)
    for _ in range(30 if LONG else 3):
        process = start_reader(tmp_path)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(draw.uniform(0, 0.06))
        process.kill()
        process.communicate()
        assert asyncio.run(main()) == 0
        folder = CacheFolder(tmp_path / "cache", None)
        assert not list((tmp_path / "cache").rglob(".*"))
        for one in folder.models():
            folder.remove(one.manifest)
