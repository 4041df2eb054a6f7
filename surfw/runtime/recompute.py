"""Gradients through streamed units: the backward pass runs each unit once more, in reverse order.

A forward pass with gradients keeps only the inputs of each unit. A unit's weights are removed as soon as it has run, so
by the backward pass, their memory would hold other weights. The backward pass loads a unit's weights again, recomputes
its forward from the same inputs with the same random numbers, and takes its gradients before the weights are removed.
So memory holds the activations of one unit at a time, and the inputs of all (T. Chen et al., «Training Deep Nets with
Sublinear Memory Cost», arXiv:1604.06174).

To autograd, a unit is one operation on its inputs and its trainable parameters. The operations inside are those of the
resident model, in the same order, and give the same bits, except for a trainable tensor that several units use: its
gradients are summed unit by unit.
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
    """Makes the units of a model run again in the backward pass, until `detach`.

    Attributes:
        unit_bytes: the most memory that one unit has taken so far while its gradients were computed: what autograd
            saves, and its outputs.
    """

    def __init__(self, hooks: StreamingHooks, before_backward: Callable[[], object]) -> None:
        """Begin; from now on the streamed weights themselves are frozen.

        Args:
            hooks: put the weights in place.
            before_backward: called before the weights of a unit are loaded for its backward pass.
        """
        self.unit_bytes = 0
        self._hooks = hooks
        self._before_backward = before_backward
        self._kept: Counter[_Piece] = Counter()  # how many calls keep each piece of memory
        self._changed: list[nn.Module] = []
        self._is_over = False
        hooks.freeze()
        for path, module in hooks.units:
            assert "forward" not in vars(module), "it is the class's own"
            module.forward = partial(self._run, path, module, module.forward)
            self._changed.append(module)

    def detach(self) -> None:
        """Restore the modules; backward passes that are not finished fail."""
        self._is_over = True
        for module in reversed(self._changed):
            del module.forward
        self._changed.clear()
        self._hooks.thaw()

    @property
    def kept_bytes(self) -> int:
        """Memory of the inputs that are kept for later backward passes."""
        return sum(size for _, size in self._kept)

    def _run(self, path: str, module: nn.Module, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """A unit's forward, as one operation for autograd if any input or parameter requires gradients."""
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
        """Count a unit's memory: its inputs for as long as the call lives, and what autograd would save.

        Args:
            call: one call of the unit.
            inputs: its inputs.
            saved: what autograd asked to save.
            outputs: its outputs.
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
        """Run a unit again, and take the gradients of all inputs and parameters that require them.

        Raises:
            ModelError: the training has ended.
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
            del outputs, pairs  # before the weights are removed
        results = iter(found)
        return [next(results) if one.requires_grad else None for one in [*fresh, *learning]]


@dataclass(eq=False)
class _Call:
    """One call of a unit in a pass with gradients: its arguments and its outputs.

    Attributes:
        inputs: how many of the tensors that autograd sees are inputs; the others are trainable parameters.
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
        """Run the unit with these tensors in place of its original inputs; returns the flattened outputs."""
        given = iter(tensors)
        leaves = [next(given) if one is _TENSOR else one for one in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.shape)
        flat, self.result_shape = tree_flatten(self.forward(*args, **kwargs))
        return flat

    def complete(self, outputs: Sequence[torch.Tensor]) -> Any:
        """The unit's result, with the tensors that autograd tracks."""
        given = iter(outputs)
        return tree_unflatten([next(given) if one is _TENSOR else one for one in self.outputs], self.result_shape)


_TENSOR = object()
"""A placeholder for a tensor."""


class _State:
    """A snapshot of the random number generators and of autocasting, restored when a unit runs again."""

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
        """Restore the snapshot during the body, and the current state afterwards."""
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
    """The memory that autograd asks to save, each piece once. Freed memory may be reused, and then counts again.

    Attributes:
        pieces: all of them. A live piece may appear twice if the tensor that was first seen with it is gone.
    """

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self._seen: dict[_Piece, ref[torch.Tensor]] = {}

    def drop(self, tensor: torch.Tensor) -> None:
        """Count a tensor without keeping it."""
        piece = _piece(tensor)
        before = self._seen.get(piece)
        if before is None or before() is None:
            self._seen[piece] = ref(tensor)
            self.pieces.append(piece)


class _Unit(torch.autograd.Function):
    """A unit as autograd sees it: a function of its inputs and its trainable parameters."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = tensors[: call.inputs]
        saved = _Saved()
        # Gradients are enabled so that torch takes the same paths as for a resident model, but nothing is saved.
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
