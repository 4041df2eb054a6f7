"""Predicts which experts the next layer will use, by applying its router to the input of this layer's experts.

The residual stream changes little between two layers, so the next router often chooses the same experts for this
layer's input as for its own. A guess costs one small product. It is compared with the router's choice afterwards; only
if guesses are mostly right are they acted upon (`ExpertPool.expect`).

Routers are found by their shape: in the module that holds the experts, a matrix with one row per expert. They are
copied when their layer runs, since they are not in memory when a guess needs them; `afford` accounts for the memory of
the copies.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from surfw.skeleton.experts import ExpertModule


class Foresight:
    """The routers of one model; each is known once its layer has run."""

    def __init__(self, model: nn.Module, modules: Sequence[ExpertModule], afford: Callable[[int], bool]) -> None:
        """Begin without routers.

        Args:
            model: the model that contains the modules.
            modules: in the order in which they run.
            afford: called with the size in bytes of a router's copy; returns whether there is memory for it.
        """
        paths = [one.path for one in modules]
        self._next = dict(zip(paths[:-1], modules[1:], strict=True))
        self._places = {one.path: _router(model, one) for one in modules}
        self._routers: dict[str, torch.Tensor] = {}
        self._afford = afford

    def learn(self, path: str) -> None:
        """Copy the router of a module that runs, unless it was copied before."""
        place = self._places.get(path)
        if path in self._routers or place is None:
            return
        router = getattr(*place).detach()
        if self._afford(router.nbytes):
            self._routers[path] = router.clone()
        else:
            self._places.pop(path)

    def forget(self) -> None:
        """Free the copies of all routers and make no more, as there is too little memory."""
        self._routers.clear()
        self._places.clear()

    @torch.no_grad()
    def guess(self, path: str, inputs: torch.Tensor, chosen: int) -> tuple[str, list[int]] | None:
        """Guess which experts the next module will use for one token.

        Args:
            path: of the module that runs now.
            inputs: the input of its experts, of shape (1, width).
            chosen: how many experts are used per token.

        Returns:
            The path of the next module, and the experts; None if no guess can be made.
        """
        following = self._next.get(path)
        router = self._routers.get(following.path) if following else None
        if following is None or router is None or inputs.shape[-1] != router.shape[-1]:
            return None
        scores = torch.nn.functional.linear(inputs.to(router.dtype).reshape(1, -1), router)[0]
        best: list[int] = scores.topk(min(chosen, following.count)).indices.tolist()
        return following.path, best


def _router(model: nn.Module, experts: ExpertModule) -> tuple[nn.Module, str] | None:
    """The only matrix beside the experts with one row per expert, as its module and name; None if there is not one."""
    parent = model.get_submodule(experts.path.rpartition(".")[0])
    found = [
        (module, leaf)
        for module in parent.modules()
        if module is not experts.module
        for leaf, one in module._parameters.items()  # noqa: SLF001 - torch's registries
        if one is not None and one.dim() == 2 and one.shape[0] == experts.count
    ]
    return found[0] if len(found) == 1 else None
