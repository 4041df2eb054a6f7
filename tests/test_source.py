"""The interface of a source: reads are limited to verifiable ranges, and names are resolved in one way."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surfw.config import BLOCK_BYTES
from surfw.errors import UnknownModelError
from surfw.manifest import payload_digest
from surfw.source import Read, describe_damage, find_damage, locate_damage
from tests.toys import ToySource, toy_chunk, toy_manifest

SIZE = 2 * BLOCK_BYTES + 5
CHUNK, PAYLOAD = toy_chunk("c", [("U8", (SIZE,))])
(FORM,) = CHUNK.forms


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, SIZE), (0, BLOCK_BYTES), (BLOCK_BYTES, 2 * BLOCK_BYTES), (2 * BLOCK_BYTES, SIZE), (BLOCK_BYTES, BLOCK_BYTES)],
)
def test_ranges_of_whole_blocks_can_be_read(start: int, stop: int) -> None:
    assert Read(CHUNK, FORM, start, stop, memoryview(bytearray(stop - start))).stop == stop


@pytest.mark.parametrize(
    ("start", "stop"), [(1, SIZE), (0, 5), (-BLOCK_BYTES, SIZE), (0, 3 * BLOCK_BYTES), (2 * BLOCK_BYTES, BLOCK_BYTES)]
)
def test_other_ranges_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=f"range {start}-{stop} of chunk c is not made of whole blocks"):
        Read(CHUNK, FORM, start, stop, memoryview(bytearray(max(0, stop - start))))


def test_the_destination_has_the_size_of_the_range() -> None:
    with pytest.raises(ValueError, match=f"destination has 5 bytes, the range {SIZE}"):
        Read(CHUNK, FORM, 0, SIZE, memoryview(bytearray(5)))


@pytest.mark.parametrize(("first", "start", "stop"), [(0, 0, SIZE), (1, BLOCK_BYTES, SIZE), (2, 2 * BLOCK_BYTES, SIZE)])
def test_blocks_as_promised_pass(first: int, start: int, stop: int) -> None:
    assert find_damage(FORM, first, memoryview(PAYLOAD)[start:stop]) == {}


@given(st.integers(0, SIZE - 1), st.integers(1, 255))
def test_one_wrong_byte_is_found_in_its_block(at: int, change: int) -> None:
    data, block = bytearray(PAYLOAD), at // BLOCK_BYTES
    data[at] ^= change
    seen = payload_digest(bytes(data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]))
    assert find_damage(FORM, 0, memoryview(data)) == {block: seen}
    text = f"chunk c from here is damaged: block {block} has BLAKE3 {seen[:16]}…, the manifest promises "
    assert describe_damage(CHUNK, FORM, block, seen, where="here").startswith(text)


def test_more_blocks_than_promised_are_damage() -> None:
    assert find_damage(FORM, 3, memoryview(b"more")) == {3: payload_digest(b"more")}


def test_where_damage_lies() -> None:
    same = "chunk the model again: it was the same 3 times, so the damage lies in the store"
    assert locate_damage(["a", "a", "a"]) == same
    differing = (
        "it differed between 3 reads, so it is damaged on the way; check the network and the memory of this machine"
    )
    assert locate_damage(["a", "b", "a"]) == differing


def source(*names: str) -> ToySource:
    return ToySource({name: toy_manifest([CHUNK], name=name) for name in names}, {})


def resolve(found: ToySource, name: str | None) -> str:
    return asyncio.run(found.resolve(name))


def test_names_are_resolved_in_full_by_last_part_or_as_the_only_one() -> None:
    assert resolve(source("org/a"), None) == "org/a"
    assert resolve(source("org/a", "b"), "a") == "org/a"
    assert resolve(source("org/a", "a"), "a") == "a"
    assert resolve(source("x/a", "y/a"), "y/a") == "y/a"


@pytest.mark.parametrize(
    ("names", "name", "text"),
    [
        (("b", "a"), None, "holds 2 models; choose one with --model (model=): a, b"),
        (("b", "a"), "c", "has no model 'c'; it has: a, b"),
        (("x/a", "y/a"), "a", "has 2 models 'a'; give the name in full: x/a, y/a"),
        (("org/a",), "org", "has no model 'org'; it has: org/a"),
        ((), None, "holds no model yet"),
    ],
)
def test_names_that_fit_no_or_several_models(names: tuple[str, ...], name: str | None, text: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        resolve(source(*names), name)
    assert text in str(caught.value)
    assert caught.value.known == sorted(names)


def test_a_source_closes_with_its_context() -> None:
    found = source("a")

    async def use() -> None:
        async with found as entered:
            assert entered is found
            assert found.closed == 0

    asyncio.run(use())
    assert found.closed == 1
    assert found.fetched_bytes == 0
