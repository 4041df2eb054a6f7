"""What is fuzzed: a parser of bytes from outside, its documented errors, and inputs that it accepts.

The promise is one sentence: *whatever the bytes are, they are accepted or refused with a documented error of one line;
there is never another exception, and never more memory than the cap.*
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surfw.errors import SurfwError

MOST_BYTES = 4096
"""The longest input that is tried: no parser needs more to be led anywhere."""

_LONGEST_ERROR = 2500


class PromiseError(AssertionError):
    """An error hides a lack of memory, or its text is no line for people."""


@dataclass(frozen=True, kw_only=True)
class Parser:
    """A parser and how to call it.

    Attributes:
        parse: called with the bytes; it returns if they are accepted.
        errors: the kinds of error that are documented.
        seeds: inputs of each kind, most of them right.
        words: what stands in inputs and is hard to guess.
    """

    parse: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    seeds: Sequence[bytes]
    words: Sequence[bytes] = ()

    def accepts(self, data: bytes) -> bool:
        """Whether the bytes are accepted. Any exception breaks the promise."""
        try:
            self.parse(data)
        except self.errors as exc:
            expect_memory(exc)
            expect_line(exc)
            return False
        return True


def expect_memory(error: BaseException) -> None:
    """Check that no lack of memory lies behind an error: the bytes have asked for more than the cap.

    Raises:
        PromiseError: one does.
    """
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, MemoryError):
            raise PromiseError(f"{type(error).__name__} is what became of a lack of memory") from error
        behind = behind.__cause__ or behind.__context__


def expect_line(error: Exception) -> None:
    """Check that the text of one of surfw's errors is one line, and none that fills a screen.

    Raises:
        PromiseError: it is not.
    """
    text = str(error)
    if isinstance(error, SurfwError) and (len(text.splitlines()) != 1 or len(text) > _LONGEST_ERROR):
        raise PromiseError(f"{type(error).__name__} says {len(text)} characters: {text[:400]!a}") from error
