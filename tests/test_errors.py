"""The error tree equals the one in its docstring, and every text says what to do."""

import inspect
import re

import pytest

from surfw import errors
from surfw.errors import RefusedError, RemoteProtocolError, SurfwError, UnknownModelError


def drawn_tree() -> dict[str, str]:
    """The errors in the docstring's tree, each with its parent."""
    parents, path = {}, ["SurfwError"]
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ([ │├└─]+)(\w+Error)\b", line):
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            parents[found[2]] = path[depth - 1]
    return parents


def test_the_classes_are_the_tree_that_is_drawn() -> None:
    drawn = drawn_tree()
    defined = {
        name: cls.__base__.__name__
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, SurfwError) and cls is not SurfwError
    }
    assert len(drawn) == 18
    assert defined == drawn
    assert sorted(errors.__all__) == sorted(["SurfwError", "UninitializedWeightsWarning", *drawn])


def test_errors_keep_what_a_program_needs_beside_the_text() -> None:
    assert RemoteProtocolError("no").close_code == 1002
    assert RemoteProtocolError("no", close_code=1009).close_code == 1009
    refused = RefusedError("there is no such chunk", code="unknown-chunk")
    assert (str(refused), refused.code) == ("there is no such chunk", "unknown-chunk")


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("x", [], "here holds no model yet; put one there with 'surfw chunk MODEL'"),
        (None, ["b", "a"], "here holds 2 models; choose one with --model (model=): a, b"),
        ("x", ["b", "a"], "here has no model 'x'; it has: a, b"),
        ("./b", ["b"], "here has no model './b' (a model's name is wanted here, no path); it has: b"),
        ("m", ["b/m", "a/m", "c"], "here has 2 models 'm'; give the name in full: a/m, b/m"),
        ("two", ["org/two", "one"], "here has no model 'two'; it has: one, org/two; did you mean org/two?"),
        ("modle", ["org/model", "x"], "here has no model 'modle'; it has: org/model, x; did you mean org/model?"),
        ("modle", ["org/model"], "here has no model 'modle'; it has: org/model"),
    ],
)
def test_an_unknown_model_names_the_known_ones(name: str | None, known: list[str], text: str) -> None:
    error = UnknownModelError(name, known, where="here")
    assert str(error) == text
    assert error.known == sorted(known)


def test_the_list_of_known_models_stays_readable() -> None:
    known = [f"org/model-{number:04}" for number in range(1000)]
    error = UnknownModelError("x" * 1000, known, where="here")
    assert error.known == known
    assert str(error).endswith("org/model-0049 and 950 more")
    assert len(str(error)) < 1500
