"""Chat sessions, at a real terminal and in a pipe."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from surfw.cli import chat
from surfw.cli.app import app
from surfw.cli.chat_prompt import PrivateHistory
from surfw.cli.chat_view import _summary
from surfw.cli.streams import expect_utf8
from surfw.errors import ConfigurationError
from surfw.models.conversation import Ending, Turn
from tests.checkpoints import save_bert, save_llama
from tests.cli.run import SURFW, complaint, environment, surfw
from tests.cli.terminal import CTRL_C, CTRL_D, terminal
from tests.cli.test_streams import EVIL, on_a_terminal, steering

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TALK = ("chat", "talker", "--max-new-tokens", "700", "--temperature", "1", "--seed", "1")
"""An answer with words that is long enough to be stopped."""

UP = "\x1b[A"
PROMPT, ANSWER = "\x1b[0;1m>", "/700 tokens"
"""What prompt_toolkit writes before a message, and the status line after an answer has begun."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose store has a model with a chat template, and an encoder."""
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "talker", eos_token_id=None)
    (home / "talker" / "chat_template.jinja").write_text(TEMPLATE)
    save_bert(home / "encoder")
    save_llama(home / "other", eos_token_id=None, seed=4)
    for name in ("talker", "encoder", "other"):
        done = surfw(home, "chunk", str(home / name))
        assert done.returncode == 0, done.stderr
    return home


def test_a_session(home: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    with terminal(home, [SURFW, *TALK], columns=200, controls=True) as (it, process):  # whatever the paths' length
        it.read_to("Ctrl-D ends the session")
        it.read_to(PROMPT)
        it.type("Weights arrive\r")
        it.read_to("reading the prompt")
        for _ in range(3):  # the first token alone may not give text yet
            it.read_to(ANSWER)
        it.type(CTRL_C)
        it.read_to("stopped")
        it.read_to(PROMPT)
        it.type(UP)
        it.read_to("arrive")
        it.type(" again\r")
        it.read_to("cached")
        it.read_to(PROMPT)
        it.type("not sent" + CTRL_C)
        it.read_to("Ctrl-C again, or Ctrl-D, ends the session")
        it.read_to(PROMPT)
        it.type("/stats\r")
        it.read_to("2 turns")
        it.type(f"/save {saved}\r")
        it.read_to("saved in")
        it.type(f"/save {saved}\r")
        it.read_to("is there already, and is not overwritten; name a new file")
        it.type(f"/save {saved.with_suffix('.txt')}\r")
        it.read_to("saved in")
        it.type("/nonsense\r")
        it.read_to("there is no command '/nonsense'; /help lists them")
        it.type("/model encoder\r")
        it.read_to("does not generate text, so there is no conversation with it")
        it.type("/model\r")
        it.read_to("this is talker")
        it.type("/model other\r")
        it.read_to("other, which has no chat template")
        it.type("/stats\r")
        it.read_to("2 turns, 0 of")
        it.type("/reset\r")
        it.read_to("a new conversation")
        it.type(" /help is a message here\r")
        it.read_to(ANSWER)
        it.type(CTRL_C)
        it.read_to("stopped")
        it.read_to(PROMPT)
        it.type(CTRL_D)
        assert process.wait(60) == 0
    document = json.loads(saved.read_text())
    assert document["model"] == "talker"
    roles = [message["role"] for message in document["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert [message["content"] for message in document["messages"][::2]] == ["Weights arrive", "Weights arrive again"]
    assert all(message["content"] for message in document["messages"])
    assert saved.with_suffix(".txt").read_text().startswith("user: Weights arrive\n\nassistant: ")
    history = home / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert json.loads(history.read_text().splitlines()[0]) == "Weights arrive"


@pytest.mark.parametrize(
    ("where", "number", "code"), [("at the prompt", signal.SIGTERM, 143), ("during an answer", signal.SIGHUP, 129)]
)
def test_other_signals_end_it(where: str, number: signal.Signals, code: int, home: Path) -> None:
    with terminal(home, [SURFW, *TALK]) as (it, process):
        it.read_to(PROMPT)
        if where == "during an answer":
            it.type("Weights arrive\r")
            it.read_to("reading the prompt")
            it.read_to(ANSWER)
        process.send_signal(number)
        it.read_to(f"surfw: interrupted by {number.name}")
        assert process.wait(60) == code


def test_ctrl_c_twice_ends_it_and_infer_without_a_prompt_begins_it(home: Path) -> None:
    with terminal(home, [SURFW, "infer", "--model", "talker"]) as (it, process):
        it.read_to(PROMPT)
        it.type(CTRL_C)
        it.read_to("Ctrl-C again")
        it.read_to(PROMPT)
        it.type(CTRL_C)
        assert process.wait(60) == 0


def test_each_line_of_a_pipe_is_a_turn(home: Path) -> None:
    lines = "Weights arrive\n\n/save is no command here\n"
    done = surfw(home, "chat", "talker", "--max-new-tokens", "5", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert [line.partition("(")[0] for line in done.stderr.splitlines()] == [f"surfw: source: {home}/store "]
    first = surfw(
        home, "infer", "--model", "talker", "--max-new-tokens", "5", "--prompt", "Weights arrive", "--no-live"
    )
    assert done.stdout.startswith(first.stdout)
    assert len(done.stdout) > len(first.stdout)
    quiet = surfw(home, "chat", "talker", "-q", "--max-new-tokens", "5", stdin=lines)
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["encoder"], "encoder (BertForMaskedLM) does not generate text, so there is no conversation with it"),
        (["nothing"], "has no model 'nothing'"),
    ],
)
def test_what_cannot_be_talked_with(arguments: list[str], text: str, home: Path) -> None:
    assert text in complaint(surfw(home, "chat", *arguments, stdin="Hello\n"))


def test_two_names_are_one_too_many(home: Path) -> None:
    done = surfw(home, "chat", "talker", "--model", "encoder")
    assert done.returncode == 2
    assert "--model does not go with MODEL 'talker'; give one of them" in done.stderr


def test_a_system_message_is_refused_before_a_model_is_opened(tmp_path: Path) -> None:
    done = surfw(tmp_path, "chat", "nothing", "--raw", "--system", "Be brief.", stdin="Hello\n")
    assert done.returncode == 2
    assert "--system does not go with --raw: a system message is part of the chat template" in done.stderr


@pytest.mark.parametrize("arguments", [["chat", "talker"], ["infer", "talker"]])
def test_an_answer_may_go_on_after_the_end_token(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(chat, "converse", lambda _, **options: given.update(options))
    monkeypatch.setattr(chat, "sees_person", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    app([*arguments, "--ignore-eos"], standalone_mode=False)
    assert given["ignore_eos"] is True


class _Talk:
    """A conversation whose answer lasts until it is stopped."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def ask(self, _text: str, **_: Any) -> None:
        assert self.stopped.wait(60)

    def stop(self) -> None:
        self.stopped.set()


class _Interrupted(ThreadPoolExecutor):
    """Sends Ctrl-C after a message has been submitted, but not earlier."""

    def submit(self, work: Any, /, *args: Any, **options: Any) -> Any:
        asking = super().submit(work, *args, **options)
        if args:
            raise KeyboardInterrupt
        return asking


def test_an_answer_is_stopped_that_was_only_about_to_begin() -> None:
    talk: Any = _Talk()
    session = chat._Session(talk, talk, talk, talk)
    with _Interrupted(1) as session._answers:
        try:
            with pytest.raises(KeyboardInterrupt):
                session._ask("Hello", Mock())
            assert talk.stopped.is_set()
        finally:
            talk.stop()


def test_what_is_not_utf8_is_refused_whatever_else_it_holds() -> None:
    expect_utf8("a character that is lost: \ufffd", "line 1")
    for text in ("\udcff", "\ufffd and \udcff"):
        with pytest.raises(ConfigurationError, match="line 1 is not valid UTF-8"):
            expect_utf8(text, "line 1")


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("end", " cached"),
        ("length", "cut at the most new tokens (--max-new-tokens)"),
        ("positions", "the model has no more positions; /reset begins anew"),
        ("stopped", "stopped"),
    ],
)
def test_why_an_answer_ended(ending: Ending, said: str) -> None:
    turn = Turn(text="a", token_ids=[1], prompt_tokens=1, ending=ending)
    assert _summary(turn).endswith(said)


def test_the_first_error_ends_a_pipe(home: Path) -> None:
    done = surfw(home, "chat", "talker", "--max-new-tokens", "5", stdin="Hello\n" + "x " * 5000 + "\nHello\n")
    assert "and talker has positions for 2048; begin a new one, or say less" in complaint(done)
    assert done.stdout


VIEW = """
import sys
from surfw.cli import streams
from surfw.cli.chat_view import ChatView
streams.set_up()
view = ChatView(is_interactive=True, live=False, quiet=False)
view.note(sys.argv[1])
with view.opening() as shown:
    shown.on_text(sys.argv[1])
view.error(ValueError(sys.argv[1]))
"""


def test_no_text_from_outside_steers_the_terminal(tmp_path: Path) -> None:
    _, seen = on_a_terminal(tmp_path, sys.executable, "-c", VIEW, f"one {EVIL} two")
    assert steering(seen) == set()
    assert seen.count("owned") == 3


def test_the_history_is_bounded_private_and_optional(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "history"
    history = PrivateHistory(path)
    assert list(history.load_history_strings()) == []
    history.store_string("one\nof two lines")
    history.store_string("two")
    assert list(PrivateHistory(path).load_history_strings()) == ["two", "one\nof two lines"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with path.open("a") as file:
        file.write('no JSON\n{"a": 1}\n' + "".join(f"{json.dumps(f'entry {n}')}\n" for n in range(5000)))
    found = list(PrivateHistory(path).load_history_strings())
    assert (len(found), found[0]) == (1000, "entry 4999")
    assert len(path.read_text().splitlines()) == 1000


def test_no_entry_makes_the_history_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "history"
    history = PrivateHistory(path)
    history.store_string("one")
    history.store_string("x" * 9_000_000)
    assert list(PrivateHistory(path).load_history_strings()) == ["one"]
    path.write_text(json.dumps("x" * 9_000_000) + "\n")
    assert list(PrivateHistory(path).load_history_strings()) == []
    history.store_string("two")
    assert list(PrivateHistory(path).load_history_strings()) == ["two"]


def test_a_history_that_cannot_be_kept(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "history")
    history = PrivateHistory(tmp_path / "history")
    history.store_string("nobody reads this")
    assert list(history.load_history_strings()) == []
    (tmp_path / "file").touch()
    inside = PrivateHistory(tmp_path / "file" / "history")
    inside.store_string("there is no such folder")
    assert list(inside.load_history_strings()) == []


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from surfw.cli.app import app\n"
        "try: app(['chat', '--help'])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print({'torch', 'transformers', 'numpy', 'prompt_toolkit', 'asyncio'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("set()\n")
    assert "chat [OPTIONS] [MODEL]\n" in done.stdout
    assert "\n    surfw chat org/name" in done.stdout
