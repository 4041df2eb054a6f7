"""Maps source tensors to the model's tensors as transformers' loader would.

The loader of transformers renames source tensors and converts some of them (per-expert matrices become one stacked
tensor, a fused projection becomes three). This module applies the same transforms per target, so that a chunk can be
made from only the source tensors it needs: plain renamings are byte copies, everything else runs transformers' own
operation. The grouping follows `transformers.core_model_loading.convert_and_load_state_dict_in_model`.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from surfw.errors import CheckpointError
from surfw.manifest import nbytes, slice_name
from surfw.skeleton.build import Skeleton
from surfw.skeleton.computed import compute_missing
from surfw.skeleton.dequantise import source_dtype
from surfw.skeleton.dtypes import torch_dtype

SourceFacts = Mapping[str, tuple[str, tuple[int, ...]]]
"""The safetensors dtype and the shape of every source tensor, by name."""


_CODED = {"F8_E4M3", "F8_E5M2", "I8"}
"""Dtypes of quantised weights, which are meaningless without their scales."""


@dataclass(frozen=True)
class Recipe:
    """How to make one or more of the model's tensors from source tensors.

    Attributes:
        targets: dtype and shape of each tensor that the recipe yields, by its name in the model.
        sources: names of the source tensors it needs; empty if transformers computes the target.
        converter: transformers' operation; None if one source becomes one target, at most renamed and cast.
        joined: the sources whose concatenated bytes equal those of the single target; empty if it is no concatenation.
        start: the offset in bytes, in the single source, at which a slice begins.
    """

    targets: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    sources: tuple[str, ...]
    converter: Callable[[Callable[[str], torch.Tensor]], dict[str, torch.Tensor]] | None = None
    joined: tuple[str, ...] = ()
    start: int = 0


def convert_bytes(
    recipe: Recipe, read: Callable[[str, memoryview, int], None], sources: SourceFacts
) -> dict[str, memoryview]:
    """Return the bytes of a recipe's targets.

    Args:
        recipe: the recipe.
        read: fills memory with a source tensor's bytes, starting at an offset in bytes.
        sources: dtypes and shapes of the source tensors.

    Raises:
        CheckpointError: the conversion yields no target, or one of another dtype or shape.
    """

    def read_tensor(name: str, only: tuple[int, ...] | None = None) -> torch.Tensor:
        dtype, shape = sources[name]
        tensor = torch.empty(shape if only is None else only, dtype=torch_dtype(dtype))
        if tensor.nbytes:
            read(name, _bytes_of(tensor), recipe.start)
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
    ((name, (dtype, shape)),) = recipe.targets.items()
    return {name: _bytes_of(read_tensor(recipe.sources[0], shape).to(dtype))}


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array) if tensor.nbytes else memoryview(b"")


@dataclass(frozen=True)
class Loading:
    """All recipes of a checkpoint.

    Attributes:
        recipes: by target name; a recipe with several targets is listed under each. Expert stacks are listed as their
            slices, see `manifest.slice_name`.
        ties: maps the name of each tied tensor to the name under which it is stored.
        unused: source tensors that the model does not use.
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
        equal: whether two source tensors have the same bytes; called if both sides of a tie are in the checkpoint.
        where: names the checkpoint in errors.
        quantizer: dequantises the sources; see `surfw.skeleton.dequantise`.

    Raises:
        CheckpointError: weights have unexpected shapes, or cannot be converted.
    """
    groups, unused = _group(skeleton, sources, quantizer)
    maker = _Maker(skeleton, sources, quantizer, where=where)
    recipes: dict[str, Recipe] = {}
    for first, group in groups.items():
        recipe = maker.recipe(first, group)
        recipes |= dict.fromkeys(recipe.targets, recipe)
    loading = finish_loading(skeleton, recipes, unused, equal, where=where)

    def slices(name: str, recipe: Recipe) -> dict[str, Recipe]:
        return maker.slices(name, recipe, groups[name]) if name in groups else {}

    return slice_experts(skeleton, loading, slices)


def slice_experts(
    skeleton: Skeleton, loading: Loading, slices: Callable[[str, Recipe], dict[str, Recipe]] = lambda *_: {}
) -> Loading:
    """Return `loading` with each expert stack replaced by its slices.

    Args:
        skeleton: the model.
        loading: the recipes of its checkpoint.
        slices: returns recipes for the slices of a stack if they can be made one by one; if it returns none, the stack
            is made as a whole and then sliced.
    """
    recipes, tied = dict(loading.recipes), set(loading.ties.values())
    for module in skeleton.experts.values():
        stacks = {slot.name: recipes.get(slot.name) for slot in module.slots}
        if any(recipe is None or len(recipe.targets) > 1 or name in tied for name, recipe in stacks.items()):
            continue
        for name in stacks:
            recipe = recipes.pop(name)
            recipes |= slices(name, recipe) or _cut(name, recipe)
    return replace(loading, recipes=recipes)


def _cut(name: str, recipe: Recipe) -> dict[str, Recipe]:
    """One recipe that makes a whole stack and yields its slices."""
    ((dtype, (count, *inner)),) = recipe.targets.values()
    names = [slice_name(name, index) for index in range(count)]

    def convert(read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        assert recipe.converter is not None, "what is stored as it is can be read slice by slice"
        return dict(zip(names, recipe.converter(read)[name], strict=False))

    return dict.fromkeys(names, Recipe({one: (dtype, tuple(inner)) for one in names}, recipe.sources, convert))


def finish_loading(
    skeleton: Skeleton,
    recipes: Mapping[str, Recipe],
    unused: Sequence[str],
    equal: Callable[[str, str], bool],
    *,
    where: str,
) -> Loading:
    """Check the recipes against the model's shapes, and find its ties and missing parameters.

    Raises:
        CheckpointError: weights have unexpected shapes.
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
    """The recipe of a parameter that transformers computes."""
    return Recipe({name: (value.dtype, tuple(value.shape))}, (), lambda _: {name: value})


def _group(skeleton: Skeleton, sources: SourceFacts, quantizer: Any) -> tuple[dict[str, _Group], list[str]]:
    """Group the sources by target, and list those that the model does not use."""
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
        if group.converter is not None or not group.collected:  # if a target has two plain sources, the first wins
            group.collected.append((pattern or source, source))
    return groups, unused


class _Maker:
    """Makes the recipes of one checkpoint."""

    def __init__(self, skeleton: Skeleton, sources: SourceFacts, quantizer: Any, *, where: str) -> None:
        self._skeleton = skeleton
        self._quantizer = quantizer
        self._sources = sources
        self._dtypes = target_dtypes(skeleton)
        self._where = where

    def recipe(self, first: str, group: _Group) -> Recipe:
        """The recipe for all targets of a group; `first` is the name of the first target."""
        sources, names = self._sources, tuple(source for _, source in group.collected)
        if group.converter is None:
            joined = names[:1] if torch_dtype(sources[names[0]][0]) == self._dtypes(first) else ()
            return Recipe({first: (self._dtypes(first), sources[names[0]][1])}, names, joined=joined)
        convert = partial(self._convert, first, group)
        if self._quantizer is not None:
            _expect_scales(names, sources, where=self._where)
            if len(group.converter.target_patterns) == 1:
                return _untried(self._skeleton, first, names, self._dtypes, convert)
        trial = convert(lambda one: torch.empty(sources[one][1], dtype=torch_dtype(sources[one][0]), device="meta"))
        slots = self._skeleton.slots
        targets = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in trial.items() if name in slots}
        return Recipe(targets, names, convert, _joined(group, targets, sources))

    def slices(self, name: str, recipe: Recipe, group: _Group) -> dict[str, Recipe]:
        """Recipes for the slices of a stack; none if the stack can only be made as a whole.

        Slices can be made one by one if the checkpoint stores the stack itself, or if the stack is built from one
        tensor per expert or from several that are concatenated. Other operations might mix experts.
        """
        dtype, shape = recipe.targets[name]
        names = [slice_name(name, index) for index in range(shape[0])]
        targets = [{one: (dtype, shape[1:])} for one in names]
        if group.converter is None:
            size = nbytes(self._sources[recipe.sources[0]][0], shape[1:])
            return {
                one: Recipe(target, recipe.sources, joined=recipe.joined, start=index * size)
                for index, (one, target) in enumerate(zip(names, targets, strict=True))
            }
        if self._quantizer is not None or len(recipe.targets) > 1 or not _stacks(group.converter):
            return {}
        alone = _apart(group, len(names))
        facts = [[self._sources[source] for _, source in one.collected] for one in alone]
        if not alone or any(one != facts[0] for one in facts):
            return {}
        if self.recipe(name, alone[0]).targets != {name: (dtype, (1, *shape[1:]))}:
            return {}
        is_joined = all(torch_dtype(stored) == dtype for stored, _ in facts[0])
        return {
            one: Recipe(
                target,
                tuple(source for _, source in its.collected),
                partial(self._convert_slice, name, its, one, shape[1:]),
                tuple(source for _, source in its.collected) if is_joined else (),
            )
            for one, target, its in zip(names, targets, alone, strict=True)
        }

    def _convert(self, first: str, group: _Group, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run transformers' operation on the sources of a group."""
        converter: Any = deepcopy(group.converter)
        for pattern, source in group.collected:
            tensor = read(source)
            dtype = source_dtype(self._quantizer, converter, tensor, self._dtypes(first))
            converter.add_tensor(first, source, pattern, tensor if dtype is None else tensor.to(dtype))
        try:
            realised = converter.convert(first, model=self._skeleton.model, config=self._skeleton.model.config)
        except Exception as exc:
            raise CheckpointError(
                f"{self._where}: transformers cannot make {first} out of {len(group.collected)} tensors such as "
                f"{group.collected[0][1]}: {exc}"
            ) from exc
        made = {name: (value[0] if isinstance(value, list) else value) for name, value in realised.items()}
        return {name: tensor.detach() for name, tensor in made.items()}

    def _convert_slice(
        self, stack: str, group: _Group, name: str, shape: tuple[int, ...], read: Callable[[str], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Convert a group of one expert, whose stack has one slice, and return that slice."""
        return {name: self._convert(stack, group, read)[stack].reshape(shape)}


def _stacks(converter: WeightConverter) -> bool:
    """Whether a converter stacks tensors and at most concatenates the stacks along the rows of their slices."""
    first, *others = converter.operations
    is_stack = type(first) is MergeModulelist and first.dim == 0
    return is_stack and len(others) < 2 and all(type(one) is Concatenate and one.dim == 1 for one in others)


def _apart(group: _Group, count: int) -> list[_Group]:
    """The sources of each of `count` slices, in concatenation order; none if a pattern has another number of them."""
    by_pattern: dict[str, list[str]] = {}
    for pattern, source in group.collected:
        by_pattern.setdefault(pattern, []).append(source)
    ordered = (
        [pattern for pattern in group.converter.source_patterns if pattern in by_pattern] if group.converter else []
    )
    if any(len(sources) != count for sources in by_pattern.values()):
        return []
    return [_Group(group.converter, [(one, by_pattern[one][index]) for one in ordered]) for index in range(count)]


def _expect_scales(names: Sequence[str], sources: SourceFacts, *, where: str) -> None:
    """Check that quantised weights have scales; without scales, transformers would take the codes for values.

    Raises:
        CheckpointError: a weight has no scale.
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
    """A recipe that yields `first` and cannot be tried on the meta device: some converters read a shape from a tensor.

    `convert_bytes` compares the actual result with the model's shape.
    """
    return Recipe({first: (dtypes(first), tuple(skeleton.slots[first].tensor.shape))}, names, convert)


def _joined(
    group: _Group, targets: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], sources: SourceFacts
) -> tuple[str, ...]:
    """The sources whose concatenated bytes equal the target's; empty if the converter does anything else to them."""
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
    """Return a function from a tensor's name to the dtype it is loaded with; transformers keeps some in fp32."""
    plan = skeleton.model._get_dtype_plan(skeleton.dtype)  # noqa: SLF001 - the call that the loader makes
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
    """Map each tied tensor to the one that is stored, following `PreTrainedModel.tie_weights`."""
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
