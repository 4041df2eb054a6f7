"""What a model needs in memory, from what is known of it before a byte is read: one calculation for everybody.

Whoever opens a model plans with it, whoever explains one shows its least budget, and so does a dry run of chunking,
which has no manifest yet. The least budget depends on the model and its dtypes alone, never on where weights come from.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from surfw.chunking.prepared import PreparedModel
from surfw.config import MIB
from surfw.manifest import Chunk, Form, Manifest
from surfw.models.opening import cast_dtypes
from surfw.runtime.buffers import buffer_capacity
from surfw.runtime.kv_cache import kv_cost
from surfw.runtime.loader import buffer_bytes, scratch_bytes
from surfw.runtime.plan import Needs, describe_needs, least_bytes
from surfw.runtime.rows import TableUnit, tables_of
from surfw.runtime.schedule import Phases, Schedule
from surfw.skeleton.build import Skeleton, build_skeleton, read_config, resolve_class
from surfw.skeleton.dtypes import parse_dtype

ROWS_BYTES = 4 * MIB
"""For blocks of tables that are being read, and as much for those that were used last."""

IN_FLIGHT_BYTES = 6 * MIB
"""What any source of weights holds at most beside the memory it fills, where it is asked for a block at a time: for
unaligned tensors of a local checkpoint, a huge page for each of its three threads; others hold less."""


def model_needs(
    manifest: Manifest,
    dtypes: Mapping[str, torch.dtype],
    tables: Mapping[str, TableUnit],
    *,
    buffered_bytes: int = IN_FLIGHT_BYTES,
) -> Needs:
    """What a model needs.

    Args:
        manifest: the model.
        dtypes: the tensors that have another dtype in the model than in their chunk.
        tables: its units that can run without their tables in memory.
        buffered_bytes: what its source holds at most beside the memory it fills.
    """
    known = describe_needs(
        manifest.name,
        {chunk.name: chunk.kind for chunk in manifest.chunks},
        {chunk.name: buffer_capacity(buffer_bytes(chunk, dtypes)) for chunk in manifest.chunks},
        manifest.order,
    )
    home = {tensor.name: chunk.name for chunk in manifest.chunks for tensor in chunk.tensors}
    size = {tensor.name: tensor.nbytes for chunk in manifest.chunks for tensor in chunk.tensors}
    looked_up = {name for unit in tables.values() for name in unit.looked_up}
    others = {name for unit in tables.values() for name in unit.others}
    return replace(
        known,
        overhead_bytes=buffered_bytes,
        in_flight_bytes=IN_FLIGHT_BYTES,
        scratch={chunk.name: scratch_bytes(chunk, dtypes) for chunk in manifest.chunks},
        tables=frozenset(home[name] for name in looked_up) - known.fixed,
        table_bytes=2 * ROWS_BYTES + sum(size[name] for name in others),
    )


def find_phases(manifest: Manifest, skeleton: Skeleton) -> Phases:
    """In which order modules will run: all in a cycle, or, where a model has an encoder and a decoder, that one's."""
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


def plan_least_budget(prepared: PreparedModel) -> tuple[int, int]:
    """What a model that is still to be chunked will need, in the dtype it is chunked in.

    Returns:
        The smallest budget for weights that can run it, and what each token adds to that for the KV cache, in bytes.
    """
    name, plan, ties, dtype = prepared.name, prepared.plan, prepared.loading.ties, parse_dtype(prepared.dtype)
    chunks = tuple(
        Chunk(
            chunk.name, chunk.kind, "", chunk.payload_bytes, tuple(tensor.info for tensor in chunk.tensors),
            (Form("none", chunk.payload_bytes, "", b""),),
        )
        for chunk in plan.chunks
    )  # fmt: skip
    manifest = Manifest(name, prepared.class_name, prepared.dtype, prepared.config, None, (), ties, chunks, plan.order)
    config = read_config(dict(prepared.config), where=name)
    count = sum(len(chunk.tensors) for chunk in chunks) + len(ties)
    skeleton = build_skeleton(
        config, resolve_class(prepared.class_name, config, where=name), dtype, tensor_count=count, where=name
    )
    tables = tables_of(skeleton, manifest)
    needs = model_needs(manifest, cast_dtypes(manifest, skeleton), tables)
    needs = Schedule(manifest.order, find_phases(manifest, skeleton), row_wise=tables).apply_to(needs)
    per_token = kv_cost(skeleton.model.config, dtype).new_token_bytes if skeleton.model.can_generate() else 0
    return least_bytes(needs.from_anywhere()), per_token
