"""A real `surfw serve` in a process of its own, which has its imports done, and its statistics."""

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.services import warm


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    process: warm.Process

    def stats(self) -> dict[str, Any]:
        """Return the answer to `GET /stats`."""
        with urllib.request.urlopen(self.url.replace("ws://", "http://") + "/stats", timeout=10) as answer:
            return dict(json.load(answer))


@contextlib.contextmanager
def serve(store: Path | None, *options: str) -> Iterator[Served]:
    """Serve a store, or what the options name instead, on a free port."""
    place = () if store is None else ("--store", str(store))
    command = [sys.executable, "-m", "surfw", "serve", *place, "--port", "0", "--no-live", "--announce"]
    process = warm.start(
        [*command, *options], modules=warm.COMMANDS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield Served(json.loads(process.stdout.readline())["url"], process)
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
