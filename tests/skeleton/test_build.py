"""A skeleton equals what `from_pretrained` would set up, and invalid configurations build nothing."""

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from surfw.errors import UnsupportedModelError
from surfw.skeleton import build
from surfw.skeleton.build import build_skeleton, fill_rest, read_config, resolve_class
from tests.exactness.families import FAMILIES
from tests.skeleton.models import settings_of, skeleton_of
from tests.toys import Pause


class ToyConfig(PreTrainedConfig):
    model_type = "surfw-toy"
    hidden: int = 4


class ToyModel(PreTrainedModel):
    """A user's own model; its constructor computes `mask`, which has no effect on the meta device."""

    config_class = ToyConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.hidden, config.hidden)
        self.register_buffer("mask", torch.ones(3) * 2, persistent=False)
        self.register_buffer("steps", torch.arange(3))
        self.post_init()

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x)


class ToyWithInit(ToyModel):
    """The same, with a method that fills its buffers."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ToyModel):
            module.mask.fill_(2)
            module.steps.copy_(torch.arange(3))


class ToyHead(PreTrainedModel):
    """Forgets `post_init`."""

    config_class = ToyConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.linear = nn.Linear(2, 2)


@pytest.fixture
def _registered() -> Iterator[None]:
    config_mapping = transformers.CONFIG_MAPPING
    AutoConfig.register("surfw-toy", ToyConfig)
    AutoModel.register(ToyConfig, ToyModel)
    AutoModelForCausalLM.register(ToyConfig, ToyHead)
    yield
    del config_mapping._extra_content["surfw-toy"]
    for auto in (AutoModel, AutoModelForCausalLM):
        del auto._model_mapping._extra_content[ToyConfig]


def registration_hooks() -> list[list[Any]]:
    """Torch's global hooks for registered parameters and modules."""
    return [
        [*torch_module._global_parameter_registration_hooks.values()],
        [*torch_module._global_module_registration_hooks.values()],
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_is_the_class_without_weights_in_evaluation_mode(family: str) -> None:
    skeleton = skeleton_of(family)
    assert type(skeleton.model) is getattr(transformers, FAMILIES[family].class_name)
    assert not any(module.training for module in skeleton.model.modules())
    assert {parameter.device.type for parameter in skeleton.model.parameters()} == {"meta"}
    with torch.random.fork_rng():
        real = FAMILIES[family].build()
    assert {name: tuple(slot.tensor.shape) for name, slot in skeleton.slots.items()} == {
        name: tuple(tensor.shape) for name, tensor in real.state_dict().items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_are_those_of_from_pretrained(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    FAMILIES[family].build().save_pretrained(tmp_path)
    loaded = getattr(transformers, FAMILIES[family].class_name).from_pretrained(tmp_path, dtype=dtype)
    skeleton = skeleton_of(family, dtype=dtype)
    stored = {name for name, slot in skeleton.slots.items() if not slot.is_buffer}
    fill_rest(skeleton, stored, where=family)
    ours, theirs = dict(skeleton.model.named_buffers()), dict(loaded.named_buffers())
    assert set(ours) == set(theirs)
    for name, buffer in theirs.items():
        assert ours[name].dtype == buffer.dtype
        assert torch.equal(ours[name], buffer), name


def test_buffers_that_a_checkpoint_brings_stay_away() -> None:
    skeleton = skeleton_of("bart")
    fill_rest(skeleton, set(skeleton.slots), where="bart")
    assert skeleton.slots["final_logits_bias"].tensor.is_meta


def test_building_draws_no_random_numbers_and_leaves_no_traces() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    before = transformers.PreTrainedModel.tie_weights, torch.linspace
    hooks = registration_hooks()
    skeleton = skeleton_of("llama", dtype=torch.bfloat16)
    fill_rest(skeleton, set(skeleton.slots), where="llama")
    assert torch.rand(1) == expected
    assert torch.get_default_dtype() == torch.float32
    assert (transformers.PreTrainedModel.tie_weights, torch.linspace) == before
    assert registration_hooks() == hooks


def test_parameters_that_nobody_brings_are_those_of_a_new_model() -> None:
    skeleton = skeleton_of("llama")
    missing = "model.layers.1.mlp.up_proj.weight"
    torch.manual_seed(7)
    fill_rest(skeleton, set(skeleton.slots) - {missing}, where="llama")
    torch.manual_seed(7)
    found = skeleton.slots[missing].tensor
    expected = torch.empty(found.shape).normal_(std=skeleton.model.config.initializer_range)
    assert torch.equal(found, expected)
    assert all(slot.tensor.is_meta for name, slot in skeleton.slots.items() if name != missing)


def test_a_class_of_ones_own_brings_its_configuration() -> None:
    cls = transformers.LlamaForCausalLM
    assert type(read_config({"model_type": "llama"}, where="here", model_class=cls)) is transformers.LlamaConfig
    with pytest.raises(UnsupportedModelError, match="here has model type 'bert', but LlamaForCausalLM is for 'llama'"):
        read_config({"model_type": "bert"}, where="here", model_class=cls)


def test_ties_of_transformers_are_not_made_and_those_of_the_class_are_seen() -> None:
    skeleton = skeleton_of("llama-tied")
    assert skeleton.slots["lm_head.weight"].tensor is not skeleton.slots["model.embed_tokens.weight"].tensor
    assert skeleton.inherent_ties == {}
    skeleton.model.lm_head.weight = skeleton.model.model.embed_tokens.weight
    again = build.Skeleton(skeleton.model, skeleton.dtype)
    assert again.inherent_ties == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_hidden_layers": 9000}, "asks for more than 456 parameters, there are 50 tensors"),
        ({"hidden_size": 10**9}, "which none of its tensors has; the configuration does not belong to these weights"),
        ({"vocab_size": 10**11}, "asks for a Embedding with a weight of shape (100000000000, 64), which none of"),
        ({"intermediate_size": 97}, "asks for a Linear with a weight of shape (97, 64), which none of its tensors has"),
        ({"hidden_act": "org/kernel"}, "model llama (LlamaForCausalLM) cannot be used: KeyError: 'org/kernel'"),
        ({"num_attention_heads": 0}, "cannot be used: "),
    ],
)
def test_a_configuration_that_lies_is_stopped_while_it_builds(settings: dict[str, Any], text: str) -> None:
    shapes = {tuple(slot.tensor.shape) for slot in skeleton_of("llama").slots.values()}
    with pytest.raises(UnsupportedModelError) as caught:
        skeleton_of("llama", tensor_count=50, accepts=shapes.__contains__, **settings)
    assert text in str(caught.value)
    nn.Linear(97, 97)  # the hooks are removed


class ManyModules(PreTrainedModel):
    """Modules without end and without parameters."""

    config_class = LlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.items = nn.ModuleList()
        while True:
            self.items.append(nn.Dropout())


def test_modules_without_parameters_are_counted_too() -> None:
    with pytest.raises(UnsupportedModelError, match="asks for more than 8320 modules, there are 1 tensors"):
        build_skeleton(LlamaConfig(), ManyModules, torch.float32, tensor_count=1, where="many")


def test_models_are_built_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard and torch's defaults are global, so another thread has to wait."""
    slow = Pause()
    accepted: list[str] = []

    def build_slowly() -> None:
        skeleton_of("llama", accepts=slow)
        accepted.append("first")

    def build_next() -> None:
        skeleton_of("gpt2", accepts=lambda _: True)
        accepted.append("second")

    first, second = threading.Thread(target=build_slowly), threading.Thread(target=build_next)
    first.start()
    assert slow.reached.wait(60)
    second.start()
    slow.go_on.set()
    first.join()
    second.join()
    assert accepted == ["first", "second"]


@pytest.mark.parametrize("model_type", [None, 5, "", "lama", "surfw-toy", "__class__"])
def test_an_unknown_model_type_says_what_to_register(model_type: Any) -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=r"here has model type .* does not know; name its class \(model_class=…\), or register it with Auto",
    ):
        read_config({"model_type": model_type}, where="here")


@pytest.mark.parametrize(
    "settings", [{"hidden_size": "wide"}, {"id2label": {"a": "b"}}, {"dtype": [1]}, {"to_dict": 3}, {"sub_configs": {}}]
)
def test_values_that_transformers_refuses(settings: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedModelError, match="the configuration of here cannot be used: "):
        read_config(settings_of("llama") | settings, where="here")


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_implementation": "org/kernel"},
        {"experts_implementation": "org/kernel"},
        {"attribute_map": {"innocent": "_attn_implementation_internal"}, "innocent": "org/kernel"},
    ],
)
def test_an_implementation_from_elsewhere_is_refused_whatever_way_it_took(settings: dict[str, Any]) -> None:
    with pytest.raises(
        UnsupportedModelError, match="asks for the implementation 'org/kernel', expected one of batched_mm"
    ):
        read_config(settings_of("llama") | settings, where="here")


def test_an_implementation_hidden_in_a_part_is_refused() -> None:
    config = {"model_type": "llava", "attn_implementation": {"text_config": "org/kernel"}}
    with pytest.raises(UnsupportedModelError, match="asks for the implementation 'org/kernel'"):
        read_config(config, where="here")


def test_a_configuration_is_read_as_it_is() -> None:
    config = read_config(settings_of("llama"), where="here")
    assert type(config) is LlamaConfig
    assert (config.hidden_size, config.num_key_value_heads) == (64, 2)


@pytest.mark.parametrize(
    ("name", "found"),
    [("LlamaForCausalLM", "LlamaForCausalLM"), ("LlamaModel", "LlamaModel"), (None, "LlamaModel")],
)  # fmt: skip
def test_classes_of_transformers(name: str | None, found: str) -> None:
    assert resolve_class(name, LlamaConfig(), where="here") is getattr(transformers, found)


@pytest.mark.parametrize(
    "name",
    ["AutoConfig", "AutoModel", "LlamaConfig", "os", "sys", "pipeline", "__class__", "__builtins__", "__loader__",
     "torch", "models", "Evil", "", "LlamaTokenizer", "transformers.LlamaModel", "logging"],
)  # fmt: skip
def test_names_that_are_no_models_are_refused(name: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"here asks for the class .*, which is neither in transformers .* nor"
    ):
        resolve_class(name, LlamaConfig(), where="here")


@pytest.mark.usefixtures("_registered")
def test_registered_classes_are_found_by_their_name_and_as_the_base_model() -> None:
    config = read_config({"model_type": "surfw-toy", "hidden": 6}, where="here")
    assert resolve_class("ToyModel", config, where="here") is ToyModel
    assert resolve_class("ToyHead", config, where="here") is ToyHead
    assert resolve_class(None, config, where="here") is ToyModel
    assert build_skeleton(config, ToyModel, torch.float32, tensor_count=3, where="here").model.linear.in_features == 6


def test_a_buffer_that_nobody_makes_is_an_error_and_no_garbage() -> None:
    skeleton = build_skeleton(ToyConfig(), ToyModel, torch.float32, tensor_count=3, where="toy")
    with pytest.raises(
        UnsupportedModelError, match=r"toy: the buffer .* of ToyModel is neither in the checkpoint nor made"
    ):
        fill_rest(skeleton, {"linear.weight", "linear.bias"}, where="toy")


@pytest.mark.parametrize("loaded", [set(), {"steps"}])
def test_a_buffer_that_the_class_makes_is_taken(loaded: set[str]) -> None:
    skeleton = build_skeleton(ToyConfig(), ToyWithInit, torch.float32, tensor_count=3, where="toy")
    if loaded:
        skeleton.slots["steps"].put(torch.arange(3))
    fill_rest(skeleton, loaded, where="toy")
    buffers = copy.deepcopy(dict(skeleton.model.named_buffers()))
    assert buffers["mask"].tolist() == [2, 2, 2]
    assert buffers["steps"].tolist() == [0, 1, 2]


def test_absurd_buffers_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = skeleton_of("gpt2")
    monkeypatch.setattr(build, "_MAX_BUFFER_BYTES", 100)
    skeleton.model.register_buffer("large", torch.empty(101, dtype=torch.uint8, device="meta"), persistent=False)
    with pytest.raises(UnsupportedModelError, match=r"gpt2 wants .* bytes of buffers, expected at most 100"):
        fill_rest(skeleton, set(skeleton.slots), where="gpt2")
    assert skeleton.model.large.is_meta


def test_a_class_that_is_no_whole_model() -> None:
    with pytest.raises(
        UnsupportedModelError, match="ToyHead is not a whole model: transformers demands that its __init__ ends"
    ):
        build_skeleton(ToyConfig(), ToyHead, torch.float32, tensor_count=3, where="toy")
