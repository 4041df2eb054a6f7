"""Run a request on an open model for `surfw infer`, show the answer as it arrives, and report the outcome."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surfw import tracing
from surfw.cli import options
from surfw.errors import SurfwError, UnsupportedModelError

if TYPE_CHECKING:
    from surfw.cli.infer_summary import Report
    from surfw.cli.infer_view import View
    from surfw.cli.sources import ChosenSource
    from surfw.models.inference import InferenceRequest, InferenceResult
    from surfw.models.streaming import StreamingModel
    from surfw.settings import Settings
    from surfw.wire import ServerStats

_STATS_SECONDS = 1.0
"""How long a summary waits for the statistics of the server's cache."""


@dataclass(frozen=True)
class Opened:
    """An open model, its source, what opening it took, and a function that returns its server's statistics."""

    streaming: "StreamingModel"
    source: str
    load_seconds: float
    queued_seconds: float
    ask_server: "Callable[[], ServerStats | None]"

    def report(self, result: "InferenceResult", *, is_whole: bool = True) -> "Report":
        """Build the report of a run."""
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


def answer_request(
    opened: Opened,
    request: "InferenceRequest",
    configuration: options.Configuration,
    view: "View",
    *,
    explain: bool,
    json: bool,
) -> "tuple[Report, dict[str, Any]]":
    """Run a request, and show its answer as it arrives.

    Returns:
        The report; and with `explain`, what limits the run, under its key in JSON.
    """
    from surfw.cli import explain_view
    from surfw.models.heads import generates
    from surfw.models.inference import answer, continues_prompt, encode_prompt
    from surfw.models.text_stream import space_before

    streaming = opened.streaming
    view.phase("preparing the prompt")
    tokenizer = open_tokenizer(streaming, needed=request.prompt_ids is None or bool(request.stop))
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
        streaming.leave_room(len(ids), most)  # fails before anything is shown if the budget is too small
    if tokenizer is not None and request.prompt is not None and continues_prompt(streaming, tokenizer, request):
        view.prompt(request.prompt, lambda token: space_before(tokenizer, ids, token))
    try:
        tracing.phase("prepare", "generating")
        with view.running(streaming, opened.source, most, has_text=tokenizer is not None):
            result = answer(streaming, tokenizer, request, inputs=inputs, on_text=view.on_text, on_token=view.on_token)
    except (KeyboardInterrupt, SurfwError):
        view.stopped(opened.report(view.result_so_far(len(ids)), is_whole=False))
        raise
    tracing.phase("prepare", "finishing")
    return opened.report(result), explained


def ask_server(chosen: "ChosenSource", settings: "Settings") -> "ServerStats | None":
    """Return the server's statistics; None if the source is not a server, or does not answer in time.

    Also None if weights are cast, since the size of a pass in memory is then not its size in the server's cache; and
    with a disk cache or offline, since the run then reads the disk cache, and offline no server may be contacted.
    """
    from surfw.client import read_stats

    is_cached = settings.disk_cache is not None or settings.offline
    if not chosen.is_server or is_cached or settings.dtype not in {None, "auto"}:
        return None
    try:
        return read_stats(chosen.url, token=settings.token, ssl=chosen.tls, timeout_seconds=_STATS_SECONDS)
    except SurfwError:
        return None


def open_tokenizer(streaming: "StreamingModel", *, needed: bool) -> Any:
    """Return the tokenizer, if the model has one; if it cannot be used and is not needed, warn."""
    try:
        return streaming.find_tokenizer()
    except UnsupportedModelError as exc:
        if needed:
            raise
        logging.getLogger("surfw.cli").warning("%s", exc)
        return None
