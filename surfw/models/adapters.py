"""The adapters of an open model: those in memory, and the one that is applied.

All tensors of a loaded adapter stay resident and count in the budget. Switching between loaded adapters reads nothing
and leaves the base's weights in place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from surfw.config import quote
from surfw.errors import ConfigurationError, ManifestError
from surfw.manifest import Manifest
from surfw.models.client import SourceThread
from surfw.runtime.buffers import Buffer, buffer_capacity
from surfw.runtime.engine import Engine
from surfw.runtime.loader import Loader, buffer_bytes, scratch_bytes
from surfw.runtime.lora import AttachedLora
from surfw.skeleton.build import Skeleton
from surfw.skeleton.dtypes import torch_dtype
from surfw.skeleton.lora import Lora, find_lora
from surfw.source import find_adapter


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An adapter in memory: its manifest, what it changes, its tensors and their size."""

    manifest: Manifest
    lora: Lora
    tensors: Mapping[str, torch.Tensor]
    size_bytes: int


class Adapters:
    """The adapters of one open model; use from one thread at a time, and not while the model runs."""

    def __init__(
        self,
        client: SourceThread,
        base: Manifest,
        skeleton: Skeleton,
        engine: Engine,
        device: torch.device,
        *,
        is_pinned: bool = False,
    ) -> None:
        """Start without adapters; `on_apply` is called with whether an adapter is applied, whenever that changes.

        Args:
            client: the source of the base and its adapters.
            base: the manifest of the open model.
            skeleton: the open model.
            engine: the model's engine, which has the budget.
            device: where the model computes.
            is_pinned: see `Loader`.
        """
        self._is_pinned = is_pinned
        self._client = client
        self._base = base
        self._skeleton = skeleton
        self._engine = engine
        self._device = device
        self._loaded: dict[str, _Loaded] = {}
        self._attached: AttachedLora | None = None
        self.on_apply: Callable[[bool], object] = lambda _: None
        self.active: str | None = None

    @property
    def names(self) -> list[str]:
        """The names of the loaded adapters, in the order they were loaded."""
        return list(self._loaded)

    @property
    def held_bytes(self) -> int:
        """Memory of all loaded adapters."""
        return sum(one.size_bytes for one in self._loaded.values())

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the applied adapter; None if no adapter is applied."""
        return self._loaded[self.active].manifest if self.active is not None else None

    def load(self, name: str) -> str:
        """Load an adapter, if it is not in memory, and return its full name.

        Raises:
            UnknownModelError: the source has no adapter of this name.
            ConfigurationError: it is not an adapter, or the memory budget is too small for it.
            ManifestError: it belongs to another base.
            UnsupportedModelError: it does not fit the model.
            SurfwError: it could not be read.
        """
        manifest = self._client.run(lambda source: find_adapter(source, name, self._base))
        if manifest.name in self._loaded:
            return manifest.name
        lora = _read(manifest, self._skeleton)
        dtypes = {one: dtype for one, dtype in lora.dtypes.items() if dtype != torch_dtype(manifest.tensors[one].dtype)}
        size_bytes = sum(buffer_capacity(buffer_bytes(chunk, dtypes)) for chunk in manifest.chunks)
        scratch = max((scratch_bytes(chunk, dtypes) for chunk in manifest.chunks), default=0)
        before = self.held_bytes
        try:
            self._engine.hold_beside(before + size_bytes + scratch)
        except ConfigurationError as exc:
            raise ConfigurationError(f"the adapter {manifest.name} does not fit: {exc}") from exc
        try:
            tensors = self._bring(manifest, dtypes)
            self._loaded[manifest.name] = _Loaded(manifest, lora, tensors, size_bytes)
        finally:
            self._engine.hold_beside(self.held_bytes)
        return manifest.name

    def apply(self, name: str | None) -> None:
        """Apply a loaded adapter in place of the current one; None applies none."""
        if self._attached is not None:
            self._attached.detach()
        self._attached, self.active = None, None
        if name is not None:
            one = self._loaded[name]
            self._attached, self.active = AttachedLora(one.lora, one.tensors), name
        self.on_apply(name is not None)

    def unload(self, name: str) -> None:
        """Unload an adapter and free its memory; if it is applied, it is removed from the model first.

        Raises:
            ConfigurationError: no adapter of this name is loaded.
        """
        if name not in self._loaded:
            loaded = ", ".join(self._loaded) or "none"
            raise ConfigurationError(f"no adapter {quote(name)} is loaded, but {loaded}; name one of these in full")
        if self.active == name:
            self.apply(None)
        del self._loaded[name]
        self._engine.hold_beside(self.held_bytes)

    def close(self) -> None:
        """Remove the applied adapter from the model, and free all memory."""
        self.apply(None)
        self._loaded.clear()

    def _bring(self, manifest: Manifest, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        loader = Loader(self._client.source, manifest, dtypes, is_pinned=self._is_pinned)
        tensors: dict[str, torch.Tensor] = {}
        try:
            for chunk in manifest.chunks:
                buffer = Buffer(buffer_bytes(chunk, dtypes))
                self._client.io.run(loader.load(chunk, buffer, priority=0))
                tensors |= loader.tensors(chunk, buffer)
        finally:
            loader.close()
        return {name: tensor.detach().to(self._device) for name, tensor in tensors.items()}


def _read(manifest: Manifest, skeleton: Skeleton) -> Lora:
    """Read what an adapter changes; its manifest is untrusted, so all of it is checked."""
    scaling: Any = manifest.config.get("scaling")
    saved: Any = manifest.config.get("saved")
    is_known = isinstance(scaling, Mapping) and isinstance(saved, list)
    if not is_known or not all(type(one) in {int, float} for one in scaling.values()) or set(map(type, saved)) - {str}:
        raise ManifestError(
            f"the manifest of the adapter {manifest.name} does not say how it is applied; chunk it again"
        )

    def find_scaling(path: str, _: int) -> float:
        if path not in scaling:
            raise ManifestError(
                f"the manifest of the adapter {manifest.name} has no scaling for {path}; chunk it again"
            )
        return float(scaling[path])

    shapes = {name: info.shape for name, info in manifest.tensors.items()}
    return find_lora(skeleton, shapes, find_scaling, saved, where=manifest.name)
