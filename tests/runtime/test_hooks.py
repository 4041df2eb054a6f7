"""Weights are loaded before a layer runs and removed afterwards; no computation ever sees missing weights."""

import copy
import inspect
import logging
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import pytest
import torch
from torch import nn

from surfw.errors import ManifestError, ModelError, StorageError
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
    """Its own weights, a list of layers, and a head."""

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
    threads = set(threading.enumerate())
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
    started = set(threading.enumerate()) - threads
    assert [thread.name for thread in started if thread.name.startswith("surfw")] == []


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
    """Like DeBERTa-v2: a module's weights are used by another one, outside of the module's own forward."""

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
    """Uses the view from `Positions` after other layers of the same size have run."""

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


def test_whoever_reads_weights_outside_of_a_forward_gets_copies_and_pins_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "surfw"), streamed(Net) as net:
        expected = raw(net.resident(X))
        assert raw(net.model(X)) == expected
        wait(net.engine.host.loads().values())  # the prefetched chunk has arrived
        plan, held = net.engine.plan, net.engine.resident()
        for (name, there), (_, here) in zip(net.resident.named_parameters(), net.model.named_parameters(), strict=True):
            for read in (torch.detach, torch.clone, lambda one: one.data, copy.copy, copy.deepcopy, torch.sum):
                assert raw(read(here)) == raw(read(there)), name
            assert here.data.numpy().tolist() == there.data.numpy().tolist()
            here.data.zero_()
        state = net.model.state_dict()
        assert {name: raw(one) for name, one in state.items()} == {
            name: raw(one) for name, one in net.resident.state_dict().items()
        }
        assert type(copy.deepcopy(net.model.head.weight)) is nn.Parameter
        assert (net.engine.plan, net.engine.resident(), net.users()) == (plan, held, 0)
        assert all_absent(net.model)
        assert raw(net.model(X)) == expected
    assert caplog.records == []


def test_another_thread_may_read_weights_while_the_model_runs() -> None:
    with streamed(Net) as net:
        found: list[bytes] = []

        def read(*_: Any) -> None:
            reader = threading.Thread(target=lambda: found.append(raw(net.model.head.weight.detach())))
            reader.start()
            reader.join()

        handle = net.model.layers[1].register_forward_hook(read)
        plan = net.engine.plan
        assert raw(net.model(X)) == raw(net.resident(X))
        handle.remove()
        assert found == [raw(net.resident.head.weight)]
        assert net.engine.plan is plan


def replace(model: nn.Module) -> None:
    model.layers[1].linear.weight = nn.Parameter(torch.full((8, 8), 0.25))
    model.head.bias = nn.Parameter(torch.ones(3))


def assign(model: nn.Module) -> None:
    state = {name: torch.full_like(one, 0.5) for name, one in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def adapt(model: nn.Module) -> None:
    """Wrap the streamed module with weights of its own, as LoRA does."""
    torch.manual_seed(1)
    adapter = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))

    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.adapter = base, adapter

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.adapter(x)

    model.layers[2].linear = Adapted(model.layers[2].linear)


@pytest.mark.parametrize("change", [replace, assign, adapt])
@pytest.mark.parametrize("after_a_run", [False, True])
def test_what_is_put_in_the_place_of_a_streamed_weight_is_used_and_stays(
    change: Callable[[nn.Module], None], after_a_run: bool
) -> None:
    with streamed(Net) as net:
        if after_a_run:
            net.model(X)
        before = raw(net.resident(X))
        change(net.resident)
        change(net.model)
        for _ in range(2):
            assert raw(net.model(X)) == raw(net.resident(X)) != before
        net.hooks.recover()
        assert raw(net.model(X)) == raw(net.resident(X))
        kept = [one for one in net.model.parameters() if not isinstance(one, AbsentParameter)]
        net.hooks.detach()
        assert {id(one) for one in kept} <= {id(one) for one in net.model.parameters()}
        assert kept


def test_a_replaced_weight_that_no_forward_has_seen_stays_too() -> None:
    with streamed(Net) as net:
        replace(net.model)
        net.hooks.recover()
        replace(net.resident)
        assert raw(net.model(X)) == raw(net.resident(X))
    with streamed(Net) as net:
        replace(net.model)
    assert raw(net.model.head.bias) == raw(torch.ones(3))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.head.weight.mul_(2),
        lambda model: model.head.weight.__setitem__(0, 1.0),
        lambda model: model.head.weight.__iadd__(1),
        lambda model: setattr(model.head.weight, "data", torch.zeros(3, 8)),
        lambda model: nn.init.normal_(model.head.weight),
        lambda model: torch.add(X, 1, out=model.own),
        lambda model: model.own.copy_(torch.ones(8)),
        lambda model: torch._foreach_mul_([model.own], 2.0),
        lambda model: model.layers[0].norm.running_mean.zero_(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
    ],
)
def test_a_change_in_place_is_refused_and_nothing_changes(change: Callable[[Any], Any]) -> None:
    with streamed(Net) as net:
        with pytest.raises(ModelError, match=r"cannot be changed in place.*module\.weight = torch\.nn\.Parameter"):
            change(net.model)
        assert raw(net.model(X)) == raw(net.resident(X))


def test_a_state_dict_that_would_be_copied_into_it_is_refused() -> None:
    with streamed(Net) as net:
        with pytest.raises(RuntimeError, match="cannot be changed in place"):
            net.model.load_state_dict(net.resident.state_dict())
        assert raw(net.model(X)) == raw(net.resident(X))


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.to("cpu"),
        lambda model: model.cpu(),
        lambda model: model.float(),
        lambda model: model.to(torch.float32),
        lambda model: model.requires_grad_(False),
        lambda model: model.eval(),
    ],
)
def test_a_conversion_to_what_it_is_already_reads_nothing(convert: Callable[[Any], Any]) -> None:
    with streamed(Net) as net:
        assert convert(net.model.head) is net.model.head
        assert all_absent(net.model)
        assert net.source.reads == []


def test_a_weight_that_is_taken_out_of_its_module_is_an_error_that_says_so() -> None:
    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    with streamed(Net) as net:
        nn.utils.parametrize.register_parametrization(net.model.head, "weight", Doubled(), unsafe=True)
        with pytest.raises(ModelError, match=r"head\.weight of toy has been taken out of its module, as a parametriz"):
            net.model(X)
        assert net.users() == 0


def test_tying_again_what_is_tied_changes_nothing() -> None:
    with streamed(Net) as net:
        net.model.head.weight = net.model.head.weight
        assert raw(net.model(X)) == raw(net.resident(X))
        assert all_absent(net.model)


def test_a_streamed_model_cannot_be_copied() -> None:
    with streamed(Net) as net, pytest.raises(ModelError, match="toy cannot be copied, as its weights are elsewhere"):
        copy.deepcopy(net.model)


REAL = torch.arange(12, dtype=torch.float32).reshape(3, 4) - 5


class Loads:
    """Counts how often the real tensor was requested."""

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
