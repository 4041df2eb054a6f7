"""`AdaptedModel`: an open model, and the LoRA adapters that one applies to it, loads, unloads and trains."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from surfw.models.lifetime import ModelLifetime
from surfw.models.options import expect_number
from surfw.models.training import training
from surfw.runtime.run import Run, current_run


class AdaptedModel(ModelLifetime):
    """A model that adapters can be applied to."""

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that is applied now; None if none is."""
        return self._open_here().adapters.active

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that are in memory."""
        return self._open_here().adapters.names

    def load_adapter(self, name: str) -> str:
        """Bring an adapter of the same source into memory, without applying it; returns its name in full.

        Raises:
            UnknownModelError: the source has none of this name.
            ConfigurationError: it is no adapter, or the memory budget is too small for it.
            ManifestError: it belongs to another base.
            SurfwError: it could not be read.
        """
        self._open_here()
        with self._holding(current_run.get() or Run()):
            return self._open_here().adapters.load(name)

    def set_adapter(self, name: str | None) -> None:
        """Apply an adapter from the next run on, instead of the one that is applied now; None applies none.

        One that is not in memory is loaded; for one that is, nothing is read. A run that goes on ends first.

        Raises:
            SurfwError: as of `load_adapter`.
        """
        self._open_here()
        with self._holding(current_run.get() or Run()):
            adapters = self._open_here().adapters  # of the model there is now: another may have taken its place
            adapters.apply(None if name is None else adapters.load(name))
            self._on_adapter()

    async def set_adapter_async(self, name: str | None) -> None:
        """As `set_adapter`, without blocking the event loop."""
        await self._in_thread(lambda: self.set_adapter(name))

    def unload_adapter(self, name: str) -> None:
        """Give an adapter's memory back; one that is applied is not applied any more.

        Raises:
            ConfigurationError: none of this name is loaded.
        """
        self._open_here()
        with self._holding(current_run.get() or Run()):
            self._open_here().adapters.unload(name)
            self._on_adapter()

    @contextmanager
    def training(self, *, optimizer_states: int = 2) -> Iterator[PreTrainedModel]:
        """Train what was put into `model.model` before, such as peft's LoRA, over the streamed weights.

        The body has the model to itself, in training mode, with gradients: call it, or what peft made of it, then
        `loss.backward()`. The streamed weights stay as they are. Each layer runs again in the backward pass, so that
        neither all weights nor all activations have to be in memory. Both passes have to be within the body, in the
        same thread. Memory for all of it is taken from the budget.

        Args:
            optimizer_states: how many tensors the optimiser keeps for each that learns: 2 for Adam, 0 for plain SGD.

        Yields:
            Transformers' own model; it is in evaluation mode again afterwards, and what was trained stays in it.

        Raises:
            ConfigurationError: nothing learns, or the memory budget is too small.
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
        """Another adapter is applied now, or none."""
