"""Text passes through a terminal without losing a letter, and the view below it is removed at the end."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from tests.cli.run import environment
from tests.cli.terminal import terminal

WRITES = """
import sys, time
from surfw.cli import streams
streams.set_up()
from surfw.cli.screen import Screen
words, done = eval(sys.argv[1]), [0]
pause = float(sys.argv[2])
def below(size):
    return [f"STATUS {done[0]} of {len(words)}", "SECOND " + "-" * min(20, size.columns - 8)]
screen = Screen(sys.stdout, below, seconds=0.01)
screen.open()
for word in words:
    if word.startswith("warn:"):
        print(word, file=sys.stderr)
    else:
        screen.write(word)
    done[0] += 1
    time.sleep(pause)
screen.close()
print("END")
"""


def wrapped(text: str, columns: int) -> list[str]:
    """The rows of a text in a terminal."""
    rows = []
    for line in text.expandtabs().split("\n"):
        row = ""
        for letter in line:
            if cell_len(row + letter) > columns:
                rows.append(row)
                row = ""
            row += letter
        rows.append(row)
    return [row.rstrip() for row in rows]


NARROW = [f"{number:03}," for number in range(500)]
WIDE = [f"{number}語é" if number % 3 else f"{number}größer🚀" for number in range(500)]
LINES = [f"{number} " + "\n" * (number % 7 == 0) + "\t" * (number % 11 == 0) for number in range(500)]
EDGES = ["x" * 40, "y" * 40, "\n", "z" * 80, "\n\n", "語" * 39, "a", "語b", "\n", "c" * 79, "d", "e" * 79, "\n", "f"]


@pytest.mark.parametrize(
    ("words", "columns", "rows"),
    [
        (NARROW, 80, 24), (WIDE, 80, 24), (LINES, 80, 24), (EDGES, 80, 24), (NARROW, 21, 6), (WIDE, 46, 10),
        (WIDE, 200, 50),
    ],
    ids=["narrow", "wide", "lines", "edges", "tiny", "small", "large"],
)  # fmt: skip
def test_500_tokens_lose_no_letter(words: list[str], columns: int, rows: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITES, repr(words), "0.0005"]
    with terminal(tmp_path, command, columns=columns, rows=rows) as (window, process):
        pass
    assert process.returncode == 0, window.rows()
    assert b"STATUS" in window.seen
    *text, end = window.rows()
    assert end == "END"
    assert "".join(text) == "".join(wrapped("".join(words), columns))
    assert text == wrapped("".join(words).rstrip("\n"), columns)


def test_a_window_that_becomes_larger_and_smaller(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITES, repr(NARROW), "0.005"]
    with terminal(tmp_path, command, columns=60, rows=20) as (window, process):
        for columns, rows, number in ((81, 24, 120), (101, 12, 240), (133, 30, 360)):
            window.wait_until(lambda number=number: window.shows(f"{number},"))  # type: ignore[misc]
            window.resize(columns, rows)
    assert process.returncode == 0
    *text, end = window.rows()
    assert end == "END"
    assert not any("STATUS" in row or "SECOND" in row for row in text)
    assert "".join(text) == "".join(NARROW)


def test_what_others_print_has_rows_of_its_own(tmp_path: Path) -> None:
    words = ["one ", "two", "warn:a", "warn:b", " three", "\n", "warn:c", "four"]
    with terminal(tmp_path, [sys.executable, "-c", WRITES, repr(words), "0.02"]) as (window, _):
        pass
    assert window.rows() == ["one two", "warn:a", "warn:b", " three", "warn:c", "four", "END"]


def test_without_text_nothing_is_left(tmp_path: Path) -> None:
    with terminal(tmp_path, [sys.executable, "-c", WRITES, "[]", "0"]) as (window, _):
        pass
    assert window.rows() == ["END"]


def test_a_window_of_two_rows(tmp_path: Path) -> None:
    with terminal(tmp_path, [sys.executable, "-c", WRITES, repr(NARROW), "0"], columns=30, rows=3) as (window, _):
        pass
    *text, end = window.rows()
    assert end == "END"
    assert "".join(text) == "".join(NARROW)


def test_no_styles_where_none_are_wanted(tmp_path: Path) -> None:
    code = "from surfw.cli.screen import dimmed; import sys; sys.stdout.write(dimmed('x'))"
    for variables, text in (({}, "\x1b[2mx\x1b[22m"), ({"NO_COLOR": "1"}, "x")):
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment(tmp_path, **variables), capture_output=True, check=True
        )
        assert run.stdout.decode() == text
