"""The slot table obeys its plan for all requests, in any order, and however loads end."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from surfw.config import MIB
from surfw.errors import ConfigurationError
from surfw.runtime.plan import Limit, Needs, ResidencyPlan, next_uses, plan_residency
from surfw.runtime.slots import Decision, SlotState, SlotTable

SIZES = dict.fromkeys("abcdef", 10)


def table_of(
    sizes: dict[str, int] = SIZES, *, pinned: Collection[str] = (), floating: Collection[str] = (), ring: int = 2,
    floating_bytes: int = 0, fixed: Collection[str] = (),
) -> SlotTable:  # fmt: skip
    """A table with a given plan."""
    return SlotTable(sizes, plan_of(sizes, pinned, floating, ring, floating_bytes, fixed))


def plan_of(
    sizes: dict[str, int],
    pinned: Collection[str],
    floating: Collection[str] = (),
    ring: int = 2,
    floating_bytes: int = 0,
    fixed: Collection[str] = (),
) -> ResidencyPlan:
    return ResidencyPlan(
        pinned=frozenset(pinned) | frozenset(fixed), floating=frozenset(floating), sizes=sizes, ring_buffers=ring,
        ring_bytes=max(sizes.values()) if ring else 0, floating_bytes=floating_bytes, fixed=frozenset(fixed),
    )  # fmt: skip


def names(decision: Decision) -> tuple[str, str]:
    """The evicted and the loaded chunks."""
    return "".join(slot.name for slot in decision.evict), "".join(slot.name for slot in decision.load)


def arrive(table: SlotTable, decision: Decision) -> tuple[str, str]:
    """Complete all loads of a decision successfully."""
    for slot in decision.load:
        table.ended(slot.name, failed=False)
    return names(decision)


def run(table: SlotTable, chunks: Sequence[str], after: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Use chunks one after another, completing all loads; return what was evicted and loaded for each."""
    seen = []
    for index, name in enumerate(chunks):
        evicted, loaded = arrive(table, table.make_ready([name]))
        table.hold([name])[0].count_use(was_ready=True)
        gone, more = arrive(table, table.release([name], next_uses([*chunks[index + 1 :], *after])))
        seen.append((evicted + gone, loaded + more))
    return seen


def test_a_chunk_is_loaded_once_while_it_is_there() -> None:
    table = table_of()
    assert names(table.make_ready(["a"])) == ("", "a")
    assert table["a"].state is SlotState.LOADING
    assert names(table.make_ready(["a"])) == ("", "")
    table.ended("a", failed=False)
    assert table.is_ready(["a"])
    assert not table.is_ready(["a", "b"])


def test_pinned_chunks_have_memory_of_their_own_and_the_others_the_rings() -> None:
    table = table_of({"a": 4, "b": 10, "c": 7}, pinned="a")
    slots = table.make_ready(["a", "c"]).load
    assert [(slot.name, slot.size_bytes, slot.in_ring) for slot in slots] == [("a", 4, False), ("c", 10, True)]


def test_the_least_recently_used_chunk_of_the_ring_makes_way() -> None:
    table = table_of()
    assert run(table, "abcac") == [("", "a"), ("", "b"), ("a", "c"), ("b", "a"), ("", "")]
    assert [slot.name for slot in table] == ["a", "c"]


def test_a_chunk_that_was_used_makes_way_before_one_that_was_fetched_ahead() -> None:
    table = table_of()
    arrive(table, table.prefetch("a"))
    run(table, "b")
    assert names(table.make_ready(["c"])) == ("b", "c")


def test_a_wrong_guess_that_is_still_loading_is_cancelled_and_gone_once_it_has_ended() -> None:
    table = table_of()
    table.prefetch("ab")
    decision = table.make_ready(["c"])
    assert names(decision) == ("", "")
    assert decision.cancel is table["a"]
    table.ended("a", failed=True)
    assert names(table.make_ready(["c"])) == ("a", "c")


def test_the_ring_grows_for_what_is_in_use_at_once_and_shrinks_after_it() -> None:
    table = table_of()
    arrive(table, table.make_ready("abc"))
    table.hold("abc")
    assert names(table.make_ready(["d"])) == ("", "d")
    table.ended("d", failed=False)
    table.hold("d")
    assert names(table.release("abcd", {})) == ("ab", "")


def test_a_failed_chunk_goes_when_it_is_asked_for_again_and_not_while_it_is_in_use() -> None:
    table = table_of()
    table.make_ready(["a"])
    table.hold(["a"])
    table.ended("a", failed=True)
    assert names(table.make_ready(["a"])) == ("", "")
    table.let_go(["a"])
    assert names(table.make_ready(["a"])) == ("a", "a")
    table.ended("a", failed=True)
    assert names(table.fetch(["a"])) == ("a", "a")


def test_uses_are_hits_prefetched_or_stalls() -> None:
    table = table_of()
    for name, ready, kind in (("a", False, "stalls"), ("a", True, "hits"), ("b", True, "prefetched")):
        arrive(table, table.make_ready([name]))
        assert table[name].count_use(was_ready=ready) == kind
    arrive(table, table.fetch(["c"]))
    assert table["c"].count_use(was_ready=True) == "hits", "it was asked for on its own"


def test_what_comes_next_is_fetched_as_far_as_the_ring_goes_and_replaces_nothing_that_comes_sooner() -> None:
    table = table_of(pinned="d")
    assert arrive(table, table.prefetch("abcd")) == ("", "ab")
    assert arrive(table, table.prefetch("abcd")) == ("", "")
    assert arrive(table, table.prefetch("bdca")) == ("a", "dc")
    assert arrive(table, table.prefetch("fbc", in_use="bc")) == ("", "")


def test_a_bounded_number_of_bytes_is_fetched_ahead_at_a_time() -> None:
    table = table_of(dict.fromkeys("abcdef", 30 * MIB), pinned="abcdef", ring=0)
    assert names(table.prefetch("abcdef")) == ("", "ab")
    assert table.in_flight_bytes == 60 * MIB
    table.ended("a", failed=False)
    assert names(table.prefetch("abcdef")) == ("", "c")
    table = table_of(dict.fromkeys("abc", 100 * MIB), pinned="abc", ring=0)
    assert names(table.prefetch("abc")) == ("", "ab"), "two of the largest, where these are larger"


def test_chunks_asked_for_on_their_own_do_not_replace_each_other() -> None:
    table = table_of()
    run(table, "ab")
    assert names(table.fetch("cbde")) == ("a", "c")
    assert [slot.name for slot in table] == ["c", "b"]


def test_floating_chunks_stay_if_they_are_needed_before_those_that_do() -> None:
    table = table_of(floating="abc", floating_bytes=10)
    run(table, "a", after="cab")
    assert not table["a"].in_ring
    run(table, "b", after="cabab")
    assert table["b"].in_ring, "a is needed sooner"
    ((evicted, _),) = run(table, "c", after="cba")
    assert evicted == "a"
    assert not table["c"].in_ring


def test_a_plan_with_less_memory_evicts_what_is_idle_at_once_and_the_rest_after_its_use() -> None:
    table = table_of(pinned="abcd", ring=2)
    run(table, "abcdef")
    table.hold("ae")
    assert names(table.adopt(plan_of(SIZES, "f", ring=1))) == ("bcd" + "f", "")
    assert [slot.name for slot in table] == ["a", "e"]
    assert names(table.release("ae", {})) == ("", ""), "a fits as long as f is not there"
    assert names(table.make_ready("f")) == ("a", "f")
    assert not table["f"].in_ring


def test_a_chunk_that_was_on_its_way_to_a_ring_goes_where_the_plan_has_none() -> None:
    table = table_of()
    table.prefetch("a")
    for _ in range(2):
        table.adopt(plan_of(SIZES, "abcdef", ring=0))
        arrive(table, table.prefetch("bcdef"))
    table.ended("a", failed=False)
    assert names(table.release("", {})) == ("a", "")


def test_what_a_plan_pins_takes_the_memory_of_what_it_does_not_pin_any_more() -> None:
    table = table_of(pinned="ab", ring=1)
    run(table, "abc")
    table.adopt(plan_of(SIZES, "de", ring=1))
    assert names(table.make_ready("d")) == ("a", "d")
    assert [slot.in_ring for slot in table] == [False, True, False]


def test_a_chunk_that_is_fixed_from_now_on_leaves_the_ring() -> None:
    table = table_of()
    arrive(table, table.make_ready("a"))
    table.hold("a")
    table.adopt(plan_of(SIZES, "", fixed="a"))
    assert not table["a"].in_ring
    assert table.spare_ring_slots == 2


def test_clearing_evicts_all_but_what_is_in_use() -> None:
    table = table_of()
    table.make_ready("ab")
    table.hold("b")
    assert names(table.clear()) == ("a", "")
    table.release_all()
    assert names(table.clear()) == ("b", "")
    assert len(table) == 0


def test_slots_whose_loads_did_not_start_are_taken_back() -> None:
    table = table_of()
    decision = table.make_ready("ab")
    table.forget(decision.load[1:])
    assert "a" in table
    assert "b" not in table
    assert names(table.make_ready("b")) == ("", "b")


@pytest.mark.parametrize("pinned", [0, 2, 4, 6])
def test_what_is_all_there_moves_no_more(pinned: int) -> None:
    table = table_of(pinned="abcdef"[:pinned], ring=6 - pinned)
    run(table, "abcdef")
    assert run(table, "abcdef" * 2) == [("", "")] * 12
    assert names(table.prefetch("abcdef")) == ("", "")


chunks = st.sampled_from("abcdefgh")


class Tiers(RuleBasedStateMachine):
    """Runs any operations in any order, with loads that end at any time and in any way."""

    @initialize(
        sizes=st.lists(st.integers(1, 4), min_size=8, max_size=8),
        fixed=st.sets(chunks, max_size=1),
        cycle=st.lists(chunks, max_size=12),
        budget=st.integers(12, 40),
        lru=st.booleans(),
    )
    def begin(self, sizes: list[int], fixed: set[str], cycle: list[str], budget: int, lru: bool) -> None:
        self.sizes = dict(zip("abcdefgh", sizes, strict=True))
        self.needs = Needs(
            name="toy", sizes=self.sizes, fixed=frozenset(fixed), together=2, cycle=tuple(one for one in cycle)
        )
        self.limit = Limit(budget_bytes=max(budget, 12), policy="lru" if lru else "auto")
        self.table = SlotTable(self.sizes, plan_residency(self.needs, self.limit))
        self.held: list[list[str]] = []
        self.counted = dict.fromkeys(("hits", "prefetched", "stalls"), 0)
        self.known: set[str] = set()
        self.uses = 0

    def obey(self, decision: Decision) -> None:
        """Check a decision: no chunk in use is evicted, and loads are within the plan."""
        plan, in_use = self.table.plan, {name for held in self.held for name in held}
        for slot in decision.evict:
            assert slot.users == 0
            assert slot.name not in in_use
            self.known.discard(slot.name)
        for index, slot in enumerate(decision.load):
            assert slot.state is SlotState.LOADING
            assert slot is self.table[slot.name]
            later = decision.load[index + 1 :]
            own = sum(one.size_bytes for one in self.table if not one.in_ring and one not in later)
            if slot.in_ring:
                assert slot.size_bytes == max(plan.ring_bytes, self.sizes[slot.name])
            elif slot.name not in plan.fixed:
                assert own <= plan.pinned_bytes + plan.floating_bytes

    @rule(names=st.lists(chunks, min_size=1, max_size=2, unique=True))
    def use(self, names: list[str]) -> None:
        was_there = {name for name in names if name in self.table and self.table[name].state is not SlotState.FAILED}
        decision = self.table.make_ready(names)
        self.obey(decision)
        if decision.cancel is not None:
            assert decision.cancel.state is SlotState.LOADING
            assert not decision.cancel.users
            assert decision.cancel.name not in names
            return
        for slot in self.table.hold(names):
            kind = slot.count_use(was_ready=slot.state is not SlotState.LOADING)
            assert kind == (
                "stalls" if slot.state is SlotState.LOADING else "hits" if slot.name in self.known else kind
            )
            assert kind == "stalls" or slot.name in was_there or slot.users > 1
            self.known.add(slot.name)
            self.counted[kind] += 1
            self.uses += 1
        self.held.append(names)

    @rule(index=st.integers(0, 9), future=st.lists(chunks, max_size=8))
    def release(self, index: int, future: list[str]) -> None:
        if self.held:
            names = self.held.pop(index % len(self.held))
            self.obey(self.table.release(names, next_uses(future)))

    @rule(upcoming=st.lists(chunks, max_size=8))
    def prefetch(self, upcoming: list[str]) -> None:
        sooner = {slot.name for slot in self.table if slot.in_ring and slot.name == (upcoming or [""])[0]}
        decision = self.table.prefetch(upcoming, [name for held in self.held for name in held])
        self.obey(decision)
        assert sooner.isdisjoint(slot.name for slot in decision.evict), "what comes first stays"

    @rule(names=st.lists(chunks, max_size=4, unique=True))
    def fetch(self, names: list[str]) -> None:
        decision = self.table.fetch(names)
        self.obey(decision)
        self.known |= {slot.name for slot in decision.load}

    @rule(index=st.integers(0, 9), failed=st.booleans())
    def end(self, index: int, failed: bool) -> None:
        if loading := [slot for slot in self.table if slot.state is SlotState.LOADING]:
            self.table.ended(loading[index % len(loading)].name, failed=failed)

    @rule(budget=st.integers(12, 40), cycle=st.lists(chunks, max_size=12))
    def replan(self, budget: int, cycle: list[str]) -> None:
        self.needs = replace(self.needs, cycle=tuple(cycle))
        try:
            plan = plan_residency(self.needs, replace(self.limit, budget_bytes=budget))
        except ConfigurationError:
            return
        self.obey(self.table.adopt(plan))

    @rule()
    def clear(self) -> None:
        self.obey(self.table.clear())

    @invariant()
    def what_is_held_is_there(self) -> None:
        if hasattr(self, "table"):
            held = [name for names in self.held for name in names]
            assert {slot.name: slot.users for slot in self.table if slot.users} == {
                name: held.count(name) for name in held
            }
            assert sum(self.counted.values()) == self.uses

    @invariant()
    def memory_is_within_the_plan(self) -> None:
        """When nothing is in use or loading, and something was released, memory is within the plan."""
        if hasattr(self, "table") and not self.held and all(slot.is_idle for slot in self.table):
            self.obey(self.table.release([], {}))
            plan = self.table.plan
            ring = [slot for slot in self.table if slot.in_ring]
            assert len(ring) <= plan.ring_buffers
            assert all(slot.size_bytes <= plan.ring_bytes for slot in ring)
            own = sum(slot.size_bytes for slot in self.table if not slot.in_ring)
            assert own <= plan.pinned_bytes + plan.floating_bytes
            assert own + sum(slot.size_bytes for slot in ring) <= plan.peak_bytes


TestTiers = Tiers.TestCase
TestTiers.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
