"""Run one parser under atheris, which mutates inputs by the code they reach; `python -m tests.fuzz` starts this.

The process may use `MEMORY_BYTES` more than at its start. It ends with the first input that violates the promise, which
libFuzzer writes to the given folder.
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
"""The memory that a parser may use for an input of a few kilobytes, including the process's corpus."""


def main(name: str, arguments: list[str]) -> None:
    """Fuzz one parser; the arguments are libFuzzer's."""
    # Its string hook is disabled: it makes every comparison of strings many times slower.
    with atheris.instrument_imports(include=["surfw"]):
        from tests.fuzz.parsers import PARSERS

        parser = PARSERS[name]()
        for seed in parser.seeds:
            parser.accepts(seed)  # it imports the modules that are imported late
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
    """The executable that libFuzzer starts for further processes, as for a merge; it runs this program."""
    file = folder / f"{name}.sh"
    file.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m tests.fuzz.guided {name} "$@"\n')
    file.chmod(0o700)
    return str(file)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGESIZE")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
