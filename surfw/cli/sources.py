"""Which source `infer` takes when none is named.

In order: `--source`; `$SURFW_SOURCE`; a surfw server on 127.0.0.1:8765; the default store; the demo model.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from surfw.cli.demo import serve_demo
from surfw.config import DEFAULT_HOST, DEFAULT_PORT, default_store

DEMO = "demo"


@dataclass(frozen=True)
class ChosenSource:
    """Where the weights come from, and why."""

    url: str
    reason: str


@contextlib.contextmanager
def choose_source(source: str | None, model: str | None) -> Iterator[ChosenSource]:
    """The source to take; the demo's server runs as long as the context."""
    named = source or (os.environ.get("SURFW_SOURCE") if model != DEMO else None)
    if named:
        yield ChosenSource(named, "named with --source" if source else "named by SURFW_SOURCE")
        return
    if model != DEMO:
        from surfw.client import probe

        local = f"ws://{DEFAULT_HOST}:{DEFAULT_PORT}"
        if asyncio.run(probe(local)):
            yield ChosenSource(local, "the server on this machine")
            return
        if any((Path(default_store()) / "models").rglob("*.json")):
            yield ChosenSource(default_store(), "the default store")
            return
    with serve_demo() as url:
        yield ChosenSource(url, "the demo model that comes with surfw, through a server of its own")
