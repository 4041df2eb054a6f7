"""Weights come before a layer runs and go afterwards; whatever happens, and nothing of the hooks is left in the end."""

import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from surfw.errors import ManifestError, StorageError
from surfw.runtime.absent import AbsentBuffer, AbsentParameter
from surfw.runtime.hooks import StreamingHooks
from tests.runtime.nets import Streamed, describe, raw, skeleton_of, streamed

X = torch.linspace(-1, 1, 2 * 8).reshape(2, 8)


class Block(nn.Module):
    """A layer with a buffer that is part of the checkpoint, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("shift", torch.zeros(8), persistent=False)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return x + scale * torch.relu(self.norm(self.linear(x)))


class Net(nn.Module):
    """Weights of its own, a list of layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(8) if torch.get_default_device().type == "cpu" else torch.empty(8))
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.head(x + self.own)


def all_absent(model: nn.Module) -> bool:
    tensors = [*model.parameters(), *(b for name, b in model.named_buffers() if "shift" not in name)]
    return all(isinstance(tensor, AbsentParameter | AbsentBuffer) for tensor in tensors)


@pytest.mark.parametrize("cache_layers", [1, 2, None])
def test_the_bits_are_those_of_the_resident_model_and_nothing_stays_in_place(cache_layers: int | None) -> None:
    with streamed(Net, cache_layers=cache_layers) as net:
        expected = net.resident(X)
        for _ in range(3):
            assert raw(net.model(X)) == raw(expected)
            assert all_absent(net.model)
            assert net.users() == 0


def test_detaching_leaves_the_model_exactly_as_it_was() -> None:
    with torch.device("meta"):
        model = Net().eval()
    before = {name: list(vars(module)) for name, module in model.named_modules()}
    tensors = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    signature = inspect.signature(model.layers[0].forward)

    def build() -> nn.Module:
        return model if torch.get_default_device().type == "meta" else Net()

    with streamed(build) as net:
        assert net.model is model
        assert all_absent(model)
        assert inspect.signature(model.layers[0].forward) == signature
        assert model.layers[0]._forward_pre_hooks
        net.model(X)
    assert {name: list(vars(module)) for name, module in model.named_modules()} == before
    assert {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]} == tensors
    for module in model.modules():
        hooks = {name: kept for name, kept in vars(module).items() if "hooks" in name}
        assert len(hooks) >= 8
        assert not any(hooks.values()), hooks
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("surfw")] == []


def fail_once(net: Streamed, name: str) -> None:
    left = {name}

    def before(read: Any) -> None:
        if read.chunk.name in left:
            left.remove(read.chunk.name)
            raise StorageError("the disk sneezed")

    net.source.before_fetch = before


def test_a_source_that_fails_once_fails_one_forward() -> None:
    with streamed(Net) as net:
        fail_once(net, "*")
        with pytest.raises(StorageError, match="the disk sneezed"):
            net.model(X)
        assert all_absent(net.model)
        assert net.users() == 0
        assert raw(net.model(X)) == raw(net.resident(X))


def test_an_error_in_a_forward_gives_the_weights_back() -> None:
    with streamed(Net) as net:
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            net.model(torch.ones(2, 7))
        assert all_absent(net.model)
        assert net.users() == 0
        assert raw(net.model(X)) == raw(net.resident(X))


def test_after_an_interrupt_the_model_can_be_put_in_order() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with streamed(Net) as net:
        handle = net.model.layers[2].norm.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            net.model(X)
        handle.remove()
        assert net.users() > 0
        assert not all_absent(net.model)
        net.hooks.recover()
        assert net.users() == 0
        assert all_absent(net.model)
        assert raw(net.model(X)) == raw(net.resident(X))
        net.hooks.detach()
        net.hooks.recover()
        assert not all_absent(net.model)


class OutsideUse(nn.Module):
    """As DeBERTa-v2: the weights of one module are used by another one, outside of the forward of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(8, width)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) + self.table.weight[:, :8].sum(0)
        return nn.functional.linear(x, self.table.weight.T)


@pytest.mark.parametrize(("width", "messages"), [(8, 0), (40_000, 1)])
def test_weights_used_outside_of_their_module_come_and_stay(
    caplog: pytest.LogCaptureFixture, width: int, messages: int
) -> None:
    def build() -> nn.Module:
        return OutsideUse(width)

    with caplog.at_level(logging.WARNING, "surfw"), streamed(build) as net:
        assert net.model.table.weight.shape == (8, width)
        assert net.source.reads == []
        for _ in range(2):
            assert raw(net.model(X)) == raw(net.resident(X))
        assert "table" in net.engine.resident()
        assert net.source.reads.count("table") == 1
    texts = [record.getMessage() for record in caplog.records]
    assert texts == ["toy uses weights of table outside of its forward; they stay in memory (1.3 MB)"] * messages


class Positions(nn.Module):
    """Returns a view of its own weights, not a copy of them."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(300_000) if torch.get_default_device().type == "cpu" else torch.empty(300_000)
        )
        self.wrap = wrap

    def forward(self) -> Any:
        return self.wrap(self.weight[:8])


class ReturnsViews(nn.Module):
    """Uses what `Positions` returned after layers as large as it have run."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any], unwrap: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.positions = Positions(wrap)
        self.layers = nn.ModuleList(nn.Linear(8, 40_000) for _ in range(3))
        self.unwrap = unwrap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = self.positions()
        for layer in self.layers:
            x = layer(x)[:, :8]
        return x + self.unwrap(positions)


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda view: view, lambda given: given),
        (lambda view: (1, [view]), lambda given: given[1][0]),
        (lambda view: {"a": {"b": view}}, lambda given: given["a"]["b"]),
    ],
    ids=["tensor", "tuple", "dict"],
)
def test_a_module_that_returns_its_weights_keeps_them(wrap: Any, unwrap: Any, caplog: pytest.LogCaptureFixture) -> None:
    def build() -> nn.Module:
        return ReturnsViews(wrap, unwrap)

    with caplog.at_level(logging.WARNING, "surfw"), streamed(build) as net:
        for _ in range(3):
            assert raw(net.model(X)) == raw(net.resident(X))
        assert "positions" in net.engine.resident()
        assert net.source.reads.count("positions") == 1
    assert len(caplog.records) == 1


def test_a_unit_that_the_order_forgets_is_refused() -> None:
    resident = Net().eval()
    with torch.device("meta"):
        model = Net().eval()
    manifest, _ = describe(model, resident.state_dict())
    object.__setattr__(manifest, "order", manifest.order[:-1])
    engine: Any = None
    with pytest.raises(ManifestError, match="the manifest of toy does not say when head runs; chunk it again"):
        StreamingHooks(skeleton_of(model), manifest, engine)
