"""A column shows the end of a text, and passes on the text that leaves it, every letter once."""

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from surfw.cli.column import TextColumn, wrap

TEXTS = st.lists(st.text(st.sampled_from("abc 語é\n"), max_size=12), max_size=30)


@given(TEXTS, st.integers(2, 9), st.integers(1, 5))
def test_no_letter_is_lost(pieces: list[str], width: int, rows: int) -> None:
    column, given_up = TextColumn(), ""
    for piece in pieces:
        column.add(piece)
        given_up += column.give_up(width, rows)
        lines = column.beside(["|"] * rows, width)
        assert len(lines) == rows
        assert {cell_len(line) for line in lines} == {width + 4}
    assert (given_up + column.end()).replace("\n", "") == "".join(pieces).replace("\n", "")


def test_rows_beside_a_table() -> None:
    column = TextColumn()
    column.add("the prompt ", dim=True)
    column.add("goes on\nand on")
    assert column.beside(["one", "two", "three", "four"], 12) == [
        "\x1b[2mthe prompt \x1b[22mg   one", "oes on         two", "and on         three", "               four",
    ]  # fmt: skip
    assert column.give_up(12, 2) == "the prompt g\n"
    assert column.end() == "oes on\nand on"


def test_what_could_steer_a_terminal_is_cleaned() -> None:
    column = TextColumn()
    column.add("a\x1b[2J\tb")
    assert column.end() == "a?[2J   b"


@given(st.text(st.sampled_from("ab語\n")), st.integers(2, 9))
def test_rows_put_together_are_the_text(text: str, width: int) -> None:
    rows = wrap(text, width)
    assert "".join(rows) == text
    assert all(cell_len(row.removesuffix("\n")) <= width for row in rows)
