"""The executed modules of a model, found in the model itself."""

from itertools import chain

import pytest
import torch
from torch import nn

from surfw.skeleton.units import Unit, find_units
from tests.exactness.families import FAMILIES
from tests.skeleton.models import skeleton_of


def listed(units: list[Unit]) -> list[tuple[str, str, int]]:
    """Path, kind and number of tensors of each unit."""
    return [(unit.path, unit.kind, len(unit.slots)) for unit in units]


def layers(path: str, count: int, tensors: int) -> list[tuple[str, str, int]]:
    return [(f"{path}.{index}", "layer", tensors) for index in range(count)]


EXPECTED = {
    "llama": [
        ("model.embed_tokens", "part", 1), *layers("model.layers", 4, 9), ("model.norm", "part", 1),
        ("lm_head", "part", 1),
    ],
    "gpt2": [
        ("transformer.wte", "part", 1), ("transformer.wpe", "part", 1), *layers("transformer.h", 4, 12),
        ("transformer.ln_f", "part", 2), ("lm_head", "part", 1),
    ],
    "t5": [
        ("shared", "part", 1), ("encoder.embed_tokens", "part", 1), ("encoder.block.0", "layer", 9),
        *layers("encoder.block", 3, 8)[1:], ("encoder.final_layer_norm", "part", 1),
        ("decoder.embed_tokens", "part", 1), ("decoder.block.0", "layer", 14), *layers("decoder.block", 3, 13)[1:],
        ("decoder.final_layer_norm", "part", 1), ("lm_head", "part", 1),
    ],
    "bert-mlm": [("bert.embeddings", "part", 5), *layers("bert.encoder.layer", 4, 16), ("cls", "part", 7)],
    "bart": [
        ("*", "own", 1), ("model.shared", "part", 1), ("model.encoder.embed_tokens", "part", 1),
        ("model.encoder.embed_positions", "part", 1), *layers("model.encoder.layers", 3, 16),
        ("model.encoder.layernorm_embedding", "part", 2), ("model.decoder.embed_tokens", "part", 1),
        ("model.decoder.embed_positions", "part", 1), *layers("model.decoder.layers", 3, 26),
        ("model.decoder.layernorm_embedding", "part", 2), ("lm_head", "part", 1),
    ],
    "albert-shared-layers": [
        ("albert.embeddings", "part", 5), ("albert.encoder.embedding_hidden_mapping_in", "part", 2),
        ("albert.encoder.albert_layer_groups.0", "layer", 16), ("predictions", "part", 7),
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", EXPECTED)
def test_units_of_families(family: str) -> None:
    assert listed(skeleton_of(family).units) == EXPECTED[family]


def test_bart_keeps_its_bias_of_the_logits_directly() -> None:
    (own,) = [unit for unit in skeleton_of("bart").units if unit.kind == "own"]
    assert [(slot.name, slot.is_buffer) for slot in own.slots] == [("final_logits_bias", True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_state_dict_is_in_one_unit(family: str) -> None:
    skeleton = skeleton_of(family)
    names = [slot.name for unit in skeleton.units for slot in unit.slots]
    assert len(names) == len(set(names))
    state = skeleton.model.state_dict(keep_vars=True)
    assert set(names) == set(state)
    assert all(skeleton.slots[name].tensor is state[name] for name in names)
    assert len({unit.path for unit in skeleton.units}) == len(skeleton.units)
    paths = {id(module) for module in skeleton.model.modules()}
    assert {id(unit.module) for unit in skeleton.units} <= paths


class Leaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("computed", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("none", None)

    def forward(self) -> None: ...


class Group(nn.Module):
    """Never called itself: it only contains a list."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ModuleList([Leaf(), Leaf()])


def tree(**children: nn.Module) -> nn.Module:
    root = nn.Module()
    for name, child in children.items():
        root.add_module(name, child)
    return root


def test_slots_are_parameters_and_the_buffers_of_the_state_dict() -> None:
    (unit,) = find_units(tree(leaf=Leaf()))
    assert [(slot.name, slot.is_buffer) for slot in unit.slots] == [("leaf.weight", False), ("leaf.kept", True)]
    slot = unit.slots[1]
    slot.put(torch.ones(2))
    assert unit.module.get_buffer("kept").tolist() == [1, 1]
    assert slot.tensor is unit.module.get_buffer("kept")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (tree(), []),
        (tree(empty=nn.Module(), dropout=nn.Dropout()), []),
        (tree(a=nn.Linear(1, 1), b=nn.Sequential(nn.Linear(1, 1), nn.ReLU())), [("a", "part", 2), ("b", "part", 2)]),
        (tree(layers=nn.ModuleList([Leaf(), Leaf()])), layers("layers", 2, 2)),
        (tree(one=nn.ModuleList([Leaf()])), layers("one", 1, 2)),
        (tree(none=nn.ModuleList()), []),
        (
            tree(groups=nn.ModuleList([Group(), Group()])),
            [*layers("groups.0.items", 2, 2), *layers("groups.1.items", 2, 2)],
        ),
        (tree(lists=nn.ModuleList([nn.ModuleList([Leaf()])])), layers("lists.0", 1, 2)),
        (tree(named=nn.ModuleDict({"x": Leaf()})), [("named", "part", 2)]),
        (nn.Linear(1, 1), [("*", "own", 2)]),
    ],
)
def test_shapes_of_models(model: nn.Module, expected: list[tuple[str, str, int]]) -> None:
    assert listed(find_units(model)) == expected


def test_a_container_that_is_shared_is_visited_once() -> None:
    shared = tree(layers=nn.ModuleList([Leaf()]))
    shared.register_parameter("own", nn.Parameter(torch.zeros(1)))
    model = tree(one=tree(inner=shared, list=nn.ModuleList([Leaf()])), two=tree(inner=shared, leaf=Leaf()))
    assert listed(find_units(model)) == [
        ("one.inner.*", "own", 1), ("one.inner.layers.0", "layer", 2), ("one.list.0", "layer", 2),
        ("two.leaf", "part", 2),
    ]  # fmt: skip


def test_a_list_within_a_layer_belongs_to_the_layer() -> None:
    layer = nn.Sequential(nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)]))
    assert listed(find_units(tree(layers=nn.ModuleList([layer])))) == [("layers.0", "layer", 4)]


def test_a_module_that_is_shared_belongs_to_the_first_unit_that_has_it() -> None:
    shared = nn.Linear(1, 1)
    model = tree(layers=nn.ModuleList([nn.Sequential(shared, Leaf()), nn.Sequential(shared, Leaf()), shared]))
    assert listed(find_units(model)) == [("layers.0", "layer", 4), ("layers.1", "layer", 2)]
    names = list(chain.from_iterable((slot.name for slot in unit.slots) for unit in find_units(model)))
    assert names[:2] == ["layers.0.0.weight", "layers.0.0.bias"]
