"""What `chat` shows: answers on stdout as they come, everything else on stderr."""

import sys
import termios
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal

from surfw.cli import render
from surfw.cli.figures import session_table
from surfw.cli.infer_view import choose_view
from surfw.cli.status import duration, rate
from surfw.cli.streams import one_line
from surfw.cli.wording import with_options
from surfw.config import count

if TYPE_CHECKING:
    from surfw.cli.infer_view import View
    from surfw.models.conversation import ConversationFacts, Turn
    from surfw.models.statistics import Statistics
    from surfw.models.streaming import StreamingModel


class ChatView:
    """The output of a session; for a pipe, only the answers."""

    def __init__(self, *, is_interactive: bool, live: bool | Literal["full"] | None, quiet: bool) -> None:
        """Choose what is shown.

        Args:
            is_interactive: whether a person is at the terminal.
            live: the setting.
            quiet: print only errors on stderr.
        """
        self._is_interactive = is_interactive
        self._live = live
        self._quiet = quiet

    def follow(self, streaming: "StreamingModel", source: str, most_tokens: int) -> None:
        """Set the model to follow while it answers.

        Args:
            streaming: the model.
            source: where its weights come from.
            most_tokens: the most tokens of an answer.
        """
        self._followed = streaming, source, most_tokens

    @contextmanager
    def opening(self) -> Iterator["View"]:
        """Show progress while the model is opened."""
        with choose_view("text", live=self._live, json=False, quiet=self._quiet) as shown, _without_echo():
            yield shown

    @contextmanager
    def answering(self) -> Iterator["View"]:
        """Yield a view that shows an answer as it arrives."""
        streaming, source, most = self._followed
        with self.opening() as shown, shown.running(streaming, source, most, has_text=True):
            try:
                yield shown
            finally:
                shown.end_text()

    def note(self, text: str) -> None:
        """Print a note in one line."""
        if not self._quiet:
            render.err.print(f"surfw: {one_line(text)}", style="dim", soft_wrap=not self._is_interactive)

    def error(self, exc: Exception) -> None:
        """Print an error in one line; the session goes on."""
        print(f"surfw: error: {one_line(with_options(str(exc)))}", file=sys.stderr, flush=True)

    def help(self, commands: Mapping[str, str]) -> None:
        """Show the commands and what they do, and the keys."""
        keys = {"Up": "what you wrote before", "Ctrl-C": "stop the answer", "Ctrl-D": "end the session"}
        render.err.print(render.pair_table("", [*commands.items(), *keys.items()]))

    def conclude(self, turn: "Turn") -> None:
        """Say what an answer took, and why it ended."""
        if self._is_interactive:
            self.note(_summary(turn))

    def facts(self, facts: "ConversationFacts", statistics: "Statistics") -> None:
        """Show how long the conversation is, and what the session took so far."""
        render.err.print(session_table(facts, statistics))


@contextmanager
def _without_echo() -> Iterator[None]:
    """Turn off the terminal's echo; what is typed meanwhile is kept for the next message."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    *modes, local, in_speed, out_speed, characters = before
    termios.tcsetattr(terminal, termios.TCSANOW, [*modes, local & ~termios.ECHO, in_speed, out_speed, characters])
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(terminal, termios.TCSANOW, before)


def _summary(turn: "Turn") -> str:
    parts = [count(len(turn.token_ids), "token")]
    if turn.tokens_per_second is not None and turn.ttft_seconds is not None:
        parts += [f"{rate(turn.tokens_per_second)} tok/s", f"first after {duration(turn.ttft_seconds)}"]
    parts.append(f"prompt of {count(turn.prompt_tokens, 'token')}, {turn.cached_tokens} cached")
    if turn.ending == "length":
        parts.append("cut at the most new tokens (--max-new-tokens)")
    if turn.ending == "positions":
        parts.append("the model has no more positions; /reset begins anew")
    if turn.ending == "stopped":
        parts.append("stopped" if turn.text else "stopped; your message is not kept")
    return " · ".join(parts)
