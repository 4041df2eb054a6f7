"""Tracing of a run: a span for each layer that computes, and one for the time between layers."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from surfw import tracing
from surfw.manifest import Manifest


@contextmanager
def traced(model: torch.nn.Module, manifest: Manifest) -> Iterator[None]:
    """Trace the modules in the manifest's order during the body, if a trace is active.

    A layer's weights are in place when its span begins, because the hooks that load them run first.
    """
    trace = tracing.current()
    if trace is None or not trace.is_here:
        yield
        return
    with ExitStack() as last:
        last.enter_context(tracing.span("compute", "between layers"))
        for name, chunks in {use.module: use.chunks for use in manifest.order}.items():
            module, running = model.get_submodule(name), _Running(name, chunks)
            last.callback(module.register_forward_pre_hook(running.begin).remove)
            last.callback(module.register_forward_hook(running.end, prepend=True, always_call=True).remove)
        trace.begin_tokens()
        yield


class _Running:
    """The spans of a layer; they nest if the layer calls itself."""

    def __init__(self, name: str, chunks: Sequence[str]) -> None:
        self._name = name
        self._chunks = chunks
        self._open: list[AbstractContextManager[None]] = []

    def begin(self, *_: Any) -> None:
        self._open.append(tracing.span("compute", self._name, layer=self._name, chunks=self._chunks))
        self._open[-1].__enter__()

    def end(self, *_: Any) -> None:
        if self._open:  # else the layer failed before `begin`
            self._open.pop().__exit__(None, None, None)
