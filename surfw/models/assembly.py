"""Assembles an open model from its manifest: what it needs in memory, and the parts that run it.

A model's memory needs are known before any weight is read, and are calculated in one place (`model_needs`): opening
plans with them, `explain` shows the least budget, and so does a dry run of chunking, which has no manifest yet. The
least budget shown depends on the model and its dtypes alone; an error about a budget also names the least one for the
source in use.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from surfw.codec import PACKED_CODECS, for_run, packed_codec, stored_codecs
from surfw.codec.lossless import DECODING_BYTES
from surfw.config import MIB, expect, format_size
from surfw.errors import ConfigurationError
from surfw.manifest import Manifest
from surfw.metrics import Metrics
from surfw.models.adapters import Adapters
from surfw.models.client import SourceThread
from surfw.models.from_manifest import cast_dtypes, open_skeleton
from surfw.models.kv_reserve import KvReserve
from surfw.models.options import OpenSettings
from surfw.runtime.buffers import buffer_capacity
from surfw.runtime.coding import coding_bytes, usual_bytes
from surfw.runtime.coding_plan import choose_coded, plan_device
from surfw.runtime.device import DEVICE_ALIGNMENT, Device, open_device
from surfw.runtime.device_engine import DeviceEngine
from surfw.runtime.engine import Engine
from surfw.runtime.expert_hooks import ExpertHooks
from surfw.runtime.experts import expert_bytes, stacked_bytes
from surfw.runtime.forms import FormChoice
from surfw.runtime.hooks import StreamingHooks
from surfw.runtime.lender import Lender
from surfw.runtime.loader import Loader, buffer_bytes, device_scratch_bytes, held_bytes, scratch_bytes
from surfw.runtime.matrices import kernel_of
from surfw.runtime.memory import MemoryClaim, deciding, find_default_budget, read_smallest_limit, rss_bytes
from surfw.runtime.plan import Limit, Needs, describe_needs, needs_behind, plan_residency
from surfw.runtime.pressure import Yielder, watch
from surfw.runtime.rows import StreamedTables, TableUnit, tables_of
from surfw.runtime.run import IoThread
from surfw.runtime.schedule import Phases, Schedule
from surfw.skeleton.build import Skeleton
from surfw.skeleton.dtypes import parse_dtype
from surfw.storage.expert_usage import ExpertUsage, keep_usage, read_usage
from surfw.storage.origins import is_local_url

logger = logging.getLogger("surfw.models")

_FREE_SHARE = 0.25
"""Part of the budget that must stay free if quantised matrices keep their operands; see `_fits_well`."""

ROWS_BYTES = 4 * MIB
"""Memory for blocks of tables being read; as much again for the most recently used ones."""

IN_FLIGHT_BYTES = 6 * MIB
"""The most memory that any source holds besides the destination, when asked for a block at a time.

For unaligned tensors of a local checkpoint this is a huge page for each of its three threads; other sources hold less.
"""

LimitedBy = Literal["memory_budget", "device_memory", "cache_layers", "default"]
"""Where the limit of a model's memory comes from; `default` is the memory available when it was opened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelParts:
    """What an open model is made of.

    Attributes:
        model: transformers' own model, in evaluation mode, its weights absent.
        layers: names of the chunks that are layers, in the order they run.
        claim: tells the other models of the process how much memory this one takes.
        yielder: gives memory back when the machine runs short.
        base_bytes: resident memory of the process before the model's first weight was loaded.
    """

    client: SourceThread
    manifest: Manifest
    model: PreTrainedModel
    layers: tuple[str, ...]
    engine: Engine
    forms: FormChoice
    tables: StreamedTables
    hooks: StreamingHooks
    kv: KvReserve
    adapters: Adapters
    claim: MemoryClaim
    yielder: Yielder
    base_bytes: int

    @property
    def below(self) -> Lender | None:
        """The engine of host memory if the model computes on a device, else None."""
        return self.engine.below if isinstance(self.engine, DeviceEngine) else None

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.engine.device.torch_device if isinstance(self.engine, DeviceEngine) else torch.device("cpu")

    @property
    def limited_by(self) -> LimitedBy:
        """What limits the weights in memory: a setting, or the available memory."""
        limit = self.engine.limit
        if limit.cache_layers is not None or limit.reason:
            return "default" if limit.reason else "cache_layers"
        return "memory_budget" if self.below is None else "device_memory"

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work; on the CPU, do nothing."""
        if isinstance(self.engine, DeviceEngine):
            self.engine.device.synchronize()

    def layer_names(self, indices: Iterable[int]) -> list[str]:
        """The names of layers by their indices, counted from 0 in the order they run, without duplicates."""
        names = []
        for index in indices:
            expect("a layer", index, int, "its number, counted from 0")
            if not 0 <= index < len(self.layers):
                raise ConfigurationError(
                    f"{self.manifest.name} has no layer {index}; it has {len(self.layers)}, counted from 0"
                )
            names.append(self.layers[index])
        return list(dict.fromkeys(names))

    def close(self) -> None:
        """Free all memory, and leave the transformers model without weights and hooks."""
        pool = self.engine.experts
        with ExitStack() as last:
            if self.manifest.experts and pool.tokens:
                before = read_usage(self.manifest)
                tokens = pool.tokens + (before.tokens if before else 0)
                last.callback(keep_usage, self.manifest, ExpertUsage(tokens, pool.counts()))
            last.callback(self.claim.close)
            last.callback(self.engine.close)
            watch.remove(self.yielder)
            self.adapters.close()
            self.kv.close()
            self.tables.clear()
            self.hooks.detach()


def assemble(
    client: SourceThread,
    manifest: Manifest,
    settings: OpenSettings,
    metrics: Metrics,
    *,
    adapter: str | None = None,
    take_part: Callable[[Manifest, Skeleton], tuple[Manifest, Skeleton]] = lambda *whole: whole,
) -> ModelParts:
    """Build the model of a manifest, apply an adapter to it, and start fetching its first weights.

    `take_part` selects the part of manifest and model that this process runs.

    Raises:
        ConfigurationError: the limit is too small for the model, its dtype is unknown, or it is encrypted and no key
            was given.
        UnsupportedModelError: its class or configuration cannot be used here.
        ManifestError: configuration and chunks do not match.
    """
    client.source.expect_readable(manifest)
    manifest = for_run(manifest, settings.codec, where=client.url)
    packed = packed_codec(manifest)
    if packed and settings.codec == "auto":
        logger.warning("%s: weights are %s, not exact; nothing else is stored of them", manifest.name, packed)
    dtype = None if settings.dtype in {None, "auto"} else parse_dtype(str(settings.dtype))
    manifest, skeleton = take_part(
        manifest, open_skeleton(manifest, dtype, model_class=settings.model_class, on_missing=settings.on_missing)
    )
    dtypes = cast_dtypes(manifest, skeleton)
    units = tables_of(skeleton, manifest)
    near = partial(client.source.near, manifest)
    forms = FormChoice(settings.codec, is_far=not is_local_url(client.url), metrics=metrics, near=near)
    if settings.codec not in {"auto", *stored_codecs(manifest)}:
        logger.warning("%s is not stored in the form '%s'; what is there is read", manifest.name, settings.codec)
    find_needs = partial(
        model_needs, manifest, dtypes, units,
        buffered_bytes=client.source.buffered_bytes, is_offline=client.source.is_offline,
    )  # fmt: skip
    phases = find_phases(manifest, skeleton)
    device = open_device(settings.device)
    if device is None:
        for kind in {kind for chunk in manifest.chunks for form in chunk.forms for kind in form.kinds} - {"raw"}:
            kernel_of(kind)  # measures the kernels now, while nothing computes
    with deciding:
        limit = _decide_limit(settings.limit, is_behind=device is not None)
        may_keep = device is None and packed == "int4"  # a device has no use for operands
        keeps_operands = may_keep and _fits_well(find_needs(keeps_operands=True), limit)
        needs = find_needs(keeps_operands=keeps_operands)
        loader = Loader(
            client.source, manifest, dtypes, forms, keeps_operands=keeps_operands, is_pinned=settings.is_pinned
        )
        if device is None:
            engine = Engine(
                manifest, needs, _with_shared(limit, settings.limit, loader, needs), loader, io=client.io,
                metrics=metrics, phases=phases, tables=units, rows_bytes=ROWS_BYTES, prefetch=settings.prefetch,
            )  # fmt: skip
        else:
            _move_rest(skeleton, device)
            engine = _open_device_engine(
                device, needs, settings, limit, loader, io=client.io, metrics=metrics, phases=phases, units=units
            )
        place = torch.device("cpu") if device is None else device.torch_device
        adapters = Adapters(client, manifest, skeleton, engine, place, is_pinned=settings.is_pinned)
        claim = MemoryClaim(
            lambda: engine.claimed_bytes,
            lambda: engine.anonymous_bytes + (adapters.held_bytes if device is None else 0),
            lambda: engine.mapped,
        )
    plan = engine.plan
    if plan.policy == "lru" and plan.streamed:
        logger.warning(
            "%s: an LRU cache of %d chunks is smaller than one pass, which uses %d: it will never hit; the policy "
            "'auto' keeps a part of them",
            manifest.name, plan.slots, len(plan.sizes) - len(plan.fixed),
        )  # fmt: skip
    tables = StreamedTables(units, engine.rows, engine.by_rows)
    used = dict.fromkeys(name for use in manifest.order for name in use.chunks)
    parts = ModelParts(
        client=client,
        manifest=manifest,
        model=skeleton.model,
        layers=tuple(name for name in used if manifest.by_name[name].kind == "layer"),
        engine=engine,
        forms=forms,
        tables=tables,
        kv=KvReserve(skeleton.model, engine),
        hooks=StreamingHooks(
            skeleton,
            manifest,
            engine,
            tables,
            device=place,
            experts=ExpertHooks(skeleton, manifest, engine.experts, place) if manifest.experts else None,
        ),
        adapters=adapters,
        claim=claim,
        yielder=Yielder(manifest.name, lambda: engine.anonymous_bytes, engine.shrink),
        base_bytes=rss_bytes(),
    )
    adapters.on_apply = parts.hooks.adapt
    if adapter is not None:
        try:
            adapters.apply(adapters.load(adapter))
        except BaseException:
            parts.close()
            raise
    engine.warm()
    if settings.prefetch and manifest.experts and (usage := read_usage(manifest)):
        engine.experts.warm(usage.counts)
    watch.add(parts.yielder)
    return parts


def _decide_limit(limit: Limit, *, is_behind: bool) -> Limit:
    """The limit of host memory: the given one, or the memory available; behind a device, `cache_layers` is dropped."""
    if is_behind and limit.cache_layers is not None:
        limit = replace(limit, cache_layers=None)
    if limit.cache_layers is not None and limit.budget_bytes is not None:
        raise ConfigurationError(
            f"{limit.cache_layers} layers (cache_size, --cache-layers) and {format_size(limit.budget_bytes)} of memory "
            "(memory_budget, --memory-budget) exclude each other where there is no GPU; give one of them"
        )
    if limit.budget_bytes is None and limit.cache_layers is None:
        found = find_default_budget()
        return replace(limit, budget_bytes=found.budget_bytes, reason=found.reason)
    if limit.budget_bytes is not None:
        _warn_beyond_memory(limit.budget_bytes)
    return limit


def _with_shared(limit: Limit, given: Limit, loader: Loader, needs: Needs) -> Limit:
    """Add to a default budget the memory of chunks that other open models already hold, if everything fits then.

    If only part of the model fits, the plan may pin other chunks than the shared ones, so the limit is unchanged.
    """
    if given.budget_bytes is not None or limit.budget_bytes is None:
        return limit
    with_shared = replace(limit, budget_bytes=limit.budget_bytes + loader.shared_bytes(needs.sizes))
    return with_shared if _everything_fits(needs, with_shared) else limit


def _open_device_engine(
    device: Device,
    needs: Needs,
    settings: OpenSettings,
    host_limit: Limit,
    loader: Loader,
    *,
    io: IoThread,
    metrics: Metrics,
    phases: Phases,
    units: Mapping[str, TableUnit],
) -> DeviceEngine:
    """Create the engines of device memory and of the host memory behind it; `needs` and `host_limit` are the host's."""
    manifest = loader.manifest
    budget = settings.device_budget_bytes
    limit = Limit(
        budget_bytes=budget, cache_layers=settings.limit.cache_layers, policy=settings.limit.policy, tier="device"
    )
    if budget is None and limit.cache_layers is None:
        found = device.find_budget()
        limit = replace(limit, budget_bytes=found.budget_bytes, reason=found.reason)
    chunks = [chunk for chunk in manifest.chunks if chunk.kind != "expert"]
    near = replace(
        needs,
        sizes={
            chunk.name: -(-held_bytes(chunk, loader.dtypes) // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT or DEVICE_ALIGNMENT
            for chunk in chunks
        },
        table_bytes=0, overhead_bytes=0, in_flight_bytes=None,
        working_bytes=device.working_bytes + stacked_bytes(manifest, loader.dtypes),
        scratch={chunk.name: device_scratch_bytes(chunk, loader.dtypes) for chunk in chunks},
        expert_bytes=0, least_expert_bytes=0, expert_pass_bytes=0,
    )  # fmt: skip
    codable: dict[str, int] = {}
    if device.decoder is not None and settings.codec in {"auto", "lossless"}:
        expected = {chunk.name: usual_bytes(chunk, loader.dtypes) for chunk in chunks}
        codable = {name: size for name, size in expected.items() if size is not None}
    for_coding = coding_bytes(max(near.sizes[name] for name in codable)) if codable else 0
    order = Schedule(manifest.order, phases, row_wise=units).apply_to(near)
    plan = plan_device(order, limit, for_coding)
    behind = needs_behind(needs, plan, order)
    if plan.coding_bytes and not choose_coded(behind, host_limit, codable):  # no host memory: the source limits
        for_coding, plan = 0, plan_device(order, limit, 0)
        behind = needs_behind(needs, plan, order)
    below = Lender(
        manifest, behind, host_limit, loader, device=device, io=io, metrics=metrics,
        rows_bytes=ROWS_BYTES, prefetch=settings.prefetch, codable=codable, is_coding=bool(plan.coding_bytes),
    )  # fmt: skip
    return DeviceEngine(
        below, device, near, limit, loader, io=io, metrics=metrics, phases=phases, tables=units,
        prefetch=settings.prefetch, coding_bytes=for_coding,
    )  # fmt: skip


def _move_rest(skeleton: Skeleton, device: Device) -> None:
    """Move tensors that no chunk provides to the device: buffers, and parameters missing from the checkpoint."""
    for module in skeleton.model.modules():
        registries: tuple[dict[str, Any], ...] = module._buffers, module._parameters  # noqa: SLF001 - torch's
        for registry in registries:
            for leaf, tensor in registry.items():
                if tensor is not None and not tensor.is_meta and tensor.device != device.torch_device:
                    moved = tensor.detach().to(device.torch_device)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    registry[leaf] = torch.nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved


def _fits_well(needs: Needs, limit: Limit) -> bool:
    """Whether all weights fit and leave `_FREE_SHARE` of the budget free.

    Kept operands are anonymous memory, not mapped files. If they fill a control group, the kernel keeps reclaiming the
    pages that hold the code of libraries, which costs more than the operands save.
    """
    if limit.budget_bytes is not None:
        limit = replace(limit, budget_bytes=int(limit.budget_bytes * (1 - _FREE_SHARE)))
    return _everything_fits(needs, limit)


def _everything_fits(needs: Needs, limit: Limit) -> bool:
    try:
        return plan_residency(needs, limit).everything_fits
    except ConfigurationError:
        return False


def _warn_beyond_memory(budget_bytes: int) -> None:
    there = read_smallest_limit()
    if budget_bytes > there.limit_bytes:
        size = format_size(there.limit_bytes)
        limit = f"this machine has {size}" if there.place.name == "meminfo" else f"the limit in {there.place} is {size}"
        logger.warning(
            "the memory budget of %s is more than there is: %s; weights beyond that are swapped out, or end the "
            "process",
            format_size(budget_bytes), limit,
        )  # fmt: skip


def model_needs(
    manifest: Manifest,
    dtypes: Mapping[str, torch.dtype],
    tables: Mapping[str, TableUnit],
    *,
    buffered_bytes: int = IN_FLIGHT_BYTES,
    keeps_operands: bool = False,
    is_offline: bool = False,
) -> Needs:
    """Calculate what a model needs in memory.

    Args:
        manifest: the model.
        dtypes: see `cast_dtypes`.
        tables: the units that can run without their tables in memory.
        buffered_bytes: the most that the source holds besides the memory it fills.
        keeps_operands: see `Loader`.
        is_offline: whether rows of tables may have to be decoded, as the source has nothing but a cache.
    """
    chunks = [chunk for chunk in manifest.chunks if chunk.kind != "expert"]
    known = describe_needs(
        manifest.name,
        {chunk.name: chunk.kind for chunk in chunks},
        {chunk.name: buffer_capacity(buffer_bytes(chunk, dtypes, keeps_operands=keeps_operands)) for chunk in chunks},
        manifest.order,
    )
    experts = [(len(one.chunks), expert_bytes(one, dtypes)) for one in manifest.experts.values()]
    chosen = chosen_experts(manifest.config)
    looked_up = {name for unit in tables.values() for name in unit.looked_up}
    others = {name for unit in tables.values() for name in unit.others}
    is_coded = any(form.codec not in {"none", *PACKED_CODECS} for chunk in manifest.chunks for form in chunk.forms)
    decoding_bytes = DECODING_BYTES if is_coded else 0
    return replace(
        known,
        overhead_bytes=buffered_bytes + decoding_bytes,
        in_flight_bytes=IN_FLIGHT_BYTES + decoding_bytes,
        scratch={chunk.name: scratch_bytes(chunk, dtypes) for chunk in manifest.chunks},
        tables=frozenset(manifest.home[name].name for name in looked_up) - known.fixed,
        table_bytes=2 * ROWS_BYTES
        + sum(manifest.tensors[name].nbytes for name in others)
        + (decoding_bytes if is_offline else 0),
        expert_bytes=sum(number * size for number, size in experts),
        least_expert_bytes=max((number * size for number, size in experts), default=0),
        expert_pass_bytes=sum(min(number, chosen or number) * size for number, size in experts),
    )


def chosen_experts(config: Mapping[str, Any]) -> int | None:
    """How many experts of a layer compute a token, if the configuration says so by one of the usual names."""
    parts = [config, *(one for one in config.values() if isinstance(one, Mapping))]
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts", "moe_topk")
    found = [part[name] for part in parts for name in names if isinstance(part.get(name), int)]
    return found[0] if found and found[0] > 0 else None


def find_phases(manifest: Manifest, skeleton: Skeleton) -> Phases:
    """The order in which modules run: all in a cycle, or with an encoder and a decoder, the encoder's once."""
    order = tuple(use.module for use in manifest.order)
    model: Any = skeleton.model
    if not (model.config.is_encoder_decoder and model.can_generate()):
        return Phases(cycle=order)
    inside = {id(module) for module in model.get_encoder().modules()}
    again = {id(module) for module in model.get_decoder().modules()}
    units = {unit.path: id(unit.module) for unit in skeleton.units}
    return Phases(
        once=tuple(path for path in order if units.get(path) in inside),
        cycle=tuple(path for path in order if units.get(path) not in inside or units.get(path) in again),
    )
