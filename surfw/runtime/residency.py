"""What stays in memory and what is streamed through it. Pure: sizes and a budget in, a plan out.

The engine obeys the plan; it decides nothing of this itself. The policy here is a plain LRU over the streamed chunks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from surfw.errors import ConfigurationError
from surfw.manifest import Use

_SMALL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ResidencyPlan:
    """A decision about memory.

    Attributes:
        pinned: chunks that stay once they are there: small parts beside the layers, and weights that a containing
            module holds directly, which are in use as long as all of its layers are.
        streamed: the others, with the bytes each takes in memory.
        slots: how many streamed chunks are kept; one more may be in flight.
        pinned_bytes: memory of the pinned chunks.
        least_slots: the fewest slots that the model can run with.
        scratch_bytes: memory that a chunk passes through on its way, where it is converted.
    """

    pinned: frozenset[str]
    streamed: Mapping[str, int]
    slots: int
    pinned_bytes: int
    least_slots: int = 1
    scratch_bytes: int = 0

    def resized(self, cache_layers: int) -> "ResidencyPlan":
        """The same plan with another number of chunks to keep.

        Raises:
            ConfigurationError: fewer than one chunk is to be kept.
        """
        check_cache_layers(cache_layers)
        return replace(self, slots=max(min(cache_layers, len(self.streamed)), self.least_slots))

    @property
    def buffers(self) -> int:
        """The most streamed chunks in memory at a time, the one in flight included."""
        return min(self.slots + 1, len(self.streamed)) if self.streamed else 0

    @property
    def peak_bytes(self) -> int:
        """The most memory weights can take: a buffer that is reused may come to have the largest chunk's size."""
        if self.buffers == len(self.streamed):
            return self.pinned_bytes + self.scratch_bytes + sum(self.streamed.values())
        return self.pinned_bytes + self.scratch_bytes + self.buffers * max(self.streamed.values())

    @property
    def everything_fits(self) -> bool:
        """Whether every chunk stays."""
        return self.slots >= len(self.streamed)


def plan_residency(
    kinds: Mapping[str, str],
    sizes: Mapping[str, int],
    order: Sequence[Use],
    *,
    cache_layers: int | None = None,
    budget_bytes: int | None = None,
    scratch_bytes: int = 0,
) -> ResidencyPlan:
    """Decide what stays.

    Args:
        kinds: the kind of each chunk, see `manifest.Chunk`.
        sizes: the bytes each chunk takes in memory.
        order: the order of uses.
        cache_layers: keep this many chunks (one more may be in flight).
        budget_bytes: without `cache_layers`, keep as many as fit into this, or the fewest there can be if none does;
            without both, keep all.
        scratch_bytes: memory for conversions, which counts as well.

    Raises:
        ConfigurationError: fewer than one chunk is to be kept.
    """
    if cache_layers is not None:
        check_cache_layers(cache_layers)
    pinned = frozenset(
        name for name, size in sizes.items() if kinds[name] == "own" or (kinds[name] == "part" and size <= _SMALL_BYTES)
    )
    streamed = {name: size for name, size in sizes.items() if name not in pinned}
    pinned_bytes = sum(sizes[name] for name in pinned)
    together = max((len(set(use.chunks) - pinned) for use in order), default=1)
    least = max(1, together - 1)
    slots = len(streamed) if cache_layers is None else min(cache_layers, len(streamed))
    if cache_layers is None and streamed and budget_bytes is not None:
        left = budget_bytes - pinned_bytes - scratch_bytes
        if sum(streamed.values()) > left:
            slots = left // max(streamed.values()) - 1
    return ResidencyPlan(pinned, streamed, max(slots, least), pinned_bytes, least, scratch_bytes)


def check_cache_layers(cache_layers: int) -> None:
    """Make sure that something is to be kept.

    Raises:
        ConfigurationError: it is not.
    """
    if isinstance(cache_layers, bool) or not isinstance(cache_layers, int) or cache_layers < 1:
        raise ConfigurationError(
            f"a cache of {cache_layers} layers is too small; at least 1 has to be kept while it runs"
        )
