"""What transformers would load: which source tensors become which tensors of the model, and how.

The loader of transformers renames source tensors and converts some of them (per-expert matrices become one stacked
tensor, a fused projection becomes three). The same transforms are asked here, per target, so that a chunk can be made
from only the source tensors it needs: plain renamings are byte copies, everything else runs transformers' own
operation. The grouping follows `transformers.core_model_loading.convert_and_load_state_dict_in_model`.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from surfw.errors import CheckpointError
from surfw.skeleton.build import Skeleton
from surfw.skeleton.computed import compute_missing
from surfw.skeleton.dequantise import source_dtype
from surfw.skeleton.dtypes import torch_dtype

SourceFacts = Mapping[str, tuple[str, tuple[int, ...]]]
"""Of every source tensor: its safetensors dtype and its shape."""


_CODED = {"F8_E4M3", "F8_E5M2", "I8"}
"""Types of weights that mean nothing without their scales."""


@dataclass(frozen=True)
class Recipe:
    """How one or several tensors of the model come out of source tensors.

    Attributes:
        targets: names of the model's tensors that it yields, with their dtype and shape.
        sources: names of the source tensors that it needs; none where transformers computes it.
        converter: transformers' operation; None where one source becomes one target, at most renamed and cast.
        joined: the sources whose concatenated bytes are those of the one target; empty if there are none such.
    """

    targets: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    sources: tuple[str, ...]
    converter: Callable[[Callable[[str], torch.Tensor]], dict[str, torch.Tensor]] | None = None
    joined: tuple[str, ...] = ()


def convert_bytes(
    recipe: Recipe, read: Callable[[str, memoryview], None], sources: SourceFacts
) -> dict[str, memoryview]:
    """The bytes of a recipe's targets; `read` fills memory with a source tensor's bytes."""

    def read_tensor(name: str) -> torch.Tensor:
        dtype, shape = sources[name]
        tensor = torch.empty(shape, dtype=torch_dtype(dtype))
        if tensor.nbytes:
            read(name, _bytes_of(tensor))
        return tensor

    if recipe.converter is not None:
        made = recipe.converter(read_tensor)
        for name, (dtype, shape) in recipe.targets.items():
            seen = made.get(name)
            if seen is None or (seen.dtype, tuple(seen.shape)) != (dtype, shape):
                found = "nothing" if seen is None else f"{seen.dtype} of shape {tuple(seen.shape)}"
                raise CheckpointError(
                    f"transformers makes {found} of {recipe.sources[0]} for {name}, expected {dtype} of shape {shape}"
                )
        return {name: _bytes_of(tensor) for name, tensor in made.items() if name in recipe.targets}
    ((name, (dtype, _)),) = recipe.targets.items()
    return {name: _bytes_of(read_tensor(recipe.sources[0]).to(dtype))}


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array) if tensor.nbytes else memoryview(b"")


@dataclass(frozen=True)
class Loading:
    """All recipes of a checkpoint.

    Attributes:
        recipes: by the name of each target; a recipe with several targets stands under each.
        ties: name of a tensor that is stored under another name, to that name.
        unused: source tensors that the model has no place for.
        missing: parameters of the model that are not in the checkpoint.
    """

    recipes: Mapping[str, Recipe]
    ties: Mapping[str, str]
    unused: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class _Group:
    """Source tensors that transformers would collect for one target: (pattern, name), in loading order."""

    converter: WeightConverter | None
    collected: list[tuple[str, str]] = field(default_factory=list)


def plan_loading(
    skeleton: Skeleton,
    sources: SourceFacts,
    equal: Callable[[str, str], bool],
    *,
    where: str,
    quantizer: Any = None,
) -> Loading:
    """Plan what `from_pretrained` would load into the skeleton.

    Args:
        skeleton: a fresh skeleton of the model.
        sources: the checkpoint's tensors.
        equal: whether two source tensors have the same bytes; asked where both sides of a tie are in the checkpoint.
        where: names the checkpoint in errors.
        quantizer: dequantises the sources; see `surfw.skeleton.dequantise`.

    Raises:
        CheckpointError: weights have other shapes, or cannot be converted.
    """
    dtypes = target_dtypes(skeleton)
    groups, unused = _group(skeleton, sources, quantizer)
    recipes: dict[str, Recipe] = {}
    for first, group in groups.items():
        recipe = _recipe(skeleton, first, group, sources, dtypes, where=where, quantizer=quantizer)
        recipes |= dict.fromkeys(recipe.targets, recipe)
    return finish_loading(skeleton, recipes, unused, equal, where=where)


def finish_loading(
    skeleton: Skeleton,
    recipes: Mapping[str, Recipe],
    unused: Sequence[str],
    equal: Callable[[str, str], bool],
    *,
    where: str,
) -> Loading:
    """Compare what recipes yield with the model's shapes, and find its ties, and what is missing.

    Raises:
        CheckpointError: weights have other shapes.
    """
    for name, recipe in recipes.items():
        expected, seen = tuple(skeleton.slots[name].tensor.shape), recipe.targets[name][1]
        if expected != seen:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {seen}, but {type(skeleton.model).__name__} with this config.json "
                f"expects {expected}; configuration and weights do not belong together"
            )
    ties = _ties(skeleton, recipes, equal)
    recipes = {name: recipe for name, recipe in recipes.items() if name not in ties}
    missing = tuple(
        name for name, slot in skeleton.slots.items() if name not in recipes and name not in ties and not slot.is_buffer
    )
    dtypes = target_dtypes(skeleton)
    computed = compute_missing(skeleton, missing, {name: dtypes(name) for name in missing})
    recipes |= {name: _computed(name, value) for name, value in computed.items()}
    return Loading(recipes, ties, tuple(unused), tuple(name for name in missing if name not in computed))


def _computed(name: str, value: torch.Tensor) -> Recipe:
    """The recipe of a parameter that no checkpoint has to hold."""
    return Recipe({name: (value.dtype, tuple(value.shape))}, (), lambda _: {name: value})


def _group(skeleton: Skeleton, sources: SourceFacts, quantizer: Any) -> tuple[dict[str, _Group], list[str]]:
    """Collect the sources by the target they go to."""
    model = skeleton.model
    transforms = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    prefix = model.base_model_prefix
    state = model.state_dict()
    groups: dict[str, _Group] = {}
    unused = []
    for source in sorted(sources, key=dot_natural_key):
        target, pattern = rename_source_key(source, renamings, converters, prefix, state)
        if target not in state and source in state:
            target, pattern = rename_source_key(source, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if target not in state:
            unused.append(source)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        group = groups.setdefault(target, _Group(converter))
        if group.converter is not None or not group.collected:  # of two plain sources of one target, the first counts
            group.collected.append((pattern or source, source))
    return groups, unused


def _recipe(
    skeleton: Skeleton,
    first: str,
    group: _Group,
    sources: SourceFacts,
    dtypes: Callable[[str], torch.dtype],
    *,
    where: str,
    quantizer: Any,
) -> Recipe:
    names = tuple(source for _, source in group.collected)
    if group.converter is None:
        joined = names[:1] if torch_dtype(sources[names[0]][0]) == dtypes(first) else ()
        return Recipe({first: (dtypes(first), sources[names[0]][1])}, names, joined=joined)

    def convert(read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        converter: Any = deepcopy(group.converter)
        for pattern, source in group.collected:
            tensor = read(source)
            dtype = source_dtype(quantizer, converter, tensor, dtypes(first))
            converter.add_tensor(first, source, pattern, tensor if dtype is None else tensor.to(dtype))
        try:
            realised = converter.convert(first, model=skeleton.model, config=skeleton.model.config)
        except Exception as exc:
            raise CheckpointError(
                f"{where}: transformers cannot make {first} out of {len(names)} tensors such as {names[0]}: {exc}"
            ) from exc
        made = {name: (value[0] if isinstance(value, list) else value) for name, value in realised.items()}
        return {name: tensor.detach() for name, tensor in made.items()}

    if quantizer is not None:
        _expect_scales(names, sources, where=where)
        if len(group.converter.target_patterns) == 1:
            return _untried(skeleton, first, names, dtypes, convert)
    trial = convert(
        lambda source: torch.empty(sources[source][1], dtype=torch_dtype(sources[source][0]), device="meta")
    )
    targets = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in trial.items() if name in skeleton.slots}
    return Recipe(targets, names, convert, _joined(group, targets, sources))


def _expect_scales(names: Sequence[str], sources: SourceFacts, *, where: str) -> None:
    """Make sure that quantised weights have scales beside them: without these, transformers takes them for values.

    Raises:
        CheckpointError: one has none.
    """
    for name in names:
        module = name.removesuffix("weight")
        is_coded = sources[name][0] in _CODED and "scale" not in name.removeprefix(module)
        if is_coded and not any("scale" in one.removeprefix(module) for one in names if one.startswith(module)):
            raise CheckpointError(
                f"{where} has {name} in {sources[name][0]} and no scale for it; the checkpoint is incomplete, download "
                "it again"
            )


def _untried(
    skeleton: Skeleton,
    first: str,
    names: tuple[str, ...],
    dtypes: Callable[[str], torch.dtype],
    convert: Callable[[Callable[[str], torch.Tensor]], dict[str, torch.Tensor]],
) -> Recipe:
    """A recipe that yields `first`, and that cannot be tried without values: some read a shape out of a tensor.

    What it really yields is compared with the model's shape once it has run: see `convert_bytes`.
    """
    return Recipe({first: (dtypes(first), tuple(skeleton.slots[first].tensor.shape))}, names, convert)


def _joined(
    group: _Group, targets: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], sources: SourceFacts
) -> tuple[str, ...]:
    """The sources whose concatenated bytes are those of the target; empty if anything else is done to them."""
    converter = group.converter
    if converter is None or len(targets) != 1 or len(converter.operations) != 1:
        return ()
    (only,) = converter.operations
    if type(only) is not Concatenate or only.dim != 0:
        return ()
    ordered = [
        source for wanted in converter.source_patterns for pattern, source in group.collected if pattern == wanted
    ]
    ((dtype, shape),) = targets.values()
    rows = sum(sources[name][1][0] for name in ordered if sources[name][1])
    same = all(torch_dtype(sources[name][0]) == dtype and sources[name][1][1:] == shape[1:] for name in ordered)
    return tuple(ordered) if same and shape and rows == shape[0] else ()


def target_dtypes(skeleton: Skeleton) -> Callable[[str], torch.dtype]:
    """A function from tensors' names to the dtypes they are loaded with; transformers keeps some in fp32."""
    plan = skeleton.model._get_dtype_plan(skeleton.dtype)  # noqa: SLF001 - the loader's own question
    if plan:
        pattern, by_group, _ = build_glob_alternation(list(plan))

    def dtype(name: str) -> torch.dtype:
        match = pattern.search(name) if plan else None
        if match is not None:
            kept: torch.dtype = plan[by_group[str(match.lastgroup)]]
            return kept
        return skeleton.slots[name].tensor.dtype

    return dtype


def _ties(skeleton: Skeleton, recipes: Mapping[str, Recipe], equal: Callable[[str, str], bool]) -> dict[str, str]:
    """Which tensors are stored under another one's name, following `PreTrainedModel.tie_weights`."""
    families: dict[str, list[str]] = {}
    declared = {**skeleton.inherent_ties, **skeleton.model.all_tied_weights_keys}
    for target, source in declared.items():
        families.setdefault(source, [source]).append(target)
    ties: dict[str, str] = {}
    for members in families.values():
        present = [name for name in members if name in recipes]
        if not present:
            continue  # reported as missing
        stored = present[0]
        for name in members:
            if name != stored and (name not in present or _same(recipes[stored], recipes[name], equal)):
                ties[name] = stored
    return ties


def _same(one: Recipe, other: Recipe, equal: Callable[[str, str], bool]) -> bool:
    plain = one.converter is None and other.converter is None
    return plain and (one.sources == other.sources or equal(one.sources[0], other.sources[0]))
