"""Inputs in files, one a line as Python writes bytes without `b''`: readable, and small differences in a diff.

`kept/NAME.txt` has inputs that together reach all that was ever reached in a parser; `python -m tests.fuzz --keep`
writes it. `cases/NAME.txt` has those that once broke the promise, each below a comment that says how.
"""

from collections.abc import Iterable
from pathlib import Path

_HERE = Path(__file__).parent
MOST_KEPT, _LONGEST = 40, 1000
"""So many inputs of each parser are kept, of all lengths up to this."""


def cases(name: str) -> list[bytes]:
    """Inputs that once broke the promise."""
    return _read(_HERE / "cases" / f"{name}.txt")


def kept(name: str) -> list[bytes]:
    """The kept corpus."""
    return _read(_HERE / "kept" / f"{name}.txt")


def keep(name: str, inputs: Iterable[bytes]) -> int:
    """Replace the kept corpus of a parser; return how many inputs it has now."""
    chosen = sorted({one for one in inputs if len(one) <= _LONGEST}, key=lambda one: (len(one), one))
    chosen = chosen[:: -(-len(chosen) // MOST_KEPT) or 1]
    (_HERE / "kept" / f"{name}.txt").write_text("".join(f"{_write(one)}\n" for one in chosen))
    return len(chosen)


def _read(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    lines = (line for line in path.read_text(encoding="ascii").splitlines() if line and not line.startswith("#"))
    return [line.encode().decode("unicode_escape").encode("latin-1") for line in lines]


def _write(data: bytes) -> str:
    text = data.decode("latin-1").encode("unicode_escape").decode()
    return f"\\x{ord(text[0]):02x}{text[1:]}" if text[:1] in {"#", " "} else text
