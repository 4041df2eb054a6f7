"""Switching from one open model to another of the same source, keeping the layers that both have.

First the old model evicts what the new one cannot use, so that both together never exceed the budget. Then the new
one is assembled; chunks that it pins and the old one holds share memory (`runtime/shared`). Then the old one is closed.
"""

from dataclasses import replace

from surfw.errors import ConfigurationError
from surfw.manifest import Manifest
from surfw.metrics import Metrics
from surfw.models.assembly import ModelParts, assemble
from surfw.models.options import OpenSettings
from surfw.runtime.run import Run, current_run


def switch_parts(
    old: ModelParts, manifest: Manifest, settings: OpenSettings, metrics: Metrics, *, adapter: str | None = None
) -> ModelParts:
    """Open the model of a manifest in place of an idle one, and close the old one.

    `adapter` names the adapter to apply to the new model; the old model's adapter is not kept.

    Raises:
        ConfigurationError: the limit is too small for the new model, or the old one computes on a device.
        SurfwError: the new model cannot be opened. The old one stays open, with less of it in memory.
    """
    if old.below is not None:
        raise ConfigurationError(
            f"{old.manifest.name} computes on {old.device}, where models share no memory; open {manifest.name} anew"
        )
    wanted = {chunk.id for chunk in manifest.chunks}
    common = {chunk.id for chunk in old.manifest.chunks if chunk.id in wanted}
    kept = old.engine.plan.pinned  # the others are in ring buffers, which are not shared
    old.engine.keep_only([chunk.name for chunk in old.manifest.chunks if chunk.id in common and chunk.name in kept])
    old.tables.clear()
    limit = replace(old.engine.limit, reserved_bytes=0)  # a new default would miss what the old one holds
    parts = assemble(old.client, manifest, replace(settings, limit=limit), metrics, adapter=adapter)
    run = current_run.get() or Run()
    try:
        for chunk in parts.manifest.chunks:
            if chunk.id in common and chunk.name in parts.engine.plan.pinned:
                for _, load in parts.engine.fetch([chunk.name]):
                    run.wait_for(load)  # an error is raised where the chunk is used
        parts.engine.warm()  # loads the chunks that differ
    except BaseException:
        parts.close()
        raise
    old.close()
    return parts
