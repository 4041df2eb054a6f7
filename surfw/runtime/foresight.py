"""Which experts the next layer will use: its own router, applied to what this layer's experts compute with.

Between two layers the residual stream changes little, so the next router often chooses from this layer's input what it
will choose from its own. The guess costs one small product. What it is worth is seen when that router has chosen: only
guesses that are mostly right are acted upon (`ExpertPool.expect`).

Routers are found by their shape: in the module that holds the experts, a matrix with a row for each of them. They are
copied when their layer runs, as they are not in memory when they are asked for; whoever keeps them has the memory for
them counted.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from surfw.skeleton.experts import ExpertModule


class Foresight:
    """The routers of one model, each known once its layer has run."""

    def __init__(self, model: nn.Module, modules: Sequence[ExpertModule], afford: Callable[[int], bool]) -> None:
        """Know no router yet.

        Args:
            model: holds the modules.
            modules: in the order in which they run.
            afford: asked for memory for a copy of a router, in bytes; says whether there is any.
        """
        paths = [one.path for one in modules]
        self._next = dict(zip(paths[:-1], modules[1:], strict=True))
        self._places = {one.path: _router(model, one) for one in modules}
        self._routers: dict[str, torch.Tensor] = {}
        self._afford = afford

    def learn(self, path: str) -> None:
        """Copy the router of a module that runs, if that was not done yet."""
        place = self._places.get(path)
        if path in self._routers or place is None:
            return
        router = getattr(*place).detach()
        if self._afford(router.nbytes):
            self._routers[path] = router.clone()
        else:
            self._places.pop(path)

    def forget(self) -> None:
        """Give the copies of all routers back, and make no more: there is too little memory."""
        self._routers.clear()
        self._places.clear()

    @torch.no_grad()
    def guess(self, path: str, inputs: torch.Tensor, chosen: int) -> tuple[str, list[int]] | None:
        """The module that runs after this one, and the experts that it will use for one token.

        Args:
            path: of the module that runs now.
            inputs: what its experts compute with, of shape (1, width).
            chosen: how many experts compute a token.

        Returns:
            None where no guess can be made.
        """
        following = self._next.get(path)
        router = self._routers.get(following.path) if following else None
        if following is None or router is None or inputs.shape[-1] != router.shape[-1]:
            return None
        scores = torch.nn.functional.linear(inputs.to(router.dtype).reshape(1, -1), router)[0]
        best: list[int] = scores.topk(min(chosen, following.count)).indices.tolist()
        return following.path, best


def _router(model: nn.Module, experts: ExpertModule) -> tuple[nn.Module, str] | None:
    """The one matrix beside the experts with a row for each, as its module and name; None if there is no such one."""
    parent = model.get_submodule(experts.path.rpartition(".")[0])
    found = [
        (module, leaf)
        for module in parent.modules()
        if module is not experts.module
        for leaf, one in module._parameters.items()  # noqa: SLF001 - torch's registries
        if one is not None and one.dim() == 2 and one.shape[0] == experts.count
    ]
    return found[0] if len(found) == 1 else None
