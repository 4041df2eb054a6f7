"""Which experts stay: those chosen most and most recently, within the budget; experts in use are never evicted."""

from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.runtime.expert_table import HALF_LIFE, Decision, ExpertTable, Key

SIZES = {"a": 10, "b": 10}


def run(table: ExpertTable, module: str, *used: int) -> Decision:
    """Run a forward of a module that uses each of these experts for one token."""
    keys = [(module, index) for index in used]
    table.note(module, [int(index in used) for index in range(8)])
    decision = table.use(keys)
    for key in decision.load:
        table.loaded(key)
    gone = table.let_go(keys)
    return Decision(decision.evict + gone.evict, decision.load)


def test_what_is_chosen_most_stays() -> None:
    table = ExpertTable(SIZES, 30)
    for _ in range(5):
        run(table, "a", 0)
    run(table, "a", 1)
    run(table, "a", 2)
    assert run(table, "a", 3) == Decision([("a", 1)], [("a", 3)])
    assert run(table, "a", 4) == Decision([("a", 2)], [("a", 4)])
    assert run(table, "a", 0) == Decision([], []), "it is still there"


def test_the_least_worthy_of_all_modules_makes_way() -> None:
    table = ExpertTable(SIZES, 20)
    run(table, "a", 0)
    run(table, "b", 0)
    run(table, "b", 0)
    assert run(table, "b", 1) == Decision([("a", 0)], [("b", 1)])


def test_what_was_popular_long_ago_makes_way() -> None:
    table = ExpertTable(SIZES, 20)
    for _ in range(50):
        run(table, "a", 0)
    for _ in range(10 * HALF_LIFE):
        run(table, "a", 1)
    run(table, "a", 2)
    assert ("a", 0) not in table
    assert ("a", 1) in table


def test_what_is_in_use_stays_beyond_the_budget_until_it_is_let_go() -> None:
    table = ExpertTable(SIZES, 20)
    first = [("a", 0), ("a", 1)]
    assert table.use(first).load == first
    second = [("b", 0)]
    assert table.use(second) == Decision([], second)
    assert table.held_bytes == 30
    for key in (*first, *second):
        table.loaded(key)
    assert len(table.let_go(first).evict) == 1
    assert table.held_bytes == 20


def test_a_smaller_budget_holds_at_once() -> None:
    table = ExpertTable(SIZES, 40)
    for index in range(4):
        run(table, "a", index)
    run(table, "a", 3)
    assert len(table.adopt(15).evict) == 3
    assert ("a", 3) in table


def test_what_is_remembered_comes_first() -> None:
    table = ExpertTable(SIZES, 20)
    table.remember("a", [0.0, 4.0, 1.0])
    table.remember("b", [2.0])
    assert table.counts("a", 3) == [0.0, 4.0, 1.0]
    assert table.worthiest() == [("a", 1), ("b", 0)]
    assert table.admit(table.worthiest()) == Decision([], [("a", 1), ("b", 0)])
    assert table.worthiest() == []


@settings(max_examples=60, deadline=None)
@given(
    st.integers(3, 8),
    st.lists(
        st.tuples(st.sampled_from(sorted(SIZES)), st.sets(st.integers(0, 7), min_size=1, max_size=3)), max_size=80
    ),
)
def test_the_budget_holds_and_what_is_used_is_there(places: int, uses: list[tuple[str, set[int]]]) -> None:
    table, there = ExpertTable(SIZES, 10 * places), set[Key]()
    for module, used in uses:
        keys = [(module, index) for index in sorted(used)]
        table.note(module, [int(index in used) for index in range(8)])
        decision = table.use(keys)
        assert set(decision.evict) <= there - set(keys)
        assert not set(decision.load) & there
        there = (there - set(decision.evict)) | set(decision.load)
        assert set(keys) <= there
        assert table.held_bytes == 10 * len(there) <= table.budget_bytes
        assert all(key in table for key in there)
        for key in decision.load:
            table.loaded(key)
        there -= set(table.let_go(keys).evict)
