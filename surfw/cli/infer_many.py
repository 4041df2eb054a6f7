"""`surfw infer --prompts FILE`: answer many prompts; both prompts and answers are JSON lines."""

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from surfw.cli import options
from surfw.cli.addresses import Mistake
from surfw.config import count, display_url, printable
from surfw.errors import ConfigurationError, StorageError

if TYPE_CHECKING:
    from surfw.models.inference import InferenceRequest, InferenceResult
    from surfw.models.many import ManyResult
    from surfw.models.streaming import StreamingModel

_MOST_LINE_BYTES = 16 * 1024 * 1024
_MOST_AHEAD = 1024
"""The most prompts read ahead of the answers written; with --ordered, up to this many answers wait for their turn."""

_EXPECTED: Mapping[str, tuple[type, str]] = {
    "prompt": (str, "a text"),
    "prompt_ids": (list, "a list of token ids"),
    "max_new_tokens": (int, "a whole number"),
    "stop": (list, "a text, or a list of texts"),
    "ignore_eos": (bool, "true or false"),
    "system": (str, "a text"),
    "raw": (bool, "true or false"),
    "pair": (list, "a text, or a list of texts"),
    "prompt_name": (str, "a text"),
}
"""The keys that a line may have besides `id`: their types, and how error messages describe them."""


@dataclass(frozen=True, kw_only=True)
class Many:
    """The options of `infer` that apply to `--prompts`."""

    prompts: Path | None
    output: Path | None
    ordered: bool
    resume: bool
    sequences: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    system: str | None
    raw: bool
    quiet: bool
    pipeline: bool = False


def check_together(many: Many, others: Mapping[str, object]) -> None:
    """Refuse options that contradict each other.

    Raises:
        Mistake: two options conflict, or one needs another.
    """
    if many.prompts is None:
        alone: dict[str, object] = {
            "--output": many.output, "--ordered": many.ordered, "--resume": many.resume, "--sequences": many.sequences,
            "--pipeline": many.pipeline,
        }  # fmt: skip
        for name, value in alone.items():
            if value:
                raise Mistake(f"{name} needs --prompts FILE; add it, or leave {name} out")
        return
    for name, value in others.items():
        if value:
            raise Mistake(f"--prompts does not go with {name}; give one of them")
    if many.resume and many.output is None:
        raise Mistake("--resume needs --output FILE, which holds the answers so far; add it, or leave --resume out")


@dataclass
class _Question:
    """A line of the file: its request, or the error in it."""

    line: int
    id: Any
    request: "InferenceRequest | None" = None
    error: str | None = None


@dataclass
class _Tally:
    """The counts so far."""

    answered: int = 0
    failed: int = 0
    left_out: int = 0
    tokens: int = 0
    start: float = field(default_factory=time.perf_counter)


def answer_file(many: Many, configuration: options.Configuration) -> None:
    """Answer all prompts of a file.

    Raises:
        SurfwError: the file or the model cannot be read; or some prompts failed, raised after all others were answered.
    """
    from surfw.cli import render
    from surfw.cli.sources import choose_source, connect, open_model

    settings = configuration.settings
    if many.pipeline and _serves_stage(configuration):
        return
    with _open_prompts(many) as lines, _open_output(many) as (done, write):
        total = _count_lines(lines)
        with (
            render.busy("looking for the weights", quiet=many.quiet) as step,
            choose_source(configuration, on_phase=step) as chosen,
        ):
            chosen.check_folder()
            if not many.quiet:
                step("")
                print(f"surfw: source: {display_url(chosen.url)} ({chosen.reason})", file=sys.stderr)
            step("reading the manifest")
            with (
                connect(chosen, settings, explain=False) as client,
                open_model(client, settings, step, pipeline=many.pipeline) as streaming,
            ):
                step("")
                tally = _Run(many, configuration, streaming, done=done, write=write).run(lines, total)
    if not many.quiet:
        print(_summary(tally), file=sys.stderr)
    if tally.failed:
        raise ConfigurationError(
            f"{count(tally.failed, 'prompt')} of {tally.failed + tally.answered} could not be answered; the answers "
            "say which and why"
        )


def _serves_stage(configuration: options.Configuration) -> bool:
    """Join the job. On ranks other than 0, serve a stage of the model until rank 0 is done, and return True."""
    from surfw.cli.sources import choose_source, connect, open_model
    from surfw.distributed import StageModel, join_job

    if not join_job()[0]:
        return False
    settings = configuration.settings
    with (
        choose_source(configuration, on_phase=lambda _: None) as chosen,
        connect(chosen, settings, explain=False) as client,
        open_model(client, settings, lambda _: None, pipeline=True) as stage,
    ):
        assert isinstance(stage, StageModel), "a pipeline was asked for"
        stage.serve()
    return True


def _summary(tally: _Tally) -> str:
    from surfw.cli.status import duration, rate

    seconds = time.perf_counter() - tally.start
    parts = [f"{count(tally.answered, 'prompt')} answered"]
    if tally.failed:
        parts.append(f"{tally.failed} failed")
    if tally.left_out:
        parts.append(f"{tally.left_out} answered before")
    parts.append(f"{count(tally.tokens, 'token')} in {duration(seconds)}")
    if tally.tokens:
        parts.append(f"{rate(tally.tokens / seconds)} tok/s")
    return f"surfw: {', '.join(parts)}"


class _Run:
    """Answers a file. A thread reads questions ahead of the model; answers arrive in the model's thread."""

    def __init__(
        self,
        many: Many,
        configuration: options.Configuration,
        streaming: "StreamingModel",
        *,
        done: set[str],
        write: Callable[[str], None] | None,
    ) -> None:
        """`done` has the ids that are answered already, as JSON; `write` writes an answer's line, None to stdout."""
        self._many, self._settings, self._streaming = many, configuration.settings, streaming
        self._done, self._write = done, write
        self._tally = _Tally()
        self._asked: dict[int, _Question] = {}
        self._waiting: dict[int, Mapping[str, Any]] = {}  # answers not written yet, since an earlier one is missing
        self._next = 0
        self._lock = threading.RLock()
        self._room = threading.Semaphore(_MOST_AHEAD)
        self._advance: Callable[..., None] = lambda **_: None
        self._places: list[int] = []  # the place of each request among all questions

    def run(self, lines: IO[bytes], total: int | None) -> _Tally:
        """Answer all questions of a file; `total` is their number, if known."""
        from surfw.cli import render
        from surfw.models.inference import GenerationOptions, InferenceRequest
        from surfw.models.many import MOST_SEQUENCES

        settings = self._settings
        sampling: GenerationOptions = {
            "max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature, "top_p": settings.top_p,
            "top_k": settings.top_k, "seed": settings.seed,
        }  # fmt: skip
        with render.count_bar("answering", total, quiet=self._many.quiet) as self._advance:
            try:
                self._streaming.answer_many(
                    self._requests(lines, InferenceRequest(prompt="", **sampling)), on_result=self._take,
                    on_tokens=self._count, sequences=self._many.sequences or MOST_SEQUENCES, **sampling,
                )  # fmt: skip
            except KeyboardInterrupt as exc:
                if self._many.output is not None:
                    raise KeyboardInterrupt("the same command with --resume goes on where it stopped") from exc
                raise
            finally:
                self._room.release(_MOST_AHEAD)
        return self._tally

    def _requests(self, lines: IO[bytes], shared: "InferenceRequest") -> Iterator["InferenceRequest"]:
        """Yield the requests, in a thread that reads ahead of the model; invalid questions are answered here."""
        for place, question in enumerate(self._questions(lines, {}, shared)):
            self._room.acquire()
            with self._lock:
                self._asked[place] = question
            if question.request is None:
                self._answer(place, {"error": question.error})
            else:
                self._places.append(place)
                yield question.request

    def _questions(self, lines: IO[bytes], seen: dict[str, int], shared: "InferenceRequest") -> Iterator[_Question]:
        for number in itertools.count(1):
            line = lines.readline(_MOST_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > _MOST_LINE_BYTES:
                raise ConfigurationError(
                    f"line {number} of the prompts has over {_MOST_LINE_BYTES} bytes; split it into several"
                )
            if not line.strip():
                continue
            question = self._parse(number, line, shared)
            key = json.dumps(question.id)
            if question.error is None and key in self._done:
                self._tally.left_out += 1
                self._advance(advance=1)
                continue
            if question.error is None and (before := seen.setdefault(key, number)) != number:
                question.request, question.error = None, f"line {before} has the id {printable(key)} already"
            yield question

    def _parse(self, number: int, line: bytes, shared: "InferenceRequest") -> _Question:
        """Parse a line; an error in it becomes its answer."""
        question = _Question(number, None)
        many = self._many
        common: dict[str, Any] = {
            "stop": many.stop,
            "ignore_eos": many.ignore_eos,
            "system": many.system,
            "raw": many.raw,
        }
        try:
            found = _read_line(line)
            question.id = found.pop("id", number)
            question.request = replace(shared, **(common | _read_settings(question.id, found)))
        except (_LineError, ConfigurationError) as exc:
            question.error = str(exc)
        return question

    def _count(self, _index: int, tokens: list[int]) -> None:
        self._count_tokens(len(tokens))

    def _count_tokens(self, tokens: int) -> None:
        self._tally.tokens += tokens
        self._advance(tokens=self._tally.tokens)

    def _take(self, found: "ManyResult") -> None:
        place, result = self._places[found.index], found.result
        if result is None:
            self._answer(place, {"error": found.error})
        else:
            self._answer(place, self._facts(result))

    def _facts(self, result: "InferenceResult") -> dict[str, Any]:
        """Return what is written for a result: text and tokens, or an encoder's output."""
        names = [name for name in ("embedding", "pooling", "predictions") if getattr(result, name) is not None]
        if names:
            self._count_tokens(result.prompt_tokens)
        names = ["prompt_tokens", *names] if names else ["text", "token_ids", "prompt_tokens"]
        return {name: getattr(result, name) for name in names}

    def _answer(self, index: int, answer: Mapping[str, Any]) -> None:
        """Write an answer; with --ordered, after all earlier ones."""
        with self._lock:
            question = self._asked.pop(index)
            document = {"id": question.id, "line": question.line, **answer}
            self._tally.failed += "error" in answer
            self._tally.answered += "error" not in answer
            if "error" in answer and not self._many.quiet:
                self._advance(note=f"surfw: line {question.line} of the prompts: {printable(str(answer['error']))}")
            self._waiting[index] = document
            ready = [index] if not self._many.ordered else []
            while self._many.ordered and self._next in self._waiting:
                ready.append(self._next)
                self._next += 1
            for one in ready:
                answered = json.dumps(self._waiting.pop(one))
                if self._write is None:
                    self._advance(line=answered)
                else:
                    self._write(answered)
                self._room.release()
                self._advance(advance=1)


class _LineError(ValueError):
    """A line of the prompts is invalid."""


def _read_line(line: bytes) -> dict[str, Any]:
    """Parse a line as a JSON object."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        seen = line[:40].decode(errors="replace").strip()
        raise _LineError(f'a line is JSON, an object such as {{"prompt": "…"}}, not {seen!r}') from None
    if not isinstance(found, dict):
        raise _LineError(f'a line is an object such as {{"prompt": "…"}}, not {json.dumps(found)[:40]}')
    return found


def _read_settings(own: object, found: Mapping[str, Any]) -> dict[str, Any]:
    """Check the values of a line, and return them under the names of `InferenceRequest`."""
    if not isinstance(own, str | int) or isinstance(own, bool):
        raise _LineError(f"an id is a text or a whole number, not {json.dumps(own)[:40]}")
    if unknown := sorted(set(found) - set(_EXPECTED)):
        raise _LineError(
            f"{printable(unknown[0])!r} means nothing here; a line may have {', '.join(['id', *_EXPECTED])}"
        )
    given = {name: value for name, value in found.items() if value is not None}
    if ("prompt" in given) == ("prompt_ids" in given):
        raise _LineError("give either prompt or prompt_ids")
    for name in ("stop", "pair"):
        if isinstance(given.get(name), str):
            given[name] = [given[name]]
    for name, value in given.items():
        kind, what = _EXPECTED[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise _LineError(f"{name} is {json.dumps(value)[:40]}, expected {what}")
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in given.get("prompt_ids", ())):
        raise _LineError("prompt_ids are whole numbers")
    if "pair" in given:
        given["pairs"] = given.pop("pair")
    return given


@contextmanager
def _open_prompts(many: Many) -> Iterator[IO[bytes]]:
    assert many.prompts is not None
    if str(many.prompts) == "-":
        yield sys.stdin.buffer
        return
    try:
        file = many.prompts.open("rb")
    except OSError as exc:
        kinds = {FileNotFoundError: "there is no such file", IsADirectoryError: "it is a folder"}
        raise ConfigurationError(
            f"{many.prompts} (--prompts) cannot be read: {kinds.get(type(exc), exc.strerror)}; name a file with a line "
            'such as {"prompt": "…"} for each prompt, or - for stdin'
        ) from exc
    with file:
        yield file


def _count_lines(lines: IO[bytes]) -> int | None:
    """Count the lines that are not empty; None for a pipe."""
    if not lines.seekable():
        return None
    total = sum(bool(line.strip()) for line in lines)
    lines.seek(0)
    return total


@contextmanager
def _open_output(many: Many) -> Iterator[tuple[set[str], Callable[[str], None] | None]]:
    """Open the output; yield the ids that have an answer there already, and what writes a line to it.

    That is None for stdout, which the progress bar may share.
    """
    if many.output is None:
        yield set(), None
        return
    done, whole = _read_answers(many.output) if many.resume else (set(), 0)
    try:
        if not many.resume and many.output.is_file() and many.output.stat().st_size:
            raise ConfigurationError(
                f"{many.output} holds something already; add --resume to go on with it, or name another file"
            )
        file = os.open(many.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as exc:
        raise ConfigurationError(f"the answers cannot be written to {many.output}: {exc.strerror}") from exc
    try:
        if many.resume:
            os.ftruncate(file, whole)

        def append(text: str) -> None:
            line = f"{text}\n".encode()
            try:
                while line:
                    line = line[os.write(file, line) :]
            except OSError as exc:
                raise StorageError(
                    f"an answer cannot be written to {many.output}: {exc.strerror}; mend that, and the same command "
                    "with --resume goes on where it stopped"
                ) from exc

        yield done, append
    finally:
        os.close(file)


def _read_answers(output: Path) -> tuple[set[str], int]:
    """Return the ids that have an answer other than an error, and the size of all complete lines in bytes."""
    done: set[str] = set()
    whole = 0
    try:
        with output.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # incomplete: the process was killed while it wrote
                try:
                    answer = json.loads(line)
                    key = json.dumps(answer["id"])
                    answer["line"]  # a line of prompts lacks it
                except (ValueError, TypeError, KeyError):
                    raise ConfigurationError(
                        f"line {number} of {output} is no answer of surfw's; name that of an earlier run, or a new file"
                    ) from None
                if "error" not in answer:
                    done.add(key)
                whole += len(line)
    except FileNotFoundError:
        pass
    return done, whole
