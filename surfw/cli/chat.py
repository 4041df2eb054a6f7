"""`surfw chat`: a conversation with a model that stays open and keeps its KV cache between turns.

At a terminal, Ctrl-C stops an answer, not the session. Answers run in a thread of their own, so that a signal does not
interrupt code that it would break. From a pipe, each line is a turn, and the first error ends the session.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surfw.cli import options, signals
from surfw.cli.streams import expect_utf8
from surfw.config import display_url, surfw_home
from surfw.errors import ConfigurationError, ModelClosedError, SurfwError
from surfw.files import expand_home

if TYPE_CHECKING:
    from surfw.cli.chat_prompt import LineEditor
    from surfw.cli.chat_view import ChatView
    from surfw.cli.infer_view import View
    from surfw.models.conversation import Conversation, Turn
    from surfw.models.streaming import StreamingModel

EXAMPLES = """\b
Examples:
  surfw chat
  surfw chat org/name --memory-budget 2GB
  surfw chat --source ws://127.0.0.1:8765 --system 'Be brief.'
  surfw chat org/name < questions.txt > answers.txt
"""

COMMANDS = {
    "/reset": "forget the conversation and begin a new one",
    "/system": "TEXT: set the system message; without a text, remove it",
    "/model": "NAME: go on with another model of the source; it reads the conversation anew",
    "/stats": "show how long the conversation is, and what the whole session took",
    "/save": "FILE: write the conversation to a new file, as text or .json",
    "/help": "show this",
    "/quit": "end the session",
}

_PATIENCE_SIGNALS = 2
"""How many times Ctrl-C stops an answer; the next one ends the session."""


@options.with_settings(*options.RUN_SETTINGS)
def chat(
    *,
    place: options.Place = None,
    system: Annotated[str | None, typer.Option(help="The system message, for models with a chat template.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue as one text, without the chat template, as for base models.")
    ] = False,
    stop: Annotated[list[str] | None, typer.Option(help="Stop an answer at this text; may be repeated.")] = None,
    ignore_eos: options.IgnoreEos = False,
    configuration: options.Configuration,
    quiet: options.Quiet = False,
) -> None:
    """Chat with a model that stays open between turns.

    Ctrl-C stops an answer, Ctrl-D ends the session, /help lists its commands. From a pipe, each line is a turn.
    """
    if "" in (stop or ()):
        raise typer.BadParameter("a text that ends an answer cannot be empty", param_hint="--stop")
    options.check_system(system, raw=raw)
    if place is not None:
        from surfw.cli.sources import choose_model

        configuration = choose_model(configuration, place)
    converse(configuration, system=system, raw=raw, stop=stop or (), ignore_eos=ignore_eos, quiet=quiet)


def sees_person() -> bool:
    """Whether stdin and stderr are terminals, so that a person can write and read."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def converse(
    configuration: options.Configuration,
    *,
    system: str | None = None,
    raw: bool = False,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    quiet: bool = False,
) -> None:
    """Open the model and hold a session: with the person at the terminal, or with the lines of a pipe."""
    from surfw.cli.chat_view import ChatView

    is_interactive = sees_person()
    view = ChatView(is_interactive=is_interactive, live=configuration.settings.live, quiet=quiet)
    with _open(configuration, view) as (streaming, source):
        from surfw.models.conversation import Conversation

        settings = configuration.settings

        def begin(system: str | None) -> Conversation:
            return Conversation(
                streaming, system=system, raw=raw, stop=stop, ignore_eos=ignore_eos,
                max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, top_p=settings.top_p,
                top_k=settings.top_k, seed=settings.seed,
            )  # fmt: skip

        conversation = begin(system)
        view.follow(streaming, source, settings.max_new_tokens)
        if is_interactive:
            _Session(streaming, conversation, view, begin).run()
        else:
            _answer_lines(conversation, view)


@contextmanager
def _open(configuration: options.Configuration, view: "ChatView") -> Iterator[tuple["StreamingModel", str]]:
    """Open the model while showing progress; yield it, and the source of its weights."""
    from surfw.cli.sources import choose_source, connect, open_model

    settings = configuration.settings
    with ExitStack() as opened:
        with view.opening() as shown:
            shown.phase("looking for the weights")
            chosen = opened.enter_context(choose_source(configuration, on_phase=shown.phase))
            source = display_url(chosen.url)
            shown.note(f"source: {chosen.described}")
            chosen.check_folder()
            shown.phase("connecting" if chosen.is_server else "reading the manifest")
            client = opened.enter_context(connect(chosen, settings, explain=False))
            streaming = opened.enter_context(open_model(client, settings, shown.phase))
            streaming.find_tokenizer()
        yield streaming, source


def _answer_lines(conversation: "Conversation", view: "ChatView") -> None:
    """Take each line of stdin as a turn."""
    for number, line in enumerate(sys.stdin or (), 1):
        if text := line.rstrip("\n"):
            expect_utf8(text, f"line {number}")
            with view.answering() as shown:
                turn = conversation.ask(text, on_text=shown.on_text, on_token=shown.on_token)
            view.conclude(turn)


class _Session:
    """A session with a person at the terminal."""

    def __init__(
        self,
        streaming: "StreamingModel",
        conversation: "Conversation",
        view: "ChatView",
        begin: "Callable[[str | None], Conversation]",
    ) -> None:
        """`begin` starts a conversation with the open model, with a system message."""
        self._streaming = streaming
        self._begin = begin
        self._conversation = conversation
        self._view = view
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset, "/system": self._system, "/model": self._model, "/stats": self._stats,
            "/save": self._save, "/help": self._help,
        }  # fmt: skip

    def run(self) -> None:
        """Take messages and commands until the person ends the session."""
        from surfw.cli.chat_prompt import LineEditor

        with ThreadPoolExecutor(1, thread_name_prefix="surfw-chat") as self._answers:
            self._answers.submit(_nothing).result()  # starts the thread while a Ctrl-C does no harm
            self._greet()
            self._loop(LineEditor(surfw_home() / "history", list(COMMANDS)))

    def _loop(self, editor: "LineEditor") -> None:
        was_interrupted = False
        while True:
            try:
                text = editor.read()
            except EOFError:
                return
            except KeyboardInterrupt:
                if signals.is_interrupted():
                    raise
                if was_interrupted:
                    return
                was_interrupted = True
                self._view.note("Ctrl-C again, or Ctrl-D, ends the session")
                continue
            was_interrupted = False
            if text.strip() == "/quit":
                return
            self._take(text)

    @property
    def _name(self) -> str:
        """The name that selects the model: that of the applied adapter, or its own."""
        return self._streaming.adapter or self._streaming.manifest.name

    def _greet(self) -> None:
        how = "" if self._conversation.has_template else ", which has no chat template: all goes on as one text"
        self._view.note(f"{self._name}{how} · /help · Ctrl-C stops an answer, Ctrl-D ends the session")

    def _take(self, text: str) -> None:
        """Answer a message or run a command; the session survives a `SurfwError`, unless the model is closed."""
        word, _, rest = text.strip().partition(" ")
        try:
            if text.startswith("/"):
                if word not in self._commands:
                    raise ConfigurationError(
                        f"there is no command {word[:80]!a}; /help lists them, and a message that begins with / "
                        "needs a space before it"
                    )
                self._commands[word](rest.strip())
            elif word:
                self._answer(text.removeprefix(" ") if text.startswith(" /") else text)
        except ModelClosedError:
            raise
        except SurfwError as exc:
            self._view.error(exc)
            if self._conversation.messages and isinstance(exc, ConfigurationError) and not text.startswith("/"):
                self._view.note("the conversation is as it was; /reset begins a new one")

    def _answer(self, text: str) -> None:
        expect_utf8(text, "the message")
        with self._view.answering() as shown:
            turn = self._ask(text, shown)
        self._view.conclude(turn)

    def _ask(self, text: str, shown: "View") -> "Turn":
        """Ask in the answer thread. Ctrl-C stops the answer, and so does any exception here."""
        with _stopped_by_signal(self._conversation):
            try:
                return self._answers.submit(
                    self._conversation.ask, text, on_text=shown.on_text, on_token=shown.on_token
                ).result()
            except BaseException:  # also from `submit`, which may have begun the answer
                _end(self._conversation, self._answers.submit(_nothing))
                raise

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._view.note("a new conversation")

    def _system(self, text: str) -> None:
        self._conversation.system = text
        self._view.note("the system message is set" if text else "there is no system message now")

    def _model(self, name: str) -> None:
        """Switch to another model; return to the current one if the other cannot hold a conversation."""
        before = self._name
        if not name:
            self._view.note(f"this is {before}; /model NAME goes on with another model of the source")
            return
        self._streaming.switch(name)
        try:
            other = self._begin(self._conversation.system)
        except SurfwError:
            self._streaming.switch(before)
            raise
        other.messages = self._conversation.messages
        self._conversation = other
        self._greet()

    def _stats(self, _: str) -> None:
        self._view.facts(self._conversation.facts(), self._streaming.statistics())

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigurationError("/save wants the name of a new file, such as chat.txt or chat.json")
        path = expand_home(name)
        is_json = path.suffix == ".json"
        text = _as_json(self._name, self._conversation) if is_json else _as_text(self._conversation)
        try:
            with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except FileExistsError:
            raise ConfigurationError(f"{path} is there already, and is not overwritten; name a new file") from None
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or str(exc)
            raise ConfigurationError(f"{path} cannot be written: {reason}; name another file") from exc
        self._view.note(f"saved in {path}")

    def _help(self, _: str) -> None:
        self._view.help(COMMANDS)


def _nothing() -> None:
    """A job without work; it is done once all jobs before it are."""


def _end(conversation: "Conversation", after: "Future[None]") -> None:
    """Stop an abandoned answer, which may not have begun yet; `after`, a job queued behind it, is done when it ends."""
    while not after.done():
        conversation.stop()
        wait([after], 0.05)


@contextmanager
def _stopped_by_signal(conversation: "Conversation") -> Iterator[None]:
    """Make SIGINT stop the answer, unless the signal is ignored."""
    before: Any = signal.getsignal(signal.SIGINT)
    received = 0

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        conversation.stop()
        if signals.is_interrupted() or received > _PATIENCE_SIGNALS:  # noted: it was SIGTERM or SIGHUP
            raise KeyboardInterrupt

    if not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is stop:
            signal.signal(signal.SIGINT, before)


def _as_json(model: str, conversation: "Conversation") -> str:
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    document = {"model": model, "messages": [*system, *conversation.messages]}
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def _as_text(conversation: "Conversation") -> str:
    system = [f"system: {conversation.system}\n"] if conversation.system else []
    return "\n".join([*system, *(f"{one['role']}: {one['content'].strip()}\n" for one in conversation.messages)])
