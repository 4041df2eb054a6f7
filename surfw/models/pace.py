"""Decides from measured passes whether speculation pays. Pure: seconds and tokens in, a decision out.

A pass that checks guesses may produce several tokens, and takes longer than a plain one. Its gain or loss against as
many plain passes is added up. Once the loss exceeds a limit (half a plain pass by default), guessing pauses, long
enough that the loss is a small share of the time; then it is tried again, as the text may have become easier to guess.
Gains offset losses, but only up to a limit.
"""

from collections import deque
from statistics import median

_PLAIN_FIRST = 2
_RECENT = 5
MOST_LOST = 0.5
_MOST_WON = 4.0
"""Plain passes that may be lost before guessing pauses (`MOST_LOST`), and the most that a gain can offset."""

_LOST_SHARE = 0.015
"""The share of the time that guessing may cost if it does not pay, after the first trial."""

_LEAST_REST = 16
_FRESH = 64
"""After this many passes with guesses in a row, the next one is plain, to measure plain passes again."""


class Pace:
    """Decides before each pass of a generation whether it should check guesses, from the times of earlier passes."""

    def __init__(self, *, most_lost: float = MOST_LOST) -> None:
        """Start with plain passes; guessing pauses once `most_lost` plain passes are lost."""
        self._most_lost = most_lost
        self._plain: deque[float] = deque(maxlen=_RECENT)
        self._rest = _PLAIN_FIRST
        self._lost = 0.0  # in plain passes
        self._in_a_row = 0
        self._has_rested = False

    @property
    def wants_guesses(self) -> bool:
        """Whether the next pass should check guesses."""
        return self._rest == 0

    @property
    def has_switched_off(self) -> bool:
        """Whether guessing is paused because it did not pay."""
        return self._rest > 0 and self._has_rested

    def note(self, seconds: float, *, tokens: int, guesses: int) -> None:
        """Record a pass.

        Args:
            seconds: time of the pass, including making its guesses.
            tokens: number of tokens produced, 1 or more.
            guesses: number of guesses checked; 0 for a plain pass.
        """
        if guesses == 0:
            self._plain.append(seconds)
            self._rest = max(0, self._rest - 1)
            self._in_a_row = 0
            return
        plain = median(self._plain) if self._plain else seconds
        self._lost = max(-_MOST_WON, self._lost + seconds / plain - tokens) if plain else 0.0
        self._in_a_row += 1
        if self._lost > self._most_lost:
            self._rest = max(_LEAST_REST, round(self._lost / _LOST_SHARE))
            self._lost, self._has_rested = 0.0, True
        elif self._in_a_row >= _FRESH:
            self._rest, self._has_rested = 1, False
