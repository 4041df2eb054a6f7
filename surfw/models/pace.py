"""When guessing tokens ahead pays: a rule over measured passes. Pure: seconds and tokens in, a decision out.

A pass that checks guesses may give several tokens, and takes longer than a plain one. What it lost or won against as
many plain passes adds up. Once more is lost than half a pass, or what else may be lost, guessing rests: for so long
that what was lost is a small share of the time, as the text may become easier to guess. A gain makes up for losses, but
not for ever.
"""

from collections import deque
from statistics import median

_PLAIN_FIRST = 2
_RECENT = 5
MOST_LOST = 0.5
_MOST_WON = 4.0
"""Passes that may be lost before guessing rests, and that a gain counts for at most."""

_LOST_SHARE = 0.015
"""What guessing may cost where it does not pay: this part of the time, after the first trial."""

_LEAST_REST = 16
_FRESH = 64
"""So many passes with guesses in a row, and the next one is plain, to see what those take by now."""


class Pace:
    """Says before each pass of a generation whether it is to check guesses, from how long the others took."""

    def __init__(self, *, most_lost: float = MOST_LOST) -> None:
        """Begin with plain passes; guessing rests once so many of them are lost."""
        self._most_lost = most_lost
        self._plain: deque[float] = deque(maxlen=_RECENT)
        self._rest = _PLAIN_FIRST
        self._lost = 0.0  # in plain passes
        self._in_a_row = 0
        self._has_rested = False

    @property
    def wants_guesses(self) -> bool:
        """Whether the next pass is to check guesses."""
        return self._rest == 0

    @property
    def has_switched_off(self) -> bool:
        """Whether guessing rests now because it did not pay."""
        return self._rest > 0 and self._has_rested

    def note(self, seconds: float, *, tokens: int, guesses: int) -> None:
        """Note a pass.

        Args:
            seconds: what it took, making its guesses included.
            tokens: that it gave, 1 or more.
            guesses: that it checked; 0 for a plain pass.
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
