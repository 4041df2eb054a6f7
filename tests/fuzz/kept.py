"""Inputs in files, one per line as a bytes literal without `b''`: readable, with small diffs.

`kept/NAME.txt` has inputs that together reach all the code ever reached in a parser; `python -m tests.fuzz --keep`
writes it. `cases/NAME.txt` has inputs that once violated the promise, each below a comment with the reason.
"""

from collections.abc import Iterable
from pathlib import Path

_HERE = Path(__file__).parent
MOST_KEPT, _LONGEST = 40, 1000
"""The number of inputs that are kept of each parser, and their greatest length."""


def cases(name: str) -> list[bytes]:
    """Inputs that once violated the promise."""
    return _read(_HERE / "cases" / f"{name}.txt")


def kept(name: str) -> list[bytes]:
    """The kept corpus."""
    return _read(_HERE / "kept" / f"{name}.txt")


def keep(name: str, inputs: Iterable[bytes]) -> int:
    """Replace the kept corpus of a parser; return its number of inputs."""
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
