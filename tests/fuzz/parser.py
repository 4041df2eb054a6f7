"""What is fuzzed: a parser of untrusted bytes, its documented errors, and valid inputs.

The promise: *any bytes are accepted, or refused with a documented error of one line; there is never another exception,
and memory never exceeds the cap.*
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surfw.errors import SurfwError

MOST_BYTES = 4096
"""The greatest length of an input: no parser needs more to reach all its code."""

_LONGEST_ERROR = 2500


class PromiseError(AssertionError):
    """An error was caused by a lack of memory, or its text is not one readable line."""


@dataclass(frozen=True, kw_only=True)
class Parser:
    """A parser and how to call it.

    Attributes:
        parse: called with the bytes; it returns if they are accepted.
        errors: the kinds of error that are documented.
        seeds: inputs of each kind, most of them valid.
        words: parts of inputs that are hard to guess.
    """

    parse: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    seeds: Sequence[bytes]
    words: Sequence[bytes] = ()

    def accepts(self, data: bytes) -> bool:
        """Return whether the bytes are accepted. Any other exception violates the promise."""
        try:
            self.parse(data)
        except self.errors as exc:
            expect_memory(exc)
            expect_line(exc)
            return False
        return True


def expect_memory(error: BaseException) -> None:
    """Check that an error was not caused by a lack of memory, which means that the bytes exceeded the cap.

    Raises:
        PromiseError: it was.
    """
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, MemoryError):
            raise PromiseError(f"{type(error).__name__} is what became of a lack of memory") from error
        behind = behind.__cause__ or behind.__context__


def expect_line(error: Exception) -> None:
    """Check that the text of one of surfw's errors is one line that does not fill a screen.

    Raises:
        PromiseError: it is not.
    """
    text = str(error)
    if isinstance(error, SurfwError) and (len(text.splitlines()) != 1 or len(text) > _LONGEST_ERROR):
        raise PromiseError(f"{type(error).__name__} says {len(text)} characters: {text[:400]!a}") from error
