"""`surfw infer`: a prompt through a model whose weights arrive while it runs."""

import logging
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surfw.cli import options
from surfw.config import display_url
from surfw.errors import ConfigurationError, UnsupportedModelError
from surfw.settings import Settings

if TYPE_CHECKING:
    from surfw.cli.sources import ChosenSource

EXAMPLES = """\b
Examples:
  surfw infer --prompt 'Weight streaming is'
  echo Hello | surfw infer --prompt - --model org/name
  surfw infer --source ws://127.0.0.1:8765 --cache-layers 2 --prompt-ids 1,2,3 --json
  surfw infer --memory-budget 2GB --explain
"""


@options.with_settings(
    "model", "source", "storage_options", "cache_layers", "memory_budget", "policy", "max_new_tokens", "temperature",
    "top_p", "top_k", "seed", "dtype", "on_missing", "connect_timeout", "silence_timeout", "retry_attempts",
    "retry_first_delay", "retry_backoff", "retry_most_delay", "retry_jitter", "token_file", "live",
)  # fmt: skip
def infer(
    *,
    prompt: Annotated[str | None, typer.Option(help="The prompt; - reads it from stdin.")] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="Token ids in place of a prompt; new ids are printed too.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the generation; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message, for models with a chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    configuration: options.Configuration,
    explain: Annotated[
        bool, typer.Option("--explain", help="Measure, and tell first what limits it; without a prompt, only that.")
    ] = False,
    json: options.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but warnings and errors.")] = False,
) -> None:
    """Run a model while its layers arrive, and print what it says.

    Encoders print their embedding, or what they put in place of [MASK].
    """
    if "" in (stop or ()):
        raise typer.BadParameter("a text that ends the generation cannot be empty", param_hint="--stop")
    ids = _parse_ids(prompt_ids)
    settings = configuration.settings
    if explain and prompt is None and ids is None:
        _explain_only(configuration, json=json, quiet=quiet)
        return
    if explain and quiet and not json:
        raise typer.BadParameter(
            "leaves nothing of --explain to be seen; leave one out, or add --json", param_hint="-q"
        )
    text = _read_prompt(prompt, ids)
    from surfw.cli.infer_view import LiveView, PlainView

    is_live = (sys.stdout.isatty() if settings.live is None else settings.live) and not json and not quiet
    view = LiveView() if is_live else PlainView(json=json, quiet=quiet, ids=ids is not None)
    request = {
        "prompt": text, "prompt_ids": ids, "system": system, "raw": raw, "stop": stop or (),
        "ignore_eos": ignore_eos, "max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature,
        "top_p": settings.top_p, "top_k": settings.top_k, "seed": settings.seed,
    }  # fmt: skip
    _run(view, request, configuration, explain=explain)


def _explain_only(configuration: options.Configuration, *, json: bool, quiet: bool) -> None:
    """No prompt: the explanation is the result."""
    from surfw.cli import explain_view, render
    from surfw.cli.infer_view import PlainView
    from surfw.cli.sources import choose_source

    with choose_source(configuration) as chosen:
        PlainView(json=json, quiet=quiet, ids=False).note(f"source: {display_url(chosen.url)} ({chosen.reason})")
        chosen.check_folder()
        with _open_model(chosen, configuration.settings) as streaming:
            found = streaming.explain(new_tokens=configuration.settings.max_new_tokens)
            if json:
                facts = {"model": found.model, "source": display_url(chosen.url)}
                render.print_json(facts | {"explain": explain_view.facts(found, configuration.origins)})
            else:
                explain_view.show(found, configuration.origins, render.out)


def _explain(view: Any, streaming: Any, tokenizer: Any, request: Any, configuration: options.Configuration) -> Any:
    """Explain the run that comes now."""
    from surfw.cli import explain_view
    from surfw.models.inference import count_prompt_tokens

    view.note("measuring")
    prompt_tokens = count_prompt_tokens(streaming, tokenizer, request)
    found = streaming.explain(prompt_tokens=prompt_tokens, new_tokens=request.max_new_tokens)
    view.explain(found, configuration.origins)
    return explain_view.facts(found, configuration.origins)


def _run(view: Any, request: dict[str, Any], configuration: options.Configuration, *, explain: bool) -> None:
    from surfw.cli.sources import choose_source

    with choose_source(configuration) as chosen:
        view.note(f"source: {display_url(chosen.url)} ({chosen.reason})")
        chosen.check_folder()
        start = time.perf_counter()
        from surfw.models.inference import InferenceRequest, answer
        from surfw.runtime.memory import peak_rss_bytes

        with _open_model(chosen, configuration.settings) as streaming:
            tokenizer = _open_tokenizer(streaming, needed=request["prompt_ids"] is None or bool(request["stop"]))
            load_seconds = time.perf_counter() - start
            asked = InferenceRequest(**request)
            explained = _explain(view, streaming, tokenizer, asked, configuration) if explain else None
            with view.running(streaming):
                result = answer(streaming, tokenizer, asked, on_text=view.on_text, on_token=view.on_token)
            statistics = streaming.statistics()
            facts = {
                "model": streaming.manifest.name,
                "source": display_url(chosen.url),
                "text": result.text,
                "token_ids": result.token_ids,
                "prompt_tokens": result.prompt_tokens,
                "new_tokens": len(result.token_ids),
                "load_seconds": load_seconds,
                "ttft_seconds": result.ttft_seconds,
                "tpot_seconds": result.tpot_seconds,
                "tokens_per_second": result.tokens_per_second,
                "cache": statistics["cache"],
                "time": statistics["time"],
                "plan": statistics["plan"],
                "peak_rss_bytes": peak_rss_bytes(),
            }
            if explained is not None:
                facts["explain"] = explained
            for name in ("embedding", "predictions"):
                if getattr(result, name) is not None:
                    facts[name] = getattr(result, name)
            view.done(facts)


def _open_model(chosen: "ChosenSource", settings: Settings) -> Any:
    """The model at a source, as the settings want it."""
    from surfw.models.streaming import StreamingModel

    return StreamingModel.open(
        chosen.url,
        settings.model,
        cache_size=settings.cache_layers,
        memory_budget=settings.memory_budget,
        policy=settings.policy,
        dtype=settings.dtype,
        on_missing=settings.on_missing,
        token=settings.token if chosen.is_server else None,
        storage_options=None if chosen.is_server else settings.storage_options,
        retry=settings.retry,
        connect_timeout=settings.connect_timeout,
        silence_timeout=settings.silence_timeout,
    )


def _open_tokenizer(streaming: Any, *, needed: bool) -> Any:
    """The tokenizer; one that cannot be used is no hindrance to a prompt of ids."""
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


def _read_prompt(prompt: str | None, ids: list[int] | None) -> str | None:
    if (prompt is None) == (ids is None):
        raise typer.BadParameter("give either --prompt or --prompt-ids", param_hint="--prompt")
    if prompt == "-":
        prompt = (sys.stdin.read() if sys.stdin else "").rstrip("\n")
    if prompt is not None and "\ufffd" not in prompt and prompt != prompt.encode(errors="replace").decode():
        raise ConfigurationError("the prompt is not valid UTF-8; write it in that encoding")
    if prompt is not None and not prompt.strip():
        raise ConfigurationError("the prompt is empty; write one after --prompt, or pipe one in with --prompt -")
    return prompt
