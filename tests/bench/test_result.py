"""Figures of several rounds, and the machine they come from."""

from surfw.bench.result import describe_machine, summarise, summarise_rates


def test_rounds_become_a_median_and_its_spread() -> None:
    assert summarise([3.0, 1.0, 8.0]) == (3.0, 1.0, 8.0, (3.0, 1.0, 8.0))
    assert summarise([2.0]) == (2.0, 2.0, 2.0, (2.0,))
    assert summarise_rates(6_000_000_000, [3.0, 2.0, 6.0]) == (2.0, 1.0, 3.0, (2.0, 3.0, 1.0))


def test_the_machine_names_libraries_that_are_there() -> None:
    machine = describe_machine("pytest", "no-such-library")
    assert {"cpu", "cores", "memory", "system", "python", "surfw", "torch", "pytest"} <= machine.keys()
    assert "no-such-library" not in machine
