"""Small seeded models of many families. surfw names none of them: it finds what it needs in the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers

VOCABULARY = 131
_PLAIN = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}  # fmt: skip
_GROUPED = _PLAIN | {"num_key_value_heads": 2}
_T5 = {"num_layers": 3, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4, "vocab_size": VOCABULARY}
_SEQ2SEQ = {
    "d_model": 64, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A class of transformers, and the settings of a small model."""

    class_name: str
    settings: Mapping[str, Any] = field(repr=False)

    def build(self) -> Any:
        """Build the model with random weights."""
        cls = getattr(transformers, self.class_name)
        return cls(cls.config_class(**self.settings))


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _GROUPED | {"tie_word_embeddings": False}),
    "llama-tied": Family("LlamaForCausalLM", _GROUPED | {"tie_word_embeddings": True}),
    "gpt2": Family(
        "GPT2LMHeadModel", {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 128}
    ),
    "t5": Family("T5ForConditionalGeneration", _T5 | {"decoder_start_token_id": 0}),
    "bert-mlm": Family("BertForMaskedLM", _PLAIN),
    "mistral": Family("MistralForCausalLM", _GROUPED),
    "qwen2": Family("Qwen2ForCausalLM", _GROUPED),
    "qwen3": Family("Qwen3ForCausalLM", _GROUPED | {"head_dim": 16}),
    "gemma2": Family("Gemma2ForCausalLM", _GROUPED | {"head_dim": 16}),
    "phi": Family("PhiForCausalLM", _GROUPED),
    "opt": Family(
        "OPTForCausalLM",
        {
            "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 128, "word_embed_proj_dim": 64,
        },
    ),
    "gpt-neox": Family("GPTNeoXForCausalLM", _PLAIN),
    "bloom": Family("BloomForCausalLM", {"hidden_size": 64, "n_layer": 4, "n_head": 4, "vocab_size": VOCABULARY}),
    "roberta": Family("RobertaForMaskedLM", _PLAIN),
    "distilbert": Family(
        "DistilBertForMaskedLM", {"dim": 64, "hidden_dim": 96, "n_layers": 4, "n_heads": 4, "vocab_size": VOCABULARY}
    ),
    "bart": Family("BartForConditionalGeneration", _SEQ2SEQ),
    "mt5": Family("MT5ForConditionalGeneration", _T5 | {"decoder_start_token_id": 0}),
    "mixtral-experts": Family("MixtralForCausalLM", _GROUPED | {"num_local_experts": 4}),
    "qwen3-experts": Family(
        "Qwen3MoeForCausalLM",
        _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
    ),
    "albert-shared-layers": Family(
        "AlbertForMaskedLM",
        {
            "embedding_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 4, "vocab_size": VOCABULARY,
        },
    ),
    "deberta-outside-weights": Family(
        "DebertaV2ForMaskedLM", _PLAIN | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    ),
    "mamba": Family(
        "MambaForCausalLM", {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": VOCABULARY, "state_size": 8}
    ),
    "electra-classifier": Family("ElectraForSequenceClassification", _PLAIN | {"embedding_size": 32}),
}  # fmt: skip

_EXPERTS = _GROUPED | {"num_hidden_layers": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_LATENT = _EXPERTS | {
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "head_dim": 8,
}  # fmt: skip

MIXTURES = {
    "mixtral": Family("MixtralForCausalLM", _EXPERTS | {"num_local_experts": 8, "intermediate_size": 32}),
    "qwen2-moe": Family(
        "Qwen2MoeForCausalLM", _EXPERTS | {"num_experts": 8, "shared_expert_intermediate_size": 32}
    ),
    "qwen3-moe": Family("Qwen3MoeForCausalLM", _EXPERTS | {"num_experts": 8}),
    "deepseek-v2": Family("DeepseekV2ForCausalLM", _LATENT | {"topk_method": "greedy"}),
    "deepseek-v3": Family("DeepseekV3ForCausalLM", _LATENT),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        _EXPERTS | {"num_local_experts": 8, "intermediate_size": 32, "layer_types": ["full_attention"] * 3},
    ),
    "glm4-moe": Family(
        "Glm4MoeForCausalLM",
        _EXPERTS | {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "olmoe": Family("OlmoeForCausalLM", _EXPERTS | {"num_experts": 8, "intermediate_size": 32}),
    "granite-moe": Family("GraniteMoeForCausalLM", _EXPERTS | {"num_local_experts": 8, "intermediate_size": 32}),
    "llama4": Family(
        "Llama4ForCausalLM",
        _EXPERTS | {"num_local_experts": 8, "intermediate_size": 32, "intermediate_size_mlp": 64, "moe_layers": [0, 2]},
    ),
}  # fmt: skip
"""Mixtures of experts: two of eight experts compute each token."""
