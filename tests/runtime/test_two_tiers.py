"""Two plans in a row: chunks kept on the device only pass through the host, which keeps the rest, within both plans."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from surfw.errors import ConfigurationError
from surfw.runtime.coding_plan import USUAL_SHARE, choose_coded, copied_per_pass, plan_device, with_coded
from surfw.runtime.plan import Limit, Needs, least_bytes, needs_behind, plan_residency
from surfw.runtime.slots import SlotTable

PAGE = 4096


@st.composite
def models(draw: st.DrawFn) -> Needs:
    """A model with a cycle of layers, some of which run twice, a table before it and a head after it."""
    sizes = {f"layer{index}": PAGE * draw(st.integers(1, 6)) for index in range(draw(st.integers(1, 8)))}
    order = [*sizes]
    if draw(st.booleans()):
        order += order[:1]
    sizes |= {"head": PAGE * draw(st.integers(1, 12)), "norm": PAGE, "table": PAGE * draw(st.integers(1, 12))}
    return Needs(
        name="toy", sizes=sizes, fixed=frozenset({"norm"}), tables=frozenset({"table"}), table_bytes=PAGE,
        overhead_bytes=draw(st.integers(0, 4)) * PAGE, cycle=(*order, "head"),
    )  # fmt: skip


@given(models(), st.integers(0, 60), st.integers(0, 60))
def test_each_chunk_stays_where_it_may_and_no_tier_has_more_than_its_budget(
    needs: Needs, device: int, host: int
) -> None:
    near = replace(needs, table_bytes=0, overhead_bytes=0, working_bytes=PAGE)
    device_bytes = least_bytes(near) + device * PAGE
    plan = plan_residency(near, Limit(budget_bytes=device_bytes, tier="device"))
    behind = needs_behind(needs, plan, near)
    host_bytes = least_bytes(behind) + host * PAGE
    below = plan_residency(behind, Limit(budget_bytes=host_bytes))
    assert plan.peak_bytes <= device_bytes
    assert below.peak_bytes <= host_bytes
    assert below.passing == plan.pinned, "what stays on the device is handed on"
    assert below.pinned.isdisjoint(name for name in below.passing if needs.sizes[name] <= below.ring_bytes)
    streamed = [name for name in near.cycle if name not in plan.pinned]
    assert below.bytes_per_pass <= sum(needs.sizes[name] for name in streamed), "only they are read again"
    if below.everything_fits:
        assert below.bytes_per_pass == 0
    copied, pinned = plan.bytes_per_pass, set(plan.pinned)
    assert copied <= sum(needs.sizes[name] for name in near.cycle if name not in pinned)
    bigger = plan_residency(near, Limit(budget_bytes=device_bytes + 20 * PAGE, tier="device"))
    assert bigger.bytes_per_pass <= copied, "more memory never copies more"


def test_too_little_on_the_device_is_said_of_the_device() -> None:
    needs = Needs(name="toy", sizes={"a": 10 * PAGE, "b": 10 * PAGE, "c": 10 * PAGE}, cycle=("a", "b", "c"))
    try:
        plan_residency(needs, Limit(budget_bytes=PAGE, tier="device"))
    except ConfigurationError as exc:
        said = str(exc)
    assert said == (
        "device memory of 4.1 kB (4096 bytes) is too small for toy, which needs 81.9 kB (81920 bytes) at least; "
        "give that or more"
    )


@given(models(), st.integers(0, 60), st.integers(0, 60), st.integers(1, 12))
def test_what_is_coded_fits_the_host_and_fewer_bytes_are_copied(
    needs: Needs, device: int, host: int, coding: int
) -> None:
    near = replace(needs, table_bytes=0, overhead_bytes=0, working_bytes=PAGE)
    limit = Limit(budget_bytes=least_bytes(near) + device * PAGE, tier="device")
    plain, plan = plan_residency(near, limit), plan_device(near, limit, coding * PAGE)
    assert plan.peak_bytes <= (limit.budget_bytes or 0)
    if not plan.coding_bytes:
        assert plan == plain
        return
    behind = needs_behind(needs, plan, near)
    below = Limit(budget_bytes=least_bytes(behind) + host * PAGE)
    expected = {name: round(USUAL_SHARE * size) for name, size in needs.sizes.items() if name != "norm"}
    chosen = choose_coded(behind, below, expected)
    assert chosen.isdisjoint(plan.pinned | behind.tables), "what stays on the device is not coded, and no table"
    coded = {name: expected[name] for name in chosen}
    settled = plan_residency(with_coded(behind, coded), below)
    assert settled.peak_bytes <= (below.budget_bytes or 0)
    assert settled.pinned.isdisjoint(name for name in chosen if needs.sizes[name] <= settled.ring_bytes)
    copied = copied_per_pass(plan, near, coded)
    assert copied <= plan.bytes_per_pass
    if chosen.issuperset(plan.streamed):
        assert copied <= USUAL_SHARE * plan.bytes_per_pass + len(near.cycle)
        assert copied < plain.bytes_per_pass, "or there would be no coding"
    if len(chosen) < len(choose_coded(behind, Limit(), expected)):
        smallest = min(expected[name] for name in choose_coded(behind, Limit(), expected) - chosen)
        assert settled.peak_bytes + smallest > (below.budget_bytes or 0) or settled.pinned, "as many as fit"


def test_what_is_handed_on_is_not_fetched_ahead() -> None:
    needs = Needs(name="toy", sizes={"a": PAGE, "b": PAGE, "c": PAGE, "d": PAGE}, cycle=("a", "b", "c", "d"))
    behind = replace(needs, passing=frozenset({"a"}))
    table = SlotTable(needs.sizes, plan_residency(behind, Limit(budget_bytes=3 * PAGE)))
    assert "a" not in [slot.name for slot in table.prefetch(["a", "b", "c"]).load]
    assert "b" in table
    assert [slot.name for slot in table.make_ready(["a"]).load] == ["a"], "it is loaded when it is asked for"
