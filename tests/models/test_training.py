"""Training over streamed weights: losses and bits equal those of peft over the resident model, within the budget."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from surfw import StreamingModel
from surfw.errors import ConfigurationError, ModelError
from tests.adapters import quietly
from tests.checkpoints import resident

TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "dense"], "t5": ["q", "wo"]}


def learner(model: Any, name: str) -> Any:
    """Add the same LoRA to a model each time."""
    torch.manual_seed(1)
    return quietly(peft.get_peft_model, model, peft.LoraConfig(r=4, target_modules=TARGETS[name], lora_dropout=0.1))


def learn(model: Any, steps: int) -> list[float]:
    """Return the losses of some steps; dropout always uses the same random numbers."""
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(step % 3))
        loss = quietly(model, input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def learned(model: Any) -> list[torch.Tensor]:
    return [one for one in model.parameters() if one.requires_grad]


@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        ("llama", 20, {"cache_size": 1}),
        ("llama", 3, {"cache_size": 3, "dtype": "bfloat16"}),
        ("llama", 3, {"device": "simulated", "cache_size": 2}),
        ("llama", 3, {}),
        ("bert", 3, {"cache_size": 1}),
    ],
)
def test_losses_and_what_is_learned_are_the_resident_models_bits(
    checkpoints: Path, store: Path, name: str, steps: int, options: dict[str, Any]
) -> None:
    there = learner(resident(checkpoints, name, dtype=options.get("dtype", "auto")).train(), name)
    expected = learn(there, steps)
    with StreamingModel.open(store, name, **options) as model:
        here = learner(model.model, name)
        with model.training() as training:
            assert training is model.model
            assert learn(here, steps) == expected
        assert all(map(torch.equal, learned(here), learned(there)))
        assert steps < 20 or expected[-1] < expected[0]
        ids = torch.tensor([[5, 9, 40, 3]])
        with torch.no_grad():
            assert torch.equal(model(ids).logits, there.eval()(ids).logits)  # dropout is off again


def test_an_encoders_output_gathers_gradients_layer_by_layer(checkpoints: Path, store: Path) -> None:
    there = learner(resident(checkpoints, "t5").train(), "t5")
    expected = learn(there, 2)
    with StreamingModel.open(store, "t5", cache_size=1) as model:
        here = learner(model.model, "t5")
        configs = [one.config for one in model.model.modules() if hasattr(one, "config")]
        before = [one.use_cache for one in configs]
        with model.training():
            assert learn(here, 2) == pytest.approx(expected, rel=1e-6)
        assert [one.use_cache for one in configs] == before
        assert any(before)


def test_the_backward_pass_streams_the_layers_in_reverse(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StreamingModel.open(store, "llama", cache_size=2) as model:
        here = learner(model.model, "llama")
        ran: list[str] = []
        acquire = model._engine.acquire
        monkeypatch.setattr(model._engine, "acquire", lambda module: ran.append(module) or acquire(module))
        with model.training():
            learn(here, 1)
            layers = [f"model.layers.{index}" for index in range(4)]
            assert [one for one in ran if "layers" in one] == [*layers, *reversed(layers)]
            assert ran[-1] == layers[0]  # no layer below it is trained, so none of them runs again
            cycle = [one for one in model._engine.needs.cycle if "layers" in one]
        assert cycle == [*layers, *reversed(layers)]


def test_gradients_of_ones_own_inputs_and_of_single_parameters(checkpoints: Path, store: Path) -> None:
    ids = torch.tensor([[5, 9, 40, 3]])

    def gradients(model: Any, base: Any) -> tuple[torch.Tensor, ...]:
        inputs = base.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=inputs, labels=ids).loss
        weights = [one for one in model.parameters() if one.requires_grad]
        return torch.autograd.grad(loss, [inputs, *weights])

    there = resident(checkpoints, "llama")
    expected = gradients(learner(there, "llama").eval(), there)
    with StreamingModel.open(store, "llama", cache_size=1) as model:
        here = learner(model.model, "llama")
        with model.training():
            found = gradients(here.eval(), model.model)
    assert all(map(torch.equal, found, expected))


def test_a_weight_of_ones_own_learns_in_the_place_of_a_streamed_one(checkpoints: Path, store: Path) -> None:
    def with_norm(model: Any) -> Any:
        model.requires_grad_(requires_grad=False)
        model.model.norm.weight = torch.nn.Parameter(torch.full((64,), 1.5))
        return model

    there = with_norm(resident(checkpoints, "llama"))
    expected = learn(there, 3)
    with StreamingModel.open(store, "llama", cache_size=1) as model:
        with_norm(model.model)
        with model.training():
            assert learn(model.model, 3) == expected


def test_what_learns_and_activations_count_in_the_budget(store: Path) -> None:
    with StreamingModel.open(store, "llama", memory_budget="40MB") as model:
        here = learner(model.model, "llama")
        with model.training(optimizer_states=2):
            fixed = 4 * sum(one.nbytes for one in learned(here))
            assert model.plan.reserved_bytes == fixed
            learn(here, 1)
            assert model.plan.reserved_bytes - fixed == 4 << 20
            ids = torch.ones((2, 512), dtype=torch.int64)
            here(input_ids=ids, labels=ids).loss.backward()
            one_layer = (
                ids.numel() * 64 * 4 * (6 + 5 * 2)
            )  # about as much as autograd keeps for a layer: its widths are 64 and 128
            assert model.plan.reserved_bytes - fixed > 2 * one_layer
            here.zero_grad()
            with torch.no_grad():
                model.generate(torch.tensor([[3, 4]]), max_new_tokens=2)
            assert model.plan.reserved_bytes - fixed > 2 * one_layer
        model.leave_room(1, 0)
        assert model.plan.reserved_bytes < fixed
        model.model.own = torch.nn.Parameter(torch.zeros(1 << 20))
        with pytest.raises(ConfigurationError, match="the training does not fit: "):
            model.training(optimizer_states=16).__enter__()
        assert not model.model.training
        assert model.plan.reserved_bytes < fixed


def test_what_would_be_wrong_is_refused(store: Path) -> None:
    ids = torch.tensor([[5, 9, 40, 3]])
    with StreamingModel.open(store, "llama", cache_size=1) as model:
        with pytest.raises(ConfigurationError, match="nothing of llama learns"), model.training():
            pass
        here = learner(model.model, "llama")
        with model.training():
            with pytest.raises(ModelError, match="was given a KV cache in a pass with gradients"):
                here(input_ids=ids, labels=ids, use_cache=True)
            learn(here, 1)  # all of it was freed
            late = here(input_ids=ids, labels=ids).loss
        with pytest.raises(ModelError, match="came after its training had ended"):
            late.backward()
        assert [path for path, one in model.model.named_modules() if "forward" in vars(one)] == []
