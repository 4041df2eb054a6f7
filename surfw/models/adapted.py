"""`AdaptedModel`: an open model, and the LoRA adapters that one applies to it, loads and unloads."""

from surfw.models.lifetime import ModelLifetime
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
        parts = self._open_here()
        with self._holding(current_run.get() or Run()):
            return parts.adapters.load(name)

    def set_adapter(self, name: str | None) -> None:
        """Apply an adapter from the next run on, instead of the one that is applied now; None applies none.

        One that is not in memory is loaded; for one that is, nothing is read. A run that goes on ends first.

        Raises:
            SurfwError: as of `load_adapter`.
        """
        parts = self._open_here()
        with self._holding(current_run.get() or Run()):
            parts.adapters.apply(None if name is None else parts.adapters.load(name))
            self._on_adapter()

    async def set_adapter_async(self, name: str | None) -> None:
        """As `set_adapter`, without blocking the event loop."""
        await self._in_thread(lambda: self.set_adapter(name))

    def unload_adapter(self, name: str) -> None:
        """Give an adapter's memory back; one that is applied is not applied any more.

        Raises:
            ConfigurationError: none of this name is loaded.
        """
        parts = self._open_here()
        with self._holding(current_run.get() or Run()):
            parts.adapters.unload(name)
            self._on_adapter()

    def _on_adapter(self) -> None:
        """Another adapter is applied now, or none."""
