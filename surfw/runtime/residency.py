"""What stays in memory and what is streamed through it. Pure: sizes and a budget in, a plan out.

The engine obeys the plan; it decides nothing of this itself. The policy here is a plain LRU over the streamed chunks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    """

    pinned: frozenset[str]
    streamed: Mapping[str, int]
    slots: int
    pinned_bytes: int

    @property
    def buffers(self) -> int:
        """The most streamed chunks in memory at a time, the one in flight included."""
        return min(self.slots + 1, len(self.streamed)) if self.streamed else 0

    @property
    def peak_bytes(self) -> int:
        """The most memory weights can take: a buffer that is reused may come to have the largest chunk's size."""
        if self.buffers == len(self.streamed):
            return self.pinned_bytes + sum(self.streamed.values())
        return self.pinned_bytes + self.buffers * max(self.streamed.values())

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
) -> ResidencyPlan:
    """Decide what stays.

    Args:
        kinds: the kind of each chunk, see `manifest.Chunk`.
        sizes: the bytes each chunk takes in memory.
        order: the order of uses.
        cache_layers: keep this many chunks (one more may be in flight).
        budget_bytes: without `cache_layers`, keep as many as fit into this; without both, keep all.

    Raises:
        ConfigurationError: fewer than one chunk is to be kept.
    """
    if cache_layers is not None and cache_layers < 1:
        raise ConfigurationError(
            f"a cache of {cache_layers} layers is too small; at least 1 has to be kept while it runs"
        )
    pinned = frozenset(
        name for name, size in sizes.items() if kinds[name] == "own" or (kinds[name] == "part" and size <= _SMALL_BYTES)
    )
    streamed = {name: size for name, size in sizes.items() if name not in pinned}
    pinned_bytes = sum(sizes[name] for name in pinned)
    together = max((len(set(use.chunks) - pinned) for use in order), default=1)
    slots = len(streamed)
    if cache_layers is not None:
        slots = min(cache_layers, len(streamed))
    elif streamed and budget_bytes is not None and pinned_bytes + sum(streamed.values()) > budget_bytes:
        slots = (budget_bytes - pinned_bytes) // max(streamed.values()) - 1
    return ResidencyPlan(pinned, streamed, max(slots, 1, together - 1), pinned_bytes)
