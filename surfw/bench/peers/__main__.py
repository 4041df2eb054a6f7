"""`python -m surfw.bench.peers MODULE COMPARISON`: run one module of this package in this process.

COMPARISON is a JSON object: a `Comparison`, or the module's own `Work`. The last line on stdout is also a JSON object:
the measurements, or `failed` with the reason. All other output goes to stderr. The process exits when its stdin closes,
because then its parent is gone.
"""

import json
import os
import sys
import threading
from dataclasses import asdict
from importlib import import_module
from typing import Any

from surfw.bench.comparison import Comparison


def main() -> None:
    """Run the module and print its result."""
    stdin = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_end_with, args=(stdin,), daemon=True).start()
    module, text = sys.argv[1:]
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        try:
            peer: Any = import_module(f"surfw.bench.peers.{module}")
            work = getattr(peer, "Work", Comparison)(**json.loads(text))
            found = asdict(peer.run(work))
        except Exception as exc:  # noqa: BLE001 - whatever foreign code raises is a result of the comparison
            found = {"failed": f"{type(exc).__name__}: {' '.join(str(exc).split())}"}
        out.write(json.dumps(found) + "\n")


def _end_with(stdin: int) -> None:
    while os.read(stdin, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
