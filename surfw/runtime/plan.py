"""Which chunks are pinned in memory and which are streamed. Pure: sizes, a schedule and a budget in, a plan out.

Decoding runs the layers in a cycle. An LRU cache that is smaller than the cycle never hits: it always evicts the chunk
that is needed next. The best possible policy gets as many hits per cycle as it has places, if it may bypass the cache
(L. A. Belady, «A study of replacement algorithms for a virtual-storage computer», IBM Systems Journal 5(2), 1966: evict
what is needed last, which in a cycle is what was just read). A fixed set of chunks achieves that. So a plan pins
chunks, spread evenly over the depth so that reading and computing overlap everywhere, and streams the others through a
ring of buffers.

Chunks that run several times in a cycle are pinned first, since each place saves more than one read. If not even those
fit, they share memory by Belady's rule, see `floating_victims`.

A plan says what may be kept. `slots` follows it to decide at each use which chunk is loaded, and what is evicted.
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
"""A tier of memory: the machine's, or that of the device that computes."""

_SMALL_BYTES = 1 << 20
_RING = 2
_ROUNDS = 3


class BudgetTooSmallError(ConfigurationError):
    """A budget is smaller than the minimum for a model.

    Attributes:
        least_bytes: that minimum.
    """

    def __init__(self, message: str, least_bytes: int = 0) -> None:
        """Say it in a message; the default lets copies and pickles be made, which set the attribute afterwards."""
        super().__init__(message)
        self.least_bytes = least_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a model needs to run, in terms of memory. All sizes are in bytes.

    Attributes:
        name: the model's, for errors.
        sizes: the memory that each chunk takes.
        fixed: chunks that every plan pins: small parts outside of the layers, and weights that a containing module
            holds directly, which are in use as long as all of its layers are.
        together: the most chunks that one module uses, the fixed ones not counted.
        tables: chunks whose rows can be read one by one, so that lookups work without the chunk in memory.
        table_bytes: memory for reading rows if tables are not in memory.
        overhead_bytes: the most memory that reads in flight take besides the chunks, if these are large.
        in_flight_bytes: `overhead_bytes` if chunks are read in small pieces, from any source; None if that makes no
            difference.
        scratch: memory for converting each chunk, experts included; one is converted at a time. Chunks that are not
            named need none.
        cycle: the chunks in the order of the cycle, without lookups in tables; a chunk may recur.
        before: chunks that run before the cycle begins, such as those of an encoder.
        passing: chunks that are resident in a nearer tier and only pass through this one.
        working_bytes: memory of this tier that is taken besides slots and KV cache: by computing, or by chunks in coded
            form.
        expert_bytes: memory of all experts that routers choose from; the chunks above do not include them.
        least_expert_bytes: memory of all experts of the module where they take most; all may be used at once.
        expert_pass_bytes: what one token reads of the experts if none is in memory.
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
        """The fewest buffers of a ring: one in use and one that the next chunk arrives in, or more for `together`."""
        return max(_RING, self.together)

    def from_anywhere(self) -> "Needs":
        """The same needs if the model is read in small pieces, from the source that takes the most memory for that."""
        return self if self.in_flight_bytes is None else replace(self, overhead_bytes=self.in_flight_bytes)

    def in_pieces(self) -> "Needs":
        """The same needs if the model is read in small pieces, where that takes less memory."""
        anywhere = self.from_anywhere()
        return anywhere if anywhere.overhead_bytes < self.overhead_bytes else self

    def overhead_of(self, names: Iterable[str]) -> int:
        """Memory besides the chunks, in bytes, if only the named chunks are ever in memory.

        Reads in flight take at most two chunks, the experts of one module, or the memory for rows of absent tables.
        """
        names = set(names)
        flight = max(self.least_expert_bytes, 2 * max((self.sizes[name] for name in names), default=0))
        if not self.tables.issubset(names):
            flight = max(flight, self.table_bytes)
        used = (size for name, size in self.scratch.items() if name in names or name not in self.sizes)
        scratch = max(used, default=0)
        return min(self.overhead_bytes, flight) + scratch + self.working_bytes

    def in_memory(self) -> tuple[dict[str, int], int]:
        """The sizes of the chunks that ever are in memory if not all fit, and the memory needed besides them."""
        absent = self.tables - set(self.cycle) - set(self.before) - self.passing
        sizes = {name: size for name, size in self.sizes.items() if name not in absent}
        return sizes, self.overhead_of(sizes) + (self.table_bytes if self.tables else 0)


def describe_needs(name: str, kinds: Mapping[str, str], sizes: Mapping[str, int], order: Sequence[Use]) -> Needs:
    """The needs that follow from the chunks alone, without tables, memory besides the chunks, or a schedule.

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
    """How much may be kept: a number of bytes, or a number of layers plus one in flight; without both, everything.

    Attributes:
        budget_bytes: for weights, reads in flight, and the reserve.
        cache_layers: instead of a budget, the number of chunks to keep, the fixed ones not counted.
        reserved_bytes: the part of the budget that weights must not use, such as for the KV cache.
        policy: `auto`, or `lru` for a plain LRU cache instead of the plan's choice.
        tier: which memory it limits, for errors.
        reason: what limits a default budget; empty for a budget that the user gave.

    Raises:
        ConfigurationError: `cache_layers` is less than 1.
    """

    budget_bytes: int | None = None
    cache_layers: int | None = None
    reserved_bytes: int = 0
    policy: Policy = "auto"
    tier: Tier = "host"
    reason: str = ""

    def __post_init__(self) -> None:
        """Refuse a cache that cannot hold even the chunk that runs."""
        layers: object = self.cache_layers
        if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 1):
            raise ConfigurationError(
                f"a cache of {layers} layers is too small; at least 1 has to be kept while it runs"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidencyPlan:
    """A decision about memory. All sizes are in bytes.

    Attributes:
        pinned: chunks that are never evicted.
        floating: chunks that run several times in a cycle and do not all fit: they share `floating_bytes`.
        sizes: the memory of each chunk that ever is in memory.
        tables: chunks whose rows are read one by one while the chunk is not in memory.
        absent: the tables that never are in memory.
        ring_buffers: the number of buffers in the ring.
        ring_bytes: the size of each of them.
        floating_bytes: memory that the floating chunks share.
        overhead_bytes: memory besides the chunks.
        reserved_bytes: memory reserved for the KV cache.
        budget_bytes: the budget for all of this, if there is one.
        cache_layers: the number of chunks to keep, if the limit gave one.
        bytes_per_pass: what one pass through the cycle reads, in the dtype in memory, once the pinned chunks are
            resident. Rows of tables are not counted.
        policy: `auto` or `lru`.
        in_pieces: whether chunks have to be read in small pieces, so that no source holds much of them.
        fixed: the chunks that every plan pins.
        passing: see `Needs`.
        coding_bytes: the part of a device's overhead for coding and decoding chunks; 0 if that is not done.
        expert_bytes: memory for experts that routers choose from.
        all_expert_bytes: memory of all experts.
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
        """The chunks that are streamed, with the memory that each takes."""
        return {name: size for name, size in self.sizes.items() if name not in self.pinned | self.passing}

    @property
    def pinned_bytes(self) -> int:
        """Memory of the pinned chunks."""
        return sum(self.sizes[name] for name in self.pinned)

    @property
    def peak_bytes(self) -> int:
        """The most memory that weights take, including the overhead but not the reserve."""
        chunks = self.pinned_bytes + self.floating_bytes + self.ring_buffers * self.ring_bytes
        return chunks + self.overhead_bytes + self.expert_bytes

    @property
    def slots(self) -> int:
        """How many chunks are kept in memory, without the fixed ones; one more may be in flight."""
        if self.cache_layers is not None:
            return min(self.cache_layers, len(self.sizes) - len(self.fixed))
        kept = len(self.pinned - self.fixed)
        return kept + max(0, self.ring_buffers - 1)

    @property
    def buffers(self) -> int:
        """The most chunks in memory at a time, including those in flight but not the fixed ones."""
        return len(self.pinned - self.fixed) + self.ring_buffers

    @property
    def everything_fits(self) -> bool:
        """Whether every chunk and expert is kept, so that nothing is read twice."""
        chunks_fit = (self.pinned | self.passing).issuperset(self.sizes) and not self.absent
        return chunks_fit and self.expert_bytes >= self.all_expert_bytes

    def ceiling(self, bytes_per_second: float, *, tokens_per_pass: float = 1.0) -> float | None:
        """The most tokens per second that reading allows: tokens per pass × bandwidth ÷ bytes per pass.

        Returns:
            None if a pass reads nothing, so that reading sets no limit.
        """
        return tokens_per_pass * bytes_per_second / self.bytes_per_pass if self.bytes_per_pass else None


def plan_residency(needs: Needs, limit: Limit) -> ResidencyPlan:
    """Decide which chunks are pinned and which are streamed.

    Args:
        needs: of the model, with its schedule.
        limit: how much may be kept.

    Raises:
        ConfigurationError: the limit is less than the model's minimum; the error names the minimum.
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
    """Plan a mixture of experts: memory goes first to what every token uses, and then to experts.

    A byte kept of the former saves a byte in every pass; a byte of an expert saves one only when the expert is chosen.
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
    """What a model needs in host memory if it computes on a device that has its own plan.

    Chunks pinned on the device are read once and passed on. Only the others recur here, each used when it is copied.

    Args:
        needs: of the model in host memory, as if it computed there.
        nearer: the plan of the device.
        order: the needs on the device, with their schedule.
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

    Pass `needs.in_pieces()` for the minimum with the current source, `needs.from_anywhere()` for that with any source.
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
    """Keep a number of chunks of any size, with memory for one more in flight."""
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
    """The plan for this budget that reads the fewest bytes per pass; None if the budget is too small."""
    everything = _everything(needs, limit)
    if everything.peak_bytes + limit.reserved_bytes <= budget_bytes:
        return everything
    streamable = {size for name, size in needs.in_memory()[0].items() if name not in needs.fixed}
    # Chunks that are too large for the ring have to be pinned. No rule finds the best ring size, so all are tried.
    tried = [_plan_ring(needs, limit, budget_bytes, size) for size in [*sorted(streamable, reverse=True), 0]]
    plans = [plan for plan in tried if plan is not None]
    return min(plans, key=lambda plan: (plan.bytes_per_pass, sum(plan.streamed.values())), default=None)


def _plan_ring(needs: Needs, limit: Limit, budget_bytes: int, ring_bytes: int) -> ResidencyPlan | None:
    """The plan with ring buffers of this size; None if the budget is too small."""
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
"""Further advice in errors about a KV cache that does not fit."""


def _too_small(needs: Needs, limit: Limit, budget_bytes: int) -> BudgetTooSmallError:
    """The error about a budget, given or default, that is too small for the model."""
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
            f"{needed}; give that or more{tokens}",
            least,
        )
    there = f"{format_size(budget_bytes)} is" if budget_bytes else "none is"
    where, options = " on the device" if is_device else "", "(memory_budget, --memory-budget)"
    if is_device:
        options = "(device_memory, --device-memory)"
    return BudgetTooSmallError(
        f"there is too little memory{where} for {needs.name}: it needs {needed}, and {there} free for it "
        f"({limit.reason}); make some free or raise that limit{tokens}, or give a budget of {least} bytes to go beyond "
        f"it {options}",
        least,
    )


def _choose(sizes: Mapping[str, int], free: int, needs: Needs) -> tuple[frozenset[str], frozenset[str]]:
    """Which chunks are pinned, and which float because not even the recurring ones all fit."""
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
    """As many chunks as fit: those that also ran before the cycle, then the largest; evenly spread among equals."""
    rank = {name: (name not in before, -sizes[name]) for name in names}
    for (_, negative), group in groupby(sorted(names, key=rank.__getitem__), key=rank.__getitem__):
        equal, size = list(group), -negative
        count = min(len(equal), free // size) if size else len(equal)
        free -= count * size
        yield from (equal[(2 * index + 1) * len(equal) // (2 * count)] for index in range(count))


def floating_victims(
    name: str, held: Mapping[str, int], size: int, free: int, next_use: Mapping[str, int]
) -> list[str] | None:
    """Which floating chunks to evict so that a chunk that was just used can be kept until its next use.

    Belady's rule with bypass: it replaces chunks that are needed later than itself, and is not kept if they do not
    free enough memory.

    Args:
        name: the chunk that was just used and is not held.
        held: the floating chunks that are kept, with their sizes.
        size: the chunk's size.
        free: unused memory for floating chunks.
        next_use: how soon each chunk is needed again, if ever.

    Returns:
        The chunks to evict, the one needed last first; None if the chunk is not kept.
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
    """How soon each chunk is needed: the index of its first use in a sequence of upcoming uses."""
    found: dict[str, int] = {}
    for index, name in enumerate(future):
        found.setdefault(name, index)
    return found


def bytes_per_pass(plan: ResidencyPlan, cycle: Sequence[str]) -> int:
    """What one pass reads in the steady state: every use of a chunk that is not kept and was not used just before.

    If the ring has a buffer for every streamed chunk, those are kept, too. A smaller LRU cache is assumed to miss
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
