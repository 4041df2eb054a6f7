"""Sizes, folders, and invalid limits."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surfw.config import (
    KIB,
    MIB,
    WireLimits,
    check_on_missing,
    check_policy,
    default_store,
    display_url,
    escape_json,
    format_size,
    is_size,
    parse_size,
    printable,
    surfw_home,
)
from surfw.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("4096", 4096), ("200MB", 200_000_000), (" 200 mb ", 200_000_000), ("1.5GiB", 3 << 29),
        ("2k", 2000), ("2KiB", 2048), ("1T", 10**12), ("1TiB", 1 << 40), ("0.1GB", 100_000_000), ("7B", 7),
        ("123456789012345678", 123456789012345678),
    ],
)  # fmt: skip
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_size_is_a_byte_or_more() -> None:
    assert [is_size(text) for text in ("1", "1.2GB", "0.0001k", "0", "0GB", "much", "", "-1")] == [True] * 2 + [
        False
    ] * 6


def test_choices_are_checked() -> None:
    check_policy("auto")
    check_policy("lru")
    check_on_missing("uninitialized")
    with pytest.raises(ConfigurationError, match=r"^policy is 'fifo'; expected one of auto, lru$"):
        check_policy("fifo")
    with pytest.raises(ConfigurationError, match=r"^on_missing is 'lru'; expected one of error, uninitialized$"):
        check_on_missing("lru")


@pytest.mark.parametrize("text", ["", "MB", "-1", "1e3", "1.MB", "1,5GB", "3 apples", "1KI", "٣", "9" * 400, "1 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is not understood; write a number and a unit, such as 200MB"):
        parse_size(text)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigurationError):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (88_100_000, "88.1 MB"), (999_960, "1.0 MB"),
        (2_200_000_000, "2.2 GB"), (3.14e12, "3.14 TB"), (10**15, "1000.00 TB"),
    ],
)  # fmt: skip
def test_sizes_for_people(size: float, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 10**15))
def test_a_formatted_size_is_read_back_within_its_last_digit(size: int) -> None:
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.05, abs=0)


def test_home_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SURFW_HOME", str(tmp_path / "here"))
    assert surfw_home() == tmp_path / "here"
    assert default_store() == str(tmp_path / "here" / "store")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SURFW_HOME", "~/there")
    assert surfw_home() == tmp_path / "there"


def test_home_is_the_users_cache_folder_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SURFW_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert surfw_home() == tmp_path / "surfw"


def test_default_limits_are_within_the_protocol() -> None:
    limits = WireLimits()
    assert 128 * KIB <= limits.frame_bytes <= 512 * KIB
    assert limits.frame_bytes <= limits.run_bytes <= limits.window_bytes


@pytest.mark.parametrize("frame_bytes", [0, 128 * KIB - 1, 512 * KIB + 1, MIB])
def test_frames_outside_of_the_protocol_are_refused(frame_bytes: int) -> None:
    with pytest.raises(ConfigurationError, match=f"frame_bytes is {frame_bytes}; frames have from 128 to 512 KiB"):
        WireLimits(frame_bytes=frame_bytes)


@pytest.mark.parametrize(("run_bytes", "window_bytes"), [(256 * KIB - 1, MIB), (MIB, 512 * KIB - 1)])
def test_limits_that_would_block_a_transfer_are_refused(run_bytes: int, window_bytes: int) -> None:
    with pytest.raises(ConfigurationError, match="a run holds at least one frame, a window two"):
        WireLimits(frame_bytes=256 * KIB, run_bytes=run_bytes, window_bytes=window_bytes)


def test_limits_are_frozen_and_named() -> None:
    limits: Any = WireLimits()
    with pytest.raises(dataclasses.FrozenInstanceError):
        limits.frame_bytes = 1
    make: Any = WireLimits
    with pytest.raises(TypeError, match="positional argument"):
        make(MIB)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/a/b?x=1", "/a/b?x=1"),
        ("ws://[::1]:8765/path", "ws://[::1]:8765/path"),
        ("s3://bucket/model@v1", "s3://bucket/model@v1"),
        ("s3://key:secret@bucket/prefix", "s3://***@bucket/prefix"),
        ("https://secret@host:80/p?token=secret&secret&b=secret=", "https://***@host:80/p?token=***&***&b=***"),
        ("redis://:secret@host:6379/0", "redis://***@host:6379/0"),
        ("redis://:se/cr?et#secret@host/0", "redis://***@host/0"),
        ("redis://u:secret@secret@host/0", "redis://***@host/0"),
        ("simplecache::s3://k:secret@b/p", "simplecache::s3://***@b/p"),
        ("zip://x::s3://k:secret::secret@b/p?t=secret", "zip://x::s3://***@b/p?t=***"),
    ],
)
def test_a_shown_url_has_no_secrets(url: str, shown: str) -> None:
    assert display_url(url) == shown
    assert display_url(shown) == shown


STEERING = "".join(map(chr, [*range(32), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), 0x2066, 0x2069]))


def test_a_text_on_one_line() -> None:
    assert printable("größer 🙂 \x1b[2J\r\n") == "größer 🙂 ?[2J??"
    assert printable("plain") == "plain"


def test_a_text_on_several_lines_keeps_what_scripts_need_and_steers_nothing() -> None:
    kept = "one\n\ttwo \u3000 \u00a0 👩\u200d🚀 \u200f שלום größer"
    assert printable(kept, lines=True) == kept
    assert set(printable(STEERING, lines=True)) == {"?", "\n", "\t"}


@given(st.text())
def test_escaped_json_says_the_same(text: str) -> None:
    escaped = escape_json(json.dumps([text, STEERING], ensure_ascii=False))
    assert json.loads(escaped) == [text, STEERING]
    assert not set(escaped) & set(STEERING)
