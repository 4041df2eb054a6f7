"""Coding exponents in three bits is exact for all 16-bit values, in torch and in the kernel, and saves 29 %."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.runtime import exponents
from surfw.runtime.coding_plan import USUAL_SHARE
from surfw.runtime.exponents import BLOCK_WORDS, MOST_SHARE, Decode, Piece, cut, encode, room_bytes

BLOCK = BLOCK_WORDS
SPECIAL = [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81, 0x0001, 0x807F, 0x7F7F, 0x0080]
"""Both zeros and infinities, quiet and signalling NaNs with payloads, denormals, the largest and smallest normal."""


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter must be chosen before the import, so the kernel runs in a separate process."""


@pytest.fixture(scope="module", params=["torch", *(["triton"] if INTERPRETED else [])])
def decode(request: pytest.FixtureRequest) -> Decode:
    """Each decoder; Triton's runs in its interpreter on the CPU."""
    if request.param == "torch":
        return exponents.decode
    from surfw.runtime.exponents_triton import decode as kernel

    return kernel


@pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="Triton is not installed, or it runs already")
def test_the_kernel_decodes_so_too() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def weights(words: int, *, seed: int = 0) -> torch.Tensor:
    """Random weights like a model's: int16."""
    torch.manual_seed(seed)
    return (torch.randn(words) * 0.02).to(torch.bfloat16).view(torch.int16)


def code(words: torch.Tensor, room: int | None = None) -> tuple[torch.Tensor, Piece | None]:
    coded = torch.full((room or 4 * len(words) + 8 * BLOCK,), 0xAA, dtype=torch.uint8)
    return coded, encode(words, 0, coded)


def there_and_back(words: torch.Tensor, decode: Decode) -> torch.Tensor:
    """Encode and decode a piece, within the memory that it announces and without touching the bytes after it."""
    coded, piece = code(words)
    assert piece is not None
    into = torch.full((len(words) + 8,), 0x1234, dtype=torch.int16)
    decode(coded[: piece.nbytes].clone(), piece, into[: len(words)])
    assert into[len(words) :].eq(0x1234).all()
    return into[: len(words)]


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_bits_come_back(decode: Decode, data: st.DataObject) -> None:
    words = weights(data.draw(st.integers(1, 3 * BLOCK)), seed=data.draw(st.integers(0, 99)))
    raw = words.view(torch.uint8)
    kind = data.draw(st.sampled_from(["weights", "special", "any", "scaled"]))
    if kind == "special":
        some = torch.tensor(data.draw(st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=64)), dtype=torch.int32)
        words[torch.randint(len(words), (len(some),))] = some.to(torch.int16)
    elif kind == "any":
        raw.copy_(torch.randint(256, raw.shape, dtype=torch.uint8))
    elif kind == "scaled":
        words = (words.view(torch.bfloat16).float() * torch.logspace(-30, 30, len(words))).to(torch.bfloat16)
        words = words.view(torch.int16)
    assert torch.equal(there_and_back(words, decode), words)


def test_every_pattern_comes_back(decode: Decode) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    assert torch.equal(there_and_back(every, decode), every)


def test_pieces_of_several_steps_come_back(decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exponents, "_STEP_WORDS", 2 * BLOCK)
    words = weights(7 * BLOCK + 8)
    words[::97] = 0x7FC1
    assert torch.equal(there_and_back(words, decode), words)


def test_weights_take_seven_tenths_and_noise_no_less_than_itself() -> None:
    words = weights(64 * BLOCK)
    _, piece = code(words, room_bytes(len(words)))
    assert piece is not None
    assert 0.69 < piece.nbytes / (2 * len(words)) < USUAL_SHARE
    noise = torch.randint(-(1 << 15), 1 << 15, (64 * BLOCK,), dtype=torch.int16)
    assert code(noise, room_bytes(len(noise)))[1] is None, "it finds no place"


@pytest.mark.parametrize("noisy", [0.1, 0.3, 0.34, 0.5, 0.66, 0.7])
def test_what_is_not_worth_it_finds_no_place(noisy: float) -> None:
    words = weights(64 * BLOCK)
    is_noise = torch.rand(len(words)) < noisy
    words[is_noise] = torch.randint(-(1 << 15), 1 << 15, (int(is_noise.sum()),), dtype=torch.int16)
    size = code(words)[1]
    assert size is not None
    is_worth_it = size.nbytes <= MOST_SHARE * 2 * len(words)
    assert is_worth_it == (noisy < 0.32)
    assert (code(words, room_bytes(len(words)))[1] == size) == is_worth_it


def test_each_block_has_its_own_seven_exponents() -> None:
    rows = torch.randn(16, BLOCK) * torch.logspace(-9, 9, 16)[:, None]
    _, piece = code(rows.to(torch.bfloat16).view(-1).view(torch.int16))
    assert piece is not None
    assert piece.escapes < 0.04 * piece.words


@given(st.integers(1, 9 * BLOCK), st.integers(1, 4))
def test_pieces_hold_every_word_once_and_none_is_small(words: int, most_blocks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exponents, "PIECE_WORDS", most_blocks * BLOCK)
        pieces = cut(words)
    assert [start for start, _ in pieces] == [sum(size for _, size in pieces[:index]) for index in range(len(pieces))]
    assert sum(size for _, size in pieces) == words
    assert all(0 < size <= most_blocks * BLOCK for _, size in pieces)
    assert all(start % BLOCK == 0 for start, _ in pieces)
