"""Gradients through units whose weights come and go: the backward pass runs each unit once more, in reverse.

A forward pass with gradients keeps nothing of a unit but its inputs: its weights go as soon as it has run, so whatever
autograd saved of them would be other weights by then. In the backward pass a unit's weights are brought again, its
forward is computed again from the same inputs with the same random numbers, and its gradients are taken before the
weights go. So memory holds one unit's activations at a time, and the inputs of all (T. Chen et al., «Training Deep Nets
with Sublinear Memory Cost», arXiv:1604.06174).

To autograd a unit is one operation of its inputs and of the parameters in it that learn. The operations inside are the
resident model's, in its order; so are the bits, unless a tensor goes into several units and learns: its gradients are
added up unit by unit.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn
from weakref import finalize, ref

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import Cache

from surfw.errors import ModelError
from surfw.runtime.hooks import StreamingHooks

Forward = Callable[..., Any]


class Recomputing:
    """Has the units of a model run again in the backward pass, until `detach`.

    Attributes:
        unit_bytes: the most that one unit takes while its gradients are computed, as seen so far: what autograd keeps
            of it, and its outputs.
    """

    def __init__(self, hooks: StreamingHooks, before_backward: Callable[[], object]) -> None:
        """Begin; the streamed weights themselves do not learn from now on.

        Args:
            hooks: bring the weights.
            before_backward: is called whenever a unit is to run again, before its weights come.
        """
        self.unit_bytes = 0
        self._hooks = hooks
        self._before_backward = before_backward
        self._kept: Counter[_Piece] = Counter()  # by how many runs each piece of memory is kept
        self._changed: list[nn.Module] = []
        self._is_over = False
        hooks.freeze()
        for path, module in hooks.units:
            assert "forward" not in vars(module), "it is the class's own"
            module.forward = partial(self._run, path, module, module.forward)
            self._changed.append(module)

    def detach(self) -> None:
        """Leave the modules as they were; what is left of a backward pass fails."""
        self._is_over = True
        for module in reversed(self._changed):
            del module.forward
        self._changed.clear()
        self._hooks.thaw()

    @property
    def kept_bytes(self) -> int:
        """What the inputs take that are kept for backward passes to come."""
        return sum(size for _, size in self._kept)

    def _run(self, path: str, module: nn.Module, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """A unit's forward, as one operation for autograd if anything learns from it."""
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves, shape = tree_flatten((args, kwargs))
        learning = [one for one in module.parameters() if one.requires_grad]
        tensors = [one for one in leaves if isinstance(one, torch.Tensor)]
        if not learning and not any(one.requires_grad for one in tensors):
            return forward(*args, **kwargs)
        if any(isinstance(one, Cache) for one in [*args, *kwargs.values()]):
            raise ModelError(
                f"{path} was given a KV cache in a pass with gradients, which would be filled twice, as layers run "
                "again in the backward pass; leave past_key_values and use_cache out, or compute under torch.no_grad()"
            )
        call = _Call(self, path, forward, leaves, shape, inputs=len(tensors))
        return call.complete(_Unit.apply(call, *tensors, *learning))  # type: ignore[no-untyped-call]  # torch's has no types

    def note(
        self, call: "_Call", inputs: Sequence[torch.Tensor], saved: "Sequence[_Piece]", outputs: Sequence[torch.Tensor]
    ) -> None:
        """Count a unit's memory: its inputs for as long as the call lives, and what autograd would keep of it.

        Args:
            call: one run of the unit.
            inputs: of it.
            saved: what autograd asked to keep.
            outputs: of it.
        """
        places = {_piece(one) for one in inputs}
        self._kept.update(places)
        finalize(call, self._let_go, places)
        known = {address for address, _ in places} | self._hooks.addresses(call.path)
        own = sum(size for address, size in saved if address not in known)
        self.unit_bytes = max(self.unit_bytes, own + sum(one.nbytes for one in outputs))

    def _let_go(self, places: "set[_Piece]") -> None:
        for place in places:
            self._kept[place] -= 1
            if not self._kept[place]:
                del self._kept[place]

    def gradients(
        self, call: "_Call", inputs: Sequence[torch.Tensor], learning: Sequence[torch.Tensor], given: Sequence[Any]
    ) -> list[torch.Tensor | None]:
        """Run a unit again, and take its gradients: of those inputs that want one, and of all that learns.

        Raises:
            ModelError: the training is over.
            SurfwError: its weights could not be read.
        """
        if self._is_over:
            raise ModelError(
                f"a backward pass through {call.path} came after its training had ended, when its weights were gone; "
                "call backward() within `with model.training()`"
            )
        self._before_backward()
        with self._hooks.in_place(call.path), call.state.restored(), torch.enable_grad():
            fresh = [one.detach().requires_grad_(one.requires_grad) for one in inputs]
            outputs = [one for one in call.compute(fresh) if isinstance(one, torch.Tensor)]
            wanted = [one for one in [*fresh, *learning] if one.requires_grad]
            pairs = [(out, one) for out, one in zip(outputs, given, strict=True) if out.requires_grad]
            pairs = [(out, one) for out, one in pairs if one is not None]
            found = torch.autograd.grad([out for out, _ in pairs], wanted, [one for _, one in pairs], allow_unused=True)
            del outputs, pairs  # before the weights go
        results = iter(found)
        return [next(results) if one.requires_grad else None for one in [*fresh, *learning]]


@dataclass(eq=False)
class _Call:
    """One run of a unit in a pass with gradients: what it was given, and what comes of it.

    Attributes:
        inputs: how many of the tensors that autograd sees are inputs; the others are parameters that learn.
    """

    owner: Recomputing
    path: str
    forward: Forward
    leaves: list[Any]
    shape: Any
    inputs: int
    state: "_State" = field(init=False)
    outputs: list[Any] = field(init=False)
    result_shape: Any = field(init=False)

    def __post_init__(self) -> None:
        tensors = [one for one in self.leaves if isinstance(one, torch.Tensor)]
        self.state = _State(tensors)
        self.leaves = [_TENSOR if isinstance(one, torch.Tensor) else one for one in self.leaves]

    def compute(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Run the unit on these tensors in the places of those that it was given; what it puts out, flattened."""
        given = iter(tensors)
        leaves = [next(given) if one is _TENSOR else one for one in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.shape)
        flat, self.result_shape = tree_flatten(self.forward(*args, **kwargs))
        return flat

    def complete(self, outputs: Sequence[torch.Tensor]) -> Any:
        """The unit's result, with the tensors that autograd knows."""
        given = iter(outputs)
        return tree_unflatten([next(given) if one is _TENSOR else one for one in self.outputs], self.result_shape)


_TENSOR = object()
"""Stands where a tensor belongs."""


class _State:
    """Random numbers and autocasting as they are now, to be as they were when a unit runs again."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._random = torch.get_rng_state()
        self._kind = next((one.device.type for one in tensors if one.device.type != "cpu"), None)
        self._devices, self._states = get_device_states(*tensors) if self._kind else ([], [])
        self._casts = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", self._kind)
            if kind is not None
        ]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Have them as they were during the body, and as they are now after it."""
        with ExitStack() as stack:
            kind = self._kind or "cuda"
            stack.enter_context(torch.random.fork_rng(self._devices, device_type=kind))
            torch.set_rng_state(self._random)
            if self._devices:
                set_device_states(self._devices, self._states, device_type=kind)
            for one, is_enabled, dtype in self._casts:
                stack.enter_context(torch.autocast(one, dtype=dtype, enabled=is_enabled))
            yield


_Piece = tuple[int, int]
"""A piece of memory: its address and its size."""


def _piece(tensor: torch.Tensor) -> _Piece:
    return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()


class _Saved:
    """What autograd asks to keep: each piece of memory once. Where one is gone, the next may come to lie.

    Attributes:
        pieces: all of them; one that is still there, but is seen by another tensor now, may be there twice.
    """

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self._seen: dict[_Piece, ref[torch.Tensor]] = {}

    def drop(self, tensor: torch.Tensor) -> None:
        """Count a tensor, and keep nothing of it."""
        piece = _piece(tensor)
        before = self._seen.get(piece)
        if before is None or before() is None:
            self._seen[piece] = ref(tensor)
            self.pieces.append(piece)


class _Unit(torch.autograd.Function):
    """A unit, for autograd: a function of its inputs and of the parameters in it that learn."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = tensors[: call.inputs]
        saved = _Saved()
        # With gradients, so that everything goes the way of the resident model, but nothing is kept for them.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saved.drop, _refuse):
            flat = call.compute([one.detach().requires_grad_(one.requires_grad) for one in inputs])
        call.outputs = [_TENSOR if isinstance(one, torch.Tensor) else one for one in flat]
        outputs = [one for one in flat if isinstance(one, torch.Tensor)]
        call.owner.note(call, inputs, saved.pieces, outputs)
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        found = tuple(one.detach() for one in outputs)
        ctx.mark_non_differentiable(*(new for new, one in zip(found, outputs, strict=True) if not one.requires_grad))
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *given: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        call: _Call = ctx.call
        tensors = ctx.saved_tensors
        return None, *call.owner.gradients(call, tensors[: call.inputs], tensors[call.inputs :], given)


def _refuse(_: None) -> NoReturn:
    raise ModelError("gradients were taken within a unit's first run, of which nothing is kept for them")
