"""`surfw infer --model A --model B`: run one prompt through several models of a source, with a heading per answer.

The models run one after another. Each replaces the one before (`StreamingModel.switch`), so that layers which two of
them share are read once.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from surfw.cli import options
from surfw.cli.addresses import Mistake
from surfw.config import display_url

if TYPE_CHECKING:
    from surfw.cli.guessing import Guessing
    from surfw.cli.infer_view import View
    from surfw.manifest import Manifest
    from surfw.models.inference import InferenceRequest
    from surfw.models.read_ahead import ReadAheadClient
    from surfw.models.streaming import StreamingModel
    from surfw.settings import Settings


def check_together(models: Sequence[str], others: Mapping[str, object]) -> None:
    """Refuse options for a single model if several models are given.

    Raises:
        Mistake: one of the options is given, or a model's name is invalid.
    """
    for name in models[1:]:
        options.check_option("model", name)
    if len(models) < 2:
        return
    for name, value in others.items():
        if value:
            raise Mistake(f"{name} does not go with several models (--model); give one of them")


def answer_each(
    models: Sequence[str],
    make_request: "Callable[[], InferenceRequest]",
    configuration: options.Configuration,
    make_view: "Callable[[], View]",
    guessing: "Guessing",
    *,
    json: bool,
    check: "Callable[[Manifest], None]",
) -> None:
    """Run a request with each model, and show the answers; `check` is called with each manifest before the first run.

    Raises:
        SurfwError: a model fails; those after it do not run.
    """
    from surfw.cli import render
    from surfw.cli.infer_run import Opened, answer_request, ask_server
    from surfw.cli.infer_summary import queued_seconds
    from surfw.cli.sources import choose_source, connect, find_base, find_manifest

    settings = configuration.settings
    found: list[dict[str, Any]] = []
    with ExitStack() as opened:
        streaming: StreamingModel | None = None
        first = opened.enter_context(ExitStack())
        view = first.enter_context(make_view())
        view.phase("looking for the weights")
        chosen = opened.enter_context(choose_source(configuration, on_phase=view.phase))
        source = display_url(chosen.url)
        view.note(f"source: {chosen.described}")
        chosen.check_folder()
        view.phase("connecting" if chosen.is_server else "reading the manifest")
        client = opened.enter_context(connect(chosen, settings, explain=False, check=check))
        guessing.check(client, client.manifest, settings)
        for manifest in (find_manifest(client, name) for name in models[1:]):
            check(manifest)
            guessing.check(client, find_base(client, manifest), settings)
        for name in models:
            with ExitStack() if streaming else first as shown:
                if streaming:
                    view = shown.enter_context(make_view())
                start, queued = time.perf_counter(), queued_seconds()
                streaming = _go_on(streaming, client, replace(settings, model=name), view, opened)
                guessing.begin(streaming, client, settings, view.phase)
                took = time.perf_counter() - start
                view.heading(streaming.adapter or streaming.manifest.name)
                one = Opened(streaming, source, took, queued, lambda: ask_server(chosen, settings))
                report, _ = answer_request(one, make_request(), configuration, view, explain=False, json=json)
                if json:
                    found.append(report.facts())
                else:
                    view.done(report)
    if json:
        render.print_json({"answers": found})


def _go_on(
    streaming: "StreamingModel | None", client: "ReadAheadClient", settings: "Settings", view: "View", opened: ExitStack
) -> "StreamingModel":
    """Open a model, replacing the one before, if any."""
    from surfw.cli.sources import open_model

    if streaming is None or streaming.device.type != "cpu":  # on a device, models share no memory
        if streaming is not None:
            streaming.close()
        return opened.enter_context(open_model(client, settings, view.phase))
    from surfw.metrics import Metrics

    assert settings.model is not None, "several models are named"
    view.phase(f"switching to {settings.model}")
    streaming.metrics = Metrics()  # a run's statistics cover that model only
    streaming.switch(settings.model)
    return streaming
