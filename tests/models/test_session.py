"""Sessions of one model: simultaneous requests run together, and each gets its own answer."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from surfw import ConfigurationError, ManyResult, ModelClosedError, Session, StreamingModel, UnsupportedModelError

NEW = 8
PROMPTS = [[9, 8, 7], [5, 6], [11, 12, 13, 14], [7]]


async def together(model: StreamingModel, prompts: Any, **options: Any) -> list[list[int]]:
    found: list[ManyResult] = [one async for one in model.generate_many(prompts, max_new_tokens=NEW, **options)]
    return [one.result.token_ids if one.result else [] for one in sorted(found, key=lambda one: one.index)]


async def read(session: Session, prompt: list[int]) -> list[int]:
    return [one async for one in session.stream(prompt)]


def test_sessions_share_each_pass(store: Path) -> None:
    async def run() -> None:
        async with StreamingModel(store, "llama", cache_size=1) as model:
            expected = await together(model, PROMPTS)
            one_start = model.metrics.count("fetched_bytes")
            await together(model, PROMPTS[:1])
            alone = model.metrics.count("fetched_bytes") - one_start
            start = model.metrics.count("fetched_bytes")
            sessions = [model.session(max_new_tokens=NEW) for _ in PROMPTS]
            found = await asyncio.gather(*map(read, sessions, PROMPTS))
            assert found == expected
            assert model.metrics.count("fetched_bytes") - start < 2 * alone, "four read as one does, not four times it"
            again = await sessions[0].answer(PROMPTS[0])
            assert again.token_ids == expected[0]
            assert (
                await model.forward_async(input_ids=model.tokenizer("a", return_tensors="pt").input_ids)
            ).logits.dim()

    asyncio.run(run())


def test_a_text_comes_as_it_is_said_and_ends_before_a_stop_text(store: Path) -> None:
    async def run() -> None:
        async with StreamingModel(store, "llama") as model:
            session = model.session(max_new_tokens=24)
            whole = await session.answer("Weights")
            pieces = [piece async for piece in session.stream("Weights")]
            assert "".join(pieces) == whole.text
            assert len(pieces) > 3
            stop = whole.text[4:7]
            cut = [piece async for piece in session.stream("Weights", stop=[stop])]
            assert "".join(cut) == whole.text[: whole.text.index(stop)]
            made: Any = model.model
            made.generation_config.stop_strings = [stop]
            assert "".join([piece async for piece in session.stream("Weights")]) == "".join(cut), "the model's own"

    asyncio.run(run())


def test_those_that_sample_otherwise_get_their_turn_and_a_mistake_is_of_one_alone(store: Path) -> None:
    async def run() -> None:
        async with StreamingModel(store, "llama") as model:
            session, warm = model.session(max_new_tokens=3), model.session(max_new_tokens=3, temperature=1.0, seed=3)
            found = await asyncio.gather(
                session.answer([5, 6]), warm.answer([5, 6]), session.answer([10**6]), warm.answer([7]),
                return_exceptions=True,
            )  # fmt: skip
            assert [len(one.token_ids) if not isinstance(one, BaseException) else type(one) for one in found] == [
                3, 3, ConfigurationError, 3,
            ]  # fmt: skip

    asyncio.run(run())


def test_a_reader_that_stops_keeps_nobody(store: Path) -> None:
    async def run() -> None:
        async with StreamingModel(store, "llama") as model:
            session = model.session(max_new_tokens=10_000, ignore_eos=True)
            stream = session.stream([5, 6])
            assert await anext(stream) >= 0
            await stream.aclose()
            assert len((await session.answer([5, 6], max_new_tokens=2)).token_ids) == 2
            waiting = asyncio.create_task(session.answer([5, 6]))
            await asyncio.sleep(0)
            await model.close_async()
            with pytest.raises(ModelClosedError):
                await waiting

    asyncio.run(run())


def test_what_has_no_session_says_so(store: Path) -> None:
    async def ask(name: str) -> None:
        async with StreamingModel(store, name) as model:
            await model.session().answer([5, 6])

    with pytest.raises(UnsupportedModelError, match="only decodes"):
        asyncio.run(ask("t5"))
    with StreamingModel.open(store, "llama") as model, pytest.raises(ConfigurationError, match="event loop"):
        model.session()
