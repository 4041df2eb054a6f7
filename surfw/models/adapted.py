"""`AdaptedModel`: loading, applying, unloading and training LoRA adapters of an open model."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from surfw.models.lifetime import ModelLifetime
from surfw.models.options import expect_number
from surfw.models.training import training
from surfw.runtime.run import Run, current_run


class AdaptedModel(ModelLifetime):
    """A model that supports adapters."""

    @property
    def adapter(self) -> str | None:
        """The name of the applied adapter; None if no adapter is applied."""
        return self._open_here().adapters.active

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters in memory."""
        return self._open_here().adapters.names

    def load_adapter(self, name: str) -> str:
        """Load an adapter of the same source without applying it, and return its full name.

        Raises:
            UnknownModelError: the source has no adapter of this name.
            ConfigurationError: it is not an adapter, or the memory budget is too small for it.
            ManifestError: it belongs to another base.
            SurfwError: it could not be read.
        """
        self._open_here()
        with self._holding(current_run.get() or Run()):
            return self._open_here().adapters.load(name)

    def set_adapter(self, name: str | None) -> None:
        """Apply an adapter in place of the current one, from the next run on; None applies none.

        The adapter is loaded if it is not in memory; otherwise nothing is read. This waits for a run in progress.

        Raises:
            SurfwError: see `load_adapter`.
        """
        self._open_here()
        with self._holding(current_run.get() or Run()):
            adapters = self._open_here().adapters  # fetched again: the model may have been switched
            adapters.apply(None if name is None else adapters.load(name))
            self._on_adapter()

    async def set_adapter_async(self, name: str | None) -> None:
        """Like `set_adapter`, without blocking the event loop."""
        await self._in_thread(lambda: self.set_adapter(name))

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter and free its memory; if it is applied, it is removed from the model first.

        Raises:
            ConfigurationError: no adapter of this name is loaded.
        """
        self._open_here()
        with self._holding(current_run.get() or Run()):
            self._open_here().adapters.unload(name)
            self._on_adapter()

    @contextmanager
    def training(self, *, optimizer_states: int = 2) -> Iterator[PreTrainedModel]:
        """Train parameters that were added to `model.model`, such as peft's LoRA, over the streamed weights.

        The body has exclusive use of the model, in training mode, with gradients: call it, or peft's wrapper of it,
        then `loss.backward()`. The streamed weights are frozen. Each layer runs again in the backward pass, so that
        neither all weights nor all activations must be in memory. Both passes must run within the body, in the same
        thread. All memory for training is taken from the budget.

        Args:
            optimizer_states: number of tensors that the optimiser keeps per trainable tensor: 2 for Adam, 0 for plain
                SGD.

        Yields:
            The transformers model; afterwards it is in evaluation mode and keeps the trained parameters.

        Raises:
            ConfigurationError: there are no trainable parameters, or the memory budget is too small.
            ModelError: the weights are quantised.
            SurfwError: weights could not be read.
        """
        expect_number("optimizer_states", optimizer_states, 0, 16)
        parts, run = self._open_here(), current_run.get() or Run()
        with self._holding(run):
            self.expect_open(parts.model)
            with parts.engine.running(run), training(parts, optimizer_states):
                try:
                    yield parts.model
                finally:
                    parts.hooks.recover()

    def _on_adapter(self) -> None:
        """Called after the applied adapter may have changed."""
