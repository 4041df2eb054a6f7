"""Which chunks are coded for copies to a device. Pure: needs, limits and sizes in, a decision out."""

from collections.abc import Mapping
from dataclasses import replace

from surfw.errors import ConfigurationError
from surfw.runtime.plan import (
    Limit,
    Needs,
    ResidencyPlan,
    bytes_per_pass,
    least_bytes,
    plan_residency,
    spread_over_groups,
)

USUAL_SHARE = 0.71
"""The expected coded size of a chunk, as a share of its size; with 2 % of escapes, `exponents` reaches 0.703."""


def plan_device(needs: Needs, limit: Limit, coding_bytes: int) -> ResidencyPlan:
    """The plan of a device: with memory for coding if that reduces the bytes copied in every pass.

    Args:
        needs: of the model on the device.
        limit: of device memory.
        coding_bytes: memory for coding; 0 to disable it.

    Raises:
        ConfigurationError: the limit is too small for the model.
    """
    plan = plan_residency(needs, limit)
    if not (coding_bytes and plan.bytes_per_pass):
        return plan
    try:
        coding = plan_residency(replace(needs, working_bytes=needs.working_bytes + coding_bytes), limit)
    except ConfigurationError:
        return plan
    if USUAL_SHARE * coding.bytes_per_pass >= plan.bytes_per_pass:
        return plan
    return replace(coding, coding_bytes=coding_bytes)


def choose_coded(needs: Needs, limit: Limit, coded: Mapping[str, int]) -> frozenset[str]:
    """Which chunks to keep in coded form: as many as fit beside a ring for the others, spread over the depth.

    Args:
        needs: of host memory, see `plan.needs_behind`; its `passing` chunks are resident on the device.
        limit: of host memory.
        coded: the coded size of each chunk that can be coded.
    """
    names = [one for one in dict.fromkeys(needs.cycle) if one in coded and one not in needs.passing | needs.tables]
    if limit.budget_bytes is None:
        return frozenset(names)
    others = replace(needs, passing=needs.passing.union(names), working_bytes=0)
    free = limit.budget_bytes - limit.reserved_bytes - least_bytes(others)
    return frozenset(spread_over_groups(names, coded, set(needs.before), max(0, free)))


def with_coded(needs: Needs, coded: Mapping[str, int]) -> Needs:
    """The same needs of host memory if these chunks are kept in coded form, in these sizes."""
    return replace(needs, passing=needs.passing.union(coded), working_bytes=sum(coded.values()))


def copied_per_pass(plan: ResidencyPlan, needs: Needs, coded: Mapping[str, int]) -> int:
    """How many bytes one pass copies to the device.

    Args:
        plan: of the device.
        needs: of the device, with their schedule.
        coded: how many bytes are copied of each coded chunk.
    """
    return bytes_per_pass(replace(plan, sizes={**plan.sizes, **coded}), needs.cycle)
