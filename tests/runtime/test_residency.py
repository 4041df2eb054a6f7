"""What stays and what is streamed: the sums are right, and what has to fit fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surfw.errors import ConfigurationError
from surfw.manifest import Use
from surfw.runtime.residency import ResidencyPlan, plan_residency

LARGE = 5 << 20
KINDS = {"embed": "part", "norm": "part", "all.*": "own", "layers.0": "layer", "layers.1": "layer", "layers.2": "layer"}
SIZES = {"embed": LARGE, "norm": 100, "all.*": LARGE, "layers.0": 10, "layers.1": 30, "layers.2": 20}
ORDER = [Use(name, (name,)) for name in KINDS]


def plan(cache_layers: int | None = None, budget_bytes: int | None = None) -> ResidencyPlan:
    return plan_residency(KINDS, SIZES, ORDER, cache_layers=cache_layers, budget_bytes=budget_bytes)


def test_small_parts_and_own_weights_are_pinned() -> None:
    assert plan().pinned == {"norm", "all.*"}
    assert plan().pinned_bytes == LARGE + 100
    assert plan().streamed == {"embed": LARGE, "layers.0": 10, "layers.1": 30, "layers.2": 20}


@pytest.mark.parametrize(
    ("cache_layers", "slots", "buffers", "everything"),
    [(1, 1, 2, False), (2, 2, 3, False), (3, 3, 4, False), (4, 4, 4, True), (9, 4, 4, True), (None, 4, 4, True)],
)
def test_layers_to_keep(cache_layers: int | None, slots: int, buffers: int, everything: bool) -> None:
    made = plan(cache_layers)
    assert (made.slots, made.buffers, made.everything_fits) == (slots, buffers, everything)


@pytest.mark.parametrize("cache_layers", [0, -1])
def test_nothing_can_run_in_no_memory(cache_layers: int) -> None:
    with pytest.raises(
        ConfigurationError, match=f"a cache of {cache_layers} layers is too small; at least 1 has to be"
    ):
        plan(cache_layers)


def test_the_peak_counts_reused_buffers_as_the_largest_chunk() -> None:
    assert plan(1).peak_bytes == LARGE + 100 + 2 * LARGE
    assert plan(2).peak_bytes == LARGE + 100 + 3 * LARGE


def test_the_peak_is_the_sum_where_nothing_is_reused() -> None:
    assert plan(3).peak_bytes == plan(4).peak_bytes == LARGE + 100 + LARGE + 60


def test_a_budget_is_kept_where_it_can_be() -> None:
    total = LARGE + 100 + LARGE + 60
    assert plan(budget_bytes=total).everything_fits
    assert plan(budget_bytes=total - 1).slots == 1
    assert plan(budget_bytes=0).slots == 1
    equal = {"a": 100, "b": 100, "c": 100, "d": 100}
    kinds = dict.fromkeys(equal, "layer")
    made = plan_residency(kinds, equal, [], budget_bytes=399)
    assert (made.slots, made.buffers, made.peak_bytes) == (2, 3, 300)


def test_a_model_of_small_parts_needs_no_buffers_whatever_the_budget() -> None:
    made = plan_residency({"norm": "part"}, {"norm": 100}, [Use("norm", ("norm",))], budget_bytes=0)
    assert (made.buffers, made.peak_bytes, made.everything_fits) == (0, 100, True)


def test_chunks_that_one_module_needs_together_fit_together() -> None:
    sizes = dict.fromkeys("abcd", 100)
    order = [Use("one", ("a", "b", "c")), Use("two", ("d",))]
    assert plan_residency(dict.fromkeys("abcd", "layer"), sizes, order, cache_layers=1).buffers == 3


facts = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=2),
    st.tuples(st.sampled_from(["layer", "part", "own"]), st.integers(0, 3 << 20)),
    min_size=1,
    max_size=8,
)


@given(facts, st.none() | st.integers(1, 9), st.none() | st.integers(0, 30 << 20))
def test_the_sums_are_right(
    facts: dict[str, tuple[str, int]], cache_layers: int | None, budget_bytes: int | None
) -> None:
    kinds = {name: kind for name, (kind, _) in facts.items()}
    sizes = {name: size for name, (_, size) in facts.items()}
    made = plan_residency(kinds, sizes, [], cache_layers=cache_layers, budget_bytes=budget_bytes)
    assert set(made.streamed) | made.pinned == set(sizes)
    assert not set(made.streamed) & made.pinned
    assert made.pinned_bytes + sum(made.streamed.values()) == sum(sizes.values())
    assert made.buffers <= len(made.streamed)
    if cache_layers is not None:
        assert made.slots == min(cache_layers, max(len(made.streamed), 1))
    elif budget_bytes is not None and made.slots > 1:
        assert made.peak_bytes <= budget_bytes
    largest = sorted(made.streamed.values())[-made.buffers :] if made.buffers else []
    assert made.pinned_bytes + sum(largest) <= made.peak_bytes
