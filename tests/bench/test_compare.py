"""Comparing the ratios of rounds: slower rows are reported, equal ones are not; and the pages of reports."""

import io
import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surfw.bench.codec import bench_codec
from surfw.bench.compare import VERDICT_FROM, compare, interval, read_results, save_results
from surfw.bench.report import html_page, markdown_page
from surfw.bench.result import Result, Row, rate_row, summarise
from surfw.cli import bench_view, render
from surfw.errors import ConfigurationError
from tests.cli.run import surfw


def result(*rows: Row, cpu: str = "x", benchmark: str = "wire") -> Result:
    return Result(benchmark=benchmark, machine={"cpu": cpu, "cores": "2", "memory": "4 GiB"}, rows=rows)


def row(ratios: list[float], name: str = "verified") -> Row:
    return rate_row(name, summarise(ratios), summarise([1.0] * len(ratios)))


def noisy(scale: float, seed: int, rounds: int = 7) -> Row:
    """A row whose rounds scatter by 3 %."""
    chance = random.Random(seed)
    return row([scale * math.exp(chance.gauss(0, 0.03)) for _ in range(rounds)])


def test_ratios_are_those_of_the_same_round() -> None:
    made = rate_row("a", summarise([2.0, 6.0, 8.0]), summarise([1.0, 2.0, 4.0]))
    assert made.ratios == (2, 3, 2)
    assert rate_row("a", summarise([2.0]), summarise([1.0, 2.0])).ratios == ()


@pytest.mark.parametrize("seed", range(20))
def test_a_slowdown_of_a_fifth_is_seen_and_the_same_is_not(seed: int) -> None:
    before = result(noisy(0.8, seed))
    (slower,) = compare(before, result(noisy(0.8 / 1.2, seed + 100))).changes
    assert slower.verdict == "worse"
    (same,) = compare(before, result(noisy(0.8, seed + 200))).changes
    assert same.verdict == "same"
    (faster,) = compare(before, result(noisy(0.8 * 1.25, seed + 300))).changes
    assert faster.verdict == "better"


def test_an_interval_that_reaches_beyond_the_margin_says_nothing() -> None:
    before = result(row([1, 1, 1, 1]))
    for now in ([0.5, 0.9, 1.1, 2], [0.85, 0.9, 0.95, 1], [1, 1.05, 1.1, 1.15]):
        (change,) = compare(before, result(row(list(now)))).changes
        assert change.verdict == "unknown"


def test_other_rates_with_the_same_ratios_are_the_same() -> None:
    before = rate_row("a", summarise([1.0, 2.0, 3.0]), summarise([2.0, 4.0, 6.0]))
    now = rate_row("a", summarise([10.0, 5.0, 7.0]), summarise([20.0, 10.0, 14.0]))
    found = compare(result(before), result(now, cpu="y"))
    assert [(one.change, one.verdict) for one in found.changes] == [(0, "same")]
    assert found.other_machine["cpu"] == "x"


def test_the_output_says_that_the_verdict_is_not_from_the_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    before, now = row([1, 1.01, 0.99, 1]), replace(row([1.5, 1.52, 1.49, 1.5]), ratio=0.9)
    found = compare(result(before), result(now))
    assert [(one.before, one.now, one.verdict) for one in found.changes] == [(1, 0.9, "better")]
    printed = io.StringIO()
    monkeypatch.setattr(render, "out", render.make_console(file=printed, width=200))
    bench_view.show_changes(found)
    for shown in (printed.getvalue(), html_page([result(now)], [found]), markdown_page([result(now)], [found])):
        assert "the verdict is from the 95 % interval of the change over all pairs of rounds" in shown


def test_rows_without_enough_rounds_and_rows_that_are_gone_are_unknown() -> None:
    found = compare(result(row([1, 1]), row([1, 1, 1], "gone")), result(row([0.5, 0.5]), row([1, 1, 1], "new")))
    assert [(one.name, one.verdict) for one in found.changes] == [
        ("verified", "unknown"), ("new", "unknown"), ("gone", "unknown"),
    ]  # fmt: skip
    assert found.worse == []


values = st.lists(st.floats(0.01, 100), min_size=3, max_size=12)


@given(values, values)
def test_the_interval_holds_the_estimate_and_turns_with_its_sides(before: list[float], now: list[float]) -> None:
    low, change, high = interval(before, now)
    assert -1 < low <= change <= high
    back = interval(now, before)
    assert back[1] == pytest.approx(1 / (1 + change) - 1, rel=1e-6, abs=1e-6)


def test_results_come_back_as_they_were_saved(tmp_path: Path) -> None:
    saved = [result(row([1, 2, 3])), result(row([4, 5, 6]), Row(name="size", value=3, unit="MB"), benchmark="codec")]
    save_results(saved, tmp_path / "saved.json")
    assert read_results(tmp_path / "saved.json") == {"wire": saved[0], "codec": saved[1]}


@pytest.mark.parametrize("text", ["", "{}", '{"results": [{}]}', '{"results": 3}', "[" * 100_000])
def test_what_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "saved.json").write_text(text)
    with pytest.raises(ConfigurationError, match="holds no results of a benchmark"):
        read_results(tmp_path / "saved.json")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]


def test_reports_ask_for_nothing_and_show_names_as_text() -> None:
    before, now = result(noisy(1, 1)), result(noisy(0.7, 2), Row(name="<script>|x", value=1, unit="MB", note="a <b>"))
    comparisons = [compare(before, now, file="b.json")]
    page = html_page([now], comparisons)
    seen = _Page()
    seen.feed(page)
    assert seen.links == []
    assert "script" not in seen.tags
    assert seen.tags.count("svg") == 2, "one for each unit"
    assert not re.search(r"https?:|url\(|@import", page)
    assert "<tr class=worse>" in page
    text = markdown_page([now], comparisons)
    assert "&lt;script&gt;\\|x" in text
    assert "| worse |" in text


def test_bench_codec_measures_what_it_says() -> None:
    found = bench_codec(rounds=2, size=3_000_000)
    rows = {one.name: one for one in found.rows}
    assert list(rows) == [
        "copying the payload", "Blosc alone, encoding", "encode", "Blosc alone, decoding", "decode",
        "Blosc alone, decoding, 2 threads", "decode, 2 threads", "coded bytes",
    ]  # fmt: skip
    for name in ("encode", "decode", "decode, 2 threads"):
        assert len(rows[name].ratios) == 2
        assert rows[name].unit == "GB/s"
    assert 0.6 < (rows["coded bytes"].ratio or 0) < 0.75


def test_a_benchmark_is_saved_compared_and_reported(tmp_path: Path) -> None:
    bench = ("bench", "codec", "--rounds", "3", "--json")
    saved, report = str(tmp_path / "saved.json"), tmp_path / "report.html"
    first = json.loads(surfw(tmp_path, *bench, "--save", saved).stdout)
    earlier = json.loads(Path(saved).read_text())
    assert earlier["results"] == [first]
    for one in earlier["results"][0]["rows"]:
        one["ratios"] = [ratio * 1e6 for ratio in one["ratios"]]  # large enough to exceed any noise
    Path(saved).write_text(json.dumps(earlier))
    done = surfw(tmp_path, *bench, "--compare", saved, "--report", str(report))
    assert done.returncode == 3
    assert "surfw: bench codec: decode is 100 % slower" in done.stderr
    comparison = json.loads(done.stdout)["comparison"]
    assert {one["verdict"] for one in comparison["changes"]} == {"worse"}
    assert comparison["verdict_from"] == VERDICT_FROM
    assert "<svg" in report.read_text()


def test_files_that_will_not_do_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    save_results([result(row([1, 2, 3]), benchmark="codec")], tmp_path / "codec.json")
    codec = str(tmp_path / "codec.json")
    for options, code, said in (
        (("--report", "x.pdf"), 2, "is neither a .html nor a .md file"),
        (("--save", "no/x.json"), 1, "there is no folder no; make it"),
        (("--save", str(tmp_path)), 1, "it is a folder; name a file in it"),
        (("--compare", "x.json"), 1, "x.json cannot be read"),
        (("--compare", codec), 1, "codec.json holds no result of bench wire, only: codec; name a file that does"),
    ):
        done = surfw(tmp_path, "bench", "wire", *options)
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr
