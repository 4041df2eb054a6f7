"""What each view shows, in windows of several sizes and in a pipe, as text files for review.

`python -m tests.regenerate` rewrites the files in `screens/`. The views are those of the commands, with invented data:
there is no server and no run, and the clock advances only when it is told to.
"""

import asyncio
import contextlib
import io
import itertools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO
from unittest.mock import Mock, patch

import pyte
import pytest

from surfw.cli import chat, render, serve, stats
from surfw.cli.app import app
from surfw.cli.chat_view import ChatView
from surfw.cli.infer_summary import Report
from surfw.cli.infer_view import LiveView, choose_view
from surfw.cli.streams import break_lines
from surfw.config import printable
from surfw.errors import ConnectionFailedError
from surfw.models.conversation import ConversationFacts, Turn
from surfw.models.explain import Advice
from surfw.models.inference import InferenceResult
from surfw.models.progress import Progress
from surfw.models.statistics import Statistics
from surfw.wire import ServerStats
from tests.checkpoints import save_llama
from tests.cli.run import environment
from tests.cli.terminal import Display
from tests.cli.test_streams import STYLE

FOLDER = Path(__file__).parent / "screens"
SIZES = [(80, 24), (200, 50), (46, 24)]
Picture = Callable[[str], None]
"""Takes a picture of the window when it is told to."""

SERVER = "ws://10.0.0.7:8765"
ANSWER = (
    "a way to run a model whose weights do not fit into memory: each layer is read when it is needed, computed with, "
    "and given up for the next one, while those that fit are kept."
)
STATISTICS: Statistics = {
    "cache": {
        "hits": 612, "misses": 136, "prefetched": 61, "stalls": 75, "hit_rate": 0.818, "resident_bytes": 388_000_000,
        "fetched_bytes": 1_292_000_000, "refetched_blocks": 0, "kv_cache_bytes": 901_120,
    },
    "time": {"stall_seconds": 19.1, "compute_seconds": 12.2},
    "fetch_latency_seconds": {"p50": 0.0921, "p95": 1.31},
    "plan": {
        "codec": "none", "limited_by": "memory_budget", "budget_bytes": 400_000_000, "reserved_bytes": 0, "pinned": 7,
        "streamed": 18,
        "bytes_per_pass": 1_500_000_000,
    },
}  # fmt: skip
REPORT = Report(
    model="org/model",
    source=SERVER,
    result=InferenceResult(
        token_ids=list(range(len(ANSWER.split()))), prompt_tokens=4, ttft_seconds=1.92, tpot_seconds=0.92
    ),
    load_seconds=1.1,
    statistics=STATISTICS,
    peak_rss_bytes=900_000_000,
    advice=Advice(more_bytes=400_000_000, budget_bytes=800_000_000, tokens_per_second=1.6),
)
EARLY: ServerStats = {
    "server": {"version": "0.9.0", "uptime_seconds": 191},
    "models": ["org/model", "org/fine-tune-1", "org/fine-tune-2", "somebody/a-model-with-a-rather-long-name"],
    "cache": {
        "hits": 220, "misses": 2464, "coalesced": 18, "hit_rate": 0.082, "bytes": 199_229_440,
        "capacity_bytes": 200_000_000, "evictions": 2274, "policy": "lru",
    },
    "requests": {"total": 640, "in_flight": 2, "latency_seconds": {"p50": 0.0123, "p95": 0.187, "p99": 1.04}},
    "bytes_sent": 2_600_000_000,
    "clients": 3,
    "storage": {"url": "s3://models-of-our-department/surfw/store", "healthy": True},
    "resources": {"rss_bytes": 341_000_000, "cpu_percent": 37.2},
    "bytes_read": 2_500_000_000,
    "connections": [
        {
            "number": number, "name": "surfw/0.9.0", "address": f"10.0.0.{20 + number}:5041{number}",
            "connected_seconds": 188.2 - 60 * number, "model": model, "in_flight": 1, "bytes_sent": 1_300_000_000,
        }
        for number, model in enumerate(("org/model", "somebody/a-model-with-a-rather-long-name", ""))
    ],
    "events": [
        {"time": 1.7e9 - 188, "kind": "joined", "text": "surfw/0.9.0 at 10.0.0.20:50410 joined"},
        {
            "time": 1.7e9 - 180, "kind": "cache",
            "text": "the cache of 200.0 MB is smaller than one pass over org/model (2.2 GB), so every pass reads from "
            "the storage; --cache-mb 2220 would hold it",
        },
        {"time": 1.7e9 - 128, "kind": "joined", "text": "surfw/0.9.0 at 10.0.0.21:50411 joined"},
        {"time": 1.7e9 - 68, "kind": "refused", "text": "10.0.0.22:50412 is refused: there is no model 'modle' here"},
    ],
    "cache_shortage": {"model": "org/model", "pass_bytes": 2_200_000_000, "cache_mb": 2220},
}  # fmt: skip
LATER: ServerStats = EARLY | {
    "server": {"version": "0.9.0", "uptime_seconds": 192},
    "requests": EARLY["requests"] | {"total": 652},
    "bytes_sent": 2_641_200_000,
    "bytes_read": 2_538_100_000,
    "cache": EARLY["cache"] | {"hits": 223, "misses": 2501},
    "connections": [one | {"bytes_sent": one["bytes_sent"] + 20_600_000} for one in EARLY["connections"]],
}

IN_TROUBLE: ServerStats = LATER | {
    "storage": EARLY["storage"] | {"healthy": False},
    "redis": {"url": "redis://10.0.0.9:6379/0", "reachable": False},
    "clients": 0,
    "connections": [],
    "events": [
        *EARLY["events"],
        {
            "time": 1.7e9 - 9,
            "kind": "storage",
            "text": "the models of the store cannot be listed: no answer within 2 s",
        },
        {
            "time": 1.7e9 - 1,
            "kind": "redis",
            "text": "Redis at redis://10.0.0.9:6379/0 cannot be reached, and the server goes on without it",
        },
    ],
}


@dataclass
class Clock:
    """Replaces the module `time`; it advances only in `sleep`, and its time zone is UTC."""

    now: float = 0.0
    strftime = staticmethod(time.strftime)
    localtime = staticmethod(time.gmtime)

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1.7e9 + self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Window(io.StringIO):
    """A stream that is a terminal; records the output, and the visible screen."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self._display = Display(columns, rows)
        self._stream = pyte.Stream(self._display)
        self._lock = threading.Lock()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            self._stream.feed(text)
            return super().write(text)

    def rows(self) -> list[str]:
        with self._lock:
            return self._display.rows()


class Stderr(io.StringIO):
    """Writes to a window as `surfw.cli.streams.Output` writes to a terminal."""

    def __init__(self, window: Window, columns: int) -> None:
        super().__init__()
        self.rich_proxied_file = window
        self._columns = columns

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return self.rich_proxied_file.write(break_lines(printable(text, lines=True), self._columns))


@contextlib.contextmanager
def printing_to(stdout: TextIO, stderr: TextIO, columns: int = 80, rows: int = 24, **extra: str) -> Iterator[Clock]:
    """Make the commands print to this window and use this clock."""
    clock = Clock()
    size = os.terminal_size((columns, rows))
    with contextlib.ExitStack() as patches:

        def put(target: str, new: object) -> None:
            patches.enter_context(patch(target, new))

        variables = environment(
            Path("home"), **{"TERM": "xterm-256color", "NO_COLOR": "", "SURFW_STORE": "store"} | extra
        )
        patches.enter_context(patch.dict(os.environ, variables, clear=True))
        for name, stream in (("stdin", None), ("stdout", stdout), ("stderr", stderr)):
            put(f"sys.{name}", stream)
        for name in ("infer_view", "render", "stats"):
            put(f"surfw.cli.{name}.time", clock)
        put("surfw.cli.screen._FALLBACK", size)
        for name in ("out", "err"):
            console = render.make_console(stderr=name == "err", width=columns, height=rows, get_time=clock.monotonic)
            put(f"surfw.cli.render.{name}", console)
        yield clock


class Model:
    """An open model whose run advances by one token at a time."""

    def __init__(self, clock: Clock) -> None:
        self.model = Mock(can_generate=lambda: True)
        self.manifest = SimpleNamespace(name="org/model")
        self.adapter = None
        self._clock = clock
        self._read_bytes = 0

    def statistics(self) -> Statistics:
        return STATISTICS

    def progress(self) -> Progress:
        return Progress(
            layer=17, layers=22, kept_layers=4, fetched_bytes=self._read_bytes, stall_seconds=19.1, run_seconds=31.3
        )

    def run(self, view: Any, text: str) -> None:
        """Give a view the words of an answer."""
        for number, word in enumerate(text.split(" ")):
            self._clock.now += 0.92
            self._read_bytes += 38_000_000
            view.on_token(number, 1 + (number + 1) * 0.92)
            view.on_text(f" {word}" if number else word)


def _picture(view: Any, picture: Picture, moment: str) -> None:
    """Take a picture of the view as it is now; the view itself draws a moment later."""
    if isinstance(view, LiveView):
        view._screen.write("")
    picture(moment)


def infer(picture: Picture, clock: Clock, *, live: Any = None) -> None:
    """A prompt and a complete run."""
    model: Any = Model(clock)
    with choose_view("text", live=live, json=False, quiet=False) as view:
        view.phase("reading the manifest")
        _picture(view, picture, "before it runs")
        view.note(f"source: {SERVER} (named by --source)")
        view.prompt("Weight streaming is", lambda _: " ")
        with view.running(model, SERVER, 128, has_text=True):
            model.run(view, ANSWER)
            _picture(view, picture, "while it runs")
        view.done(REPORT)
    picture("in the end")


def infer_full(picture: Picture, clock: Clock) -> None:
    """The same with a table."""
    infer(picture, clock, live="full")


def talk(picture: Picture, clock: Clock) -> None:
    """A question and its answer, and the commands."""
    streaming: Any = Model(clock)
    facts = ConversationFacts(turns=1, tokens=41, cached_tokens=40, positions=2048, kv_cache_bytes=901_120)
    conversation: Any = Mock(has_template=False, facts=lambda: facts)
    view = ChatView(is_interactive=True, live=None, quiet=False)
    with view.opening() as shown:
        shown.note(f"source: {SERVER} (named by --source)")
        shown.phase("reading the manifest")
        _picture(shown, picture, "before it is open")
    view.follow(streaming, SERVER, 128)
    session = chat._Session(streaming, conversation, view, lambda _: conversation)
    session._greet()
    sys.stdout.write("> What is weight streaming?\n")
    with view.answering() as shown:
        streaming.run(shown, f"It is {ANSWER}")
        _picture(shown, picture, "while it answers")
    view.conclude(
        Turn(token_ids=list(range(36)), prompt_tokens=6, ttft_seconds=1.92, tokens_per_second=1.05, ending="length")
    )
    sys.stdout.write("> /stats\n")
    session._stats("")
    facts = ConversationFacts(turns=1, tokens=41, cached_tokens=0, positions=None, kv_cache_bytes=0)
    sys.stdout.write("> /stats\n")
    session._stats("")
    sys.stdout.write("> /help\n")
    session._help("")
    picture("after /stats, of a KV cache that goes on and of one that does not, and /help")


def serving(picture: Picture, _clock: Clock) -> None:
    """A server that loses its storage, Redis and clients, and is then stopped."""
    stop, number = asyncio.Event(), itertools.count()

    def look(**_: bool) -> ServerStats:
        match next(number):
            case 0:
                return EARLY
            case 2:
                picture("without its storage, Redis and clients")
                stop.set()
        return IN_TROUBLE

    server: Any = Mock(url="ws://127.0.0.1:8765", stats=look)
    ticks = SimpleNamespace(monotonic=itertools.count(0, 0.5).__next__)
    with patch("surfw.cli.serve.time", ticks), patch("surfw.cli.full_screen.LOOK_SECONDS", 0.001):
        asyncio.run(serve._show(server, stop))


def watching(picture: Picture, _clock: Clock) -> None:
    """A watched server that becomes unreachable."""

    number = itertools.count()

    def look() -> ServerStats:
        match next(number):
            case 0:
                return EARLY
            case 1:
                picture("the first reading")
                return LATER
            case 2:
                picture("with rates")
                raise ConnectionFailedError(f"no surfw server at {SERVER}: connection refused; start one there")
            case _:
                picture("the server is away")
                raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        stats._watch(stats.Watch(look, SERVER), 1.0, json=False)


def chunking(picture: Picture, clock: Clock) -> None:
    """A small checkpoint, and the progress of a large one."""
    app(["chunk", "./tiny", "--dry-run"], standalone_mode=False)
    with render.byte_bar("model.layers.16", 2_200_000_000, quiet=False) as update:
        for number in range(17, 19):
            clock.now += 1.5
            update(advance=88_000_000 * (number - 10), description=f"model.layers.{number}", refresh=True)
        picture("while it writes")
    app(["chunk", "./tiny"], standalone_mode=False)
    picture("in the end")


VIEWS: dict[str, Callable[[Picture, Clock], None]] = {
    "infer": infer, "infer-live-full": infer_full, "chat": talk, "serve": serving, "stats-watch": watching,
    "chunk": chunking,
}  # fmt: skip
MORE_SIZES = {"stats-watch": [(30, 8)]}
IN_PIPES = {"infer", "stats-watch", "chunk"}


def draw(name: str) -> str:
    """Return everything that a view shows; it may write to the current folder."""
    sections = []
    for columns, rows in SIZES + MORE_SIZES.get(name, []):
        window = Window(columns, rows)

        def picture(moment: str, size: str = f"{columns} × {rows}", window: Window = window) -> None:
            sections.append((f"{size}, {moment}", window.rows()))

        with prepared(name), printing_to(window, Stderr(window, columns), columns, rows) as clock:
            VIEWS[name](picture, clock)
    if name in IN_PIPES:
        out, err, dumb = io.StringIO(), io.StringIO(), Window(80, 24)
        with prepared(name), printing_to(out, err) as clock:
            VIEWS[name](lambda _: None, clock)
        with prepared(name), printing_to(dumb, Stderr(dumb, 80), TERM="dumb") as clock:
            VIEWS[name](lambda _: None, clock)
        assert "\x1b" not in out.getvalue() + err.getvalue() + dumb.getvalue()
        sections += [("a pipe, stdout", out.getvalue().splitlines()), ("a pipe, stderr", err.getvalue().splitlines())]
        sections.append(("TERM=dumb, in the end", dumb.rows()))
    return "\n".join(f"=== {title}\n" + "".join(f"{row.rstrip()}\n" for row in rows) for title, rows in sections)


@contextlib.contextmanager
def prepared(name: str) -> Iterator[None]:
    """Change to a folder with the files that a view needs."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if name == "chunk":
            save_llama(Path("tiny"))
        yield


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_shows_what_it_did(name: str) -> None:
    assert draw(name) == (FOLDER / f"{name}.txt").read_text(), "python -m tests.regenerate, and look at the difference"


@pytest.mark.parametrize("name", VIEWS)
def test_without_styles_a_view_shows_the_same(name: str) -> None:
    shown = {}
    for value in ("", "1"):
        window = Window(80, 24)
        with prepared(name), printing_to(window, Stderr(window, 80), NO_COLOR=value) as clock:
            VIEWS[name](lambda _: None, clock)
        shown[bool(STYLE.search(window.getvalue()))] = window.rows()
    assert shown[True] == shown[False]
