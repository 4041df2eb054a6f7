"""A retry policy says when to try again, and limits the attempts; redirects are checked before they are followed."""

import pytest

from surfw.errors import ConfigurationError
from surfw.retry import Redirect, RetryPolicy, parse_redirect


def test_delays_grow_by_the_backoff() -> None:
    policy = RetryPolicy(attempts=5, first_delay_seconds=0.5, backoff=3, jitter=0)
    assert list(policy.delays()) == [0.5, 1.5, 4.5, 13.5]


def test_jitter_takes_a_share_away() -> None:
    draws = iter([0.0, 0.5, 1.0])
    policy = RetryPolicy(attempts=4, first_delay_seconds=1, backoff=1, jitter=0.4)
    assert list(policy.delays(lambda: next(draws))) == pytest.approx([1.0, 0.8, 0.6])


def test_chance_stays_within_the_share() -> None:
    policy = RetryPolicy(attempts=200, first_delay_seconds=1, backoff=1, jitter=0.5)
    delays = list(policy.delays())
    assert len(delays) == 199
    assert 0.5 <= min(delays) < max(delays) <= 1


def test_no_delay_is_longer_than_the_longest() -> None:
    policy = RetryPolicy(attempts=6, first_delay_seconds=1, backoff=10, most_delay_seconds=50, jitter=0)
    assert list(policy.delays()) == [1, 10, 50, 50, 50]
    assert max(RetryPolicy(attempts=1000).delays()) <= 30
    assert list(RetryPolicy(attempts=2, first_delay_seconds=9, most_delay_seconds=2, jitter=0).delays()) == [2]


def test_one_attempt_never_waits() -> None:
    assert list(RetryPolicy(attempts=1).delays()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attempts": 0}, "0 attempts make no sense; expected 1 to 1000"),
        ({"attempts": 1001}, "1001 attempts"),
        ({"first_delay_seconds": -0.1}, "a first delay of -0.1 seconds makes no sense"),
        ({"first_delay_seconds": float("nan")}, "a first delay of nan seconds"),
        ({"backoff": 0.9}, "a backoff of 0.9 makes no sense; expected 1 or more"),
        ({"backoff": float("inf")}, "a backoff of inf"),
        ({"most_delay_seconds": -1}, "a longest delay of -1 seconds makes no sense"),
        ({"jitter": 1.5}, "a jitter of 1.5 makes no sense; expected a share from 0 to 1"),
        ({"restart_seconds": -1}, "-1 seconds for a restart make no sense; expected 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RetryPolicy(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "location", "redirect"),
    [
        ("http://a/b", "/c#d", Redirect("http://a/c", False, False, False, False)),
        ("ws://a:80/b", "http://A/b", Redirect("http://A/b", False, False, False, False)),
        ("ws://a/b", "HTTPS://a/b", Redirect("HTTPS://a/b", True, False, True, False)),
        ("wss://a", "ws://a", Redirect("ws://a", False, True, True, False)),
        ("https://a", "https://a:444/", Redirect("https://a:444/", True, False, True, False)),
        ("https://a", "//u:p@a/", Redirect("https://u:p@a/", True, False, False, True)),
    ],
)
def test_what_a_redirect_changes(url: str, location: str, redirect: Redirect) -> None:
    assert parse_redirect(url, location) == redirect


@pytest.mark.parametrize("location", ["ftp://a/", "https://", "http://[", "http://a:b/", "mailto:a@b"])
def test_a_redirect_to_no_server(location: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_redirect("http://a/b", location)
