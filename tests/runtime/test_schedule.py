"""What runs next: first predicted from the manifest's order, then from what was observed."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surfw.manifest import Use
from surfw.runtime.plan import Needs
from surfw.runtime.schedule import Phases, Schedule


def schedule_of(order: Sequence[str]) -> Schedule:
    return Schedule([Use(module, (module,)) for module in order])


def upcoming(schedule: Schedule, count: int) -> list[str]:
    return list(schedule.upcoming(count))


def run(schedule: Schedule, modules: str) -> None:
    for module in modules:
        schedule.observe(module)


def test_the_order_of_the_manifest_is_a_cycle() -> None:
    schedule = schedule_of(["a", "b", "c"])
    assert upcoming(schedule, 5) == ["a", "b", "c", "a", "b"]
    schedule.observe("b")
    assert upcoming(schedule, 3) == ["c", "a", "b"]


def test_nothing_is_known_of_an_empty_order() -> None:
    schedule = schedule_of([])
    assert upcoming(schedule, 3) == []
    schedule.observe("x")
    assert upcoming(schedule, 3) == []


def test_a_module_outside_of_the_order_is_learned() -> None:
    schedule = schedule_of(["a", "b"])
    run(schedule, "axbaxb")
    assert upcoming(schedule, 4) == ["a", "x", "b", "a"]


def test_another_order_replaces_the_manifests() -> None:
    schedule = schedule_of(["a", "b", "c"])
    run(schedule, "acbacb")
    assert upcoming(schedule, 6) == ["a", "c", "b", "a", "c", "b"]


def test_phases_are_told_apart_by_what_ran_before() -> None:
    """T5: an embedding (s) leads into the encoder (e, f) once, then into a cycle of decoder (d, g) and head (h)."""
    schedule = schedule_of(list("sefdgh"))
    run(schedule, "sef" + "sdgh" * 2)
    assert upcoming(schedule, 8) == list("sdghsdgh")
    run(schedule, "sef")
    assert upcoming(schedule, 5) == list("sdghs")


def test_a_layer_that_runs_many_times() -> None:
    """ALBERT: one layer (l), four times, between an embedding (e) and a pooler (p)."""
    schedule = schedule_of(list("elp"))
    run(schedule, "ellllp" * 2)
    assert upcoming(schedule, 2) == ["e", "l"]
    run(schedule, "el")
    assert upcoming(schedule, 1) == ["l"]


@given(st.permutations("abcdefgh"), st.integers(1, 8), st.integers(0, 8))
def test_any_cycle_is_learned(modules: list[str], length: int, further: int) -> None:
    cycle = modules[:length]
    seen = [*cycle * 3, *cycle[:further]]
    schedule = schedule_of(list("abcdefgh"))
    run(schedule, "".join(seen))
    assert upcoming(schedule, 10) == [cycle[(len(seen) + step) % length] for step in range(10)]


@pytest.mark.parametrize("count", [0, 1, 16])
def test_as_many_as_are_asked_for(count: int) -> None:
    assert len(list(islice(schedule_of(["a", "b"]).upcoming(count), 20))) == count


def test_the_chunks_of_the_next_modules_come_once_each_and_without_tables_that_rows_are_looked_up_in() -> None:
    order = [
        Use("embed", ("table",)),
        Use("one", ("a", "shared")),
        Use("two", ("b", "shared")),
        Use("head", ("table",)),
    ]
    schedule = Schedule(order, row_wise={"embed"})
    assert list(schedule.upcoming_chunks(())) == ["table", "a", "shared", "b"]
    assert list(schedule.upcoming_chunks({"table"})) == ["a", "shared", "b", "table"], "the head needs the whole of it"
    schedule.observe("one")
    assert list(schedule.upcoming_chunks({"table"})) == ["b", "shared", "table", "a"]


def test_needs_get_the_chunks_before_the_cycle_and_in_it_but_for_those_that_stay_anyway() -> None:
    order = [Use("encoder", ("e", "norm")), Use("embed", ("table",)), Use("decoder", ("d", "norm"))]
    schedule = Schedule(order, Phases(once=("encoder",), cycle=("embed", "decoder")), row_wise={"embed"})
    needs = Needs(name="toy", sizes=dict.fromkeys(("e", "d", "norm", "table"), 1), fixed=frozenset({"norm"}))
    scheduled = schedule.apply_to(needs)
    assert (scheduled.before, scheduled.cycle) == (("e",), ("table", "d"))
    assert schedule.apply_to(replace(needs, tables=frozenset({"table"}))).cycle == ("d",)
    assert schedule.starts_cycle("embed")
    assert not schedule.starts_cycle("encoder")
    schedule.observe("embed")
    assert schedule.next_uses(needs) == {"d": 0, "table": 1}
