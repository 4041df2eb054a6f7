"""Parsers accept untrusted bytes, or refuse them with a documented error, in bounded memory.

`python -m tests.fuzz` tries far more inputs, guided by the code they reach.
"""

import tracemalloc
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.errors import ManifestError
from tests.fuzz.__main__ import fuzz
from tests.fuzz.kept import cases, kept
from tests.fuzz.mutations import mutate
from tests.fuzz.parser import MOST_BYTES, Parser, PromiseError, expect_line, expect_memory
from tests.fuzz.parsers import PARSERS
from tests.fuzz.plants import PLANTS, plant

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")

_MEMORY_BYTES = 24 << 20
"""The memory for an input of 4 KiB: a window, a few frames, and a chunk, but not the sizes that it claims."""

_parsers: dict[str, Parser] = {}


def parser(name: str) -> Parser:
    return _parsers.get(name) or _parsers.setdefault(name, PARSERS[name]())


@pytest.mark.parametrize("name", PARSERS)
def test_what_was_found_once_is_handled(name: str) -> None:
    one = parser(name)
    accepted = [one.accepts(data) for data in [*one.seeds, *cases(name), *kept(name)]]
    assert any(accepted[: len(one.seeds)]), "an input to start from is right"


@pytest.mark.parametrize("name", PARSERS)
def test_changed_inputs_are_accepted_or_refused(name: str) -> None:
    one = parser(name)
    inputs = [data for data in [*one.seeds, *kept(name)] if len(data) <= MOST_BYTES]

    @settings(max_examples=60, database=None)
    @given(st.sampled_from(inputs), st.integers(0, 2**32), st.binary(max_size=40), st.integers(0, MOST_BYTES))
    def check(data: bytes, seed: int, added: bytes, at: int) -> None:
        changed = mutate(data, Random(seed), MOST_BYTES) or data[:at] + added + data[at + len(added) :]
        tracemalloc.start()
        try:
            one.accepts(changed)
            assert tracemalloc.get_traced_memory()[1] < _MEMORY_BYTES
        finally:
            tracemalloc.stop()

    check()


def test_a_lack_of_memory_is_no_error_of_a_parser() -> None:
    error = ManifestError("damaged")
    expect_memory(error)
    error.__context__ = ValueError("x")
    error.__context__.__cause__ = MemoryError()
    with pytest.raises(PromiseError, match="lack of memory"):
        expect_memory(error)


def test_an_error_is_a_line() -> None:
    expect_line(ManifestError("a line"))
    expect_line(ValueError("not\nof surfw"))
    for text in ("", "two\nlines", "two\u2028lines", "x" * 10_000):
        with pytest.raises(PromiseError):
            expect_line(ManifestError(text))


@pytest.mark.parametrize("name", PLANTS)
def test_bugs_can_be_put_in(name: str, tmp_path: Path) -> None:
    module = plant(name, tmp_path) / "surfw" / PLANTS[name].module
    assert PLANTS[name].wrong in module.read_text()
    compile(module.read_text(), module, "exec")


@pytest.mark.skipif(find_spec("atheris") is None, reason="the extra fuzz is not installed")
def test_a_planted_bug_is_found_within_a_minute_and_nothing_else(tmp_path: Path) -> None:
    bug = fuzz("client-messages", tmp_path, seconds=60, runs=None, surfw=plant("client-messages", tmp_path / "planted"))
    assert bug.found is not None
    assert "surfw/wire/messages.py" in bug.said
    parser("client-messages").accepts(bug.found.read_bytes())
    none = fuzz("client-messages", tmp_path, seconds=None, runs=2000)
    assert (none.runs >= 2000, none.found, none.said) == (True, None, "")
