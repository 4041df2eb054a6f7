"""Small checkpoints on disk, made from a seed."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_TEXT = ["Weights arrive while the model runs.", "A layer is fetched while the one before it computes."]


def save_llama(path: Path, *, layers: int = 4, hidden: int = 64, seed: int = 0, **settings: Any) -> Path:
    """Save a random LLaMA with a real tokenizer."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(["<s>", "</s>", "<pad>"])
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"vocab_size": len(tokenizer.get_vocab())} | settings,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = 2
    model.save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(path)
    return path


def save_bert(path: Path, *, seed: int = 0) -> Path:
    """Save a random BERT with a masked-language-model head and a real tokenizer."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(["[PAD]", "[MASK]", "[UNK]"])
    config = BertConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=len(tokenizer.get_vocab()),
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]"
    ).save_pretrained(path)
    return path


def resident(checkpoints: Path, name: str, **options: Any) -> Any:
    """Load the model of a saved checkpoint into memory with its transformers class."""
    (cls,) = json.loads((checkpoints / name / "config.json").read_text())["architectures"]
    return copy.deepcopy(getattr(transformers, cls).from_pretrained(checkpoints / name, **options))


def _tokenizer(special: list[str]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer
