"""`surfw infer`: a prompt through a model whose weights arrive while it runs."""

import logging
import select
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surfw.cli import chat, infer_many, options
from surfw.cli.addresses import Mistake
from surfw.cli.streams import expect_utf8
from surfw.config import display_url
from surfw.errors import SurfwError, UnsupportedModelError

if TYPE_CHECKING:
    from surfw.cli.infer_summary import Report
    from surfw.cli.infer_view import View
    from surfw.cli.sources import ChosenSource
    from surfw.manifest import Manifest
    from surfw.models.inference import InferenceRequest, InferenceResult
    from surfw.models.streaming import StreamingModel
    from surfw.settings import Settings
    from surfw.wire import ServerStats

EXAMPLES = """\b
Examples:
  surfw infer --prompt 'Weight streaming is'
  surfw infer my-model 'Weight streaming is'
  surfw infer ./my-model 'Weight streaming is' --memory-budget 2GB
  echo Hello | surfw infer org/name
  surfw infer 127.0.0.1:8765 --cache-layers 2 --prompt-ids 1,2,3 --json
  surfw infer my-model --memory-budget 2GB --explain
  surfw infer my-model --prompts questions.jsonl --output answers.jsonl --resume
"""

_PATIENCE_SECONDS = 1.0
_STATS_SECONDS = 1.0
"""How long a summary waits for what the server says of its cache."""


@options.with_settings(*options.RUN_SETTINGS)
def infer(
    *,
    place: options.Place = None,
    text: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; - is stdin, as is a pipe where none is given.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The prompt, where MODEL is left out; - reads it from stdin.")
    ] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="Token ids instead of a prompt; ids are printed too.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the generation; may be repeated.")] = None,
    ignore_eos: options.IgnoreEos = False,
    system: Annotated[str | None, typer.Option(help="A system message, for models with a chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Pass the prompt unchanged, without the chat template.")] = False,
    pair: Annotated[
        list[str] | None,
        typer.Option(help="A second text, for models that read two: to rank, choose, or answer from; may be repeated."),
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Which of its own prompts an embedding model reads before the text.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Answer many: JSON lines such as {"id": 1, "prompt": "…"}; - is stdin.'),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the answers to --prompts there, instead of to stdout.")
    ] = None,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Answers in the order of --prompts, not as they finish.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out the prompts that --output has answers to.")
    ] = False,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="How many of --prompts run together. [default: up to 64]")
    ] = None,
    pipeline: Annotated[
        bool,
        typer.Option(
            "--pipeline", help="Share the layers with the other ranks of a torchrun job; each has its own budget."
        ),
    ] = False,
    configuration: options.Configuration,
    explain: Annotated[
        bool, typer.Option("--explain", help="First measure and show what limits the run; without a prompt, only that.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run a model while its layers arrive, and print what it says.

    Encoders print their embedding, or what their head says: candidates for [MASK], labels, answers, scores.
    """
    for texts, hint, what in ((stop, "--stop", "a text that ends the generation"), (pair, "--pair", "a second text")):
        if "" in (texts or ()):
            raise typer.BadParameter(f"{what} cannot be empty", param_hint=hint)
    prompt = _one_of("PROMPT", text, "--prompt", prompt)
    many = infer_many.Many(
        prompts=prompts, output=output, ordered=ordered, resume=resume, sequences=sequences, stop=tuple(stop or ()),
        ignore_eos=ignore_eos, system=system, raw=raw, quiet=quiet, pipeline=pipeline,
    )  # fmt: skip
    others: dict[str, object] = {
        "a prompt": prompt, "--prompt-ids": prompt_ids, "--explain": explain, "--json": json, "--pair": pair,
        "--prompt-name": prompt_name,
    }  # fmt: skip
    infer_many.check_together(many, others)
    ids = _parse_ids(prompt_ids)
    _check_together(configuration, ids=ids, system=system, raw=raw, json=json, quiet=quiet)
    if place is not None:
        from surfw.cli.sources import choose_model

        configuration = choose_model(configuration, place)
    if prompts is not None:
        infer_many.answer_file(many, configuration)
        return
    from surfw.cli.infer_view import choose_view

    settings = configuration.settings
    if explain and prompt is None and ids is None:
        view = choose_view("text", live=settings.live, json=True, quiet=quiet)
        _run(None, configuration, view, explain=True, json=json)
        return
    if prompt is None and ids is None and not json and chat.sees_person() and sys.stdout.isatty():
        chat.converse(configuration, system=system, raw=raw, stop=stop or (), ignore_eos=ignore_eos, quiet=quiet)
        return
    if explain and quiet and not json:
        raise typer.BadParameter(
            "leaves nothing of --explain to be seen; leave one out, or add --json", param_hint="-q"
        )
    prompt = _read_prompt(prompt, ids, quiet=quiet)

    def make_request() -> "InferenceRequest":
        from surfw.models.inference import InferenceRequest

        return InferenceRequest(
            prompt=prompt,
            prompt_ids=ids,
            system=system,
            raw=raw,
            stop=stop or (),
            ignore_eos=ignore_eos,
            pairs=pair or (),
            prompt_name=prompt_name,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=settings.seed,
        )

    view = choose_view("text" if ids is None else "ids", live=settings.live, json=json, quiet=quiet)

    def check(manifest: "Manifest") -> None:
        from surfw.models.read_ahead import expect_prompt

        expect_prompt(manifest, ids)

    _run(make_request, configuration, view, explain=explain, json=json, check=check)


def _run(
    make_request: "Callable[[], InferenceRequest] | None",
    configuration: options.Configuration,
    view: "View",
    *,
    explain: bool,
    json: bool,
    check: "Callable[[Manifest], None]" = lambda _: None,
) -> None:
    """Run a request, which is made once torch is imported; without one, explain what would limit it.

    `check` sees the manifest before.
    """
    from surfw.cli.infer_summary import queued_seconds
    from surfw.cli.sources import choose_source, connect, open_model

    settings = configuration.settings
    with view:
        view.phase("looking for the weights")
        with choose_source(configuration, on_phase=view.phase) as chosen:
            source = display_url(chosen.url)
            view.note(f"source: {chosen.described}")
            chosen.check_folder()
            start = time.perf_counter()
            view.phase("connecting" if chosen.is_server else "reading the manifest")
            with (
                connect(chosen, settings, explain=explain, check=check) as client,
                open_model(client, settings, view.phase) as streaming,
            ):
                if make_request is None:
                    view.phase("measuring")
                    _explain_only(streaming, configuration, view, source, json=json)
                    return
                seconds, queued = time.perf_counter() - start, queued_seconds()
                opened = _Opened(streaming, source, seconds, queued, lambda: _ask_server(chosen, settings))
                _answer(opened, make_request(), configuration, view, explain=explain, json=json)


def _ask_server(chosen: "ChosenSource", settings: "Settings") -> "ServerStats | None":
    """What the server says of itself; None if it is none, or says nothing soon.

    Also None where weights are cast: what a pass reads of the server's cache is not what it takes in memory, then. And
    where there is a disk cache: a run reads that, and offline nobody is asked anything.
    """
    from surfw.client import read_stats

    is_cached = settings.disk_cache is not None or settings.offline
    if not chosen.is_server or is_cached or settings.dtype not in {None, "auto"}:
        return None
    try:
        return read_stats(chosen.url, token=settings.token, ssl=chosen.tls, timeout_seconds=_STATS_SECONDS)
    except SurfwError:
        return None


@dataclass(frozen=True)
class _Opened:
    """An open model, where its weights come from, what opening it took, and who asks its server for more."""

    streaming: "StreamingModel"
    source: str
    load_seconds: float
    queued_seconds: float
    ask_server: "Callable[[], ServerStats | None]"

    def report(self, result: "InferenceResult", *, is_whole: bool = True) -> "Report":
        """Put together what a run came to."""
        from surfw.cli.infer_summary import Report, queued_seconds
        from surfw.runtime.memory import peak_rss_bytes

        per_token, share = result.tpot_seconds, result.decode_stall_share
        advice = None
        if per_token is not None and share is not None:
            advice = self.streaming.advise(seconds_per_token=per_token, stall_share=share)
        return Report(
            model=self.streaming.manifest.name,
            source=self.source,
            result=result,
            load_seconds=self.load_seconds,
            statistics=self.streaming.statistics(),
            peak_rss_bytes=peak_rss_bytes(),
            advice=advice,
            is_whole=is_whole,
            queued_seconds=queued_seconds() - self.queued_seconds,
            ask_server=self.ask_server,
            adapter=self.streaming.adapter,
        )


def _answer(
    opened: _Opened,
    request: "InferenceRequest",
    configuration: options.Configuration,
    view: "View",
    *,
    explain: bool,
    json: bool,
) -> None:
    """Run a request, and show what it came to."""
    from surfw.cli import explain_view, render
    from surfw.models.heads import generates
    from surfw.models.inference import answer, continues_prompt, encode_prompt
    from surfw.models.text_stream import space_before

    streaming = opened.streaming
    view.phase("preparing the prompt")
    tokenizer = _open_tokenizer(streaming, needed=request.prompt_ids is None or bool(request.stop))
    inputs = encode_prompt(streaming, tokenizer, request)
    ids = inputs["input_ids"].flatten().tolist()
    explained = {}
    if explain:
        view.phase("measuring")
        found = streaming.explain(prompt_tokens=len(ids), new_tokens=request.max_new_tokens)
        explained = {"explain": explain_view.facts(found, configuration.origins)}
        if not json:
            view.explain(found, configuration.origins)
    most = request.max_new_tokens if generates(streaming) else 0
    if most:
        streaming.leave_room(len(ids), most)  # or say that there is none, before anything is shown
    if tokenizer is not None and request.prompt is not None and continues_prompt(streaming, tokenizer, request):
        view.prompt(request.prompt, lambda token: space_before(tokenizer, ids, token))
    try:
        with view.running(streaming, opened.source, most, has_text=tokenizer is not None):
            result = answer(streaming, tokenizer, request, inputs=inputs, on_text=view.on_text, on_token=view.on_token)
    except (KeyboardInterrupt, SurfwError):
        view.stopped(opened.report(view.result_so_far(len(ids)), is_whole=False))
        raise
    report = opened.report(result)
    if json:
        view.close()
        render.print_json(report.facts() | explained)
    else:
        view.done(report)


def _explain_only(
    streaming: "StreamingModel", configuration: options.Configuration, view: "View", source: str, *, json: bool
) -> None:
    """Show what limits the model: without a prompt, that is the result."""
    from surfw.cli import explain_view, render

    found = streaming.explain(new_tokens=configuration.settings.max_new_tokens)
    view.close()
    if json:
        explained = explain_view.facts(found, configuration.origins)
        render.print_json({"model": found.model, "source": source, "explain": explained})
    else:
        explain_view.show(found, configuration.origins, render.out)


def _open_tokenizer(streaming: "StreamingModel", *, needed: bool) -> Any:
    """Return the tokenizer, if the model has one; if it cannot be used and is not needed, warn."""
    try:
        return streaming.find_tokenizer()
    except UnsupportedModelError as exc:
        if needed:
            raise
        logging.getLogger("surfw.cli").warning("%s", exc)
        return None


def _parse_ids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of ids such as 1,2,3", param_hint="--prompt-ids") from None


def _one_of(name: str, value: str | None, other_name: str, other: str | None) -> str | None:
    """What was given in one of two ways.

    Raises:
        Mistake: it was given in both.
    """
    if value is not None and other is not None:
        raise Mistake(f"{other_name} does not go with {name} {value[:40]!r}; give one of them")
    return other if value is None else value


def _check_together(
    configuration: options.Configuration,
    *,
    ids: list[int] | None,
    system: str | None,
    raw: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Refuse options that contradict each other.

    Raises:
        Mistake: two of them do.
    """
    options.check_system(system, raw=raw)
    if system is not None and ids is not None:
        raise Mistake("--system does not go with --prompt-ids, which are taken as they are")
    if configuration.origins["live"].kind == "argument" and configuration.settings.live and (json or quiet):
        raise Mistake(f"--live does not go with {'--json' if json else '--quiet'}; give one of them")


def _read_prompt(prompt: str | None, ids: list[int] | None, *, quiet: bool) -> str | None:
    """The prompt, from the command line or from stdin; None if there are ids instead."""
    if ids is not None:
        if prompt is not None:
            raise Mistake("give either --prompt or --prompt-ids, and not both")
        return None
    is_piped = prompt is None and sys.stdin is not None and not sys.stdin.isatty()
    if prompt == "-" or is_piped:
        prompt = _read_stdin(quiet=quiet).rstrip("\n")
    if prompt is None or (is_piped and not prompt):
        raise Mistake("there is no prompt: give either --prompt or --prompt-ids, or pipe one in")
    expect_utf8(prompt, "the prompt")
    if not prompt.strip():
        raise Mistake("the prompt is empty; write a text, or pipe one in with --prompt -")
    return prompt


def _read_stdin(*, quiet: bool) -> str:
    """All of stdin. If nothing comes for a moment, say what is waited for: a script may have left a pipe open."""
    if sys.stdin is None:
        return ""
    if not quiet and not select.select([sys.stdin], [], [], _PATIENCE_SECONDS)[0]:
        print("surfw: waiting for the prompt on stdin", file=sys.stderr)
    return sys.stdin.read()
