"""From one open model to another of the same source: layers that both have stay where they are.

First the old model lets go of what the new one has no use for, so that both together never hold more than the budget.
Then the new one is put together; what it pins and the old one holds is the same memory (`runtime/shared`). Only then is
the old one taken apart.
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
    """Open the model of a manifest in the place of another one, which nothing runs, and close that.

    `adapter` names the adapter over it that is wanted; one that the old model had is not taken over.

    Raises:
        ConfigurationError: the limit is too small for the new model, or it computes on a device.
        SurfwError: the new model cannot be opened. The old one goes on, with less of it in memory.
    """
    if old.below is not None:
        raise ConfigurationError(
            f"{old.manifest.name} computes on {old.device}, where models share no memory; open {manifest.name} anew"
        )
    wanted = {chunk.id for chunk in manifest.chunks}
    common = {chunk.id for chunk in old.manifest.chunks if chunk.id in wanted}
    kept = old.engine.plan.pinned  # the others are in buffers of a ring, which no other model can have
    old.engine.keep_only([chunk.name for chunk in old.manifest.chunks if chunk.id in common and chunk.name in kept])
    old.tables.clear()
    limit = replace(old.engine.limit, reserved_bytes=0)  # not what is free now: the old one takes a part of that
    parts = assemble(old.client, manifest, replace(settings, limit=limit), metrics, adapter=adapter)
    run = current_run.get() or Run()
    try:
        for chunk in parts.manifest.chunks:
            if chunk.id in common and chunk.name in parts.engine.plan.pinned:
                for _, load in parts.engine.fetch([chunk.name]):
                    run.wait_for(load)  # whoever needs it hears of how it ended
        parts.engine.warm()  # with what differs
    except BaseException:
        parts.close()
        raise
    old.close()
    return parts
