"""The printed explanations, and the printed summary of a run that waited, are correct."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from surfw.cli.explain_view import explanation_rows, facts, show
from surfw.cli.infer_summary import Report, limits, queued_seconds, summary
from surfw.models import Explanation
from surfw.models.explain import Advice
from surfw.models.inference import InferenceResult
from surfw.settings import SettingOrigin
from surfw.wire import ServerStats
from tests.wire.test_reports import WITH_MORE

STREAMED = Explanation(
    model="toy", source="/store", limited_by="memory_budget", budget_bytes=1_000_000_000, cache_layers=None,
    policy="auto", layers=22, kept_layers=7, pinned=9, pinned_bytes=747_700_000, ring_buffers=2, ring_bytes=88_100_000,
    shared_bytes=0, by_rows=("embed",), overhead_bytes=8_400_000, reserved_bytes=270_300,
    peak_bytes=932_500_000, least_budget_bytes=264_500_000, base_bytes=414_000_000, bytes_per_pass=1_320_000_000,
    bytes_per_second=2.64e9, measured_bytes=64_000_000, compute_seconds=0.125, compute_share=1.0, unit="tokens",
    reading_ceiling=2.0, computing_ceiling=8.0, bottleneck="storage", more_bytes_per_pass=264_000_000, more_ceiling=8.0,
)  # fmt: skip
FITS = replace(
    STREAMED, limited_by="default", kept_layers=22, pinned=25, pinned_bytes=2_200_000_000, ring_buffers=0, ring_bytes=0,
    by_rows=(), bytes_per_pass=0, bytes_per_second=None, reading_ceiling=None, bottleneck="compute",
    more_bytes_per_pass=None, more_ceiling=None,
)  # fmt: skip
ARGUMENT, DEFAULT = SettingOrigin("argument", "memory_budget"), SettingOrigin("default", "default")


def rows(one: Explanation, origin: SettingOrigin = ARGUMENT) -> dict[str, str]:
    return dict(explanation_rows(one, origin))


def test_what_is_streamed_is_told_from_the_budget_to_the_bottleneck() -> None:
    assert rows(STREAMED) == {
        "memory budget": "1.0 GB, as --memory-budget says",
        "stays in memory": "7 of 22 layers and 2 other parts, 747.7 MB",
        "the rest passes through": "a ring of 2 buffers of 88.1 MB",
        "read by rows": "embed",
        "beside the weights": "8.4 MB, and 270.3 kB for the KV cache",
        "peak": "932.5 MB; with 264.5 MB it runs from any source",
        "outside of the budget": "414.0 MB of the process itself, and activations",
        "read in a pass": "1.3 GB, from storage at 2.64 GB/s (measured just now over 64.0 MB)",
        "ceiling by reading": "2.00 tok/s (bandwidth ÷ bytes in a pass)",
        "ceiling by computing": "8.00 tok/s (125.0 ms in a pass, measured just now)",
        "what limits it": "reading from storage; the ceiling is 2.00 tok/s",
        "with 1 GB more": "264.0 MB read in a pass; the ceiling is 8.00 tok/s",
        "how sure that is": "measured in a few seconds; other work on this machine lowers it",
    }


def test_where_everything_fits_nothing_is_said_of_reading() -> None:
    found = rows(FITS, DEFAULT)
    assert found["memory budget"] == "1.0 GB, which is what memory there is, less a headroom"
    assert found["stays in memory"] == "everything: 22 layers and 3 other parts, 2.2 GB; nothing is streamed"
    assert found["what limits it"] == "computing; the ceiling is 8.00 tok/s"
    assert not {"read in a pass", "ceiling by reading", "with 1 GB more", "the rest passes through"} & found.keys()


@pytest.mark.parametrize(
    ("change", "origin", "row", "text"),
    [
        ({}, SettingOrigin("variable", "SURFW_MEMORY_BUDGET"), "memory budget", "1.0 GB, as SURFW_MEMORY_BUDGET says"),
        ({}, SettingOrigin("file", "a.toml"), "memory budget", "1.0 GB, as a.toml says"),
        (
            {"limited_by": "cache_layers", "budget_bytes": None, "cache_layers": 2},
            SettingOrigin("argument", "cache_layers"),
            "memory budget", "none: 2 layers and one more in flight, as --cache-layers says",
        ),
        ({"policy": "lru"}, ARGUMENT, "the rest passes through", "a ring of 2 buffers of 88.1 MB (policy lru)"),
        ({"more_bytes_per_pass": 0}, ARGUMENT, "with 1 GB more",
         "nothing is read any more; the ceiling is 8.00 tok/s"),
        ({"compute_share": 0.25}, ARGUMENT, "ceiling by computing",
         "8.00 tok/s (125.0 ms in a pass, measured just now on 25 % of the weights)"),
        ({"compute_seconds": None, "computing_ceiling": None}, ARGUMENT, "ceiling by computing",
         "not known: it could not be measured in a few seconds"),
        ({"source": "ws://h:1", "bytes_per_second": 4e6}, ARGUMENT, "read in a pass",
         "1.3 GB, over the link at 4.0 MB/s (measured just now over 64.0 MB)"),
        ({"source": "ws://localhost:1", "bottleneck": "link"}, ARGUMENT, "what limits it",
         "reading from the server; the ceiling is 2.00 tok/s"),
        ({"unit": "passes"}, ARGUMENT, "what limits it", "reading from storage; the ceiling is 2.00 passes/s"),
    ],
)  # fmt: skip
def test_each_case_has_its_words(change: dict[str, Any], origin: SettingOrigin, row: str, text: str) -> None:
    assert rows(replace(STREAMED, **change), origin)[row] == text


def test_scripts_get_all_of_it_and_where_the_limit_comes_from() -> None:
    origins = {"memory_budget": SettingOrigin("file", "a.toml"), "cache_layers": DEFAULT}
    found = facts(STREAMED, origins)
    assert (found["limited_by"], found["limited_from"], found["ceiling"]) == ("memory_budget", "file", 2.0)
    assert facts(replace(STREAMED, limited_by="cache_layers"), origins)["limited_from"] == "default"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_every_row_is_printed(is_terminal: bool) -> None:
    out = io.StringIO()
    show(STREAMED, {"memory_budget": ARGUMENT}, Console(file=out, force_terminal=is_terminal, width=120))
    lines = out.getvalue().splitlines()
    assert len(lines) == len(rows(STREAMED))
    assert all(text in line for text, line in zip(rows(STREAMED).values(), lines, strict=True))


@pytest.mark.parametrize(
    ("stall_seconds", "pass_bytes", "is_whole", "is_said"),
    [(9, 1_500_000, True, True), (1, 1_500_000, True, False), (9, 5, True, False), (9, 1_500_000, False, False)],
)
def test_a_run_that_waited_for_a_server_with_a_small_cache_says_so(
    stall_seconds: int, pass_bytes: int, is_whole: bool, is_said: bool
) -> None:
    asked: list[ServerStats] = []

    def ask() -> ServerStats:
        asked.append(WITH_MORE)
        return WITH_MORE

    statistics: Any = {
        "cache": {"refetched_blocks": 0},
        "time": {"stall_seconds": stall_seconds, "compute_seconds": 10 - stall_seconds},
        "plan": {"codec": "none", "bytes_per_pass": pass_bytes, "limited_by": "default"},
    }
    said = summary(
        Report(
            model="org/b", source="ws://h:1", result=InferenceResult(prompt_tokens=3), load_seconds=1,
            statistics=statistics, peak_rss_bytes=1, is_whole=is_whole, ask_server=ask,
        )
    )  # fmt: skip
    clause = "; the server's cache of 5 B is smaller than one pass (1.5 MB), so it reads its storage each time; "
    assert (f"{clause}--cache-mb 30 there would help" in said) == is_said
    assert len(asked) == (stall_seconds == 9 and is_whole), "nobody is asked who is not to blame"


def test_a_run_beside_other_work_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    time = {"stall_seconds": 1, "compute_seconds": 9}
    statistics: Any = {"cache": {"refetched_blocks": 0}, "time": time, "plan": None}
    alone = Report(
        model="m", source="/s", result=InferenceResult(prompt_tokens=3), load_seconds=1, statistics=statistics,
        peak_rss_bytes=1, queued_seconds=1,
    )  # fmt: skip
    hint = "; other work kept its threads waiting for a processor; OMP_NUM_THREADS=1 may be faster then"
    assert hint not in summary(alone)
    beside = replace(alone, queued_seconds=8)
    assert summary(beside).endswith(hint)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert hint not in summary(beside)
    assert queued_seconds() >= 0


def test_a_run_that_waited_says_what_would_help() -> None:
    plan = {"bytes_per_pass": 15, "limited_by": "default"}
    little, mostly = ({"stall_seconds": stall, "compute_seconds": 10 - stall} for stall in (1, 9))
    assert limits("/s", little, plan) == "computing limited it; waited for the disk 10 % of the time"
    assert limits("/s", mostly, plan) == "waited for the disk 90 % of the time; more memory would keep more layers"
    by_layers = plan | {"limited_by": "cache_layers"}
    assert limits("s3://b/k", mostly, by_layers).endswith("; more memory (--memory-budget) would keep more layers")
    fits = plan | {"bytes_per_pass": 0}
    assert limits("ws://h:1", mostly, fits) == "waited for the link 90 % of the time, until all weights were there"
    assert limits("ws://[::1]:1", little, fits) == "computing limited it; waited for the server 10 % of the time"
    advice = Advice(more_bytes=400_000_000, budget_bytes=1_400_000_001, tokens_per_second=1.6)
    assert limits("/s", mostly, plan, advice).endswith("; 400.0 MB more memory would allow up to 1.60 tok/s")
    assert limits("/s", mostly, by_layers, advice).endswith(
        "; 400.0 MB more memory (--memory-budget 1401MB) would allow up to 1.60 tok/s"
    )
