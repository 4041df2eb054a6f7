"""What `infer` shows: on a terminal, in a pipe, and when it is interrupted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.run import SURFW, environment, surfw
from tests.cli.terminal import CTRL_C, terminal
from tests.services import warm

SAYS = "Weight streaming is a way to run a model whose weights do not fit into memory."
DEMO = ("infer", "--model", "demo", "--prompt", "Weight streaming is", "--max-new-tokens")
CODES = "\x1b"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the demo model's store."""
    made = tmp_path_factory.mktemp("home")
    assert surfw(made, *DEMO, "1").returncode == 0
    return made


def shown(rows: list[str]) -> str:
    return "\n".join(rows)


def test_on_a_terminal_the_text_stays_and_the_status_goes(home: Path) -> None:
    with terminal(home, [SURFW, *DEMO, "14"]) as (window, process):
        window.wait_until(lambda: b"starting" in window.seen)
        window.wait_until(lambda: b"starting" in window.seen)
    assert process.returncode == 0
    rows = window.rows()
    assert rows[-3] == SAYS
    assert rows[-2].startswith("surfw: 14 tokens in ")
    assert "waited for the server" in shown(rows[-2:])
    assert "/14 tokens" not in shown(rows)


@pytest.mark.parametrize("columns", [130, 80])
def test_a_table_beside_the_text_or_below_it(home: Path, columns: int) -> None:
    with terminal(home, [SURFW, *DEMO, "60", "--ignore-eos", "--live", "full"], columns=columns) as (window, process):
        pass
    assert process.returncode == 0
    beside = re.search(rb"Weight streaming is[^\n]*TTFT", window.seen)
    assert (beside is not None) == (columns == 130)
    rows = window.rows()
    assert "hits / prefetched / stalls" in shown(rows)
    assert SAYS in "".join(rows)
    assert "/60 tokens" not in shown(rows)


@pytest.mark.parametrize("option", ["full", "--no-live", "plain"])
def test_a_terminal_that_knows_no_codes_gets_none(home: Path, option: str) -> None:
    options = {"full": ["--live", "full"], "--no-live": ["--no-live"], "plain": []}[option]
    term = "xterm-256color" if option == "--no-live" else "dumb"
    with terminal(home, [SURFW, *DEMO, "14", *options], columns=200, TERM=term) as (window, process):
        pass
    assert process.returncode == 0
    seen = window.seen.decode()
    assert CODES not in seen
    assert "\b" not in seen
    first, text, last = seen.replace("\r\n", "\n").splitlines()
    assert first.startswith("surfw: source: ")
    assert text == SAYS.removeprefix("Weight streaming is")
    assert last.startswith("surfw: 14 tokens in ")


def test_no_colour(home: Path) -> None:
    with terminal(home, [SURFW, *DEMO, "4"], NO_COLOR="1") as (window, _):
        pass
    assert b"\x1b[2m" not in window.seen
    assert window.shows("Weight streaming is a way to run")


def test_what_was_said_stays_after_ctrl_c(home: Path) -> None:
    with terminal(home, [SURFW, *DEMO, "500", "--ignore-eos"], controls=True) as (window, process):
        window.wait_until(lambda: window.shows("/500 tokens") and window.shows("is a way to run"))
        window.type(CTRL_C)
    assert process.returncode == 130
    text = "\n".join(window.rows())
    assert "Weight streaming is a way to run" in text
    assert "surfw: stopped after " in text
    assert "tok/s" in text
    assert text.endswith("surfw: interrupted")
    assert "/500 tokens" not in text
    assert window.rows()[-2], "no line is left empty before it"


@pytest.mark.parametrize("options", [["--no-live"], ["-q"]])
def test_a_line_of_text_ends_before_what_is_said_of_ctrl_c(home: Path, options: list[str]) -> None:
    command = [SURFW, *DEMO, "500", "--ignore-eos", *options]
    with terminal(home, command, controls=True) as (window, process):
        window.wait_until(lambda: window.shows("a way to run"))
        window.type("\x03")
    assert process.returncode == 130
    *before, text, last = window.rows()
    assert (last, text == "") == ("surfw: interrupted", False)
    assert any(row.startswith("surfw: stopped after ") for row in [*before, text]) == (options == ["--no-live"])


BEFORE_CAT = """
import os, subprocess, sys
from surfw.cli.main import main
cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
os.dup2(cat.stdin.fileno(), 1)
cat.stdin.close()
sys.stdout.reconfigure(line_buffering=False)
main()
"""
"""`surfw … | cat` without a shell."""


@pytest.mark.parametrize("options", [[], ["--no-live"]])
def test_after_ctrl_c_a_summary_comes_though_the_reader_of_the_text_has_ended_too(
    home: Path, options: list[str]
) -> None:
    command = [sys.executable, "-c", BEFORE_CAT, *DEMO, "500", "--ignore-eos", *options]
    with terminal(home, command, controls=True) as (window, _):
        window.wait_until(lambda: window.shows("a way to run"))
        window.type(CTRL_C)
    text = shown(window.rows())
    assert "surfw: stopped after " in text
    assert text.endswith("surfw: interrupted")


def test_ctrl_c_in_the_first_seconds_is_answered_at_once(home: Path) -> None:
    """The spinner disappears, whether or not it waits for an import."""
    with terminal(home, [SURFW, *DEMO, "4"], cold=True) as (window, process):
        window.wait_until(lambda: b"importing torch" in window.seen)
        window.type("\x03")
    assert process.returncode == 130
    (said,) = [row for row in window.rows() if row.startswith("surfw: interrupted")]
    assert said in {"surfw: interrupted; ends after this import", "surfw: interrupted"}
    assert "importing" not in shown(window.rows())
    assert "" not in window.rows()


def test_a_pipe_gets_each_token_at_once(home: Path) -> None:
    process = warm.start(
        [SURFW, *DEMO, "500", "--ignore-eos"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=environment(home),
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        pieces = [os.read(process.stdout.fileno(), 4096).decode() for _ in range(4)]
        assert all(len(piece) < 40 for piece in pieces), pieces
        process.kill()


def test_ids_come_as_text_does(home: Path) -> None:
    arguments = ("infer", "--model", "demo", "--prompt-ids", "1,5,6", "--max-new-tokens", "5", "--ignore-eos")
    said = json.loads(surfw(home, *arguments, "--json").stdout)
    assert surfw(home, *arguments).stdout == " ".join(map(str, said["token_ids"])) + "\n"


def test_a_file_gets_the_text_and_the_terminal_the_status(home: Path, tmp_path: Path) -> None:
    with (tmp_path / "said").open("wb") as said, terminal(home, [SURFW, *DEMO, "14"], stdout=said) as (window, process):
        window.wait_until(lambda: b"starting" in window.seen)
    assert process.returncode == 0
    assert (tmp_path / "said").read_text() == SAYS.removeprefix("Weight streaming is") + "\n"
    assert not window.shows("a way to run")
    assert "surfw: 14 tokens in " in shown(window.rows())


def test_an_object_for_scripts_comes_after_the_status(home: Path) -> None:
    with terminal(home, [SURFW, *DEMO, "4", "--json"], columns=400) as (window, process):
        window.wait_until(lambda: b"starting" in window.seen)
    assert process.returncode == 0
    assert json.loads("".join(window.rows()[1:]))["new_tokens"] == 4
