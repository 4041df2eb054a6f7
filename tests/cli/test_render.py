"""Tables fit their width: cells are wrapped between words and never cut."""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from surfw.bench.result import Result, Row
from surfw.cli import bench_view, render

ROWS = [
    ("model.embed_tokens", "embeddings", "1", "262.1 MB"),
    ("model.layers.0 … model.layers.21 (22)", "layer", "9", "88.1 MB each"),
]


def shown(
    monkeypatch: pytest.MonkeyPatch, width: int, *, terminal: bool = True, show: Callable[[], None] | None = None
) -> list[str]:
    file = io.StringIO()
    console = type(render.out)(file=file, width=width, force_terminal=terminal, color_system=None)
    monkeypatch.setattr(render, "out", console)
    if show is None:
        render.print_table(("chunk", "kind", "tensors", "size"), ROWS, numbers=("tensors", "size"))
    else:
        show()
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_a_table_is_broken_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, 80) == [
        "chunk                                  kind        tensors          size",
        "model.embed_tokens                     embeddings        1      262.1 MB",
        "model.layers.0 … model.layers.21 (22)  layer             9  88.1 MB each",
    ]
    narrow = [
        "chunk               kind        tensors          size",
        "model.embed_tokens  embeddings        1      262.1 MB",
        "model.layers.0 …    layer             9  88.1 MB each",
        "model.layers.21",
        "(22)",
    ]
    assert shown(monkeypatch, 55) == narrow


def test_where_its_words_do_not_fit_each_row_is_a_line_and_what_belongs_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, 46) == [
        "model.embed_tokens",
        "  kind embeddings, tensors 1, size 262.1 MB",
        "model.layers.0 … model.layers.21 (22)",
        "  kind layer, tensors 9, size 88.1 MB each",
    ]


def test_in_a_pipe_each_row_is_one_whole_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, 30, terminal=False) == shown(monkeypatch, 80)


def test_paths_are_broken_after_slashes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("store", "/srv/somewhere/far/below/models", "default"), ("model", "not set", "default")]
    table = partial(render.print_table, ("setting", "value", "from"), rows)
    assert shown(monkeypatch, 40, show=table) == [
        "setting  value                 from",
        "store    /srv/somewhere/far/   default",
        "         below/models",
        "model    not set               default",
    ]
    assert shown(monkeypatch, 24, show=table) == [
        "store",
        "  value /srv/somewhere/",
        "  far/below/models, from",
        "  default",
        "model",
        "  value not set, from",
        "  default",
    ]


def test_a_line_is_broken_between_words_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    line = partial(render.say, "10 chunks, 8 layers")
    assert shown(monkeypatch, 14, show=line) == ["10 chunks, 8", "layers"]
    assert shown(monkeypatch, 14, show=line, terminal=False) == ["10 chunks, 8 layers"]


@pytest.mark.parametrize("width", [80, 60])
def test_the_figures_of_a_benchmark_are_never_cut(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"value": 0.13, "unit": "GB/s", "low": 0.101, "high": 0.1042, "baseline": 0.605, "ratio": 0.934}
    row = Row(name="Blosc alone, encoding", verified=True, **figures)  # type: ignore[arg-type]
    ceiling = replace(row, name="decode in 2 threads", ceiling=1.21, share=0.467)
    result = Result(benchmark="codec", machine={"cpu": "one"}, rows=(row, ceiling))
    lines = shown(monkeypatch, width, show=lambda: bench_view.show_rows(result))
    assert "…" not in "".join(lines)
    assert sum("0.101–0.104" in line for line in lines) == 2
    assert max(map(len, lines)) <= width
