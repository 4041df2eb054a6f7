"""Stages of a pipeline: which layers of a model each rank has, and a model cut down to one of them.

The layers of a model are cut into runs of neighbours whose weights are as equal in size as they can be. What comes
before the layers (embeddings) belongs to the first stage, and what comes after them (norm and head) to the last one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from surfw.distributed.plan import Run
from surfw.errors import ConfigurationError
from surfw.manifest import Manifest
from surfw.skeleton.units import Unit


@dataclass(frozen=True)
class Stage:
    """What one rank of a pipeline has.

    Attributes:
        index, count: which stage of how many.
        layers: the paths of its layers, in the order they run.
        others: the paths of its other units.
        absent: the paths of units that other stages have.
    """

    index: int
    count: int
    layers: tuple[str, ...]
    others: tuple[str, ...]
    absent: tuple[str, ...]

    @property
    def is_first(self) -> bool:
        """Whether prompts begin here."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether tokens come out here."""
        return self.index == self.count - 1

    @property
    def paths(self) -> frozenset[str]:
        """The units that it has."""
        return frozenset((*self.layers, *self.others))


def cut_evenly(sizes: Sequence[int], count: int) -> list[Run]:
    """Runs of neighbours, none empty, of which the largest is as small as it can be.

    Args:
        sizes: of the items, in order; at least `count` of them.
        count: how many runs.
    """
    least, most = max(sizes), sum(sizes)
    while least < most:
        limit = (least + most) // 2
        least, most = (least, limit) if len(_runs_within(sizes, limit)) <= count else (limit + 1, most)
    runs = _runs_within(sizes, least)
    while len(runs) < count:  # fewer do, but each stage is to have something: the longest one gives
        at = max(range(len(runs)), key=lambda one: runs[one][1] - runs[one][0])
        low, high = runs[at]
        runs[at : at + 1] = [(low, (low + high) // 2), ((low + high) // 2, high)]
    return runs


def _runs_within(sizes: Sequence[int], limit: int) -> list[Run]:
    runs, low, size = [], 0, 0
    for at, one in enumerate(sizes):
        if at > low and size + one > limit:
            runs.append((low, at))
            low, size = at, 0
        size += one
    return [*runs, (low, len(sizes))]


def plan_stages(manifest: Manifest, units: Sequence[Unit], count: int) -> list[Stage]:
    """The stages of a model, by the sizes of its chunks.

    Args:
        manifest: the model.
        units: its units.
        count: how many stages.

    Raises:
        ConfigurationError: it has fewer layers than that.
    """
    uses = {use.module: use.chunks for use in manifest.order}
    order = [unit for path in uses for unit in units if unit.path == path]
    layers = [at for at, unit in enumerate(order) if unit.kind == "layer"]
    if len(layers) < count:
        raise ConfigurationError(
            f"{manifest.name} has {len(layers)} layers, which cannot be {count} stages of a pipeline; take fewer ranks"
        )
    sizes = [sum(manifest.by_name[chunk].payload_bytes for chunk in uses[unit.path]) for unit in order]
    own = [sizes[at] for at in layers]
    own[0] += sum(sizes[: layers[0]])
    own[-1] += sum(sizes[layers[-1] + 1 :])
    stages = []
    for index, (low, high) in enumerate(cut_evenly(own, count)):
        mine = [order[at] for at in layers[low:high]]
        first = 0 if index == 0 else layers[low]
        last = len(order) if index == count - 1 else layers[high]
        others = [unit for unit in order[first:last] if unit.kind != "layer"]
        kept = {unit.path for unit in (*mine, *others)}
        absent = tuple(unit.path for unit in units if unit.path not in kept)
        layer_paths, other_paths = tuple(unit.path for unit in mine), tuple(unit.path for unit in others)
        stages.append(Stage(index, count, layer_paths, other_paths, absent))
    return stages
