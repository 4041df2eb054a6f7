"""`surfw infer`: run a prompt through a model whose weights arrive while it runs."""

import select
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surfw.cli import chat, infer_each, infer_many, options
from surfw.cli.addresses import Mistake
from surfw.cli.guessing import Guessing
from surfw.cli.streams import expect_utf8
from surfw.cli.traced import writing_trace
from surfw.config import display_url

if TYPE_CHECKING:
    from surfw.cli.infer_view import View
    from surfw.manifest import Manifest
    from surfw.models.inference import InferenceRequest
    from surfw.models.streaming import StreamingModel

EXAMPLES = """\b
Examples:
  surfw infer --prompt 'Weight streaming is'
  surfw infer my-model 'Weight streaming is'
  surfw infer ./my-model 'Weight streaming is' --memory-budget 2GB
  echo Hello | surfw infer org/name
  surfw infer 127.0.0.1:8765 --cache-layers 2 --prompt-ids 1,2,3 --json
  surfw infer my-model --memory-budget 2GB --explain
  surfw infer --model my-model --model my-model-tuned --prompt 'Weight streaming is'
  surfw infer my-model --prompts questions.jsonl --output answers.jsonl --resume
"""

_PATIENCE_SECONDS = 1.0


@options.with_settings(*options.RUN_SETTINGS, several=("model",))
def infer(
    *,
    place: options.Place = None,
    text: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The prompt; - reads stdin, and so does a pipe if none is given."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt, if MODEL is left out; - reads stdin.")] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="Token ids instead of a prompt; the output is ids too.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop generating at this text; may be repeated.")] = None,
    ignore_eos: options.IgnoreEos = False,
    system: Annotated[str | None, typer.Option(help="The system message, for models with a chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Pass the prompt unchanged, without the chat template.")] = False,
    pair: Annotated[
        list[str] | None,
        typer.Option(help="A second text, for models that take two: to rank, choose, or answer from; may be repeated."),
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="The name of an embedding model's own prompt to put before the text.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Answer the prompts in this file: JSON lines such as {"id": 1, "prompt": "…"}; - reads stdin.',
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the answers to --prompts to this file instead of stdout.")
    ] = None,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Write answers in the order of --prompts, not as they finish.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip prompts whose ids --output has answers to, whatever their texts.")
    ] = False,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="The number of --prompts to run together. [default: up to 64]")
    ] = None,
    pipeline: Annotated[
        bool,
        typer.Option(
            "--pipeline", help="Split the layers between the ranks of a torchrun job, each with its own budget."
        ),
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write a timeline of the run to this file, for ui.perfetto.dev or stats --run."
        ),
    ] = None,
    prompt_lookup: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Speculate up to N tokens from the text so far, and check them in one pass."
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Speculate with a smaller draft model: a name, a source, or self:int4."),
    ] = None,
    configuration: options.Configuration,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Measure and show what limits the run first; without a prompt, do only that."),
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run a model while its layers arrive, and print its output.

    Encoders print their embedding, or their head's output: candidates for [MASK], labels, answers, scores.
    """
    _expect_texts(stop, pair)
    prompt = _one_of("PROMPT", text, "--prompt", prompt)
    many = infer_many.Many(
        prompts=prompts, output=output, ordered=ordered, resume=resume, sequences=sequences, stop=tuple(stop or ()),
        ignore_eos=ignore_eos, system=system, raw=raw, quiet=quiet, pipeline=pipeline,
    )  # fmt: skip
    others: dict[str, object] = {
        "a prompt": prompt, "--prompt-ids": prompt_ids, "--explain": explain, "--json": json, "--pair": pair,
        "--prompt-name": prompt_name, "--trace": trace, "--prompt-lookup": prompt_lookup, "--draft": draft,
    }  # fmt: skip
    infer_many.check_together(many, others)
    guessing = Guessing(prompt_lookup, draft)
    models = configuration.several["model"]
    only = {"--prompts": prompts, "--explain": explain, "--trace": trace, "--adapter": configuration.settings.adapter}
    infer_each.check_together(models, only)
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
        guessing.refuse("--explain without a prompt; give one")
        with writing_trace(trace):
            _run(None, configuration, view, guessing, explain=True, json=json)
        return
    if (
        prompt is None
        and ids is None
        and trace is None
        and not json
        and len(models) < 2
        and chat.sees_person()
        and sys.stdout.isatty()
    ):
        guessing.refuse("a chat, whose turns go on with a KV cache; give a prompt")
        chat.converse(configuration, system=system, raw=raw, stop=stop or (), ignore_eos=ignore_eos, quiet=quiet)
        return
    if explain and quiet and not json:
        raise typer.BadParameter(
            "does not go with --explain, of which it leaves nothing to be seen; give one of them, or add --json",
            param_hint="-q",
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

    def check(manifest: "Manifest") -> None:
        from surfw.models.read_ahead import expect_prompt

        expect_prompt(manifest, ids)

    def make_view() -> "View":
        return choose_view("text" if ids is None else "ids", live=settings.live, json=json, quiet=quiet)

    if len(models) > 1:
        infer_each.answer_each(models, make_request, configuration, make_view, guessing, json=json, check=check)
        return
    with writing_trace(trace):
        _run(make_request, configuration, make_view(), guessing, explain=explain, json=json, check=check)


def _run(
    make_request: "Callable[[], InferenceRequest] | None",
    configuration: options.Configuration,
    view: "View",
    guessing: Guessing,
    *,
    explain: bool,
    json: bool,
    check: "Callable[[Manifest], None]" = lambda _: None,
) -> None:
    """Run a request, or explain what limits the model if `make_request` is None.

    The request is made after torch is imported. `check` is called with the manifest before that.
    """
    from surfw.cli import render
    from surfw.cli.infer_run import Opened, answer_request, ask_server
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
            with ExitStack() as opened:
                client = opened.enter_context(connect(chosen, settings, explain=explain, check=check))
                guessing.check(client, client.manifest, settings)
                streaming = opened.enter_context(open_model(client, settings, view.phase))
                if make_request is None:
                    view.phase("measuring")
                    _explain_only(streaming, configuration, view, source, json=json)
                    return
                guessing.begin(streaming, client, settings, view.phase)
                seconds, queued = time.perf_counter() - start, queued_seconds()
                ready = Opened(streaming, source, seconds, queued, lambda: ask_server(chosen, settings))
                report, explained = answer_request(
                    ready, make_request(), configuration, view, explain=explain, json=json
                )
                if json:
                    view.close()
                    render.print_json(report.facts() | explained)
                else:
                    view.done(report)


def _explain_only(
    streaming: "StreamingModel", configuration: options.Configuration, view: "View", source: str, *, json: bool
) -> None:
    """Show what limits the model, as the command's only output."""
    from surfw.cli import explain_view, render

    found = streaming.explain(new_tokens=configuration.settings.max_new_tokens)
    view.close()
    if json:
        explained = explain_view.facts(found, configuration.origins)
        render.print_json({"model": found.model, "source": source, "explain": explained})
    else:
        explain_view.show(found, configuration.origins, render.out)


def _expect_texts(stop: list[str] | None, pair: list[str] | None) -> None:
    for texts, hint, what in ((stop, "--stop", "a text that ends the generation"), (pair, "--pair", "a second text")):
        if "" in (texts or ()):
            raise typer.BadParameter(f"{what} cannot be empty", param_hint=hint)


def _parse_ids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of ids such as 1,2,3", param_hint="--prompt-ids") from None


def _one_of(name: str, value: str | None, other_name: str, other: str | None) -> str | None:
    """Return a value that can be given in two ways.

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
        Mistake: two options do.
    """
    options.check_system(system, raw=raw)
    if system is not None and ids is not None:
        raise Mistake("--system does not go with --prompt-ids, which are taken as they are; give one of them")
    if configuration.origins["live"].kind == "argument" and configuration.settings.live and (json or quiet):
        raise Mistake(f"--live does not go with {'--json' if json else '--quiet'}; give one of them")


def _read_prompt(prompt: str | None, ids: list[int] | None, *, quiet: bool) -> str | None:
    """Return the prompt, from the command line or from stdin; None if token ids were given."""
    if ids is not None:
        if prompt is not None:
            raise Mistake("--prompt-ids does not go with a prompt; give one of them")
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
    """Read all of stdin. If nothing arrives for a second, say so: a script may have left a pipe open."""
    if sys.stdin is None:
        return ""
    if not quiet and not select.select([sys.stdin], [], [], _PATIENCE_SECONDS)[0]:
        print("surfw: waiting for the prompt on stdin", file=sys.stderr)
    return sys.stdin.read()
