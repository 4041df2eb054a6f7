"""Rows are made of outcomes: medians, ratios, ceilings from each round's bandwidth, and peers with other answers."""

import pytest

from surfw.bench.comparison import Measurement
from surfw.bench.infer_result import make_notes, make_rows
from surfw.bench.process import Outcome

TOKENS = [7, 8, 9, 10, 11]


def outcome(
    seconds: float, *, tokens: list[int] = TOKENS, streamed: int | None = None, group: int | None = None
) -> Outcome[Measurement]:
    """A generation whose first token took a fifth of the time."""
    found = Measurement(
        token_ids=tokens,
        seconds=seconds,
        ttft_seconds=seconds / 5,
        decode_seconds=seconds * 4 / 5,
        peak_rss_bytes=int(seconds * 1000),
        streamed_bytes=streamed,
    )
    return Outcome(found=found, peak_group_bytes=group)


def test_rates_are_medians_of_all_tokens_and_the_ratio_is_surfws() -> None:
    surfw, peer = make_rows(
        {"surfw": [outcome(5), outcome(1), outcome(2)], "peer": [outcome(10), outcome(5), outcome(20)]}, [None] * 3
    )
    assert (surfw.value, surfw.low, surfw.high) == (2.5, 1.0, 5.0)
    assert (peer.value, peer.low, peer.high) == (0.5, 0.25, 1.0)
    assert (surfw.surfw_ratio, peer.surfw_ratio) == (1.0, 5.0)
    assert surfw.decode_value == pytest.approx(4 / 1.6)
    assert surfw.ttft_seconds == pytest.approx(0.4)
    assert surfw.peak_rss_bytes == 5000
    assert (surfw.new_tokens, surfw.token_ids, surfw.same_tokens) == (5, TOKENS, True)
    assert (surfw.ceiling, surfw.share, surfw.streamed_bytes_per_token) == (None, None, None)


def test_a_ceiling_is_the_bandwidth_of_its_own_round_by_what_is_streamed_per_token() -> None:
    (row,) = make_rows({"surfw": [outcome(5, streamed=400), outcome(10, streamed=400)]}, [200.0, 100.0])
    assert row.streamed_bytes_per_token == 100
    assert row.ceiling == pytest.approx((2 + 1) / 2)
    assert row.share == pytest.approx(0.5), "one token a second of two, then a half of one"


def test_nothing_streamed_and_no_bandwidth_have_no_ceiling() -> None:
    (fits,) = make_rows({"surfw": [outcome(5, streamed=0)]}, [200.0])
    assert (fits.ceiling, fits.share, fits.streamed_bytes_per_token) == (None, None, 0)
    assert make_notes([fits], 200.0, measured=True) == [
        "surfw streamed nothing after the first token: everything fits, and only computing limits it"
    ]
    (unknown,) = make_rows({"surfw": [outcome(5, streamed=400)]}, [None])
    assert unknown.ceiling is None
    (note,) = make_notes([unknown], None, measured=True)
    assert note.startswith("no ceiling, because the bandwidth of the source is not known")


def test_who_fails_has_no_numbers_and_the_others_do() -> None:
    surfw, peer = make_rows(
        {"surfw": [outcome(5), outcome(5)], "peer": [outcome(1), Outcome(failed="was killed", peak_group_bytes=9)]},
        [None, None],
    )
    assert (peer.value, peer.token_ids, peer.failed) == (None, None, "was killed")
    assert surfw.value == 1.0
    assert "peer: was killed" in make_notes([surfw, peer], None, measured=True)
    failed, other = make_rows({"surfw": [Outcome(failed="ended")], "peer": [outcome(5)]}, [None])
    assert (failed.failed, other.value, other.surfw_ratio) == ("ended", 1.0, None)


def test_other_tokens_are_named_and_fewer_of_the_same_are_not() -> None:
    rows = make_rows(
        {
            "surfw": [outcome(5), outcome(5)],
            "short": [outcome(5, tokens=TOKENS[:2]), outcome(5, tokens=TOKENS[:2])],
            "once": [outcome(5), outcome(5, tokens=[7, 8, 9, 10, 12])],
            "peer": [outcome(5), outcome(5)],
        },
        [None, None],
    )
    assert [row.same_tokens for row in rows] == [True, True, False, True]
    notes = make_notes(rows, None, measured=True)
    assert "other tokens than the rest gave: once" in notes
    assert "short generated 2 tokens, not 5, because it is slow" in notes


def test_the_most_memory_of_all_rounds_is_told() -> None:
    (row,) = make_rows({"surfw": [outcome(5, group=70), outcome(4, group=90)]}, [None, None])
    assert (row.peak_rss_bytes, row.peak_group_bytes) == (5000, 90)
