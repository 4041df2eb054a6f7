"""What a model uses its memory for, what limits its speed, and what more memory would bring; as data.

The plan gives the bytes read per pass, a measurement the bandwidth. The ceiling is tokens per pass × bandwidth ÷ bytes
per pass, and at most what computing alone allows. This module prints nothing.
"""

from collections import Counter
from concurrent.futures import wait
from dataclasses import dataclass, replace
from typing import Literal

from surfw.config import GB, Policy, is_server_url
from surfw.models.assembly import LimitedBy, ModelParts
from surfw.models.measure import (
    READ_SECONDS,
    Computing,
    Reading,
    RunModel,
    measure_computing,
    measure_copying,
    measure_reading,
)
from surfw.runtime.device_engine import DeviceEngine
from surfw.runtime.plan import Limit, ResidencyPlan

_MOSTLY = 0.5
_WORTHWHILE = 1.5
"""A smaller speed-up is within the variation between runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """A model's memory and bottlenecks. Sizes are in bytes; a pass is one run through all recurring layers.

    Attributes:
        model: name of the model.
        source: where its weights come from.
        limited_by: what limits the memory of weights where the model computes: the `memory_budget`, `device_memory` or
            `cache_layers` setting, or `default`, the memory that was available.
        budget_bytes: the budget; None with `cache_layers`.
        cache_layers: number of layers to keep; None with a budget.
        policy: `auto` or `lru`.
        layers: number of layers.
        kept_layers: number of resident layers.
        pinned: number of resident chunks, including embeddings, norms and heads.
        pinned_bytes: their memory.
        ring_buffers: number of buffers that streamed chunks pass through; 0 if everything is resident.
        ring_bytes: size of each ring buffer.
        shared_bytes: memory shared by layers that run several times in a pass.
        by_rows: non-resident tables, of which only the rows looked up are read.
        overhead_bytes: memory in addition to the weights: table rows, and what is being converted or in flight.
        reserved_bytes: memory reserved for the KV cache.
        peak_bytes: peak memory of all of this, including the KV cache.
        least_budget_bytes: the smallest budget that the model runs with, from any source.
        base_bytes: resident memory of the process before the first weight was loaded; a budget includes neither this
            nor activations.
        codec: the form in which most of the weights are read: `none`, `lossless` if that is faster, or a packed one.
        bytes_per_pass: stored bytes read per pass once all resident chunks are in memory.
        bytes_per_second: measured read bandwidth; None if nothing is streamed.
        measured_bytes: how many bytes the measurement read; None if nothing is streamed.
        compute_seconds: compute time of a pass while nothing is read; None if it could not be measured.
        compute_share: fraction of the weights that `compute_seconds` was measured on; below 1, it is scaled up.
        unit: what a pass yields: `tokens`, or `passes` for models that do not generate.
        reading_ceiling: the most units per second that reading allows; None if nothing is read.
        computing_ceiling: the most units per second that computing allows; None if it could not be measured.
        bottleneck: the lowest ceiling: `link` to a server, `storage`, `bus` to the device, or `compute`.
        more_bytes_per_pass: bytes that a pass would read, or copy to the device, with 1 GB more; None if a pass
            streams nothing as it is.
        more_ceiling: the most units per second with 1 GB more; None if unknown.
        device: where the model computes. On a device other than the CPU, the memory fields above describe device
            memory, and those below host memory and the bus.
        host_budget_bytes: the budget of host memory.
        host_kept_layers: number of layers held in host memory, to be copied to the device in every pass.
        host_coded_layers: how many of these will be coded; see `runtime.coding`.
        host_peak_bytes: peak memory of weights on the host.
        bus_bytes_per_pass: bytes copied to the device per pass.
        bus_bytes_per_second: measured copy bandwidth.
        bus_ceiling: the most units per second that copying allows.
    """

    model: str
    source: str
    limited_by: LimitedBy
    budget_bytes: int | None
    cache_layers: int | None
    policy: Policy
    layers: int
    kept_layers: int
    pinned: int
    pinned_bytes: int
    ring_buffers: int
    ring_bytes: int
    shared_bytes: int
    by_rows: tuple[str, ...]
    overhead_bytes: int
    reserved_bytes: int
    peak_bytes: int
    least_budget_bytes: int
    base_bytes: int
    codec: str = "none"
    bytes_per_pass: int
    bytes_per_second: float | None
    measured_bytes: int | None = None
    compute_seconds: float | None
    compute_share: float
    unit: Literal["tokens", "passes"]
    reading_ceiling: float | None
    computing_ceiling: float | None
    bottleneck: Literal["link", "storage", "bus", "compute"]
    more_bytes_per_pass: int | None
    more_ceiling: float | None
    device: str = "cpu"
    host_budget_bytes: int | None = None
    host_kept_layers: int | None = None
    host_coded_layers: int = 0
    host_peak_bytes: int | None = None
    bus_bytes_per_pass: int = 0
    bus_bytes_per_second: float | None = None
    bus_ceiling: float | None = None

    @property
    def other_parts(self) -> int:
        """How many resident chunks are not layers."""
        return self.pinned - self.kept_layers

    @property
    def ceiling(self) -> float | None:
        """The most units per second that reading, copying and computing allow; None if all three limits are unknown."""
        return _smallest(self.reading_ceiling, self.bus_ceiling, self.computing_ceiling)


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """What more memory would bring.

    Attributes:
        more_bytes: the additional memory.
        budget_bytes: the memory budget with it.
        tokens_per_second: the ceiling of reading and computing with it.
    """

    more_bytes: int
    budget_bytes: int
    tokens_per_second: float


def explain(parts: ModelParts, run: RunModel, *, prompt_tokens: int) -> Explanation:
    """Measure a model and explain it; see `measure_computing`. Statistics are not changed.

    Raises:
        SurfwError: weights could not be read.
    """
    reserved_bytes = parts.engine.limit.reserved_bytes
    with parts.engine.metrics.off_the_record():
        computing = measure_computing(parts, run, prompt_tokens)
        parts.engine.reserve(reserved_bytes)  # undo what the measurement's own KV cache reserved
        wait([load for _, load in parts.engine.fetch(parts.layers)], READ_SECONDS)  # so that nothing else is read
        reading = measure_reading(parts)
        copying = measure_copying(parts)
    return explain_plan(parts, computing, reading, copying)


def explain_plan(
    parts: ModelParts, computing: Computing | None, reading: Reading | None, copying: float | None = None
) -> Explanation:
    """Explain a model's plan with the given measurements; `copying` is bytes per second to the device."""
    engine, manifest, below = parts.engine, parts.manifest, parts.below
    plan, limit = engine.plan, engine.limit
    behind = below.settled_plan() if below else plan
    copied = engine.copied_per_pass if isinstance(engine, DeviceEngine) else 0
    coded = set(below.copied_bytes()) if below else set[str]()
    # Stored bytes ÷ bytes in memory: these differ if the model runs in another dtype than it is stored in, or if coded
    # forms are read.
    read: Counter[str] = Counter()
    experts = [chunk.name for one in manifest.experts.values() for chunk in one.chunks]
    for name in (*plan.sizes, *experts):
        form = parts.forms.form(manifest.by_name[name])
        read[form.codec] += form.stored_bytes
    stored = read.total() / max(1, sum(plan.sizes.values()) + plan.all_expert_bytes)
    speed = reading.bytes_per_second / stored if reading and stored else None
    by_computing = 1 / computing.seconds if computing and computing.seconds else None
    by_reading = behind.ceiling(speed) if speed else None
    by_copying = copying / copied if copied and copying else None
    more = engine.plan_with(_one_gb_more(plan, limit)) if plan.bytes_per_pass else None
    share = copied / plan.bytes_per_pass if copied else 1.0
    pace = copying / share if below and copying else speed
    more_ceiling = more.ceiling(pace) if more and pace else None
    if below:
        more_ceiling = _smallest(more_ceiling, by_reading)
    ceilings: dict[Literal["link", "storage", "bus", "compute"], float | None] = {
        "compute": by_computing,
        "bus": by_copying,
        "link" if is_server_url(parts.client.url) else "storage": by_reading,
    }
    smallest = _smallest(*ceilings.values())
    return Explanation(
        model=manifest.name,
        source=parts.client.url,
        limited_by=parts.limited_by,
        budget_bytes=limit.budget_bytes,
        cache_layers=limit.cache_layers,
        policy=plan.policy,
        layers=len(parts.layers),
        kept_layers=len(plan.pinned.intersection(parts.layers)),
        pinned=len(plan.pinned),
        pinned_bytes=plan.pinned_bytes,
        ring_buffers=plan.ring_buffers,
        ring_bytes=plan.ring_bytes,
        shared_bytes=plan.floating_bytes,
        by_rows=tuple(sorted(plan.tables - plan.pinned)),
        overhead_bytes=plan.overhead_bytes,
        reserved_bytes=plan.reserved_bytes,
        peak_bytes=plan.peak_bytes + plan.reserved_bytes,
        least_budget_bytes=engine.least_budget_bytes,
        base_bytes=parts.base_bytes,
        codec=max(read, key=read.__getitem__, default="none"),
        bytes_per_pass=round(behind.bytes_per_pass * stored),
        bytes_per_second=reading.bytes_per_second if reading else None,
        measured_bytes=reading.stored_bytes if reading else None,
        compute_seconds=computing.seconds if computing else None,
        compute_share=computing.share if computing else 0.0,
        unit="tokens" if parts.model.can_generate() else "passes",
        reading_ceiling=by_reading,
        computing_ceiling=by_computing,
        bottleneck=next((name for name, one in ceilings.items() if one is not None and one == smallest), "compute"),
        more_bytes_per_pass=round(more.bytes_per_pass * (share if below else stored)) if more else None,
        more_ceiling=_smallest(more_ceiling, by_computing) if more else None,
        device=str(parts.device) if below is None else below.device.name,
        host_budget_bytes=below.limit.budget_bytes if below else None,
        host_kept_layers=len(behind.pinned.union(coded).intersection(parts.layers)) if below else None,
        host_coded_layers=len(coded.intersection(parts.layers)),
        host_peak_bytes=behind.peak_bytes if below else None,
        bus_bytes_per_pass=copied,
        bus_bytes_per_second=copying,
        bus_ceiling=by_copying,
    )


def advise(parts: ModelParts, *, seconds_per_token: float, stall_share: float) -> Advice | None:
    """Estimate what more memory would bring to a generation that mostly waited for weights.

    In such a generation reading takes nearly all of a token's time, so the bandwidth is bytes per pass ÷ that time; the
    time not spent waiting is the compute time.

    Args:
        parts: the parts of the model.
        seconds_per_token: mean time per token after the first.
        stall_share: the fraction of that time spent waiting.

    Returns:
        The smallest tried amount that would make the model 1.5 times as fast; None if it did not mostly wait, if a pass
        reads nothing, or if no amount would be enough.
    """
    engine = parts.engine
    plan, limit = engine.plan, engine.limit
    if parts.below or not plan.bytes_per_pass or stall_share < _MOSTLY or seconds_per_token <= 0:
        return None  # on a device, what causes the waiting is not measured
    bandwidth = plan.bytes_per_pass / seconds_per_token
    by_computing = 1 / (seconds_per_token * (1 - stall_share)) if stall_share < 1 else None
    now = plan.peak_bytes + plan.reserved_bytes if limit.budget_bytes is None else limit.budget_bytes
    more_bytes, everything = max(plan.streamed.values()), sum(plan.streamed.values()) + plan.peak_bytes
    while more_bytes < 2 * everything:
        more = engine.plan_with(replace(limit, budget_bytes=now + more_bytes, cache_layers=None))
        speed = _smallest(more.ceiling(bandwidth), by_computing)
        if speed is not None and speed * seconds_per_token >= _WORTHWHILE:
            return Advice(more_bytes=more_bytes, budget_bytes=now + more_bytes, tokens_per_second=speed)
        more_bytes *= 2
    return None


def _one_gb_more(plan: ResidencyPlan, limit: Limit) -> Limit:
    """The limit with 1 GB more; with `cache_layers`, 1 GB more than these layers take."""
    now = plan.peak_bytes + plan.reserved_bytes if limit.budget_bytes is None else limit.budget_bytes
    return Limit(budget_bytes=now + GB, reserved_bytes=limit.reserved_bytes, policy=limit.policy)


def _smallest(*ceilings: float | None) -> float | None:
    return min((value for value in ceilings if value is not None), default=None)
