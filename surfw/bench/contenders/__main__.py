"""`python -m surfw.bench.contenders NAME WORK`: one contender, or the reads of the store, in this process.

WORK is a JSON object. The last line on stdout is one, too: what was measured, or `failed`, why not. Whatever the
contender prints meanwhile goes to stderr. The process ends when its stdin does: then nobody waits for it any longer.
"""

import json
import os
import sys
import threading
from dataclasses import asdict
from typing import Any

from surfw.bench.contenders import CONTENDERS
from surfw.bench.contenders.work import Work
from surfw.bench.reads import READS, measure_reads


def main() -> None:
    """Run it."""
    stdin = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_end_with, args=(stdin,), daemon=True).start()
    name, text = sys.argv[1:]
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        try:
            found = _measure(name, Work(**json.loads(text)))
        except Exception as exc:  # noqa: BLE001 - foreign code: whatever it raises is a result of the comparison
            found = {"failed": f"{type(exc).__name__}: {' '.join(str(exc).split())}"}
        out.write(json.dumps(found) + "\n")


def _end_with(stdin: int) -> None:
    while os.read(stdin, 1):
        pass
    os._exit(1)


def _measure(name: str, work: Work) -> dict[str, Any]:
    return asdict(measure_reads(work.source, work.model) if name == READS else CONTENDERS[name].run(work))


if __name__ == "__main__":
    main()
