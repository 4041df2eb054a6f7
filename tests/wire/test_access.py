"""A token is sent in one form, and accepted only in that form."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surfw.config import is_loopback
from surfw.errors import ConfigurationError
from surfw.wire import bearer, check_token, is_meant, shown_token

TOKENS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40)


@given(TOKENS)
def test_the_token_arrives(token: str) -> None:
    assert shown_token(list(bearer(token).values())) == token


@given(st.lists(st.text(max_size=60) | st.text(max_size=20).map("Bearer ".__add__), max_size=3))
def test_any_header_shows_a_token_or_none(shown: list[str]) -> None:
    is_one = len(shown) == 1 and shown[0].lower().partition(" ")[0] == "bearer"
    assert shown_token(shown) == (shown[0][7:].strip() if is_one else None)


@given(st.text(max_size=20))
def test_any_text_is_a_token_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigurationError):
        assert check_token(text).isascii()
        assert text.strip() == text != ""


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
        ("192.0.2.1", False), ("localhost.example.org", False), ("127.0.0.1.example.org", False), ("", False),
    ],
)  # fmt: skip
def test_which_hosts_are_this_machine(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


@pytest.mark.parametrize(
    ("host", "meant"),
    [
        ("127.0.0.1", True),
        ("10.0.0.7:8765", True),
        ("[::1]", True),
        ("[2001:db8::1]:80", True),
        ("::1", True),
        ("LocalHost:8765", True),
        ("gpu.example.org", True),
        ("GPU.example.org.:80", True),
        ("", False),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("1.2.3.4.5", False),
        ("[evil]", False),
        ("gpu.example.org@evil.example", False),
    ],
)
def test_a_host_means_a_server_by_address_or_known_name(host: str, meant: bool) -> None:
    assert is_meant(host, ["gpu.example.org."]) is meant
