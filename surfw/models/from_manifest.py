"""Builds a model from an untrusted manifest.

The configuration is sanitised, and every shape that the class asks for is compared with the manifest during the build.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from surfw.config import GIB, OnMissing, count, format_size
from surfw.errors import ManifestError, UninitializedWeightsWarning
from surfw.manifest import Manifest, TensorInfo, stack_name
from surfw.runtime.loader import as_parameter
from surfw.runtime.run import Run, current_run
from surfw.skeleton.build import Skeleton, build_skeleton, fill_rest, read_config, resolve_class
from surfw.skeleton.dtypes import parse_dtype, safetensors_dtype, torch_dtype
from surfw.skeleton.guards import foreign_errors
from surfw.skeleton.loading import target_dtypes
from surfw.skeleton.sanitise import (
    NOT_FROM_A_FILE,
    check_generation,
    sanitise,
    sanitise_generation,
    untag_floats,
)
from surfw.skeleton.units import Slot

logger = logging.getLogger("surfw.models")

_MAX_MISSING_BYTES = 4 * GIB
_TAKEN = frozenset(dir(GenerationConfig))
"""Names that generation settings must not have: methods and attributes of their class."""


def open_skeleton(
    manifest: Manifest,
    dtype: torch.dtype | None = None,
    *,
    model_class: type[PreTrainedModel] | None = None,
    on_missing: OnMissing = "error",
) -> Skeleton:
    """Build the model of a manifest without weights; interrupting this thread's run interrupts the build.

    Args:
        manifest: the model.
        dtype: run in this dtype; default: the stored one.
        model_class: the caller's own class; default: the manifest's, from transformers or registered with it.
        on_missing: with `uninitialized`, parameters without weights in the manifest are initialised as in a new model.

    Raises:
        UnsupportedModelError: the class or configuration cannot be used here.
        ManifestError: configuration and chunks do not match.
    """
    where = manifest.name
    settings, generation, code, unfit = sanitise(manifest.config, manifest.generation_config, where=where)
    for lines, why in ((code, "surfw runs no code from elsewhere"), (unfit, "no file may choose it")):
        for line in lines:
            logger.warning("%s: ignored in its configuration, because %s: %s", where, why, line)
    config = read_config(settings, where=where, model_class=model_class)
    cls = model_class or resolve_class(manifest.class_name, config, where=where)
    tensors = manifest.weights
    shapes = {tensor.shape for tensor in tensors.values()}
    skeleton = build_skeleton(
        config,
        cls,
        dtype or parse_dtype(manifest.dtype),
        tensor_count=len(tensors) + len(manifest.ties),
        accepts=shapes.__contains__ if on_missing == "error" else lambda _: True,
        check=(current_run.get() or Run()).check,
        where=where,
    )
    for name, slot in skeleton.slots.items():
        if stored := tensors.get(manifest.ties.get(name, name)):
            _check_fit(name, stored, slot.tensor, cls.__name__, where)
    loaded = set(tensors) | set(manifest.ties)
    if missing := [slot for name, slot in skeleton.slots.items() if name not in loaded and not slot.is_buffer]:
        _report_missing(missing, cls.__name__, on_missing, where)
    if unknown := loaded - set(skeleton.slots):
        raise ManifestError(f"{where}: {cls.__name__} has no place for {min(unknown)}; chunk the model again")
    _check_order(manifest, skeleton)
    fill_rest(skeleton, loaded, where=where)
    _set_dtypes(skeleton, manifest)
    if skeleton.model.can_generate():
        _configure_generation(skeleton.model, untag_floats(generation or {}), manifest, untag_floats(settings))
    return skeleton


def _check_fit(name: str, stored: TensorInfo, place: torch.Tensor, cls: str, where: str) -> None:
    """Check that a stored tensor matches its parameter or buffer in the class.

    Floating-point tensors may be stored in another precision: the model can run in another dtype, and releases of
    transformers differ in what they keep in float32. Integer, boolean and complex tensors are never converted.
    """
    if tuple(place.shape) != stored.shape:
        raise ManifestError(f"{where}: {name} has shape {stored.shape} in the manifest, {tuple(place.shape)} in {cls}")
    found = torch_dtype(stored.dtype)
    if found != place.dtype and not (found.is_floating_point and place.dtype.is_floating_point):
        raise ManifestError(
            f"{where}: {name} has dtype {stored.dtype} in the manifest, {safetensors_dtype(place.dtype)} in {cls}; "
            "chunk the model again"
        )


def _report_missing(missing: Sequence[Slot], cls: str, on_missing: OnMissing, where: str) -> None:
    first = missing[0].name
    if on_missing == "error":
        raise ManifestError(
            f"{where}: the manifest has no weights for {first} of {cls}; chunk the model again, or compute with "
            "weights that nobody trained: on_missing='uninitialized'"
        )
    size = sum(slot.tensor.nbytes for slot in missing)
    if size > _MAX_MISSING_BYTES:
        raise ManifestError(
            f"{where}: {cls} wants {format_size(size)} of weights that the manifest does not have, expected at most "
            f"{format_size(_MAX_MISSING_BYTES)}; the configuration does not belong to these weights"
        )
    warnings.warn(
        f"{where}: {count(len(missing), 'weight')} of {cls} {'is' if len(missing) == 1 else 'are'} UNINITIALIZED, "
        f"such as {first}: what it computes with them is meaningless until they are trained",
        UninitializedWeightsWarning,
        stacklevel=2,
    )


def _set_dtypes(skeleton: Skeleton, manifest: Manifest) -> None:
    """Set parameters, still without values, to the dtypes that transformers keeps them in."""
    wanted = target_dtypes(skeleton)
    for name, slot in skeleton.slots.items():
        dtype = wanted(manifest.ties.get(name, name))
        if not slot.is_buffer and slot.tensor.dtype != dtype:
            slot.put(as_parameter(slot.tensor.to(dtype)))


def cast_dtypes(manifest: Manifest, skeleton: Skeleton) -> dict[str, torch.dtype]:
    """The tensors whose dtype in the model differs from that in their chunk, with the model's dtype."""
    wanted = target_dtypes(skeleton)
    found = {name: (torch_dtype(info.dtype), wanted(stack_name(name))) for name, info in manifest.tensors.items()}
    return {name: to for name, (stored, to) in found.items() if stored != to}


def _check_order(manifest: Manifest, skeleton: Skeleton) -> None:
    """Check that every unit's use names the chunks that hold its tensors."""
    uses = {use.module: set(use.chunks) for use in manifest.order}
    twice = [module for module, count in Counter(use.module for use in manifest.order).items() if count > 1]
    for unit in skeleton.units:
        names = (manifest.ties.get(slot.name, slot.name) for slot in unit.slots)
        needed = {manifest.home[name].name for name in names if name in manifest.home}
        if needed and (unit.path not in uses or not needed <= uses[unit.path] or unit.path in twice):
            raise ManifestError(f"{manifest.name}: the execution order does not fit {unit.path}; chunk the model again")


def _configure_generation(
    model: PreTrainedModel, generation: dict[str, object], manifest: Manifest, config: dict[str, object]
) -> None:
    """Configure generation as `from_pretrained` does: from generation_config.json, else from config.json."""
    has_file = manifest.generation_config is not None
    settings, dropped = sanitise_generation(generation if has_file else config, taken=_TAKEN)
    for line in dropped:
        if not has_file and line.partition(":")[0] not in NOT_FROM_A_FILE:
            continue  # a configuration has other settings of these names
        logger.warning("%s: ignored in its generation settings, because no file may choose it: %s", manifest.name, line)
    check_generation(settings, where=manifest.name)
    advice = "; correct its generation_config.json or config.json, and chunk it again"
    with foreign_errors(f"the generation settings of {manifest.name}", advice):
        make: Any = GenerationConfig.from_dict if has_file else GenerationConfig.from_model_config
        model.generation_config = make(settings)
