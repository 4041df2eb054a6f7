"""Two plans, one behind the other: what the device keeps only passes, all else is the host's, and nothing exceeds."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from surfw.errors import ConfigurationError
from surfw.runtime.plan import Limit, Needs, least_bytes, needs_behind, plan_residency

PAGE = 4096


@st.composite
def models(draw: st.DrawFn) -> Needs:
    """A model whose layers run in a cycle, some of them twice, with a table before and a head behind."""
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
