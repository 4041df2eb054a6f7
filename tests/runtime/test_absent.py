"""An absent weight tells its facts and computes with the real one, never with nothing."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from surfw.runtime.hooks import AbsentBuffer, AbsentParameter

REAL = torch.arange(12, dtype=torch.float32).reshape(3, 4) - 5


class Loads:
    """Counts how often the real tensor was asked for."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> torch.Tensor:
        self.count += 1
        return REAL


@pytest.fixture(params=[AbsentParameter, AbsentBuffer])
def absent(request: pytest.FixtureRequest) -> Any:
    loads = Loads()
    made = request.param(torch.empty(3, 4, device="meta"), loads)
    made.loads = loads
    return made


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (lambda a: tuple(a.shape), (3, 4)),
        (lambda a: a.size(1), 4),
        (lambda a: a.dtype, torch.float32),
        (lambda a: a.device, torch.device("cpu")),
        (lambda a: a.dim(), 2),
        (lambda a: a.ndim, 2),
        (lambda a: a.numel(), 12),
        (lambda a: a.nbytes, 48),
        (lambda a: a.stride(), (4, 1)),
        (lambda a: a.requires_grad, False),
        (lambda a: a.is_floating_point(), True),
        (lambda a: a.is_contiguous(), True),
        (lambda a: a.element_size(), 4),
        (lambda a: a.is_meta, False),
        (lambda a: a.is_cuda, False),
        (lambda a: a.layout, torch.strided),
        (lambda a: a.grad, None),
        (lambda a: a.detach_() is a, True),
        (lambda a: a.share_memory_() is a, True),
        (lambda a: nn.ParameterList([a]).share_memory()[0] is a if isinstance(a, nn.Parameter) else True, True),
        (len, 3),
        (lambda a: len({a, a}), 1),
        (repr, "<absent weight, torch.float32, (3, 4)>"),
    ],
)
def test_facts_are_free(absent: Any, ask: Callable[[Any], Any], answer: Any) -> None:
    assert ask(absent) == answer
    assert absent.loads.count == 0


@pytest.mark.parametrize(
    "compute",
    [
        lambda a: a + 1,
        lambda a: 2 * a,
        lambda a: a @ a.T,
        lambda a: a[1:, 2],
        lambda a: a == 3.0,
        lambda a: a.sum(),
        lambda a: a.detach(),
        lambda a: a.data,
        lambda a: a.T,
        lambda a: a.mT,
        lambda a: a.clone(),
        lambda a: a.view(-1),
        lambda a: a.to(torch.bfloat16),
        lambda a: a.half(),
        lambda a: a.contiguous(),
        lambda a: torch.stack([a, a]),
        lambda a: torch.cat((a, torch.ones(1, 4))),
        lambda a: torch.equal(a, REAL),
        lambda a: nn.functional.linear(torch.ones(2, 4), a),
        lambda a: nn.functional.linear(input=torch.ones(2, 4), weight=a),
        lambda a: nn.functional.embedding(torch.tensor([2, 0]), a),
        lambda a: torch.where(a > 0, a, -a),
        lambda a: a.tolist(),
        lambda a: a[0, 0].item(),
        lambda a: list(a.numpy().reshape(-1)),
        lambda a: [row.sum() for row in a],
        lambda a: a.untyped_storage().nbytes(),
    ],
)
def test_computing_brings_the_values(absent: Any, compute: Callable[[Any], Any]) -> None:
    expected, given = compute(REAL), compute(absent)
    if isinstance(expected, torch.Tensor):
        assert given.dtype == expected.dtype
        assert torch.equal(given, expected)
    else:
        assert given == expected
    assert absent.loads.count >= 1


def test_what_can_be_had_without_the_whole_is_not_brought() -> None:
    asked, loads = [], Loads()

    def apply(function: Any, args: Any, kwargs: Any) -> Any:
        asked.append(function)
        return NotImplemented if function is nn.functional.linear else "a part of it"

    weight: Any = AbsentParameter(torch.empty(3, 4, device="meta"), loads, apply)
    ids, given = torch.tensor([2, 0]), torch.ones(2, 4)
    assert nn.functional.embedding(ids, weight) == "a part of it"
    assert nn.functional.embedding(input=ids, weight=weight) == "a part of it"
    assert loads.count == 0
    assert torch.equal(nn.functional.linear(given, weight), nn.functional.linear(given, REAL))
    assert loads.count == 1
    assert torch.equal(weight + 1, REAL + 1)
    assert weight.shape == (3, 4)
    assert asked == [nn.functional.embedding, nn.functional.embedding, nn.functional.linear]


def test_it_is_what_a_module_expects() -> None:
    module = nn.Linear(4, 3, bias=False, device="meta")
    loads = Loads()
    parameter = AbsentParameter(module.weight, loads)
    module.weight = parameter
    assert isinstance(parameter, nn.Parameter)
    assert list(module.parameters()) == [parameter] or next(module.parameters()) is parameter
    assert loads.count == 0
    assert torch.equal(module(torch.ones(1, 4)), nn.functional.linear(torch.ones(1, 4), REAL))
    assert loads.count >= 1


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, lambda a: pickle.loads(pickle.dumps(a))])
def test_a_copy_has_values(absent: Any, make: Callable[[Any], Any]) -> None:
    copied = make(absent)
    assert torch.equal(copied + 0, REAL)
    if make is not copy.copy:
        assert type(copied) in {torch.Tensor, nn.Parameter}


def test_what_it_stands_on_refuses_to_compute() -> None:
    with pytest.raises(RuntimeError), torch._C.DisableTorchFunctionSubclass():
        AbsentParameter(torch.empty(3, 4, device="meta"), Loads()).tolist()
