"""Several sources as one: their order, what is requested again after a fault, and when the source gives up."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from surfw.config import MIB
from surfw.errors import ConnectionFailedError, IntegrityError, ManifestError, UnknownModelError
from surfw.manifest import Base, Chunk, Manifest
from surfw.retry import RetryPolicy
from surfw.source import Read
from surfw.sources.choice import SourceTable, Standing
from surfw.sources.failover import Failover
from surfw.sources.identity import find_difference
from tests.sources.counted import read_all
from tests.sources.faulty import FaultySource, damaged, lost, opener
from tests.stores import TOKENIZER, make_store, payload

QUICK = RetryPolicy(attempts=3, first_delay_seconds=0.01, backoff=2, jitter=0)
SIZES = [3 * MIB + 7, 20 * MIB]


def table(*, retry: RetryPolicy | None = None, sources: int = 2, by_speed: bool = False) -> SourceTable:
    """Sources without measurements."""
    standings = [Standing(f"ws://{index}") for index in range(sources)]
    return SourceTable(standings, retry or QUICK, by_speed, draw=lambda: 0)


def test_the_first_source_is_asked_until_it_fails_and_again_after_its_rest() -> None:
    one = table(retry=RetryPolicy(attempts=3, first_delay_seconds=1, backoff=4, most_delay_seconds=10, jitter=0))
    assert one.usable(0) == [0, 1]
    one.failed(0, 10, "gone")
    one.failed(0, 10.5, "gone")  # was open at the same time
    assert (one.standings[0].failures, one.standings[0].failed_at, one.next_try()) == (1, 10, (0.0, 1))
    assert one.usable(10.9) == [1]
    assert one.usable(11) == [0, 1]
    one.failed(0, 11, "gone")
    one.failed(0, 15, "gone")
    assert one.usable(24) == [1]
    assert one.usable(25) == [0, 1]
    one.begin(0, 25)
    assert one.usable(25) == [1]  # a single request tries it
    one.failed(0, 25.5, "gone")
    assert one.usable(35.5) == [0, 1]
    one.progressed(0)
    one.failed(0, 36, "gone")
    assert not one.is_exhausted()
    one.failed(0, 40, "gone")
    one.failed(0, 50, "gone")
    one.set_aside(1, "damage")
    assert one.is_exhausted()
    one.progressed(0)
    assert not one.is_exhausted()
    one.succeeded(0, MIB, 0.5)
    assert (one.usable(0), one.standings[0].failed_at) == ([0], None)


def test_what_is_late_depends_on_what_a_source_usually_takes() -> None:
    one = table()
    unknown = one.late_seconds(0, MIB)
    one.succeeded(0, MIB, 2.0)
    assert one.late_seconds(0, 2 * MIB) == pytest.approx(16.0)
    one.succeeded(1, MIB, 0.001)
    assert one.late_seconds(1, MIB) == 1.0 < unknown


def test_by_speed_all_are_tried_then_the_fastest_is_asked_and_others_now_and_then() -> None:
    one = table(sources=3, by_speed=True)
    asked = []
    for _ in range(10):
        asked.append(one.usable(0)[0])
        one.begin(asked[-1], 0)
    assert asked == [0, 1, 2] * 3 + [0]
    for index, seconds in ((0, 3.0), (1, 1.0), (2, 0.9)):
        one.succeeded(index, MIB, seconds)
        for _ in range(asked.count(index)):
            one.end(index)
    assert one.usable(1) == [1, 2, 0]  # slightly faster is no reason to switch
    one.begin(1, 9)
    assert one.usable(9.5) == [1, 2, 0]
    assert one.usable(10) == [0, 2, 1]  # these were not used for a while
    one.begin(0, 10)
    assert one.usable(10) == [2, 1, 0]
    one.succeeded(0, MIB, 0.01)
    one.end(0)
    assert one.usable(11) == [2, 0, 1]
    one.begin(2, 11)
    one.end(2)
    assert one.usable(11) == [0, 2, 1]
    one.set_aside(0, "damage")
    assert one.usable(11) == [1, 2]


def run(
    tmp_path: Path,
    prepare: Callable[[FaultySource, FaultySource], None],
    *,
    deadline: float | None = None,
    sizes: list[int] | None = None,
) -> tuple[Failover, FaultySource, FaultySource]:
    """Read a model through two sources with faults, and check the bytes."""
    made = make_store(tmp_path, sizes=SIZES if sizes is None else sizes)
    one, other = FaultySource(tmp_path, "ws://one"), FaultySource(tmp_path, "ws://other")
    failover = Failover(
        [("ws://one", opener(one)), ("ws://other", opener(other))], retry=QUICK, deadline_seconds=deadline
    )

    async def main() -> None:
        async with failover:
            manifest = await failover.manifest(await failover.resolve(None))
            assert manifest.digest == made.digest
            prepare(one, other)
            expected = {chunk.name: payload(tmp_path, chunk) for chunk in made.chunks}
            assert await asyncio.wait_for(read_all(failover, manifest), 30) == expected
            assert {file.path: await failover.file(manifest, file.path) for file in manifest.files} == TOKENIZER
            assert failover.fetched_bytes == sum(chunk.payload_bytes for chunk in made.chunks)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        assert not tasks

    asyncio.run(main())
    assert (one.closed, other.closed) == (1, 1)
    return failover, one, other


def test_as_long_as_nothing_happens_the_first_source_delivers_all(tmp_path: Path) -> None:
    failover, one, other = run(tmp_path, lambda *_: None)
    assert set(one.asked.values()) == {1}
    assert (failover.failures, failover.hedged_ranges, other.delivered) == (0, 0, 0)


def after(blocks: int, happens: Callable[[], None]) -> Callable[[int], None]:
    """Do something before each block after this many."""
    return lambda delivered: happens() if delivered >= blocks else None


@pytest.mark.parametrize("blocks", [0, 5, 13])
def test_when_the_first_is_lost_only_what_is_missing_is_asked_of_the_second(
    tmp_path: Path, blocks: int, caplog: pytest.LogCaptureFixture
) -> None:
    _, one, other = run(tmp_path, lambda one, _: setattr(one, "before", after(blocks, lost)))
    assert one.delivered == blocks
    assert other.delivered == 24 - blocks
    (said,) = {record.message for record in caplog.records if record.levelno == logging.WARNING}
    assert said.startswith("ws://one failed, and is tried again later: ")
    assert set((one.asked + other.asked).values()) == {1}


def test_who_delivered_damage_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "surfw.sources"):
        failover, one, other = run(tmp_path, lambda one, _: setattr(one, "before", after(4, damaged)))
    assert (one.delivered, other.delivered) == (4, 20)
    assert failover.standings[0].aside
    assert [record.message for record in caplog.records] == ["ws://one is not asked any more: block 3 is damaged"]


def test_a_source_that_is_late_is_overtaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SourceTable, "late_seconds", lambda *_: 0.02)
    failover, one, other = run(tmp_path, lambda one, _: setattr(one, "before", lambda _: asyncio.Event()))
    assert failover.hedged_ranges > 0
    assert (one.delivered, other.delivered) == (0, 24)


def test_damage_of_a_source_that_is_overtaken_meanwhile_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SourceTable, "late_seconds", lambda *_: 0.0)
    is_hedged, is_damaged = asyncio.Event(), asyncio.Event()

    def overtake(_: int) -> asyncio.Event:
        is_hedged.set()
        return is_damaged

    def prepare(one: FaultySource, other: FaultySource) -> None:
        one.before = lambda _: damaged() if is_hedged.is_set() else is_hedged
        other.before = overtake
        fetch = one.fetch

        async def then_damaged(manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
            await fetch(manifest, reads, priority=priority)
            is_damaged.set()
            damaged()

        monkeypatch.setattr(one, "fetch", then_damaged)

    failover, _, _ = run(tmp_path, prepare, sizes=[MIB])
    assert failover.hedged_ranges == 1
    assert failover.standings[0].aside


def test_sources_that_are_opened_while_others_are_told_are_told_too(tmp_path: Path) -> None:
    made = make_store(tmp_path, sizes=[MIB])
    told: list[str] = []

    class Told(FaultySource):
        async def announce(self, manifest: Manifest, cycle: Sequence[Chunk], kept: Sequence[Chunk]) -> None:
            told.append(self.url)
            if self is other:
                is_open.set()
            await is_open.wait()

    one, other, is_open = Told(tmp_path, "ws://one"), Told(tmp_path, "ws://other"), asyncio.Event()

    async def main() -> None:
        async with Failover([("ws://one", opener(one)), ("ws://other", opener(other))], retry=QUICK) as failover:
            await failover.resolve(None)  # opens only the first one
            manifest = await one.manifest(made.name)
            await asyncio.gather(failover.announce(manifest, manifest.chunks, ()), failover.manifest(made.name))
        assert told == ["ws://one", "ws://other"]

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("by_speed", [False, True])
def test_the_faster_source_delivers_most_if_speed_counts(tmp_path: Path, *, by_speed: bool) -> None:
    made = make_store(tmp_path, sizes=[9 * MIB] * 12)

    def slowly(_: object) -> asyncio.Event:
        event = asyncio.Event()
        asyncio.get_running_loop().call_later(0.02, event.set)
        return event

    async def main() -> tuple[int, int]:
        one, other = FaultySource(tmp_path, "ws://one"), FaultySource(tmp_path, "ws://other")
        one.before = slowly
        places = [("ws://one", opener(one)), ("ws://other", opener(other))]
        async with Failover(places, retry=QUICK, by_speed=by_speed) as failover:
            await read_all(failover, await failover.manifest(made.name))
            assert [standing.in_flight for standing in failover.standings] == [0, 0]
        return one.delivered, other.delivered

    slow, fast = asyncio.run(main())
    assert slow + fast == 108
    assert fast > 3 * slow if by_speed else fast == 0


def test_the_first_is_back_once_it_is_up_again(tmp_path: Path) -> None:
    made = make_store(tmp_path, sizes=SIZES)

    async def main() -> None:
        one, other = FaultySource(tmp_path, "ws://one"), FaultySource(tmp_path, "ws://other")
        places = [("ws://one", opener(one)), ("ws://other", opener(other))]
        async with Failover(places, retry=QUICK) as failover:
            manifest = await failover.manifest(made.name)
            one.before = lost
            await read_all(failover, manifest)
            assert (one.delivered, other.delivered) == (0, 24)
            one.before = lambda _: None
            await asyncio.sleep(0.05)  # longer than its pause
            await read_all(failover, manifest)  # one of its ranges tries the first source again
            assert one.delivered > 0
            before = one.delivered
            await read_all(failover, manifest)
            assert one.delivered == before + 24

    asyncio.run(main())


def test_when_all_are_lost_patience_ends_and_the_error_names_each(tmp_path: Path) -> None:
    def prepare(*sources: FaultySource) -> None:
        for source in sources:
            source.before = after(2, lost)

    with pytest.raises(ConnectionFailedError) as caught:
        run(tmp_path, prepare)
    assert "of toy/model could not be had: ws://one: the link was lost; ws://other: the link was lost" in str(
        caught.value
    )


def test_until_the_deadline_everything_is_waited_for(tmp_path: Path) -> None:
    def prepare(*sources: FaultySource) -> None:
        def back() -> None:
            for source in sources:
                source.before = lambda _: None

        for source in sources:
            source.before = lost
        asyncio.get_running_loop().call_later(0.3, back)  # longer than all attempts take

    failover, *_ = run(tmp_path, prepare, deadline=20)
    assert failover.failures > 2 * QUICK.attempts
    assert failover.waiting is None


def test_at_the_deadline_there_is_one_error(tmp_path: Path) -> None:
    def prepare(one: FaultySource, other: FaultySource) -> None:
        one.before = lost
        other.before = lambda _: asyncio.Event()

    with pytest.raises(ConnectionFailedError, match=r"could not be had within 0\.3 seconds") as caught:
        run(tmp_path, prepare, deadline=0.3)
    assert "ws://one: the link was lost" in str(caught.value)


def test_when_all_are_damaged_the_error_says_so(tmp_path: Path) -> None:
    def prepare(*sources: FaultySource) -> None:
        for source in sources:
            source.before = damaged

    with pytest.raises(IntegrityError, match="ws://one: block 3 is damaged; ws://other: block 3 is damaged"):
        run(tmp_path, prepare, deadline=5)


def test_sources_of_different_models_are_refused(tmp_path: Path) -> None:
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_store(tmp_path / place, sizes=SIZES, seed=seed)
    make_store(tmp_path / "d", sizes=SIZES, files=TOKENIZER | {"vocab.txt": b"other"})

    async def main(*places: str) -> None:
        sources = [(f"ws://{one}", opener(FaultySource(tmp_path / one))) for one in places]
        async with Failover(sources, retry=QUICK) as failover:
            await failover.manifest("toy/model")

    asyncio.run(main("a", "b"))
    with pytest.raises(ManifestError, match=r"ws://a and ws://c have different models 'toy/model': they .* layers\.0;"):
        asyncio.run(main("a", "b", "c"))
    with pytest.raises(ManifestError, match=r"they differ in the file vocab\.txt"):
        asyncio.run(main("a", "d"))


@pytest.mark.parametrize(
    "change",
    [
        {"class_name": "Other"}, {"dtype": "float16"}, {"config": {}}, {"generation_config": {"top_k": 1}},
        {"files": ()}, {"ties": {"a": "b"}}, {"order": ()}, {"key_id": "00" * 16},
        {"base": Base("toy/base", "11" * 32)},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_models_of_different_identities_differ_in_something_that_is_named(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    made = make_store(tmp_path, sizes=[1, 2])
    changed = replace(made, **change)
    assert changed.identity != made.identity
    assert find_difference(made, changed)


def test_models_differ_if_their_chunks_are_of_other_kinds_or_in_another_order(tmp_path: Path) -> None:
    made = make_store(tmp_path, sizes=[1, 2])
    first, *others = made.chunks
    turned, named = replace(made, chunks=made.chunks[::-1]), replace(made, chunks=(replace(first, kind="x"), *others))
    assert find_difference(made, replace(made, name="toy/other")) is None
    assert (find_difference(made, turned), find_difference(made, named)) == (
        "the order of its chunks", f"chunk {first.name}"
    )  # fmt: skip
    assert len({made.identity, turned.identity, named.identity}) == 3


def test_one_that_turns_out_to_be_another_model_later_is_set_aside(tmp_path: Path) -> None:
    made = make_store(tmp_path / "a", sizes=SIZES)
    make_store(tmp_path / "b", sizes=SIZES, seed=1)
    one, other = FaultySource(tmp_path / "a"), FaultySource(tmp_path / "b")

    async def main() -> None:
        calls = 0

        async def open_late() -> FaultySource:
            nonlocal calls
            calls += 1
            if calls == 1:
                lost()
            return other

        async with Failover([("ws://a", opener(one)), ("ws://b", open_late)], retry=QUICK) as failover:
            manifest = await failover.manifest(made.name)
            one.before = lambda delivered: lost() if delivered == 2 and not other.files and calls < 2 else None
            await asyncio.sleep(0.05)
            await read_all(failover, manifest)
            assert failover.standings[1].aside
            assert "another model" in failover.standings[1].why

    asyncio.run(main())


def test_one_that_does_not_have_the_model_is_set_aside(tmp_path: Path) -> None:
    made = make_store(tmp_path / "a", sizes=[10])
    make_store(tmp_path / "b", "other", sizes=[10])

    async def main(*places: str) -> None:
        sources = [(f"ws://{one}", opener(FaultySource(tmp_path / one))) for one in places]
        async with Failover(sources, retry=QUICK) as failover:
            assert (await failover.manifest(made.name)).digest == made.digest

    asyncio.run(main("b", "a"))
    with pytest.raises(UnknownModelError):
        asyncio.run(main("b", "b"))


def test_forms_that_not_all_have_are_left_out(tmp_path: Path) -> None:
    made = make_store(tmp_path, sizes=[MIB])
    (chunk,) = made.chunks
    lossless = replace(chunk.forms[0], codec="lossless", digest="0" * 64)

    class More(FaultySource):
        async def manifest(self, model: str) -> Manifest:
            found = await super().manifest(model)
            return replace(found, chunks=(replace(chunk, forms=(lossless, *chunk.forms)),))

    async def main() -> None:
        sources = [("ws://a", opener(More(tmp_path))), ("ws://b", opener(FaultySource(tmp_path)))]
        async with Failover(sources, retry=QUICK) as failover:
            manifest = await failover.manifest(made.name)
            assert [form.codec for form in manifest.chunks[0].forms] == ["none"]

    asyncio.run(main())
