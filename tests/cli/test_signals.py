"""SIGTERM and SIGHUP end real commands as Ctrl-C does, without leftovers."""

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import save_llama
from tests.cli.run import SURFW, environment, imports, surfw
from tests.servers import serve
from tests.services import warm

TERM, HUP, INT = signal.SIGTERM, signal.SIGHUP, signal.SIGINT
EVERY = [(INT, 130, ""), (TERM, 143, " by SIGTERM"), (HUP, 129, " by SIGHUP")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a LLaMA that is large enough to be interrupted in the middle of a command."""
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "big", layers=24, hidden=256)
    assert surfw(home, "chunk", str(home / "big")).returncode == 0
    return home


@contextmanager
def running(home: Path, *command: str) -> Iterator[subprocess.Popen[str] | warm.Process]:
    """Run a command in a session of its own, with temporary files in `home/tmp`; surfw has its imports done."""
    (home / "tmp").mkdir(exist_ok=True)
    variables = environment(home, TMPDIR=str(home / "tmp"))
    pipe = subprocess.PIPE
    process: subprocess.Popen[str] | warm.Process
    if command[0] == SURFW:
        process = warm.start(command, modules=imports(command), env=variables, stdin=pipe, stdout=pipe, stderr=pipe)
    else:
        process = subprocess.Popen(
            command, env=variables, text=True, start_new_session=True, stdin=pipe, stdout=pipe, stderr=pipe
        )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str] | warm.Process, is_so: Callable[[], object]) -> None:
    while not is_so():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def end(
    process: subprocess.Popen[str] | warm.Process, number: signal.Signals, *, group: bool = False
) -> tuple[int | None, str]:
    """Return its exit code and its last output; all processes that it started must have ended."""
    children = psutil.Process(process.pid).children(recursive=True)
    if group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert psutil.wait_procs(children, timeout=30)[1] == [], "whatever ran for it has ended"
    assert "Traceback" not in err
    return process.returncode, err.splitlines()[-1]


def test_chunk(home: Path, tmp_path: Path) -> None:
    with running(tmp_path, SURFW, "chunk", str(home / "big")) as process:
        wait_for(process, lambda: list((tmp_path / "store").rglob("*.safetensors")))
        assert end(process, TERM) == (143, "surfw: interrupted by SIGTERM; the same command goes on where it stopped")
    assert not list((tmp_path / "store").rglob("models/*"))


@pytest.mark.parametrize(("number", "code", "by"), EVERY)
def test_serve_in_its_first_seconds(number: signal.Signals, code: int, by: str, home: Path, tmp_path: Path) -> None:
    """The signal goes to all processes of the group, as from a terminal; one of them reads the checkpoint."""
    with running(tmp_path, SURFW, "serve", str(home / "big"), "--port", "0") as process:
        wait_for(process, psutil.Process(process.pid).children)
        assert end(process, number, group=True) == (code, f"surfw: interrupted{by}")


@pytest.mark.parametrize("number", [INT, TERM])
def test_serve_later_stops_as_it_should(number: signal.Signals, home: Path) -> None:
    with running(home, SURFW, "serve", "--port", "0", "--announce") as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        code, last = end(process, number)
    assert code == 0
    assert last.endswith(" INFO stopping")


def test_infer_with_the_server_of_the_demo(home: Path) -> None:
    arguments = ["--model", "demo", "--prompt", "a", "--max-new-tokens", "100000", "--ignore-eos"]
    with running(home, SURFW, "infer", *arguments) as process:
        assert process.stdout is not None
        assert process.stdout.read(8)
        assert end(process, TERM) == (143, "surfw: interrupted by SIGTERM")
    assert not list((home / "tmp").iterdir())


def test_stats(home: Path) -> None:
    with (
        serve(home / "store") as served,
        running(home, SURFW, "stats", served.url, "--watch", "--json", "--every", "50") as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline()
        assert end(process, TERM) == (143, "surfw: interrupted by SIGTERM")


def test_config(home: Path) -> None:
    file = home / "settings.toml"
    os.mkfifo(file)
    with running(home, SURFW, "--config", str(file), "config") as process, file.open("w"):  # opened: it reads the file
        assert end(process, TERM) == (143, "surfw: interrupted by SIGTERM")


@pytest.mark.parametrize("what", ["wire", "chunk"])
def test_a_benchmark_leaves_no_files(what: str, home: Path, tmp_path: Path) -> None:
    arguments = [] if what == "wire" else [str(home / "big"), "--rounds", "1000"]
    with running(tmp_path, SURFW, "bench", what, *arguments) as process:
        wait_for(process, lambda: any(path.is_file() for path in (tmp_path / "tmp").rglob("*")))
        assert end(process, TERM) == (143, "surfw: interrupted by SIGTERM")
    assert not list((tmp_path / "tmp").iterdir())


IMPORTS = """
import sys
import termios
from pathlib import Path
from surfw.cli.main import main

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[2]:
            Path("reached").touch()
            Path("opened").read_text()  # waits at a FIFO
            Path("passed").touch()

sys.meta_path.insert(0, Slow())
main()
"""


@pytest.mark.parametrize(
    ("module", "options", "number", "code", "by"),
    [
        *(("typer", [], *one) for one in EVERY),
        ("numpy", [], *EVERY[0]),
        ("numpy", ["-q"], *EVERY[1]),
    ],
)
def test_an_import_is_ended_before_a_command_runs_and_comes_to_its_end_within_one(
    module: str, options: list[str], number: signal.Signals, code: int, by: str, tmp_path: Path
) -> None:
    save_llama(tmp_path / "model")
    os.mkfifo(tmp_path / "opened")
    program = f"import os; os.chdir({str(tmp_path)!r}){IMPORTS}".replace("sys.argv[2]", repr(module))
    says_so = module == "numpy" and not options
    with running(tmp_path, sys.executable, "-c", program, "chunk", str(tmp_path / "model"), *options) as process:
        wait_for(process, (tmp_path / "reached").exists)
        process.send_signal(number)
        if says_so:
            assert process.stderr is not None
            assert process.stderr.readline() == f"surfw: interrupted{by}; ends after this import\n", "before it ends"
        if module != "typer":
            (tmp_path / "opened").write_text("")
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, "" if says_so else f"surfw: interrupted{by}\n")
    assert (tmp_path / "passed").exists() == (module != "typer")


BETWEEN_IMPORTS = """
from surfw.cli import render, signals
from surfw.cli.infer_view import choose_view
signals.set_up()
signals.begin()
try:
    with render.busy("", quiet=True) as step, choose_view("text", live=False, json=False, quiet=False) as view:
        import interrupted
        {tell}("importing another")
        print("goes on")
except KeyboardInterrupt:
    print("ends")
"""


@pytest.mark.parametrize("tell", ["step", "view.phase"])
def test_no_other_import_begins_after_the_one_that_a_signal_waits_for(tell: str, tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run(
        [sys.executable, "-c", BETWEEN_IMPORTS.format(tell=tell)], capture_output=True, text=True, check=False,
        env=environment(tmp_path, PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])),
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("ends\n", "surfw: interrupted; ends after this import\n")


WHILE_FREEING = """
import os, signal
from surfw.cli import signals
class Freed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        print("freed")
signals.set_up()
signals.begin()
try:
    Freed()
    signal.pause()
except KeyboardInterrupt:
    print("ends")
"""


def test_a_signal_is_not_lost_where_python_forgets_what_is_raised(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WHILE_FREEING], capture_output=True, text=True, check=False, timeout=60,
        env=environment(tmp_path, PYTHONPATH=str(Path(__file__).parents[2])),
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("freed\nends\n", "")


IN_THE_MIDDLE = """
import os, signal, subprocess, sys, tempfile
from pathlib import Path
from surfw.cli import signals
signals.set_up()
signals.begin()
def interrupt(event, arguments):
    if event == sys.argv[1]:
        sys.argv[1] = ""
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(interrupt)
child, started = None, sys.argv[1] != "tempfile.mkdtemp"
try:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "file").touch()
        child = subprocess.Popen(["sleep", "100"])
        Path(folder, "other").touch()
    signal.pause()
except KeyboardInterrupt:
    print("ends")
    if child is not None:
        child.kill()
    elif started:
        print("a process is left")
"""


@pytest.mark.parametrize("event", ["tempfile.mkdtemp", "subprocess.Popen", "os.remove", "os.rmdir"])
def test_what_is_begun_is_not_left_behind(event: str, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_MIDDLE, event], capture_output=True, text=True, check=False, timeout=60,
        env=environment(tmp_path, TMPDIR=str(tmp_path / "tmp"), PYTHONPATH=str(Path(__file__).parents[2])),
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("ends\n", "")
    assert not list((tmp_path / "tmp").iterdir())


FORKED = """
import multiprocessing, time
from surfw.cli import signals
signals.set_up()
signals.begin()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
time.sleep(0.2)
child.terminate()
child.join(20)
print("ended", child.exitcode is not None)
child.kill()
"""


def test_a_forked_process_is_ended_by_one_signal(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, check=False, timeout=60,
        env=environment(tmp_path, PYTHONPATH=str(Path(__file__).parents[2])),
    )  # fmt: skip
    assert done.stdout == "ended True\n"


AT_THE_END = """
import os, signal, sys, tempfile
from surfw.cli.app import app
from surfw.cli.main import main
from surfw.cli.options import Command

def interrupt(event, arguments):
    if event == "os.rmdir":
        os.kill(os.getpid(), signal.SIGTERM)

@app.command("short", cls=Command)
def short() -> None:
    with tempfile.TemporaryDirectory():
        sys.addaudithook(interrupt)

main()
"""


def test_an_interruption_of_the_last_step_is_not_lost(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END, "short"], capture_output=True, text=True, check=False, timeout=60,
        env=environment(tmp_path, PYTHONPATH=str(Path(__file__).parents[2])),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (143, "surfw: interrupted by SIGTERM\n")


SLOW_TO_END = """
import time
from surfw.cli.app import app
from surfw.cli.options import Command
from surfw.cli.main import main

@app.command("wait", cls=Command)
def wait() -> None:
    try:
        print("waiting", flush=True)
        while True:
            time.sleep(0.05)  # a signal just before a long sleep would be answered only after it
    finally:
        print("cleaning", flush=True)
        while True:
            time.sleep(0.05)

main()
"""


@pytest.mark.parametrize("first", [INT, TERM])
def test_a_second_signal_ends_it_at_once(first: signal.Signals, tmp_path: Path) -> None:
    with running(tmp_path, sys.executable, "-c", SLOW_TO_END, "wait") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(first)
        assert process.stdout.readline() == "cleaning\n"
        process.send_signal(INT)
        process.communicate(timeout=60)
        assert process.returncode == 130


def test_a_process_that_was_started_to_ignore_a_hangup_goes_on(tmp_path: Path) -> None:
    code = f"import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv({SURFW!r}, sys.argv[1:])"
    file = tmp_path / "settings.toml"
    os.mkfifo(file)
    with running(tmp_path, sys.executable, "-c", code, SURFW, "--config", str(file), "config", "--json") as process:
        with file.open("w") as settings:
            process.send_signal(HUP)
            settings.write("[tool.surfw]\n")
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "store" in out


def test_who_is_ended_at_once_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, termios\n"
        "from surfw.cli import signals\n"
        "signals.set_up(); signals.begin(); signals.is_full_screen = True\n"
        "a, b, c, local, *more = termios.tcgetattr(0)\n"
        "termios.tcsetattr(0, termios.TCSANOW, [a, b, c, local & ~termios.ECHO, *more])\n"
        "signal.signal(signal.SIGINT, lambda number, _: signals.note(number))\n"
        "os.write(1, b'\\x1b[?1049h\\x1b[?25l')\n"
        "os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)\n"
    )
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, check=False,
        env=environment(tmp_path, TERM="xterm-256color", PYTHONPATH=str(Path(__file__).parents[2])),
    )  # fmt: skip
    assert done.returncode == 130
    assert termios.tcgetattr(theirs) == before
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # how Linux reports that the other end is closed
        while piece := os.read(ours, 1 << 16):  # one read may return a part of the output
            seen += piece
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")
    assert seen.rindex(b"\x1b[?1049l") > seen.rindex(b"\x1b[?1049h")
    os.close(ours)
