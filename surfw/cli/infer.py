"""`surfw infer`: a prompt through a model whose weights arrive while it runs."""

import logging
import sys
import time
from typing import Annotated, Any

import typer

from surfw.cli import options
from surfw.errors import ConfigurationError, UnsupportedModelError

EXAMPLES = """\b
Examples:
  surfw infer --prompt 'Weight streaming is'
  echo Hello | surfw infer --prompt - --model org/name
  surfw infer --source ws://127.0.0.1:8765 --cache-layers 2 --prompt-ids 1,2,3 --json
"""


def infer(
    prompt: Annotated[str | None, typer.Option(help="The prompt; - reads it from stdin.")] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="Token ids in place of a prompt; new ids are printed too.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model, or its last part. [default: the only one there is]")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="ws://host:port, a folder or a storage URL. [default: $SURFW_SOURCE, else a server on this machine, "
            "else the default store, else the demo model]",
        ),
    ] = None,
    cache_layers: Annotated[
        int | None, typer.Option(min=1, help="Layers kept in memory; one more may be in flight. [default: what fits]")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Sample with this temperature. [default: greedy]")
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Sample from this much probability.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from this many tokens.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of the random numbers.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the generation; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message, for models with a chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Run in this dtype, such as bfloat16. [default: as stored]")] = None,
    json: options.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but warnings and errors.")] = False,
    live: Annotated[
        bool | None, typer.Option("--live/--no-live", help="A live table. [default: in a terminal]")
    ] = None,
) -> None:
    """Run a model while its layers arrive, and print what it says.

    Encoders print their embedding, or what they put in place of [MASK].
    """
    from surfw.cli.infer_view import LiveView, PlainView

    if "" in (stop or ()):
        raise typer.BadParameter("a text that ends the generation cannot be empty", param_hint="--stop")
    ids = _parse_ids(prompt_ids)
    text = _read_prompt(prompt, ids)
    is_live = (sys.stdout.isatty() if live is None else live) and not json and not quiet
    view = LiveView() if is_live else PlainView(json=json, quiet=quiet, ids=ids is not None)
    request = {
        "prompt": text, "prompt_ids": ids, "system": system, "raw": raw, "max_new_tokens": max_new_tokens,
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "stop": stop or (),
        "ignore_eos": ignore_eos,
    }  # fmt: skip
    _run(view, request, source=source, model=model, cache_layers=cache_layers, dtype=dtype)


def _run(
    view: Any,
    request: dict[str, Any],
    *,
    source: str | None,
    model: str | None,
    cache_layers: int | None,
    dtype: str | None,
) -> None:
    from surfw.cli.sources import choose_source

    with choose_source(source, model) as chosen:
        view.note(f"source: {chosen.url} ({chosen.reason})")
        start = time.perf_counter()
        from surfw.models.inference import Request, answer
        from surfw.models.streaming import StreamingModel
        from surfw.runtime.memory import peak_rss_bytes

        with StreamingModel.open(chosen.url, model, cache_size=cache_layers, dtype=dtype) as streaming:
            tokenizer = _open_tokenizer(streaming, needed=request["prompt_ids"] is None or bool(request["stop"]))
            load_seconds = time.perf_counter() - start
            with view.running(streaming):
                result = answer(streaming, tokenizer, Request(**request), on_text=view.on_text, on_token=view.on_token)
            statistics = streaming.statistics()
            facts = {
                "model": streaming.manifest.name,
                "source": chosen.url,
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
                "peak_rss_bytes": peak_rss_bytes(),
            }
            for name in ("embedding", "predictions"):
                if getattr(result, name) is not None:
                    facts[name] = getattr(result, name)
            view.done(facts)


def _open_tokenizer(streaming: Any, *, needed: bool) -> Any:
    """The tokenizer; one that cannot be used is no hindrance to a prompt of ids."""
    try:
        return streaming.tokenizer
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
