"""What stays in memory and what is streamed through it. Pure: sizes, a schedule and a budget in, a plan out.

Decoding runs the layers in a cycle. There, an LRU cache that is smaller than the cycle never hits: what it evicts is
what comes next. The best that any policy can do, if it may decide not to keep what it has just read, is to hit as often
per cycle as it has places (L. A. Belady, «A study of replacement algorithms for a virtual-storage computer», IBM
Systems Journal 5(2), 1966: evict what is needed last, which in a cycle is what was just read). Keeping a fixed set
reaches that. So a plan names chunks that stay, spread evenly over the depth, so that reading and computing overlap
everywhere; the others pass through a ring of buffers.

Chunks that run several times in a cycle go first: each place they have saves more than one read. Where not even those
fit, they share memory by Belady's rule, see `floating_victims`.

A plan says what may stay. By it, `slots` decides at each use which chunk is loaded, and what is evicted for it.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

from surfw.config import KB, Policy, format_size
from surfw.errors import ConfigurationError
from surfw.manifest import Use

Tier = Literal["host", "device"]
"""Memory that weights pass through on their way: that of the machine, or of the device that computes."""

_SMALL_BYTES = 1 << 20
_RING = 2
_ROUNDS = 3


class BudgetTooSmallError(ConfigurationError):
    """A budget is smaller than the least with which a model runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a model needs to run, as far as memory is concerned. All sizes are in bytes.

    Attributes:
        name: the model's, for errors.
        sizes: the memory that each chunk takes.
        fixed: chunks that stay once they are there: small parts outside of the layers, and weights that a containing
            module holds directly, which are in use as long as all of its layers are.
        together: the most chunks, without the fixed ones, that one module uses.
        tables: chunks of which single rows can be read, so that they need not be in memory to be looked up in.
        table_bytes: memory that reading rows takes where tables are not in memory.
        overhead_bytes: the most memory that reads in flight take besides the chunks, if these are large.
        in_flight_bytes: as `overhead_bytes`, where chunks are read one small piece at a time, from any source; None
            where that would make no difference.
        scratch: memory that each chunk passes through to be converted, one at a time, experts among them; nothing for
            those not named.
        cycle: the chunks in the order in which they run again and again, lookups in tables left out; a chunk may recur.
        before: chunks that run before the cycle begins, such as those of an encoder.
        passing: chunks that are handed on to a nearer tier, where they stay: here, they only pass through.
        working_bytes: memory that is taken in this tier besides slots and KV cache: by computing, or by chunks that
            wait in coded form.
        expert_bytes: memory of all experts of which routers choose; they are no chunks of the above.
        least_expert_bytes: of the module whose experts take most: all of them may be used at once.
        expert_pass_bytes: what is read of them for one token, if none is in memory.
    """

    name: str
    sizes: Mapping[str, int]
    fixed: frozenset[str] = frozenset()
    together: int = 1
    tables: frozenset[str] = frozenset()
    table_bytes: int = 0
    overhead_bytes: int = 0
    in_flight_bytes: int | None = None
    scratch: Mapping[str, int] = field(default_factory=dict)
    cycle: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    passing: frozenset[str] = frozenset()
    working_bytes: int = 0
    expert_bytes: int = 0
    least_expert_bytes: int = 0
    expert_pass_bytes: int = 0

    @property
    def ring_buffers(self) -> int:
        """The fewest buffers that chunks can be streamed through: one in use, and one that the next arrives in."""
        return max(_RING, self.together)

    def from_anywhere(self) -> "Needs":
        """The same model, read in small pieces from the source that takes most memory for that."""
        return self if self.in_flight_bytes is None else replace(self, overhead_bytes=self.in_flight_bytes)

    def in_pieces(self) -> "Needs":
        """The same model, read in small pieces."""
        anywhere = self.from_anywhere()
        return anywhere if anywhere.overhead_bytes < self.overhead_bytes else self

    def overhead_of(self, names: Iterable[str]) -> int:
        """Memory besides the chunks where no others than these are ever in memory, in bytes.

        No more is in flight than two chunks, the experts of a module, or what rows take that are read of the others.
        """
        names = set(names)
        flight = max(self.least_expert_bytes, 2 * max((self.sizes[name] for name in names), default=0))
        if not self.tables.issubset(names):
            flight = max(flight, self.table_bytes)
        used = (size for name, size in self.scratch.items() if name in names or name not in self.sizes)
        scratch = max(used, default=0)
        return min(self.overhead_bytes, flight) + scratch + self.working_bytes

    def in_memory(self) -> tuple[dict[str, int], int]:
        """Where memory is short: the sizes of the chunks that are ever in memory, and the memory besides them."""
        absent = self.tables - set(self.cycle) - set(self.before) - self.passing
        sizes = {name: size for name, size in self.sizes.items() if name not in absent}
        return sizes, self.overhead_of(sizes) + (self.table_bytes if self.tables else 0)


def describe_needs(name: str, kinds: Mapping[str, str], sizes: Mapping[str, int], order: Sequence[Use]) -> Needs:
    """What follows from chunks alone: no tables, no memory besides the chunks, and no schedule.

    Args:
        name: the model's.
        kinds: the kind of each chunk, see `manifest.Chunk`.
        sizes: the bytes each chunk takes in memory.
        order: the order of uses.
    """
    fixed = frozenset(
        one for one, size in sizes.items() if kinds[one] == "own" or (kinds[one] == "part" and size <= _SMALL_BYTES)
    )
    together = max((len(set(use.chunks) - fixed) for use in order), default=1)
    return Needs(name=name, sizes=sizes, fixed=fixed, together=max(1, together))


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """How much may be kept: so many bytes, or so many layers and one in flight; without both, everything.

    Attributes:
        budget_bytes: for weights, for what is in flight, and for what is reserved.
        cache_layers: instead of a budget, the number of chunks to keep, the fixed ones not counted.
        reserved_bytes: part of the budget that weights must leave, such as for the KV cache.
        policy: `auto`, or `lru`: a plain LRU cache instead of the plan's choice.
        tier: which memory it limits, for errors.
        reason: what a default budget is limited by; empty for a budget that the user gave.

    Raises:
        ConfigurationError: fewer than one chunk is to be kept.
    """

    budget_bytes: int | None = None
    cache_layers: int | None = None
    reserved_bytes: int = 0
    policy: Policy = "auto"
    tier: Tier = "host"
    reason: str = ""

    def __post_init__(self) -> None:
        """Refuse a cache that cannot hold the chunk that runs."""
        layers: object = self.cache_layers
        if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 1):
            raise ConfigurationError(
                f"a cache of {layers} layers is too small; at least 1 has to be kept while it runs"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidencyPlan:
    """A decision about memory. All sizes are in bytes.

    Attributes:
        pinned: chunks that stay once they are there.
        floating: chunks that run several times in a cycle and do not all fit: they share `floating_bytes`.
        sizes: the memory each chunk takes that is ever in memory.
        tables: chunks that are looked up in by reading single rows wherever they are not in memory.
        absent: those of them that are never in memory.
        ring_buffers: through how many buffers the streamed chunks pass.
        ring_bytes: the size of each of them.
        floating_bytes: memory that the floating chunks share.
        overhead_bytes: memory besides the chunks.
        reserved_bytes: what is left free, for the KV cache.
        budget_bytes: what all of it may take, if there is a budget.
        cache_layers: how many chunks were to be kept, if they were counted.
        bytes_per_pass: what is read in one pass through the cycle, in the memory's dtype, once the pinned chunks are
            there. Rows of tables are not counted.
        policy: `auto` or `lru`.
        in_pieces: whether chunks have to be read one small piece at a time, so that no source holds much of them.
        fixed: those of the pinned chunks that stay in every plan.
        passing: as of the needs.
        coding_bytes: of a device's overhead, what coding and decoding chunks takes; 0 where that is not done.
        expert_bytes: memory for experts of which routers choose.
        all_expert_bytes: what all of them take.
    """

    pinned: frozenset[str]
    floating: frozenset[str] = frozenset()
    sizes: Mapping[str, int]
    tables: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset()
    ring_buffers: int
    ring_bytes: int
    floating_bytes: int = 0
    overhead_bytes: int = 0
    reserved_bytes: int = 0
    budget_bytes: int | None = None
    cache_layers: int | None = None
    bytes_per_pass: int = 0
    policy: Policy = "auto"
    in_pieces: bool = False
    fixed: frozenset[str] = field(default=frozenset(), repr=False)
    passing: frozenset[str] = field(default=frozenset(), repr=False)
    coding_bytes: int = 0
    expert_bytes: int = 0
    all_expert_bytes: int = 0

    @property
    def streamed(self) -> dict[str, int]:
        """The chunks that are not pinned, with the memory each takes."""
        return {name: size for name, size in self.sizes.items() if name not in self.pinned | self.passing}

    @property
    def pinned_bytes(self) -> int:
        """Memory of the chunks that stay."""
        return sum(self.sizes[name] for name in self.pinned)

    @property
    def peak_bytes(self) -> int:
        """The most memory that weights take, the overhead included; the reserve is not counted."""
        chunks = self.pinned_bytes + self.floating_bytes + self.ring_buffers * self.ring_bytes
        return chunks + self.overhead_bytes + self.expert_bytes

    @property
    def slots(self) -> int:
        """How many chunks are kept in memory, the fixed ones not counted; one more may be in flight."""
        if self.cache_layers is not None:
            return min(self.cache_layers, len(self.sizes) - len(self.fixed))
        kept = len(self.pinned - self.fixed)
        return kept + max(0, self.ring_buffers - 1)

    @property
    def buffers(self) -> int:
        """The most chunks in memory at a time, those in flight included and the fixed ones not counted."""
        return len(self.pinned - self.fixed) + self.ring_buffers

    @property
    def everything_fits(self) -> bool:
        """Whether every chunk stays, and nothing is read twice."""
        chunks_fit = (self.pinned | self.passing).issuperset(self.sizes) and not self.absent
        return chunks_fit and self.expert_bytes >= self.all_expert_bytes

    def ceiling(self, bytes_per_second: float, *, tokens_per_pass: float = 1.0) -> float | None:
        """The most tokens per second that reading allows: tokens per pass × bandwidth ÷ bytes per pass.

        Returns:
            None where nothing is read in a pass, so that reading is no limit.
        """
        return tokens_per_pass * bytes_per_second / self.bytes_per_pass if self.bytes_per_pass else None


def plan_residency(needs: Needs, limit: Limit) -> ResidencyPlan:
    """Decide what stays.

    Args:
        needs: the model, with its schedule.
        limit: how much may be kept.

    Raises:
        ConfigurationError: the limit is smaller than what the model needs at least; the error names that.
    """
    if needs.expert_bytes:
        return _plan_experts(needs, limit)
    if limit.cache_layers is not None:
        return _plan_layers(needs, limit.cache_layers, limit.policy)
    if limit.budget_bytes is None:
        return _everything(needs, limit)
    for tried in (needs, needs.in_pieces()):
        if (made := _plan_budget(tried, limit, limit.budget_bytes)) is not None:
            return replace(made, in_pieces=tried is not needs)
    raise _too_small(needs, limit, limit.budget_bytes)


def _plan_experts(needs: Needs, limit: Limit) -> ResidencyPlan:
    """Decide what stays of a mixture of experts: first of what every token uses, then of its experts.

    A byte of the former that stays saves a byte of every pass, of the latter as often as it is chosen.
    """
    shared, least = replace(needs, expert_bytes=0), needs.least_expert_bytes
    budget_bytes, room = limit.budget_bytes, needs.expert_bytes
    if limit.cache_layers is not None:
        made, room = plan_residency(shared, limit), limit.cache_layers * least
    elif budget_bytes is None:
        made = plan_residency(shared, limit)
    elif budget_bytes - limit.reserved_bytes < least_bytes(needs.in_pieces()):
        raise _too_small(needs, limit, budget_bytes)
    else:
        made = replace(
            plan_residency(shared, replace(limit, budget_bytes=budget_bytes - least)), budget_bytes=budget_bytes
        )
        room = budget_bytes - limit.reserved_bytes - made.peak_bytes
    kept = max(least, min(room, needs.expert_bytes))
    missed = needs.expert_pass_bytes * (needs.expert_bytes - kept) // needs.expert_bytes
    return replace(
        made,
        expert_bytes=kept,
        all_expert_bytes=needs.expert_bytes,
        bytes_per_pass=made.bytes_per_pass + missed,
    )


def needs_behind(needs: Needs, nearer: ResidencyPlan, order: Needs) -> Needs:
    """What a model needs in host memory, where it computes on a device with a plan of its own.

    What stays on the device is read once and handed on. Only the others recur here, each used when it is copied.

    Args:
        needs: the model in host memory, if it computed there.
        nearer: the plan of the device.
        order: its needs, with their schedule.
    """
    kept = nearer.pinned
    return replace(
        needs,
        fixed=frozenset(),
        together=1,
        passing=kept,
        tables=needs.tables - kept,
        cycle=tuple(name for name in order.cycle if name not in kept),
        before=tuple(name for name in order.before if name not in kept),
    )


def least_bytes(needs: Needs) -> int:
    """The smallest budget that the model runs with: its fixed chunks, a ring for the others, and the overhead.

    That of `needs.in_pieces()` does for the source at hand, that of `needs.from_anywhere()` for whatever source.
    """
    least = _everything(needs, Limit()).peak_bytes
    sizes, overhead = needs.in_memory()
    for ring_bytes in {0, *(size for name, size in sizes.items() if name not in needs.fixed)}:
        stays = sum(size for name, size in sizes.items() if name in needs.fixed or size > ring_bytes)
        least = min(least, overhead + stays + needs.ring_buffers * ring_bytes)
    return least + needs.least_expert_bytes


def _everything(needs: Needs, limit: Limit) -> ResidencyPlan:
    largest = max((needs.sizes[name] for name in needs.passing), default=0)
    return ResidencyPlan(
        pinned=frozenset(needs.sizes) - needs.passing, sizes=needs.sizes, fixed=needs.fixed, passing=needs.passing,
        ring_buffers=needs.ring_buffers if needs.passing else 0, ring_bytes=largest,
        overhead_bytes=needs.overhead_of(needs.sizes), reserved_bytes=limit.reserved_bytes,
        budget_bytes=limit.budget_bytes, policy=limit.policy,
    )  # fmt: skip


def _plan_layers(needs: Needs, cache_layers: int, policy: Policy) -> ResidencyPlan:
    """Keep a number of chunks of any size, and have memory for one more on its way."""
    others = {name: size for name, size in needs.sizes.items() if name not in needs.fixed}
    buffers = max(cache_layers + 1, needs.together)
    if buffers >= len(others):
        return replace(_everything(needs, Limit(policy=policy)), cache_layers=cache_layers)
    ring = buffers if policy == "lru" else needs.ring_buffers
    kept, floating = _choose(dict.fromkeys(others, 1), buffers - ring, needs)
    largest = max(size for name, size in others.items() if name not in kept)
    made = ResidencyPlan(
        pinned=needs.fixed | kept, floating=floating, sizes=needs.sizes, ring_buffers=ring, ring_bytes=largest,
        floating_bytes=(buffers - ring) * largest if floating else 0, overhead_bytes=needs.overhead_of(needs.sizes),
        policy=policy, fixed=needs.fixed, cache_layers=cache_layers,
    )  # fmt: skip
    return replace(made, bytes_per_pass=bytes_per_pass(made, needs.cycle))


def _plan_budget(needs: Needs, limit: Limit, budget_bytes: int) -> ResidencyPlan | None:
    """The plan for a budget that reads least; None if the budget is too small."""
    everything = _everything(needs, limit)
    if everything.peak_bytes + limit.reserved_bytes <= budget_bytes:
        return everything
    streamable = {size for name, size in needs.in_memory()[0].items() if name not in needs.fixed}
    # The ring's size decides what is too large for it and has to stay. No rule finds the best one, so all are tried.
    tried = [_plan_ring(needs, limit, budget_bytes, size) for size in [*sorted(streamable, reverse=True), 0]]
    plans = [plan for plan in tried if plan is not None]
    return min(plans, key=lambda plan: (plan.bytes_per_pass, sum(plan.streamed.values())), default=None)


def _plan_ring(needs: Needs, limit: Limit, budget_bytes: int, ring_bytes: int) -> ResidencyPlan | None:
    """The plan with ring buffers of this size; None if the budget is too small for it."""
    sizes, overhead = needs.in_memory()
    fixed = needs.fixed & set(sizes)
    stays = fixed | {name for name, size in sizes.items() if size > ring_bytes}
    left = budget_bytes - limit.reserved_bytes - overhead - needs.ring_buffers * ring_bytes
    left -= sum(sizes[name] for name in stays)
    if left < 0:
        return None
    others = {name: size for name, size in sizes.items() if name not in stays | needs.passing}
    kept = floating = frozenset[str]()
    buffers = needs.ring_buffers if others or needs.passing else 0
    if limit.policy == "lru" and others:
        buffers += left // ring_bytes
    else:
        kept, floating = _choose(others, left, needs)
    made = ResidencyPlan(
        pinned=stays | kept, floating=floating, sizes=sizes, tables=needs.tables,
        absent=frozenset(needs.sizes).difference(sizes), ring_buffers=buffers, ring_bytes=ring_bytes,
        floating_bytes=left if floating else 0, overhead_bytes=overhead, reserved_bytes=limit.reserved_bytes,
        budget_bytes=limit.budget_bytes, policy=limit.policy, fixed=fixed, passing=needs.passing,
    )  # fmt: skip
    return replace(made, bytes_per_pass=bytes_per_pass(made, needs.cycle))


SMALLER_CACHE = ", or have the KV cache quantised, which is not exact (generate(cache_implementation='quantized'))"
"""What an error about a KV cache that has no room advises besides."""


def _too_small(needs: Needs, limit: Limit, budget_bytes: int) -> BudgetTooSmallError:
    """The error about a budget that the model does not run with: one that the user gave, or the default."""
    reserve = f", {format_size(limit.reserved_bytes)} of it for the KV cache" if limit.reserved_bytes else ""
    here = least_bytes(needs.in_pieces())
    tokens = f", or ask for fewer tokens{SMALLER_CACHE}" if limit.reserved_bytes and here <= budget_bytes else ""
    least, anywhere = (one + limit.reserved_bytes for one in (here, least_bytes(needs.from_anywhere())))
    needed = f"{format_size(least)} ({least} bytes) at least{reserve}"
    if anywhere > least:
        needed += f", and {format_size(anywhere)} ({anywhere} bytes) from any other source"
    is_device = limit.tier == "device"
    if not limit.reason:
        given = f" ({budget_bytes} bytes)" if budget_bytes >= KB else ""
        what = "device memory" if is_device else "a memory budget"
        return BudgetTooSmallError(
            f"{what} of {format_size(budget_bytes)}{given} is too small for {needs.name}, which needs "
            f"{needed}; give that or more{tokens}"
        )
    there = f"{format_size(budget_bytes)} is" if budget_bytes else "none is"
    where, options = " on the device" if is_device else "", "(memory_budget, --memory-budget)"
    if is_device:
        options = "(device_memory, --device-memory)"
    return BudgetTooSmallError(
        f"there is too little memory{where} for {needs.name}: it needs {needed}, and {there} free for it "
        f"({limit.reason}); make some free or raise that limit{tokens}, or give a budget of {least} bytes to go beyond "
        f"it {options}"
    )


def _choose(sizes: Mapping[str, int], free: int, needs: Needs) -> tuple[frozenset[str], frozenset[str]]:
    """Which chunks stay, and which share the free memory because not even those that recur all fit."""
    uses = Counter(name for name in needs.cycle if name in sizes)
    recurring = [name for name, count in uses.items() if count > 1]
    needed = sum(sizes[name] for name in recurring)
    if needed > free:
        return frozenset(), frozenset(recurring)
    once = [name for name, count in uses.items() if count == 1]
    rarely = [name for name in sizes if name not in uses]
    kept = set(recurring)
    left = free - needed
    for names in (once, rarely):
        for chosen in spread_over_groups(names, sizes, set(needs.before), left):
            kept.add(chosen)
            left -= sizes[chosen]
    return frozenset(kept), frozenset()


def spread_over_groups(
    names: Sequence[str], sizes: Mapping[str, int], before: Collection[str], free: int
) -> Iterator[str]:
    """As many chunks as fit: those that also ran before the cycle first, then the large ones; spread among equals."""
    rank = {name: (name not in before, -sizes[name]) for name in names}
    for (_, negative), group in groupby(sorted(names, key=rank.__getitem__), key=rank.__getitem__):
        equal, size = list(group), -negative
        count = min(len(equal), free // size) if size else len(equal)
        free -= count * size
        yield from (equal[(2 * index + 1) * len(equal) // (2 * count)] for index in range(count))


def floating_victims(
    name: str, held: Mapping[str, int], size: int, free: int, next_use: Mapping[str, int]
) -> list[str] | None:
    """Which floating chunks make way for one that has just been used, so that it can stay until its next use.

    Belady's rule with bypass: it replaces those that are needed after it, and does not stay at all if there are none.

    Args:
        name: the chunk, which is not held.
        held: the floating chunks that are kept, with their sizes.
        size: the chunk's size.
        free: memory for floating chunks that is not taken.
        next_use: how soon each chunk is needed again, if ever.

    Returns:
        The chunks to evict, the last needed first; None if it does not stay.
    """
    never = len(next_use) + max(next_use.values(), default=0) + 1
    when = next_use.get(name, never)
    victims: list[str] = []
    for other in sorted(held, key=lambda one: -next_use.get(one, never)):
        if free >= size:
            break
        if next_use.get(other, never) <= when:
            return None
        victims.append(other)
        free += held[other]
    return victims if free >= size and when < never else None


def next_uses(future: Sequence[str]) -> dict[str, int]:
    """How soon each chunk is needed, from a sequence of coming uses."""
    found: dict[str, int] = {}
    for index, name in enumerate(future):
        found.setdefault(name, index)
    return found


def bytes_per_pass(plan: ResidencyPlan, cycle: Sequence[str]) -> int:
    """What one pass reads once all that stays is there: every use but those of what is kept, or was used just before.

    Where the ring has buffers for all that is streamed, that stays there too. A smaller LRU cache is taken to miss
    everything that is not pinned.
    """
    cycle = [name for name in cycle if name not in plan.passing]
    through_ring = {name for name in cycle if name in plan.sizes and name not in plan.pinned}
    if len(through_ring) <= plan.ring_buffers:
        return 0
    held: dict[str, int] = {}
    read = 0
    for _ in range(_ROUNDS if plan.floating else 1):
        read = 0
        for index, name in enumerate(cycle):
            if name in plan.pinned or name in held or name not in plan.sizes:
                continue
            size = plan.sizes[name]
            if plan.policy == "lru" or name != cycle[index - 1]:
                read += size
            if name in plan.floating:
                future = next_uses([*cycle[index + 1 :], *cycle[: index + 1]])
                victims = floating_victims(name, held, size, plan.floating_bytes - sum(held.values()), future)
                if victims is not None:
                    held = {one: held[one] for one in held if one not in victims} | {name: size}
    return read
