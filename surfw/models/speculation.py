"""Speculative decoding: guesses at the next tokens, which one pass over the layers checks together.

While weights stream, a pass costs nearly the same for eight tokens as for one. Guessing and checking are transformers'
assisted generation; guesses come from earlier text (prompt lookup) or from a smaller model, the draft. A guess that the
model would not have made is dropped, so greedy answers match plain decoding wherever transformers' own do.

This module measures the passes, and pauses guessing if it does not pay (`pace`). The memory of a draft that the model
opened is part of the model's budget, so such a draft must beat plain passes of a model that has the whole budget. If it
does not, it frees its memory, and guessing is off until `speculate` is called again.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

import torch
from transformers.generation.candidate_generator import CandidateGenerator

from surfw.errors import ConfigurationError
from surfw.metrics import Metrics
from surfw.models.pace import MOST_LOST, Pace
from surfw.models.read_ahead import expect_vocabularies

if TYPE_CHECKING:
    from surfw.models.base import StreamingBaseModel
    from surfw.models.draft import OwnDraft

T = TypeVar("T")

_MOST_LOST_BY_DRAFT = 2.0
"""Plain passes that a draft may lose before it frees its memory, which is final."""

DRAFT_TOKENS = 5
"""How many tokens a draft guesses at first; transformers' schedule increases it while all of them are right."""

_OTHER_WAYS = frozenset(
    {
        "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate", "constraints",
        "force_words_ids", "penalty_alpha", "stop_strings", "stopping_criteria", "past_key_values", "cache",
        "assistant_ensemble_weight",
    }
)  # fmt: skip
"""Arguments of `generate()` that exclude speculation."""

_MAKER = "_get_candidate_generator"


class SpeculationFacts(TypedDict):
    """Results of speculation over all generations of a model, without the first and last pass of each.

    `acceptance` is the fraction of right guesses; None without guesses. The seconds per token are for passes with
    guesses and for plain ones; None if there were none. `switched_off` says whether the last generation ended without
    guessing because it did not pay; it stays True once a draft has freed its memory.
    """

    kind: Literal["prompt_lookup", "draft"]
    draft: str | None
    guessed_tokens: int
    accepted_tokens: int
    acceptance: float | None
    passes: int
    guessed_passes: int
    seconds_per_token_with: float | None
    seconds_per_token_without: float | None
    switched_off: bool


@dataclass
class _Counts:
    """Totals of passes of one kind."""

    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        self.passes += 1
        self.tokens += tokens
        self.seconds += seconds

    @property
    def seconds_per_token(self) -> float | None:
        return self.seconds / self.tokens if self.tokens else None


class Speculation:
    """Speculation in the generations of a model.

    Attributes:
        is_over: whether the draft did not pay for its memory, which ends speculation.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        prompt_lookup: int | None = None,
        draft: "StreamingBaseModel | None" = None,
        own: "OwnDraft | None" = None,
    ) -> None:
        """Guess tokens from the text so far, or with a draft.

        Args:
            metrics: the model's metrics; the span `stall` is the time it waited for weights.
            prompt_lookup: the most tokens to guess from the text so far.
            draft: the draft model.
            own: the draft's share of the memory, if it is part of the model's budget.
        """
        self.is_over = False
        self._metrics, self._prompt_lookup, self._draft, self._own = metrics, prompt_lookup, draft, own
        self._draft_name = None if draft is None else (own or draft.manifest).name
        self._costs_memory = False
        self._plain, self._guessed = _Counts(), _Counts()
        self._guesses = self._accepted = 0
        self._stalled = 0.0  # seconds, before this pass
        self._pace = Pace()

    def begin(self, prompt_tokens: int, new_tokens: int) -> bool:
        """Prepare for a generation of one sequence; return False if it is to run without guesses.

        Raises:
            ConfigurationError: the budget is too small for the model and its draft.
        """
        if self.is_over:
            return False
        if self._own is not None:
            self._own.share(prompt_tokens, new_tokens)
        elif self._draft is not None:
            self._draft.leave_room(prompt_tokens, new_tokens)
        return True

    def run(self, model: Any, work: "Callable[[Mapping[str, Any]], T]") -> T:
        """Generate: call `work` with the extra arguments for `generate()`, which it must call once."""
        self._costs_memory = self._own is not None and self._own.reading_without() < 1
        self._pace = Pace(most_lost=_MOST_LOST_BY_DRAFT if self._costs_memory else MOST_LOST)
        self._stalled = self._metrics.seconds("stall")
        with self._watching(model):
            if self._draft is None:
                return work({"prompt_lookup_num_tokens": self._prompt_lookup})
            with _short_drafts(self._draft.model):
                return self._draft.run(lambda assistant: work({"assistant_model": assistant}))

    def facts(self) -> SpeculationFacts:
        """The results so far."""
        return {
            "kind": "draft" if self._draft_name is not None else "prompt_lookup",
            "draft": self._draft_name,
            "guessed_tokens": self._guesses,
            "accepted_tokens": self._accepted,
            "acceptance": self._accepted / self._guesses if self._guesses else None,
            "passes": self._plain.passes + self._guessed.passes,
            "guessed_passes": self._guessed.passes,
            "seconds_per_token_with": self._guessed.seconds_per_token,
            "seconds_per_token_without": self._plain.seconds_per_token,
            "switched_off": self.is_over or self._pace.has_switched_off,
        }

    def wants_guesses(self) -> bool:
        """Whether the next pass should check guesses."""
        return not self.is_over and self._pace.wants_guesses

    def note(self, seconds: float, *, tokens: int, guesses: int) -> None:
        """Record a pass that produced this many tokens, all but one of them guessed."""
        stalled = self._metrics.seconds("stall")
        counted = seconds
        if self._own is not None and self._costs_memory and not guesses and not self.is_over:
            # With the draft's memory the model would read, and so wait, less, but compute as long.
            counted = max(seconds - (stalled - self._stalled), seconds * self._own.reading_without())
        self._stalled = stalled
        self._pace.note(counted, tokens=tokens, guesses=guesses)
        if self._own is not None and self._costs_memory and self._pace.has_switched_off and not self.is_over:
            self.is_over = True
            self._own.rest()
        (self._guessed if guesses else self._plain).add(seconds, tokens)
        self._guesses += guesses
        self._accepted += tokens - 1

    @contextmanager
    def _watching(self, model: Any) -> Iterator[None]:
        """Wrap the candidate generator that transformers' loop creates."""
        make = getattr(model, _MAKER)

        def watched(*args: Any, **kwargs: Any) -> _Watched:
            return _Watched(make(*args, **kwargs), self)

        setattr(model, _MAKER, watched)  # on this object only
        try:
            yield
        finally:
            delattr(model, _MAKER)


class _Watched(CandidateGenerator):
    """Forwards to another candidate generator when guessing pays, and measures the passes.

    A pass lasts from one request for candidates to the next, so the last pass of a generation is not counted. Neither
    is the first, which reads the prompt; it always gets guesses, because the draft reads the prompt then, too.
    """

    def __init__(self, inner: Any, speculation: Speculation) -> None:
        self._inner, self._speculation = inner, speculation
        self._begun: float | None = None
        self._guesses = self._matched = self._asked = 0

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs: Any) -> Any:
        """Return the text so far, with or without guesses appended; of shape (1, tokens)."""
        now = time.perf_counter()
        if self._begun is not None and self._asked > 1:
            self._speculation.note(now - self._begun, tokens=self._matched + 1, guesses=self._guesses)
        self._asked += 1
        self._begun, self._guesses, self._matched = now, 0, 0
        if self._asked > 1 and not self._speculation.wants_guesses():
            return input_ids, None
        ids, logits = self._inner.get_candidates(input_ids, **kwargs)
        self._guesses = ids.shape[1] - input_ids.shape[1]
        return ids, logits

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Record how many guesses were right, and pass it on."""
        self._matched = int(num_matches)
        if self._guesses:
            self._inner.update_candidate_strategy(input_ids, scores, num_matches)


def may_guess(named: Mapping[str, Any], own: Any) -> bool:
    """Whether a call of `generate()` may speculate: it must not ask for another way to generate.

    Only the model's end token may end it, as other stopping criteria are checked only after all tokens of a pass.

    Args:
        named: the call's arguments.
        own: the model's own generation settings.
    """
    given = {name for name, value in named.items() if value is not None and value is not False}
    config = named.get("generation_config") or own
    return (
        given.isdisjoint(_OTHER_WAYS)
        and named.get("use_cache") is not False
        and not any(getattr(config, name, None) for name in _OTHER_WAYS)
    )


def expect_draft(model: "StreamingBaseModel", draft: "StreamingBaseModel") -> None:
    """Check that a draft can be used with a model.

    Raises:
        ConfigurationError: it cannot.
    """
    name, other = model.manifest.name, draft.manifest.name
    if draft is model:
        raise ConfigurationError(f"{name} cannot be its own draft; open it a second time, in another form or smaller")
    made, guesser = model.model, draft.model
    if not guesser.can_generate() or guesser.config.is_encoder_decoder is not made.config.is_encoder_decoder:
        raise ConfigurationError(
            f"the draft {other} ({draft.manifest.class_name}) does not generate as {name} does "
            f"({model.manifest.class_name}); give another draft"
        )
    sizes = [one.config.get_text_config(decoder=True).vocab_size for one in (made, guesser)]
    expect_vocabularies(name, sizes[0], other, sizes[1])
    if made.device != guesser.device:
        raise ConfigurationError(
            f"the draft {other} computes on {guesser.device}, and {name} on {made.device}; open both on one device"
        )


@contextmanager
def _short_drafts(draft: Any) -> Iterator[None]:
    """Make a draft start with `DRAFT_TOKENS` guesses, unless its own settings specify the number."""
    config = draft.generation_config
    before = config.num_assistant_tokens, config.num_assistant_tokens_schedule
    if before == (None, None):
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = DRAFT_TOKENS, "heuristic_transient"
    try:
        yield
    finally:
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = before
