"""The last rows of a text, in a column beside other lines; earlier rows leave it to be printed. Pure."""

from collections.abc import Sequence

from surfw.cli.screen import dimmed
from surfw.config import printable

NEWLINE, BETWEEN = "\n", "   "


class TextColumn:
    """The end of a growing text."""

    def __init__(self) -> None:
        self._text = ""
        self._dim = 0

    def add(self, text: str, *, dim: bool = False) -> None:
        """Append text; dim text has to come before all other text."""
        self._text += printable(text, lines=True).expandtabs()
        self._dim = len(self._text) if dim else self._dim

    def end(self) -> str:
        """Remove and return all that is left."""
        left, self._text = self._text, ""
        return left

    def give_up(self, width: int, rows: int) -> str:
        """Remove rows from the beginning until at most `rows` are left; return them as lines."""
        found = wrap(self._text, width)
        given = found[: max(0, len(found) - rows)]
        gone = sum(map(len, given))
        self._text, self._dim = self._text[gone:], max(0, self._dim - gone)
        return "".join(f"{row.removesuffix(NEWLINE)}\n" for row in given)

    def beside(self, others: Sequence[str], width: int) -> list[str]:
        """Return the last rows, padded to the width, with one of the other lines beside each."""
        from rich.cells import cell_len

        rows = self.rows(width)
        filled = [*rows, *[("", "")] * (len(others) - len(rows))][-len(others) :] if others else []
        return [
            styled + " " * (width - cell_len(row)) + BETWEEN + other
            for (row, styled), other in zip(filled, others, strict=True)
        ]

    def rows(self, width: int) -> list[tuple[str, str]]:
        """Return each row as a pair: plain, and with its style."""
        found, dim = [], self._dim
        for whole in wrap(self._text, width):
            row = whole.removesuffix(NEWLINE)
            found.append((row, (dimmed(row[:dim]) if dim else "") + row[dim:]))
            dim = max(0, dim - len(whole))
        return found


def wrap(text: str, width: int) -> list[str]:
    """Cut a text into rows of at most `width` cells; joined, they are the text, newlines included."""
    from rich.cells import cell_len

    rows = [""]
    for letter in text:
        if letter != NEWLINE and cell_len(rows[-1] + letter) > width:
            rows.append("")
        rows[-1] += letter
        if letter == NEWLINE:
            rows.append("")
    return rows
