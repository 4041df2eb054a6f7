"""One parser under atheris, which changes inputs by what they reach in surfw: `python -m tests.fuzz` starts this.

The process may take `MEMORY_BYTES` more than it has when it begins. It ends with the first input that breaks the
promise; libFuzzer writes that into the folder that it was told.
"""

import gc
import logging
import os
import resource
import shlex
import sys
import warnings
from pathlib import Path
from random import Random
from typing import Any

import atheris

from tests.fuzz.mutations import mutate
from tests.fuzz.parser import MOST_BYTES

MEMORY_BYTES = 512 << 20
"""What an input of a few kilobytes may make a parser take, with all that the process keeps of its corpus."""


def main(name: str, arguments: list[str]) -> None:
    """Fuzz one parser; the arguments are libFuzzer's."""
    # Its string hook is left out: it makes every comparison of texts many times slower.
    with atheris.instrument_imports(include=["surfw"]):
        from tests.fuzz.parsers import PARSERS

        parser = PARSERS[name]()
        for seed in parser.seeds:
            parser.accepts(seed)  # which imports what is imported late
    logging.disable()
    warnings.simplefilter("ignore")
    gc.collect()
    gc.freeze()
    limit = _address_space() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def change(data: bytes, most_bytes: int, seed: int) -> bytes:
        random = Random(seed)
        changed = mutate(data, random, min(most_bytes, MOST_BYTES)) if random.random() < 0.5 else None
        return atheris.Mutate(data, most_bytes) if changed is None else changed

    def test(data: bytes) -> None:
        parser.accepts(data)

    options: dict[str, Any] = {"custom_mutator": change}
    atheris.Setup([_program(name, Path.cwd()), *arguments], test, **options)
    atheris.Fuzz()


def _program(name: str, folder: Path) -> str:
    """What libFuzzer starts where it wants one more process, as for a merge: this program as an executable file."""
    file = folder / f"{name}.sh"
    file.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m tests.fuzz.guided {name} "$@"\n')
    file.chmod(0o700)
    return str(file)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGESIZE")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
