"""A command's output arrives whole, or the command fails with one line; text from outside cannot control a terminal."""

import asyncio
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from surfw.cli.streams import break_lines
from surfw.storage import Store, open_backend
from tests.cli.run import SURFW, environment, imports, surfw
from tests.cli.terminal import terminal
from tests.servers import serve
from tests.services import warm
from tests.wire.test_reports import STATS, WITH_MORE

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b2J\r\x7f\u202egpj"
"""Sets a title, clears the screen in two ways, overwrites the line, and reverses the direction of writing."""
STYLE = re.compile(r"\x1b\[[\d;]*m")


@contextmanager
def evil_server() -> Iterator[str]:
    """A server whose statistics have the right shape, but contain control characters."""
    stats = STATS | {"models": [EVIL], "server": {"version": EVIL, "uptime_seconds": 1}}
    stats |= {"storage": {"url": EVIL, "healthy": True}}
    client = WITH_MORE["connections"][0] | {"name": EVIL, "address": EVIL, "model": EVIL}
    stats |= {"connections": [client], "events": [{"time": 0, "kind": EVIL, "text": EVIL}]}

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(stats).encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        answering = threading.Thread(target=server.serve_forever)
        answering.start()
        try:
            yield f"ws://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            answering.join()


def on_a_terminal(home: Path, *command: str, **extra: str) -> tuple[int, str]:
    """Run a command on a terminal, without codes unless `extra` allows them; returns its exit code and output."""
    options: dict[str, Any] = {"TERM": "dumb"} | extra
    with terminal(home, command, controls=True, **options) as (window, process):
        pass
    return process.wait(), window.seen.decode().replace("\r\n", "\n")


def steering(text: str) -> set[str]:
    """The control characters of `EVIL` in the output."""
    return set(text) & {letter for letter in EVIL if not letter.isprintable()}


def test_the_words_of_a_server(tmp_path: Path) -> None:
    with evil_server() as url:
        code, seen = on_a_terminal(tmp_path, SURFW, "stats", url)
        assert (code, steering(seen)) == (0, set()), seen
        assert "?]0;owned?[2J?2J" in seen
        code, seen = on_a_terminal(tmp_path, SURFW, "stats", url, "--json")
        assert (code, steering(seen)) == (0, set())
        assert json.loads(seen)["models"] == [EVIL]
        piped = subprocess.run([SURFW, "stats", url], env=environment(tmp_path), capture_output=True, check=True)
        assert steering(piped.stdout.decode()) == set()


@pytest.mark.parametrize(
    "arguments",
    [["chunk", f"./{EVIL}"], ["infer", f"--{EVIL}"], ["--config", f"{EVIL}.toml", "config"], ["stats", f"x://{EVIL}"]],
    ids=lambda one: one[0],
)
def test_errors_of_any_kind(arguments: list[str], tmp_path: Path) -> None:
    code, seen = on_a_terminal(tmp_path, SURFW, *arguments)
    assert code in {1, 2}
    assert steering(seen) == set(), seen
    assert "owned" in seen


PRINTS = """
import logging, sys, warnings
from surfw.cli import streams
from surfw.cli.infer_view import PlainView
streams.set_up()
text = sys.argv[1]
view = PlainView("text")
view.on_text(text + "\\n")
view.note(text)
warnings.warn(text)
logging.getLogger("somebody").error(text)
"""


def test_a_live_view_draws_itself_in_place(tmp_path: Path) -> None:
    demo = ("infer", "--model", "demo", "--prompt", "Weight streaming is", "--max-new-tokens", "4")
    code, seen = on_a_terminal(tmp_path, SURFW, *demo, TERM="xterm-256color", COLUMNS="80", LINES="24")
    assert code == 0, seen[-2000:]
    assert "\x1b[1A\x1b7\x1b[?7l\r\n\x1b[2K" in seen.replace("\r\r\n", "\r\n"), "it draws below the text"
    assert "\x1b8\x1b[J" in seen, "and erases that from there"
    assert "?[" not in seen, "what it says to the terminal is not cleaned"


def test_what_a_model_generates_is_cleaned_for_a_terminal_and_exact_in_a_file(tmp_path: Path) -> None:
    text = f"one\ttwo\nthree {EVIL} 👩\u200d🚀 größer"
    _, seen = on_a_terminal(tmp_path, sys.executable, "-c", PRINTS, text)
    assert steering(seen) == set()
    assert seen.startswith("one\ttwo\nthree ?]0;owned?")
    assert seen.count("👩\u200d🚀 größer") == 4
    done = subprocess.run([sys.executable, "-c", PRINTS, text], capture_output=True, check=True)
    assert done.stdout == f"{text}\n".encode()
    assert steering(done.stderr.decode()) == set()


NOTES = "from surfw.cli.chat_view import ChatView; ChatView(is_interactive=True, live=False, quiet=False).note('a')"


@pytest.mark.parametrize(
    "command", [[SURFW, "chunk", "org/name"], [sys.executable, "-c", NOTES]], ids=["chunk", "chat"]
)
def test_what_is_noted_has_no_styles_where_none_are_wanted(command: list[str], tmp_path: Path) -> None:
    _, seen = on_a_terminal(tmp_path, *command, TERM="xterm-256color")
    assert STYLE.search(seen)
    _, seen = on_a_terminal(tmp_path, *command, TERM="xterm-256color", NO_COLOR="1")
    assert not STYLE.search(seen)


COMMANDS = {
    "config": ["config"],
    "config --json": ["config", "--json"],
    "version": ["--version"],
    "help": ["infer", "--help"],
    "stats": ["stats", "SERVER"],
    "stats --json": ["stats", "SERVER", "--json"],
    "list": ["chunk", "--list"],
    "infer": ["infer", "--model", "demo", "--prompt", "a", "--max-new-tokens", "2"],
    "serve": ["serve", "STORE", "--port", "0", "--announce"],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An empty store, and a server of it."""
    store = tmp_path_factory.mktemp("home") / "store"
    asyncio.run(Store(open_backend(store)).create())
    with serve(store) as served:
        yield {"SERVER": served.url, "STORE": str(store)}


def run_in_shell(places: dict[str, str], arguments: list[str], redirections: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command with its streams redirected, as a shell does."""
    store = Path(places["STORE"])
    command = [SURFW, *(places.get(one, one) for one in arguments)]
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirections}', "sh", *command],
        env=environment(store.parent), stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False,
    )  # fmt: skip


REDIRECTED = {
    ">&-": "import os, sys; os.close(1); sys.stdout = sys.__stdout__ = None",
    ">/dev/full": "import os, sys; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)",
}
"""Code with which a process that has its imports done redirects its streams as a shell does."""


def run_redirected(places: dict[str, str], name: str, redirection: str) -> tuple[int, str]:
    """Run one of `COMMANDS` with this stdout: its exit code, and its stderr."""
    if name != "infer":
        done = run_in_shell(places, COMMANDS[name], redirection)
        return done.returncode, done.stderr.decode()
    code = f"{REDIRECTED[redirection]}; from surfw.cli.main import main; main()"
    run = warm.run([sys.executable, "-c", code, *COMMANDS[name]], env=environment(Path(places["STORE"]).parent))
    return run.returncode, run.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_result_that_cannot_be_printed_is_an_error_in_one_line(name: str, places: dict[str, str]) -> None:
    kinds = {">&-": "Bad file descriptor", ">/dev/full": "No space left on device"}
    for redirection, reason in kinds.items():
        code, said = run_redirected(places, name, redirection)
        errors = [line for line in said.splitlines() if "surfw: source: " not in line]
        errors = [line for line in errors if " serves " not in line and "importing torch" not in line]
        assert code == 1, said
        assert errors == [f"surfw: error: stdout cannot be written to: {reason}; what was printed is not complete"]


WITHOUT_STDERR = ["2>&-", "2>/dev/full", "2>&- <&-"]


@pytest.mark.parametrize("name", ["config", "stats", "list"])
@pytest.mark.parametrize("redirection", WITHOUT_STDERR)
def test_without_stderr_the_result_is_the_same(name: str, redirection: str, places: dict[str, str]) -> None:
    done = run_in_shell(places, COMMANDS[name], redirection)
    assert done.returncode == 0
    assert done.stdout
    for failing in (f">&- {redirection}", f">/dev/full {redirection}"):
        assert run_in_shell(places, COMMANDS[name], failing).returncode == 1


@pytest.mark.parametrize("redirection", WITHOUT_STDERR)
def test_without_stderr_an_error_is_its_exit_code(redirection: str, places: dict[str, str]) -> None:
    refused = run_in_shell(places, ["chunk", "./nowhere"], redirection)
    assert (refused.returncode, refused.stdout) == (1, b"")


@pytest.mark.parametrize("form", [["--json"], []])
def test_a_reader_that_leaves(form: list[str], places: dict[str, str]) -> None:
    """As `head` does: this is no error, and the exit code is that of other tools."""
    with subprocess.Popen(
        [SURFW, "stats", places["SERVER"], *form, "--watch", "--every", "0.1"],
        env=environment(Path(places["STORE"]).parent), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_that_was_never_there(name: str, places: dict[str, str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [SURFW, *(places.get(one, one) for one in COMMANDS[name])]
    process = warm.start(
        command, modules=imports(command), env=environment(Path(places["STORE"]).parent), stdin=subprocess.DEVNULL,
        stdout=writing, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(writing)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 141, said
    assert "error" not in said
    assert "Traceback" not in said


def test_long_lines_are_broken_between_words(tmp_path: Path) -> None:
    assert break_lines("one two three\n\nfour\n", 8) == "one two\nthree\n\nfour\n"
    assert break_lines("a /path/that/is-longer b", 8) == "a\n/path/that/is-longer\nb"
    assert break_lines("one two three", 0) == "one two three"
    assert (
        break_lines("after 1.9 s, 1.60 tok/s, 61 % or 4.1 MB/s", 10) == "after\n1.9 s,\n1.60 tok/s,\n61 % or\n4.1 MB/s"
    )
    assert break_lines("in 3 steps, of 4 big ones", 7) == "in 3\nsteps,\nof 4\nbig\nones"
    mistake = ("infer", "./nowhere", "a")
    with terminal(tmp_path, [SURFW, *mistake], columns=46) as (window, process):
        pass
    assert process.returncode == 1
    words = surfw(tmp_path, *mistake).stderr.split()
    assert len(words) > 20
    assert {one for one in words if len(one) < 46} <= set(" ".join(window.rows()).split())


_BACKGROUND = """
import fcntl, os, pty, termios
from surfw.cli.streams import can_draw
os.setsid()
_, terminal = pty.openpty()
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
stream = open(terminal, "w")
found = [can_draw(stream)]
if (child := os.fork()) == 0:
    os.setpgid(0, 0)  # as a shell does it with what ends with &
    os._exit(int(can_draw(stream)))
print(*found, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_what_runs_in_the_background_of_a_shell_draws_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _BACKGROUND]
    done = subprocess.run(command, env=environment(tmp_path, TERM="xterm"), check=True, capture_output=True, text=True)
    assert done.stdout == "True 0\n"
