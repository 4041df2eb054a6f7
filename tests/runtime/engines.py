"""Engines for tests: over toy sources, with functions that inspect or drive them."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from surfw.config import Policy
from surfw.manifest import Manifest
from surfw.metrics import Metrics
from surfw.runtime.engine import Engine
from surfw.runtime.loader import Loader
from surfw.runtime.plan import Limit
from surfw.runtime.rows import TableUnit
from surfw.runtime.run import IoThread
from surfw.runtime.schedule import Phases
from tests.toys import ToySource, toy_needs

PAGE = 4096


@contextmanager
def running(
    manifest: Manifest,
    source: ToySource,
    *,
    cache_layers: int | None = None,
    budget_bytes: int | None = None,
    policy: Policy | None = None,
    phases: Phases | None = None,
    tables: dict[str, TableUnit] | None = None,
    metrics: Metrics | None = None,
) -> Iterator[Engine]:
    """Run an engine over a source, a plain LRU cache if layers are counted; it leaves nothing behind."""
    before = set(threading.enumerate())
    io = IoThread()
    policy = policy or ("auto" if budget_bytes else "lru")
    limit = Limit(cache_layers=cache_layers, budget_bytes=budget_bytes, policy=policy)
    loader = Loader(source, manifest)
    needs = replace(toy_needs(manifest), tables=frozenset(tables or ()))
    engine = Engine(manifest, needs, limit, loader, io=io, metrics=metrics or Metrics(), phases=phases, tables=tables)
    try:
        yield engine
    finally:
        engine.close()
        io.close()
    started = set(threading.enumerate()) - before
    assert [thread.name for thread in started if thread.name.startswith("surfw")] == []


def settle(engine: Engine) -> list[str]:
    """Wait for all loads in progress; return the resident chunks."""
    for load in engine.host.loads().values():
        load.exception()
    return engine.resident()


def use(engine: Engine, modules: Sequence[str]) -> None:
    """Run modules one after another, each after all prefetched chunks have arrived."""
    for module in modules:
        engine.acquire(module)
        settle(engine)
        engine.release(module)
        settle(engine)


def counts(engine: Engine) -> dict[str, int]:
    return {name: engine.metrics.count(name) for name in ("hits", "prefetched", "stalls")}


def users(engine: Engine) -> dict[str, int]:
    """How many modules hold each chunk that is in use."""
    return {slot.name: slot.users for slot in engine.table if slot.users}


def spare_bytes(engine: Engine) -> int:
    """The bytes of the ring's empty buffers."""
    return sum(buffer.capacity_bytes for buffer in engine.host.spare)


def data(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: bytes(tensor.numpy()) for name, tensor in tensors.items()}
