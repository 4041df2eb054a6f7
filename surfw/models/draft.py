"""A draft that a model opened itself, and the memory budget that both share.

The draft is fully resident, because it runs several times for each pass of the model. Its memory, including its KV
cache, is taken from the model's budget while the draft is open. So total memory never exceeds the budget, and
`memory_budget` stays what the user gave.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from surfw.config import format_size
from surfw.errors import ConfigurationError
from surfw.models.assembly import ModelParts
from surfw.runtime.plan import BudgetTooSmallError

if TYPE_CHECKING:
    from surfw.models.base import StreamingBaseModel

OWN_FORM = "self:"
"""Prefix of a draft's name that stands for another form of the model itself."""


class OwnDraft:
    """A draft opened for one model, within that model's budget.

    Attributes:
        model: the draft.
        name: its name in messages and statistics: `self:int4`, or the name of another model.
        total_bytes: the budget of both; None if the model uses `cache_size`, and the draft has its own budget.
    """

    def __init__(
        self, parts: ModelParts, open_draft: "Callable[[int | None], StreamingBaseModel]", shown: str | None = None
    ) -> None:
        """Shrink the model to its least budget, open the draft with the rest, then divide the budget.

        `shown` is the draft's name in messages and statistics; None for its name in the source.

        Raises:
            ConfigurationError: the budget is too small for both.
            SurfwError: the draft cannot be opened.
        """
        self._name, self._engine, self._shown = parts.manifest.name, parts.engine, shown
        self._given_bytes: int | None = None
        self._rests = False
        self.total_bytes = self._engine.limit.budget_bytes
        opened = None
        try:
            if self.total_bytes is not None:
                self._engine.reserve(0)
                self._relimit(self._engine.least_budget_bytes)
            opened = self.model = self._open(open_draft)
            self.share(0, 0)
        except BaseException:
            if opened is not None:
                opened.close()
            self._give_back()
            raise

    def _open(self, open_draft: "Callable[[int | None], StreamingBaseModel]") -> "StreamingBaseModel":
        free_bytes = self._free_bytes()
        try:
            return open_draft(free_bytes)
        except BudgetTooSmallError as exc:
            if free_bytes is None:
                raise
            needed = self._engine.least_budget_bytes + exc.least_bytes
            raise ConfigurationError(
                f"the draft cannot be opened with the {format_size(free_bytes)} that {self._name} leaves of the memory "
                f"budget of {format_size(self.total_bytes or 0)}: both need over {format_size(needed)}; give more "
                "memory, or a smaller draft"
            ) from exc

    @property
    def name(self) -> str:
        """See the class."""
        return self._shown or self.model.manifest.name

    def share(self, prompt_tokens: int, new_tokens: int) -> None:
        """Give the draft the memory it needs for a generation, and the model the rest.

        Raises:
            ConfigurationError: the budget is too small for both.
        """
        if self.total_bytes is None:
            return
        try:
            self.model.leave_room(prompt_tokens, new_tokens)
        except ConfigurationError as exc:
            raise self._too_small() from exc
        if not self.model.plan.everything_fits:
            raise self._too_small()
        self._note_what_was_given_back()
        self._engine.reserve(0)
        self._relimit(self.total_bytes - self._taken_bytes)

    def reading_without(self) -> float:
        """Bytes that the model would read per pass with the whole budget, as a fraction of what it reads now."""
        now = self._engine.plan.bytes_per_pass
        if self.total_bytes is None or now == 0:
            return 1.0
        limit = replace(self._engine.limit, budget_bytes=self.total_bytes)
        return self._engine.plan_with(limit).bytes_per_pass / now

    def rest(self) -> None:
        """Shrink the draft to its least budget during a generation, and give the model the rest.

        Called between two passes; the draft must be closed after the generation.
        """
        if self.total_bytes is None:
            return
        self._note_what_was_given_back()
        self._rests = True
        parts = self.model._open_here()  # noqa: SLF001 - ours
        parts.hooks.end_run()  # else resident chunks count as in use until the end of the generation
        self.model.memory_budget = parts.engine.least_budget_bytes
        self._relimit(self.total_bytes - self._taken_bytes)

    def _note_what_was_given_back(self) -> None:
        """Lower the total by what the model gave back under memory pressure (`pressure`); it is not reclaimed."""
        now = self._engine.limit.budget_bytes
        if self._given_bytes is not None and now is not None and self.total_bytes is not None:
            self.total_bytes -= max(0, self._given_bytes - now)
        self._given_bytes = now

    def change_budget(self, total_bytes: int) -> None:
        """Change the budget of both.

        Raises:
            ConfigurationError: it is too small for both; nothing changes.
        """
        self._relimit(total_bytes - self._taken_bytes)
        self.total_bytes = total_bytes
        if not self._rests:
            self.model.memory_budget = max(self._taken_bytes, self._free_bytes() or 0)

    def close(self) -> None:
        """Close the draft, and give the model the whole budget."""
        self._note_what_was_given_back()
        self.model.close()
        self._give_back()

    @property
    def _taken_bytes(self) -> int:
        return self.model.plan.peak_bytes + self.model.plan.reserved_bytes

    def _free_bytes(self) -> int | None:
        return None if self.total_bytes is None else max(1, self.total_bytes - self._engine.least_budget_bytes)

    def _give_back(self) -> None:
        if self.total_bytes is not None:
            self._relimit(self.total_bytes)

    def _relimit(self, budget_bytes: int) -> None:
        if budget_bytes != self._engine.limit.budget_bytes:
            self._engine.relimit(replace(self._engine.limit, budget_bytes=max(1, budget_bytes)))
        self._given_bytes = budget_bytes

    def _too_small(self) -> ConfigurationError:
        least = self._engine.least_budget_bytes
        needed = least + sum(self.model.plan.sizes.values())
        return ConfigurationError(
            f"the draft {self.name} does not fit beside {self._name} into a memory budget of "
            f"{format_size(self.total_bytes or 0)}: as a draft has to be in memory as a whole, both need over "
            f"{format_size(needed)}; give more memory, or a smaller draft"
        )
