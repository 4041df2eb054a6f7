"""Which chunks stay and which are streamed: sums are right, plans fit, and no policy could have more hits."""

import pickle
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.errors import ConfigurationError
from surfw.manifest import Use
from surfw.runtime import plan as planning
from surfw.runtime.plan import (
    BudgetTooSmallError,
    Limit,
    Needs,
    ResidencyPlan,
    bytes_per_pass,
    describe_needs,
    floating_victims,
    next_uses,
)

LARGE = 5 << 20
KINDS = {"embed": "part", "norm": "part", "all.*": "own", "layers.0": "layer", "layers.1": "layer", "layers.2": "layer"}
SIZES = {"embed": LARGE, "norm": 100, "all.*": LARGE, "layers.0": 10, "layers.1": 30, "layers.2": 20}
CYCLE = ["embed", "layers.0", "layers.1", "layers.2"]
NEEDS = describe_needs("toy", KINDS, SIZES, [Use(name, (name,)) for name in KINDS])
UNIT = 1 << 20


def plan_residency(needs: Needs, limit: Limit, cycle: Sequence[str], before: Sequence[str] = ()) -> ResidencyPlan:
    return planning.plan_residency(replace(needs, cycle=tuple(cycle), before=tuple(before)), limit)


def least_bytes(needs: Needs, cycle: Sequence[str]) -> int:
    return planning.least_bytes(replace(needs, cycle=tuple(cycle)))


def plan(cache_layers: int | None = None) -> ResidencyPlan:
    return plan_residency(NEEDS, Limit(cache_layers=cache_layers), CYCLE)


def equal_layers(count: int, **more: int) -> Needs:
    return Needs(name="toy", sizes={f"{index:02d}": UNIT for index in range(count)} | more)


def test_small_parts_and_own_weights_are_fixed() -> None:
    assert NEEDS.fixed == {"norm", "all.*"}
    assert NEEDS.together == 1
    assert plan(1).pinned == NEEDS.fixed
    assert plan(1).pinned_bytes == LARGE + 100
    assert plan(1).streamed == {"embed": LARGE, "layers.0": 10, "layers.1": 30, "layers.2": 20}


def test_chunks_that_one_module_uses_together_are_counted() -> None:
    uses = [Use("a", ("embed", "norm")), Use("b", ("layers.0", "layers.1", "layers.0"))]
    assert describe_needs("toy", KINDS, SIZES, uses).together == 2


@pytest.mark.parametrize(
    ("cache_layers", "slots", "ring", "everything"),
    [(1, 1, 2, False), (2, 2, 2, False), (3, 4, 0, True), (4, 4, 0, True), (9, 4, 0, True), (None, 4, 0, True)],
)
def test_layers_to_keep(cache_layers: int | None, slots: int, ring: int, everything: bool) -> None:
    made = plan(cache_layers)
    kept = slots if everything else slots - 1
    assert (len(made.pinned) - len(NEEDS.fixed), made.ring_buffers, made.everything_fits) == (kept, ring, everything)
    assert made.slots == min(cache_layers or slots, slots), "what was asked for, not what stays"


@pytest.mark.parametrize("cache_layers", [0, -1, True])
def test_nothing_can_run_in_no_memory(cache_layers: int) -> None:
    with pytest.raises(
        ConfigurationError, match=f"a cache of {cache_layers} layers is too small; at least 1 has to be"
    ):
        plan(cache_layers)


def test_everything_stays_where_it_fits_and_not_with_one_byte_less() -> None:
    needs = equal_layers(6, head=3 * UNIT)
    cycle = list(needs.sizes)
    made = plan_residency(needs, Limit(budget_bytes=9 * UNIT), cycle)
    assert made.everything_fits
    assert (made.peak_bytes, made.ring_buffers, made.bytes_per_pass) == (9 * UNIT, 0, 0)
    for limit in (Limit(budget_bytes=9 * UNIT - 1), Limit(budget_bytes=9 * UNIT, reserved_bytes=1)):
        made = plan_residency(needs, limit, cycle)
        assert not made.everything_fits
        assert made.peak_bytes <= 9 * UNIT - 1


def test_what_is_much_larger_than_the_layers_stays_so_that_the_ring_is_small() -> None:
    needs = equal_layers(6, head=3 * UNIT)
    made = plan_residency(needs, Limit(budget_bytes=6 * UNIT), list(needs.sizes))
    assert "head" in made.pinned
    assert (made.ring_buffers, made.ring_bytes) == (2, UNIT)
    assert made.bytes_per_pass == 5 * UNIT


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("reserved", [0, 1000])
def test_the_least_budget_works_and_one_byte_less_names_it(together: int, reserved: int) -> None:
    needs = Needs(name="toy", sizes=SIZES, fixed=frozenset({"norm", "all.*"}), together=together, overhead_bytes=77)
    least = least_bytes(needs, CYCLE) + reserved
    made = plan_residency(needs, Limit(budget_bytes=least, reserved_bytes=reserved), CYCLE)
    assert made.peak_bytes + reserved == least
    with pytest.raises(ConfigurationError, match=rf"too small for toy, which needs .* \({least} bytes\) at least"):
        plan_residency(needs, Limit(budget_bytes=least - 1, reserved_bytes=reserved), CYCLE)


def test_a_table_that_is_only_looked_up_in_takes_no_memory_when_it_is_short() -> None:
    needs = Needs(
        name="toy", sizes={"table": 100 * UNIT, "a": UNIT, "b": UNIT}, tables=frozenset({"table"}), table_bytes=9
    )
    everything = plan_residency(needs, Limit(budget_bytes=102 * UNIT), ["a", "b"])
    assert everything.everything_fits
    assert everything.tables == set()
    made = plan_residency(needs, Limit(budget_bytes=3 * UNIT), ["a", "b"])
    assert made.tables == {"table"}
    assert "table" not in made.sizes
    assert (made.pinned, made.streamed, made.bytes_per_pass) == ({"a", "b"}, {}, 0)
    assert made.peak_bytes == 2 * UNIT + 9
    assert not made.everything_fits


def test_a_table_that_is_also_a_head_streams_like_a_layer() -> None:
    needs = replace(equal_layers(4, table=3 * UNIT), tables=frozenset({"table"}))
    cycle = list(needs.sizes)
    made = plan_residency(needs, Limit(budget_bytes=6 * UNIT), cycle)
    assert made.tables == {"table"}
    assert (made.sizes["table"], made.bytes_per_pass) == (3 * UNIT, 3 * UNIT)
    assert "table" in made.pinned
    needs = replace(needs, sizes=dict.fromkeys("abcd", 2 * UNIT) | {"table": 3 * UNIT})
    made = plan_residency(needs, Limit(budget_bytes=6 * UNIT), ["a", "b", "c", "d", "table"])
    assert "table" in made.streamed


def test_pins_are_spread_evenly_over_the_depth() -> None:
    needs = equal_layers(12)
    made = plan_residency(needs, Limit(budget_bytes=6 * UNIT), list(needs.sizes))
    assert sorted(made.pinned) == ["01", "04", "07", "10"]
    for kept in range(1, 10):
        made = plan_residency(needs, Limit(cache_layers=kept + 1), list(needs.sizes))
        places = sorted(int(name) for name in made.pinned)
        assert len(places) == kept
        gaps = [later - sooner for sooner, later in pairwise([*places, places[0] + 12])]
        assert max(gaps) - min(gaps) <= 1


def test_what_runs_once_is_not_kept_at_the_cost_of_the_cycle() -> None:
    encoder, decoder = ["e0", "e1", "e2"], ["d0", "d1", "d2", "d3"]
    needs = Needs(name="toy", sizes=dict.fromkeys([*encoder, "shared", *decoder], UNIT))
    made = plan_residency(needs, Limit(budget_bytes=4 * UNIT), ["shared", *decoder], ["shared", *encoder])
    assert len(made.pinned) == 2
    assert "shared" in made.pinned
    assert made.pinned < {"shared", *decoder}
    assert made.bytes_per_pass == 3 * UNIT


def test_lru_has_all_of_its_memory_in_the_ring() -> None:
    needs = equal_layers(8)
    made = plan_residency(needs, Limit(budget_bytes=5 * UNIT, policy="lru"), list(needs.sizes))
    assert (made.pinned, made.ring_buffers, made.slots) == (set(), 5, 4)
    assert made.bytes_per_pass == 8 * UNIT


def test_the_ceiling_is_bandwidth_over_what_a_pass_reads() -> None:
    needs = equal_layers(8)
    made = plan_residency(needs, Limit(budget_bytes=6 * UNIT), list(needs.sizes))
    assert made.bytes_per_pass == 4 * UNIT
    assert made.ceiling(8 * UNIT) == 2.0
    assert made.ceiling(8 * UNIT, tokens_per_pass=1.5) == 3.0
    assert plan_residency(needs, Limit(), list(needs.sizes)).ceiling(1.0) is None


def most_hits(trace: Sequence[str], slots: int) -> int:
    """The hits of the best offline policy with bypass, computed in another way than by Belady's rule.

    Keeping a chunk between two uses takes a slot and saves a read. So the most hits are the most such intervals of
    which no more than `slots` overlap. This is interval scheduling on several machines, where it is optimal to take
    the interval that ends first, on the machine that became free last.
    """
    last: dict[str, int] = {}
    intervals = []
    for index, name in enumerate(trace):
        if name in last:
            intervals.append((index, last[name]))
        last[name] = index
    free_since = [0] * slots
    hits = 0
    for end, start in sorted(intervals):
        fitting = [free for free in free_since if free <= start]
        if fitting:
            free_since.remove(max(fitting))
            free_since.append(end)
            hits += 1
    return hits


def hits_and_bytes(made: ResidencyPlan, trace: Sequence[str], cycle_length: int) -> tuple[int, int]:
    """The hits and read bytes of a cache that obeys the plan; checks that it never exceeds the plan."""
    held: dict[str, int] = {}
    floating: dict[str, int] = {}
    hits = read = 0
    for index, name in enumerate(trace):
        size = made.sizes[name]
        if name in held or name in floating:
            hits += 1
            continue
        if index == 0 or trace[index - 1] != name:  # the most recently used chunk is still in the ring
            read += size
        if name in made.pinned:
            held[name] = size
        elif name in made.floating:
            future = next_uses(trace[index + 1 : index + 1 + 2 * cycle_length])
            victims = floating_victims(name, floating, size, made.floating_bytes - sum(floating.values()), future)
            if victims is not None:
                floating = {one: floating[one] for one in floating if one not in victims} | {name: size}
        assert sum(held.values()) <= made.pinned_bytes
        assert sum(floating.values()) <= made.floating_bytes
    return hits, read


def unit_plan(cycle: Sequence[str], before: Sequence[str], slots: int) -> ResidencyPlan:
    """A plan for chunks of one size, with this many slots beside the ring's two."""
    names = dict.fromkeys([*before, *cycle])
    needs = Needs(name="toy", sizes=dict.fromkeys(names, UNIT))
    return plan_residency(needs, Limit(budget_bytes=(slots + 2) * UNIT), cycle, before)


@pytest.mark.parametrize("layers", range(1, 41))
def test_no_policy_hits_more_often_on_a_cycle(layers: int) -> None:
    names = [f"{index:02d}" for index in range(layers)]
    turns = 4
    for slots in range(layers + 1):
        made = unit_plan(names, (), slots)
        hits, read = hits_and_bytes(made, names * turns, layers)
        everything = slots + 2 >= layers  # then no ring is needed, and its memory holds two more chunks
        assert hits == most_hits(names * turns, layers if everything else slots)
        first, later = layers * UNIT, (turns - 1) * made.bytes_per_pass
        assert read == first + later
        assert made.bytes_per_pass == bytes_per_pass(made, names) == (0 if everything else (layers - slots) * UNIT)


@settings(max_examples=500, deadline=None)
@given(
    before=st.lists(st.sampled_from("abcdefgh"), max_size=8, unique=True),
    cycle=st.lists(st.sampled_from("efghijklmnop"), min_size=1, max_size=16),
    slots=st.integers(0, 12),
    turns=st.integers(1, 5),
)
def test_no_policy_hits_more_often_with_phases_and_repeated_chunks(
    before: list[str], cycle: list[str], slots: int, turns: int
) -> None:
    """An encoder first, then a decoder in a cycle, with shared chunks, and chunks that run several times.

    Only once, where the cycle begins, may a chunk of the encoder be missed that could have been kept.
    """
    made = unit_plan(cycle, before, slots)
    trace = [*before, *cycle * turns]
    hits, read = hits_and_bytes(made, trace, len(cycle))
    everything = made.everything_fits
    most = most_hits(trace, len(set(trace)) if everything else slots)
    again = set(before) & set(cycle) - made.pinned
    assert most - len(again) <= hits <= most
    if not made.floating and len(set(cycle) - made.pinned) > made.ring_buffers:
        assert read <= (len(set(trace)) + len(again)) * UNIT + turns * made.bytes_per_pass


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    fixed=st.sets(st.integers(0, 11), max_size=3),
    budget=st.integers(0, 700),
    reserved=st.integers(0, 50),
    lru=st.booleans(),
)
def test_a_budget_is_never_exceeded(sizes: list[int], fixed: set[int], budget: int, reserved: int, lru: bool) -> None:
    names = {str(index): size for index, size in enumerate(sizes)}
    needs = Needs(
        name="toy", sizes=names, fixed=frozenset(str(one) for one in fixed if one < len(sizes)), overhead_bytes=3
    )
    limit = Limit(budget_bytes=budget, reserved_bytes=reserved, policy="lru" if lru else "auto")
    cycle = [name for name in names if name not in needs.fixed]
    if budget < least_bytes(needs, cycle) + reserved:
        with pytest.raises(ConfigurationError, match="too small for toy"):
            plan_residency(needs, limit, cycle)
        return
    made = plan_residency(needs, limit, cycle)
    assert made.peak_bytes + reserved <= budget
    assert made.pinned | set(made.streamed) == set(names)
    assert all(size <= made.ring_bytes for size in made.streamed.values())
    assert made.bytes_per_pass == (sum(made.streamed.values()))


@settings(max_examples=100, deadline=None)
@given(layers=st.integers(1, 40), budgets=st.lists(st.integers(2, 50), min_size=2, max_size=2))
def test_more_memory_never_reads_more(layers: int, budgets: list[int]) -> None:
    needs = equal_layers(layers)
    less, more = (
        plan_residency(needs, Limit(budget_bytes=budget * UNIT), list(needs.sizes)) for budget in sorted(budgets)
    )
    assert more.bytes_per_pass <= less.bytes_per_pass


def test_what_is_never_in_memory_needs_no_scratch_to_be_converted() -> None:
    needs = Needs(
        name="toy", sizes={"a": UNIT, "b": UNIT, "table": 100 * UNIT}, tables=frozenset({"table"}), table_bytes=9,
        overhead_bytes=7, scratch={"a": 2 * UNIT, "table": 200 * UNIT},
    )  # fmt: skip
    cycle = ["a", "b"]
    assert least_bytes(needs, cycle) == (2 + 2) * UNIT + 9 + 7
    made = plan_residency(needs, Limit(budget_bytes=4 * UNIT + 16), cycle)
    assert made.absent == {"table"}
    assert made.overhead_bytes == 2 * UNIT + 9 + 7
    everything = plan_residency(needs, Limit(budget_bytes=302 * UNIT + 7), cycle)
    assert everything.everything_fits
    assert everything.peak_bytes == 302 * UNIT + 7
    assert not plan_residency(needs, Limit(budget_bytes=302 * UNIT + 6), cycle).everything_fits


def test_an_error_about_a_budget_survives_another_process() -> None:
    made = BudgetTooSmallError("too small", 3)
    found = pickle.loads(pickle.dumps(made))
    assert (type(found), str(found), found.least_bytes) == (BudgetTooSmallError, "too small", 3)
