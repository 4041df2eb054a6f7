"""Tables fit their place: broken between words, and never cut."""

import io
from collections.abc import Callable
from functools import partial

import pytest

from surfw.cli import render

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
