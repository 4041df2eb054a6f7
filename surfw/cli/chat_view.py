"""What `chat` shows: answers on stdout as they come, everything else on stderr."""

import sys
import termios
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich.status import Status

from surfw.cli import render
from surfw.cli.streams import one_line
from surfw.config import count, format_size

if TYPE_CHECKING:
    from surfw.models.conversation import ConversationFacts, Turn
    from surfw.models.statistics import Statistics


class ChatView:
    """The screen of a session; in a pipe, only its answers."""

    def __init__(self, *, is_interactive: bool, quiet: bool) -> None:
        """Choose what is shown.

        Args:
            is_interactive: a person is there, and may wait.
            quiet: nothing on stderr but errors.
        """
        self._is_interactive = is_interactive
        self._quiet = quiet
        self._status: Status | None = None
        self._printed = ""

    def note(self, text: str) -> None:
        """Say what is going on, in a line."""
        if not self._quiet:
            render.err.print(f"surfw: {one_line(text)}", style="dim", soft_wrap=not self._is_interactive)

    def error(self, exc: Exception) -> None:
        """Say what went wrong, in a line, while the session goes on."""
        print(f"surfw: error: {one_line(str(exc))}", file=sys.stderr, flush=True)

    def help(self, commands: Mapping[str, str]) -> None:
        """Show the commands and what they do, and the keys."""
        keys = {"Up": "what you wrote before", "Ctrl-C": "stop the answer", "Ctrl-D": "end the session"}
        render.err.print(render.pair_table("", [*commands.items(), *keys.items()]))

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show that something goes on, until there is something to see; what is typed meanwhile is not."""
        if self._is_interactive and not self._quiet:
            self._status = render.err.status(one_line(what), spinner="dots")
            self._status.start()
        try:
            with _without_echo():
                yield
        finally:
            self._end_status()

    def phase(self, what: str) -> None:
        """Say what goes on now."""
        if self._status is not None:
            self._status.update(one_line(what))

    def _end_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Show an answer, whose text comes with `on_text`."""
        self._printed = ""
        with self.waiting("reading"):
            yield

    def on_text(self, text: str) -> None:
        """Print a piece of the answer."""
        if text:
            self._end_status()
            self._print(text)

    def end_answer(self, turn: "Turn") -> None:
        """Print what is left of the answer, and what it took."""
        if turn.text.startswith(self._printed):
            self._print(turn.text[len(self._printed) :])
        if not self._printed.endswith("\n"):
            self._print("\n")
        if self._is_interactive:
            self.note(_summary(turn))

    def break_answer(self) -> None:
        """End the line of an answer that broke off."""
        if self._printed and not self._printed.endswith("\n"):
            self._print("\n")

    def _print(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._printed += text

    def facts(self, facts: "ConversationFacts", statistics: "Statistics") -> None:
        """Show how long the conversation is, and what the session took so far."""
        cache, time, plan = statistics["cache"], statistics["time"], statistics["plan"]
        bound = "" if facts.positions is None else f" of {facts.positions}"
        budget = plan["budget_bytes"] if plan is not None else None
        used = format_size(cache["resident_bytes"])
        stalled, computing = render.seconds(time["stall_seconds"]), render.seconds(time["compute_seconds"])
        rows = [
            ("conversation", f"{count(facts.turns, 'turn')}, {facts.tokens}{bound} tokens"),
            ("KV cache", format_size(facts.kv_cache_bytes)),
            ("weights in memory", used if budget is None else f"{used} of a budget of {format_size(budget)}"),
            ("fetched", format_size(cache["fetched_bytes"])),
            ("hits / prefetched / stalls", f"{cache['hits']} / {cache['prefetched']} / {cache['stalls']}"),
            ("stalled, computing", f"{stalled}, {computing}"),
        ]
        render.err.print(render.pair_table("", rows))


@contextmanager
def _without_echo() -> Iterator[None]:
    """Keep what is typed off the screen; it waits for the next message."""
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
        parts += [f"{turn.tokens_per_second:.2f} tokens/s", f"first after {render.seconds(turn.ttft_seconds)}"]
    parts.append(f"prompt of {count(turn.prompt_tokens, 'token')}, {turn.cached_tokens} cached")
    if turn.ending == "length":
        parts.append("cut at the most new tokens (--max-new-tokens)")
    if turn.ending == "stopped":
        parts.append("stopped" if turn.text else "stopped; your message is not kept")
    return " · ".join(parts)
