"""Search windows of plaintext at every offset of files and of processes' memory."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

WINDOW, STEP = 64, 4096
_PIECE_BYTES = 32 << 20
_LEAST_VALUES = 16
"""Windows with fewer different bytes, such as those of a norm of ones, may occur anywhere by chance."""

Words = npt.NDArray[np.uint64]


class Windows:
    """64 bytes at every 4 KiB of some payloads."""

    def __init__(self, payloads: Iterable[bytes]) -> None:
        taken = (one[at : at + WINDOW] for one in payloads for at in range(0, len(one) - WINDOW, STEP))
        self.all = frozenset(window for window in taken if len(set(window)) >= _LEAST_VALUES)
        self._begins = np.unique(np.frombuffer(b"".join(window[:8] for window in self.all), np.uint64))
        self._shift = np.uint64(44 if len(self._begins) < 1 << 16 else 40)  # small tables fit into the CPU's cache
        self._marked = np.zeros(1 << 64 - int(self._shift), bool)
        self._marked[self._mark(self._begins)] = True

    def find_in(self, pieces: Iterable[bytes], *, enough: int | None = None) -> set[bytes]:
        """Return the windows in pieces of data, at any offset; the search stops after `enough`."""
        found = set[bytes]()
        for piece in pieces:
            found.update(self._find(piece))
            if enough is not None and len(found) >= enough:
                break
        return found

    def _find(self, piece: bytes) -> Iterator[bytes]:
        for shift in range(8 if len(piece) >= WINDOW else 0):
            words = np.frombuffer(piece, np.uint64, (len(piece) - shift) // 8, shift)
            places = np.flatnonzero(self._marked[self._mark(words)])
            places = places[np.isin(words[places], self._begins)]
            for place in places.tolist():
                if (window := piece[8 * place + shift : 8 * place + shift + WINDOW]) in self.all:
                    yield window

    def _mark(self, words: Words) -> Words:
        return (words * np.uint64(0x9E3779B97F4A7C15)) >> self._shift


def pieces_of_files(folder: Path) -> Iterator[bytes]:
    """The contents of all files in a folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.read_bytes()


def pieces_of_memory(pid: int) -> Iterator[bytes]:
    """A process's memory without the code of libraries, in overlapping pieces, so that no window is cut."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for low, high, path in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) r\S+ \S+ \S+ \S+ *(.*)$", maps, re.MULTILINE):
            if ".so" in path:
                continue
            start, stop = int(low, 16), int(high, 16)
            for at in range(start, stop, _PIECE_BYTES):
                with contextlib.suppress(OSError, OverflowError, ValueError):  # vvar and vsyscall
                    memory.seek(at)
                    yield memory.read(min(_PIECE_BYTES + WINDOW, stop - at))
