"""The predicted size of the KV cache equals the cache after transformers' generation."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from transformers import DynamicCache, EncoderDecoderConfig, GPT2Config, LlamaConfig, PreTrainedConfig, StaticCache

from surfw.runtime.kv_cache import CACHE_NAMES, KvCost, Quantised, cache_bytes, kv_cost, output_cache
from tests.exactness.families import FAMILIES, VOCABULARY, Family

PROMPT, NEW, SEQUENCES = 9, 6, 2
POSITION_BYTES = 8
"""Layers with a sliding window or a fixed size count their tokens in a tensor with one element."""

LLAMA, PLAIN = dict(FAMILIES["llama"].settings), dict(FAMILIES["gpt-neox"].settings)
LATENT = PLAIN | {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_group": 1, "topk_group": 1,
}  # fmt: skip
WINDOW = {"sliding_window": 4}
UNEVEN = dict(FAMILIES["bart"].settings) | {"encoder_layers": 2, "encoder_attention_heads": 2}

EXACT = {name: FAMILIES[name] for name in ("llama", "gpt2", "t5", "qwen2", "qwen3", "phi", "opt", "bloom", "bart")} | {
    "gemma": Family("GemmaForCausalLM", LLAMA | {"head_dim": 32}),
    "bart-uneven": Family("BartForConditionalGeneration", UNEVEN),
    "t5-uneven": Family("T5ForConditionalGeneration", {**FAMILIES["t5"].settings, "num_decoder_layers": 2, "d_kv": 8}),
    "latent-attention": Family("DeepseekV3ForCausalLM", LATENT),
    "latent-attention-indexed": Family(
        "GlmMoeDsaForCausalLM", LATENT | {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 4}
    ),
    "one-key-for-all-heads": Family(
        "GPTBigCodeForCausalLM", {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    ),
    "one-key-for-all-heads-too": Family("FalconForCausalLM", PLAIN),
    "keys-repeated-for-all-heads": Family("FalconForCausalLM", PLAIN | {"new_decoder_architecture": True}),
}
"""Every layer keeps the key and the value of every token."""

BOUNDED = {
    "mistral-window": Family("MistralForCausalLM", LLAMA | WINDOW),
    "gemma2-window": Family("Gemma2ForCausalLM", LLAMA | WINDOW | {"head_dim": 16}),
    "gemma3-window": Family("Gemma3ForCausalLM", LLAMA | WINDOW | {"head_dim": 16}),
}
"""Some layers keep only their window."""


def generate(family: Family, dtype: torch.dtype, prompt: int = PROMPT) -> tuple[KvCost, object]:
    """Return the expected size of the cache, and the cache after a generation."""
    torch.manual_seed(0)
    model = family.build().to(dtype).eval()
    ids = torch.randint(5, 100, (SEQUENCES, prompt))
    done = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    return kv_cost(model.config, dtype), output_cache(done)


def expected_bytes(family: Family, cost: KvCost, prompt: int = PROMPT) -> int:
    """The decoder does not read the last token; with an encoder, a start token precedes the first one."""
    has_encoder = "Conditional" in family.class_name
    return cost.total_bytes(prompt, NEW if has_encoder else NEW - 1, sequences=SEQUENCES)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXACT)
def test_what_is_expected_is_what_a_generation_leaves_behind(name: str, dtype: torch.dtype) -> None:
    cost, cache = generate(EXACT[name], dtype)
    assert cache_bytes(cache) == expected_bytes(EXACT[name], cost) > 0


@pytest.mark.parametrize("prompt", [2, PROMPT, 40])
@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_expected_bounds_a_sliding_window_from_above(name: str, prompt: int) -> None:
    cost, cache = generate(BOUNDED[name], torch.float32, prompt)
    layers = int(LLAMA["num_hidden_layers"])
    assert 0 < cache_bytes(cache) <= expected_bytes(BOUNDED[name], cost, prompt) + layers * POSITION_BYTES
    assert cost == kv_cost(Family("LlamaForCausalLM", LLAMA).build().config, torch.float32)


def test_numbers_of_a_known_model() -> None:
    """TinyLlama: 22 layers; 4 of 32 heads have keys and values of 64 numbers: 22 × 2 × 4 × 64 × 2 bytes."""
    config = LlamaConfig(hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4)
    assert kv_cost(config, torch.bfloat16) == KvCost(22528, 22528, layers=22, itemsize=2)
    assert kv_cost(config, torch.float32).total_bytes(100, 28, sequences=3) == 3 * 128 * 45056


def test_the_prompt_costs_what_the_decoders_layers_keep_of_the_encoder() -> None:
    t5 = EXACT["t5-uneven"].build().config
    assert kv_cost(t5, torch.float32) == KvCost(2 * 2 * 4 * 8 * 4, 2 * 2 * 4 * 8 * 4, layers=2, itemsize=4)
    pair = EncoderDecoderConfig.from_encoder_decoder_configs(
        LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=7),
        GPT2Config(n_embd=32, n_head=2, n_layer=3),
    )
    expected = KvCost(3 * 2 * 32 * 2, 3 * 2 * 32 * 2, layers=3, itemsize=2)
    assert kv_cost(pair, torch.float16) == expected, "the encoder's layers keep nothing"


def test_layers_without_keys_grow_with_no_token() -> None:
    mamba = FAMILIES["mamba"]
    cost, cache = generate(mamba, torch.float32)
    longer = generate(mamba, torch.float32, 3 * PROMPT)[1]
    assert cost == KvCost(0, 0, layers=0)
    assert cache_bytes(cache) == cache_bytes(longer) > 0, "the state has one size"
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    hybrid = Family("Lfm2ForCausalLM", LLAMA | {"layer_types": kinds})
    cost, cache = generate(hybrid, torch.float32)
    assert cost.new_token_bytes == 2 * 2 * 2 * 16 * 4, "two of four layers attend"
    grown = cache_bytes(generate(hybrid, torch.float32, 3 * PROMPT)[1]) - cache_bytes(cache)
    assert grown == cost.total_bytes(2 * PROMPT, 0, sequences=SEQUENCES)


def test_a_cache_of_a_fixed_size_counts_whole_from_its_first_use() -> None:
    config = EXACT["llama"].build().config
    cache = StaticCache(config=config, max_cache_len=32)
    positions = config.num_hidden_layers * POSITION_BYTES
    assert cache_bytes(cache) == positions
    for layer in range(config.num_hidden_layers):
        cache.update(torch.ones(2, 2, 3, 16), torch.ones(2, 2, 3, 16), layer)
    assert cache_bytes(cache) == positions + kv_cost(config, torch.float32).total_bytes(32, 0, sequences=2)


def test_a_view_counts_with_all_that_it_keeps_and_shared_memory_once() -> None:
    whole = torch.zeros(1, 2, 100, 16)
    assert cache_bytes(((whole[:, :, -4:], whole[:, :, :4]),)) == whole.nbytes
    assert cache_bytes([{"a": whole}, (torch.zeros(10), None), torch.zeros(10, device="meta")]) == whole.nbytes + 40
    assert cache_bytes(None) == cache_bytes(()) == cache_bytes(DynamicCache()) == 0


def test_a_cache_that_contains_itself_or_a_model_is_counted_once_and_without_it() -> None:
    cache: Any = SimpleNamespace(keys=torch.zeros(10), model=torch.nn.Linear(3, 3))
    cache.itself = [cache]
    assert cache_bytes(cache) == 40


def test_a_configuration_that_says_nothing_of_layers_counts_as_nothing() -> None:
    class Plain(PreTrainedConfig):
        model_type = "plain-of-ones-own"

    assert kv_cost(Plain(), torch.float32).total_bytes(10, 10) == 0


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_of_an_output_by_each_of_its_names(name: str) -> None:
    cache = DynamicCache()
    assert output_cache({"logits": torch.zeros(1), name: cache}) is cache
    assert output_cache({name: None}) is None
    assert output_cache((torch.zeros(1), cache)) is None


def test_a_tensor_that_is_made_of_others_counts_as_they_do() -> None:
    """Like those of optimum-quanto, which have no storage of their own."""
    made = TwoTensor(torch.zeros(10), torch.zeros(10))
    assert cache_bytes([made]) == 80


def test_a_quantised_cache_takes_its_bits_its_scales_the_newest_tokens_and_a_layer_as_it_was() -> None:
    cost = KvCost(1000, 1000, layers=10, itemsize=2)
    assert cost.quantised_bytes(100, 0, Quantised(bits=4, group_size=64)) == 100_000 // 4 + 3125 + 10_000
    assert cost.quantised_bytes(100, 50, Quantised(bits=8, residual_tokens=20)) == 75_000 + 4687 + 20_000 + 15_000
    assert cost.quantised_bytes(0, 7, Quantised(), sequences=3) == cost.total_bytes(0, 7, sequences=3)
