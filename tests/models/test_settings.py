"""A model with any settings gives an answer or one of surfw's errors."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from surfw.errors import SurfwError, UnsupportedModelError
from surfw.models import StreamingModel, from_manifest
from surfw.models.from_manifest import open_skeleton
from surfw.models.inference import InferenceRequest, InferenceResult, answer
from surfw.skeleton.sanitise import sanitise_generation
from surfw.storage import FilesystemBackend, Store

SETTINGS = [*sorted(name for name in vars(GenerationConfig()) if not name.startswith("_")), "streamer", "to_dict"]
VALUES: list[Any] = [True, -1, 10**6, 0.5, [], [10**6], [[[3], 1.0]], [2, 1.5], {"a": 1}]


@pytest.mark.filterwarnings("ignore")
def test_no_generation_setting_ends_in_an_error_of_another(store: Path) -> None:
    request = InferenceRequest(prompt_ids=[5, 6, 7], max_new_tokens=2)
    others = {}
    with StreamingModel.open(store, "llama") as llama:
        usual = answer(llama, None, request).token_ids
        for name in SETTINGS:
            _, dropped = sanitise_generation({name: "static"}, taken=from_manifest._TAKEN)
            for value in VALUES[:1] if dropped else VALUES:
                manifest = replace(llama.manifest, generation_config={name: value})
                try:
                    from_manifest._configure_generation(llama.model, {name: value}, manifest, {})
                    found = answer(llama, None, request)
                except SurfwError:
                    continue
                except Exception as error:  # noqa: BLE001 - each is a finding
                    others[name, str(value)] = repr(error)[:200]
                    continue
                if dropped:
                    assert found.token_ids == usual
    assert others == {}


@pytest.mark.parametrize("model", ["llama", "bert"])
@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict": False},
        {"use_return_dict": False},
        {"cache_implementation": "x"},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": "x"},
        {"compile_config": {"a": 1}},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"output_hidden_states": "x"},
        {"chunk_size_feed_forward": "x"},
        {"attn_implementation": "flex_attention"},
        {"_attn_implementation_internal": "flex_attention"},
    ],
)
def test_no_setting_of_a_configuration_ends_in_an_error_of_another(
    settings: dict[str, Any], model: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Store.manifest

    async def manifest(self: Store, name: str) -> Any:
        found = await stored(self, name)
        return replace(found, config={**found.config, **settings}, generation_config=None)

    def run() -> InferenceResult:
        with StreamingModel.open(store, model) as streaming:
            assert streaming.model.config._attn_implementation in {"sdpa", "eager"}
            return answer(streaming, None, InferenceRequest(prompt_ids=[5, 6, 7], max_new_tokens=3, ignore_eos=True))

    usual = run()
    monkeypatch.setattr(Store, "manifest", manifest)
    try:
        found = run()
    except UnsupportedModelError:
        assert "x" in settings.values()
    else:
        assert (found.token_ids, found.embedding) == (usual.token_ids, usual.embedding)


def test_a_class_of_ones_own_may_choose_what_it_likes(store: Path) -> None:
    """The rules apply to a file's settings, not to the caller's own code."""

    class OwnConfig(LlamaConfig):
        @classmethod
        def from_dict(cls, *arguments: Any, **options: Any) -> Any:
            found = super().from_dict(*arguments, **options)
            found._attn_implementation = "flex_attention"
            return found

    class Own(LlamaForCausalLM):
        config_class = OwnConfig

    manifest = asyncio.run(Store(FilesystemBackend(store)).manifest("llama"))
    assert open_skeleton(manifest, model_class=Own).model.config._attn_implementation == "flex_attention"
