"""While a model is built, other threads can use torch, transformers and the hub without restriction."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import huggingface_hub.constants
import pytest
import torch
import transformers
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._device import _device_constructors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    ReformerConfig,
    ReformerModelWithLMHead,
    initialization,
)

from surfw.errors import SurfwError
from surfw.skeleton import guards
from surfw.skeleton.build import build_skeleton, read_config
from tests.skeleton.models import settings_of, skeleton_of
from tests.toys import Pause


class Other:
    """Another thread, which the test joins."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._thread = threading.Thread(target=self._run, args=(work,))
        self._failed: list[BaseException] = []
        self._thread.start()

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as exc:  # noqa: BLE001 - it is the test's
            self._failed.append(exc)

    def end(self) -> None:
        """Wait for its end; raise its error."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        for exc in self._failed:
            raise exc


@contextmanager
def building() -> Iterator[None]:
    """Another thread is building a model until the context ends."""
    pause = Pause()
    shapes = {tuple(slot.tensor.shape) for slot in skeleton_of("llama-tied").slots.values()}
    other = Other(lambda: skeleton_of("llama-tied", accepts=lambda shape: pause() and shape in shapes))
    try:
        assert pause.reached.wait(60)
        yield
    finally:
        pause.go_on.set()
        other.end()


def small_tied() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=5,
            tie_word_embeddings=True,
        )
    )  # fmt: skip


def is_tied(model: LlamaForCausalLM) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


def test_others_build_what_they_like_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    _device_constructors.cache_clear()  # listed while `from_pretrained` had replaced it; `linspace` is not in it
    with building():
        assert nn.Linear(7, 3).weight.shape == (3, 7)
        assert is_tied(small_tied())
        with torch.device("meta"):
            assert torch.linspace(0, 1, 3).is_meta
        assert not huggingface_hub.is_offline_mode()
    assert is_tied(small_tied())
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_whoever_registers_a_parameter_meanwhile_goes_on_with_it() -> None:
    pause = Pause()

    def pause_others(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            pause()

    hooks = [torch_module.register_module_parameter_registration_hook(hook) for hook in (pause_others, lambda *_: None)]
    try:
        other = Other(lambda: nn.Linear(2, 2))
        assert pause.reached.wait(60)
        skeleton_of("llama")
        pause.go_on.set()
        other.end()
    finally:
        for hook in hooks:
            hook.remove()


def test_weights_are_tied_again_after_transformers_untied_them_meanwhile() -> None:
    leave = threading.Event()
    entered = threading.Event()

    def untie() -> None:
        with initialization.no_tie_weights():
            entered.set()
            assert leave.wait(60)

    with building():
        other = Other(untie)
        assert entered.wait(60)
    leave.set()
    other.end()
    assert is_tied(small_tied())
    skeleton = skeleton_of("llama-tied")
    assert skeleton.inherent_ties == {}


class _Turns:
    """Two threads read a configuration: the first enters, the second enters, the first leaves, the second leaves."""

    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()


class SlowConfig(LlamaConfig):
    @classmethod
    def from_dict(cls, *arguments: object, **options: object) -> PreTrainedConfig:
        assert huggingface_hub.is_offline_mode()
        if threading.current_thread().name == "first":
            _Turns.first_in.set()
            assert _Turns.second_in.wait(60)
        else:
            _Turns.second_in.set()
            assert _Turns.first_out.wait(60)
        assert huggingface_hub.is_offline_mode(), "it ends with the last who needs it"
        return super().from_dict(*arguments, **options)


class SlowModel(transformers.LlamaForCausalLM):
    config_class = SlowConfig


def test_the_hub_is_back_when_two_models_were_opened_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def first() -> None:
        threading.current_thread().name = "first"
        read_config(settings_of("llama"), where="first", model_class=SlowModel)
        _Turns.first_out.set()

    one = Other(first)
    assert _Turns.first_in.wait(60)
    other = Other(lambda: read_config(settings_of("llama"), where="second", model_class=SlowModel))
    one.end()
    other.end()
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_an_import_amid_the_building_of_a_model_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        assert sum(waited) < 100, "it waits without end"

    monkeypatch.setattr(guards.time, "sleep", sleep)
    with (
        initialization.no_tie_weights(),
        pytest.raises(SurfwError, match=r"^surfw is imported while transformers builds a model"),
    ):
        guards._tie_weights_elsewhere()
    assert sum(waited) == pytest.approx(60)


def test_what_a_models_code_prints_goes_to_the_log(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "surfw"):
        config = ReformerConfig(is_decoder=True, attn_layers=["local"], axial_pos_embds=False, vocab_size=8)
        made = build_skeleton(config, ReformerModelWithLMHead, torch.float32, tensor_count=99, where="m").model
        made.prepare_inputs_for_generation(torch.ones(1, 1), invented=1)
    assert capsys.readouterr().out == ""
    assert caplog.messages == ["Warning: invented is not a recognized input."]
