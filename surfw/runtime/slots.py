"""Which chunk is in which slot of a memory tier, and what to load and evict next. Pure: no threads, devices or I/O.

A `SlotTable` follows a `ResidencyPlan`. It knows only names and sizes in bytes, not what a slot consists of. Its
methods record what they decide and return it as a `Decision`: what to evict, load, or wait for. The engine carries it
out and reports with `ended` how each load ended; `misplaced` says which loads to cancel. A slot goes from loading to
ready or failed; a chunk without a slot is not in this tier.

Pinned chunks have memory of their own and are not evicted. The others are streamed through the ring: a few slots of one
size, which are reused. Chunks that are needed next are prefetched into idle slots of the ring; wrong prefetches are
evicted. Floating chunks run several times in a pass, and there is memory for some of them: after a use, one leaves the
ring if it is needed sooner than those it replaces (`plan.floating_victims`).

Invariants, after any sequence of calls:

- at most `plan.ring_buffers` slots are in the ring, including loading ones, unless more are in use at once;
- the other slots take no more than the plan's pinned chunks and its `floating_bytes`;
- a chunk in use is never evicted, and a loading one only by `clear`;
- a failed load leaves nothing behind: its slot is evicted once its chunk is requested again or the slot is needed.

After a change of plan, the first two hold once the slots that were in use or loading are idle.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from surfw.config import MIB
from surfw.runtime.plan import ResidencyPlan, floating_victims

_LEAST_IN_FLIGHT_BYTES = 64 * MIB

UseKind = Literal["hits", "prefetched", "stalls"]
"""How execution found a chunk: already resident; fetched for this use and ready in time; or not ready."""


class SlotState(Enum):
    """What a slot holds."""

    LOADING = auto()
    READY = auto()
    FAILED = auto()


@dataclass(slots=True, eq=False)
class Slot:
    """A place in memory that holds a chunk, or receives one.

    Attributes:
        name: the chunk.
        size_bytes: the memory that the slot takes.
        in_ring: whether it belongs to the ring; if not, the chunk has memory of its own.
        state: the state of its chunk.
        users: how many modules use the chunk now.
        is_known: whether the chunk was used, or loaded by `fetch`; if not, it was loaded for its next use.
    """

    name: str
    size_bytes: int
    in_ring: bool
    state: SlotState = SlotState.LOADING
    users: int = 0
    is_known: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether it can be evicted at once."""
        return not self.users and self.state is not SlotState.LOADING

    def count_use(self, *, was_ready: bool) -> UseKind:
        """Note that execution has reached the chunk; `was_ready` says whether its load had ended by then."""
        kind: UseKind = "stalls" if not was_ready else "hits" if self.is_known else "prefetched"
        self.is_known = True
        return kind


@dataclass(slots=True)
class Decision:
    """What a driver has to do, in this order.

    Attributes:
        evict: slots that were removed. Memory of an evicted ring slot can be reused for a loaded one.
        load: new slots, whose chunks are to be loaded.
        cancel: a slot that is needed now but holds a wrong prefetch. The driver cancels its load and, once that has
            ended, calls again.
    """

    evict: list[Slot] = field(default_factory=list)
    load: list[Slot] = field(default_factory=list)
    cancel: Slot | None = None


class SlotTable:
    """The slots of one tier.

    Attributes:
        plan: the plan that it follows; see `adopt`.
    """

    def __init__(self, sizes: Mapping[str, int], plan: ResidencyPlan) -> None:
        """Start empty.

        Args:
            sizes: the bytes that each chunk takes in this tier, including chunks that the plan keeps out of it.
            plan: the plan to follow.
        """
        self._sizes = sizes
        self._slots: OrderedDict[str, Slot] = OrderedDict()  # least recently used first
        self.adopt(plan)

    def __getitem__(self, name: str) -> Slot:
        """The slot of a chunk that has one."""
        return self._slots[name]

    def __contains__(self, name: str) -> bool:
        """Whether a chunk has a slot."""
        return name in self._slots

    def __iter__(self) -> Iterator[Slot]:
        """All slots, least recently used first."""
        return iter(self._slots.values())

    def __len__(self) -> int:
        """How many slots there are."""
        return len(self._slots)

    @property
    def in_flight_bytes(self) -> int:
        """Memory of the slots that are loading."""
        return sum(slot.size_bytes for slot in self if slot.state is SlotState.LOADING)

    @property
    def spare_ring_slots(self) -> int:
        """How many slots the ring may still grow by."""
        return max(0, self.plan.ring_buffers - len(self._ring()))

    @property
    def is_complete(self) -> bool:
        """Whether every chunk of the plan has a slot, apart from those that only pass through."""
        if passing := self.plan.passing:
            return len(self._slots.keys() - passing) >= len(self.plan.sizes.keys() - passing)
        return len(self._slots) >= len(self.plan.sizes)

    def is_ready(self, names: Iterable[str]) -> bool:
        """Whether all of these chunks are ready."""
        slots = (self._slots.get(name) for name in names)
        return all(slot is not None and slot.state is SlotState.READY for slot in slots)

    def has_place(self, name: str) -> bool:
        """Whether a chunk has a slot, or can get one without growing the ring beyond the plan."""
        if name in self._slots or name in self.plan.pinned:
            return True
        ring = self._ring()
        return len(ring) < max(1, self.plan.ring_buffers) or any(not slot.users for slot in ring)

    def adopt(self, plan: ResidencyPlan) -> Decision:
        """Follow another plan. Chunks that it has no memory for are evicted at once if idle, else after their use."""
        self.plan = plan
        self._own_bytes = plan.pinned_bytes + plan.floating_bytes
        self._most_in_flight = max(_LEAST_IN_FLIGHT_BYTES, 2 * max(plan.sizes.values(), default=0))
        self._everything_fits = plan.everything_fits
        for slot in self:
            slot.in_ring &= slot.name not in plan.fixed
        return self._trim(Decision())

    def make_ready(self, names: Sequence[str]) -> Decision:
        """Load the chunks that are needed now, if necessary by evicting prefetched ones."""
        decision = Decision()
        for name in names:
            slot = self._slots.get(name)
            if slot is not None and slot.state is SlotState.FAILED and not slot.users:
                self._evict(slot, decision)
        missing = [name for name in dict.fromkeys(names) if name not in self._slots]
        through_ring = [name for name in missing if not self._load_pinned(name, decision, needed=names)]
        while through_ring and len(ring := self._ring()) + len(through_ring) > self.plan.ring_buffers:
            victims = [slot for slot in ring if not slot.users and slot.name not in names]
            if not victims:
                break  # more chunks are in use than the ring has slots: it grows for them until the next `release`
            # Evict a chunk that was already used before a prefetched one; among equals, the least recently used.
            victim = min(victims, key=lambda slot: not slot.is_known)
            if victim.state is SlotState.LOADING:
                decision.cancel = victim  # the load still writes to its memory
                return decision
            self._evict(victim, decision)
        for name in through_ring:
            self._load(name, decision, in_ring=True)
        return decision

    def hold(self, names: Iterable[str]) -> list[Slot]:
        """Mark chunks as in use, until `let_go` or `release`; `make_ready` has to have given them slots."""
        slots = [self._slots[name] for name in names]
        for slot in slots:
            slot.users += 1
            self._slots.move_to_end(slot.name)
        return slots

    def let_go(self, names: Iterable[str]) -> None:
        """Undo `hold`; chunks that have no slot any more are ignored."""
        for name in names:
            if slot := self._slots.get(name):
                slot.users -= 1

    def release(self, names: Sequence[str], next_use: Mapping[str, int]) -> Decision:
        """Undo `hold` after a use, and evict what the plan has no memory for.

        Args:
            names: the chunks.
            next_use: how soon each chunk is used again; needed only if floating ones are released.
        """
        self.let_go(names)
        decision = Decision()
        if not (self._everything_fits and self._is_settled):
            for name in names:
                self._float(name, next_use, decision)
            self._trim(decision)
        return decision

    def trim(self) -> Decision:
        """Evict what the plan has no memory for, without releasing anything."""
        return Decision() if self._everything_fits and self._is_settled else self._trim(Decision())

    def misplaced(self) -> list[Slot]:
        """The loading slots that the plan has no memory for, as idle ones are too few; the driver cancels their loads.

        Both inside and outside of the ring, those are chosen that were started last.
        """
        loading = [slot for slot in reversed(self._slots.values()) if slot.state is SlotState.LOADING]
        excess, found = self._excess_bytes(), list[Slot]()
        for slot in loading:
            if excess > 0 and not slot.users and not slot.in_ring and slot.name not in self.plan.pinned:
                found.append(slot)
                excess -= slot.size_bytes
        in_ring = [slot for slot in loading if slot.in_ring and not slot.users]
        large = [slot for slot in in_ring if slot.size_bytes > self.plan.ring_bytes]  # of an earlier, larger ring
        rest = [slot for slot in in_ring if slot.size_bytes <= self.plan.ring_bytes]
        surplus = max(0, len(self._ring()) - len(large) - self.plan.ring_buffers)
        return found + large + rest[:surplus]

    def prefetch(self, upcoming: Iterable[str], in_use: Collection[str] = ()) -> Decision:
        """Load what is used next, as far as there are slots, with a bounded number of bytes in flight.

        Args:
            upcoming: the chunks in the order of their next uses, each once; consumed as far as there is memory.
            in_use: chunks of the ring that must not be evicted for them.
        """
        decision = Decision()
        in_flight, sooner = self.in_flight_bytes, set(in_use)
        for name in upcoming:
            if name in self.plan.passing:
                continue  # it is loaded when the nearer tier requests it
            if name not in self._slots:
                if in_flight and in_flight + self._sizes[name] > self._most_in_flight:
                    break
                if not self._load_ahead(name, sooner, decision):
                    break
                in_flight += self._slots[name].size_bytes
            sooner.add(name)
        return decision

    def fetch(self, names: Sequence[str]) -> Decision:
        """Load chunks on explicit request, as many as there are slots for once idle ones are evicted."""
        decision = Decision()
        wanted: set[str] = set()
        for name in names:
            slot = self._slots.get(name)
            if slot is not None and slot.state is SlotState.FAILED and not slot.users:
                self._evict(slot, decision)
            if name not in self._slots:
                if not self._load_ahead(name, wanted, decision):
                    continue
                self._slots[name].is_known = True  # so that its first use counts as a hit
            wanted.add(name)
            self._slots.move_to_end(name)
        return decision

    def ended(self, name: str, *, failed: bool) -> None:
        """Note that the load of a chunk has ended; `failed` if it did not succeed or was cancelled."""
        self._slots[name].state = SlotState.FAILED if failed else SlotState.READY

    def forget(self, slots: Iterable[Slot]) -> None:
        """Remove slots in any state, such as those whose loads could not be started."""
        for slot in slots:
            del self._slots[slot.name]
        self._is_settled = False

    def release_all(self) -> None:
        """Undo every `hold`; nothing runs any more."""
        for slot in self:
            slot.users = 0

    def clear(self, keep: Collection[str] = ()) -> Decision:
        """Evict every chunk that is not in use, including loading ones, except those in `keep`."""
        decision = Decision()
        for slot in list(self):
            if not slot.users and slot.name not in keep:
                self._evict(slot, decision)
        return decision

    def _load_pinned(self, name: str, decision: Decision, needed: Collection[str] = ()) -> bool:
        """Load a chunk into memory of its own, if the plan pins it; chunks that are no longer pinned are evicted."""
        if name not in self.plan.fixed:
            if name not in self.plan.pinned:
                return False
            excess = self._sizes[name] + self._excess_bytes()
            if excess > 0 and not self._evict_unpinned(excess, decision, needed):
                return False
        self._load(name, decision, in_ring=False)
        return True

    def _load_ahead(self, name: str, sooner: Collection[str], decision: Decision) -> bool:
        """Load a chunk, evicting from the ring one that is not needed sooner; False if there is no slot."""
        if self._load_pinned(name, decision):
            return True
        ring = self._ring()
        if len(ring) >= self.plan.ring_buffers:
            victim = next((slot for slot in ring if slot.is_idle and slot.name not in sooner), None)
            if victim is None:
                return False
            self._evict(victim, decision)
        self._load(name, decision, in_ring=True)
        return True

    def _load(self, name: str, decision: Decision, *, in_ring: bool) -> None:
        size_bytes = max(self._sizes[name], self.plan.ring_bytes) if in_ring else self._sizes[name]
        self._slots[name] = slot = Slot(name, size_bytes, in_ring)
        decision.load.append(slot)

    def _evict(self, slot: Slot, decision: Decision) -> None:
        del self._slots[slot.name]
        self._is_settled = False
        decision.evict.append(slot)

    def _ring(self) -> list[Slot]:
        return [slot for slot in self if slot.in_ring]

    def _excess_bytes(self) -> int:
        """How much more the slots outside of the ring take than the plan allows; negative if memory is left."""
        return sum(slot.size_bytes for slot in self if not slot.in_ring) - self._own_bytes

    def _evict_unpinned(self, size_bytes: int, decision: Decision, needed: Collection[str] = ()) -> bool:
        """Evict idle, unpinned slots outside of the ring until this much is free; False if that is not enough."""
        for slot in list(self):
            if size_bytes <= 0:
                break
            if slot.is_idle and not slot.in_ring and slot.name not in self.plan.pinned and slot.name not in needed:
                size_bytes -= slot.size_bytes
                self._evict(slot, decision)
        return size_bytes <= 0

    def _float(self, name: str, next_use: Mapping[str, int], decision: Decision) -> None:
        """Move a floating chunk that was just used out of the ring, if it is needed sooner than those it replaces."""
        slot = self._slots.get(name)
        if slot is None or name not in self.plan.floating or not slot.in_ring or slot.users:
            return
        held = {
            other.name: other.size_bytes
            for other in self
            if not other.in_ring and other.name in self.plan.floating and not other.users
        }
        free = self.plan.floating_bytes - sum(held.values())
        victims = floating_victims(name, held, slot.size_bytes, free, next_use)
        if victims is None:
            return
        for victim in (self._slots[one] for one in victims):
            victim.in_ring = True  # its buffer joins the ring in exchange for that of `slot`
            self._evict(victim, decision)
        slot.in_ring = False

    def _trim(self, decision: Decision) -> Decision:
        """Evict idle slots that the plan has no memory for."""
        fits = self._evict_unpinned(self._excess_bytes(), decision)
        for slot in [one for one in self._ring() if one.is_idle and one.size_bytes > self.plan.ring_bytes]:
            self._evict(slot, decision)  # of an earlier, larger ring
        ring = self._ring()
        surplus = max(0, len(ring) - self.plan.ring_buffers)
        for slot in [one for one in ring if one.is_idle][:surplus]:
            self._evict(slot, decision)
        ring = self._ring()  # slots that are in use or loading may still be too many
        fits &= len(ring) <= self.plan.ring_buffers and all(one.size_bytes <= self.plan.ring_bytes for one in ring)
        self._is_settled = fits and self.is_complete
        return decision
