"""What a run adds to a trace: a span for each layer that computes, and one for what transformers does between them."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from surfw import tracing
from surfw.manifest import Manifest


@contextmanager
def traced(model: torch.nn.Module, manifest: Manifest) -> Iterator[None]:
    """Have the model's modules that run, in the order of the manifest, traced during the body, if there is a trace.

    The weights of a layer are in place by the time its span begins: the hooks that put them there come first.
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
    """A layer's spans; a layer that calls itself has them nested."""

    def __init__(self, name: str, chunks: Sequence[str]) -> None:
        self._name = name
        self._chunks = chunks
        self._open: list[AbstractContextManager[None]] = []

    def begin(self, *_: Any) -> None:
        self._open.append(tracing.span("compute", self._name, layer=self._name, chunks=self._chunks))
        self._open[-1].__enter__()

    def end(self, *_: Any) -> None:
        if self._open:  # else it failed before it began
            self._open.pop().__exit__(None, None, None)
