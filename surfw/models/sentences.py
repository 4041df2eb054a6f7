"""Sentence embeddings, as sentence-transformers makes them: one vector from the hidden states of a text's tokens.

`modules.json` lists the modules that a text passes through: the transformers model, a pooling, and optionally a
normalisation; each has a folder with its settings. The arithmetic is that of sentence-transformers 6.2
(`modules/pooling.py`), in the same order, so that results are equal bit for bit.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers.normalizers import Lowercase, Sequence
from transformers import PreTrainedTokenizerBase

from surfw.checkpoint.companions import MODULES_FILE, SENTENCE_CONFIG_FILE, SENTENCE_FILES
from surfw.config import quote
from surfw.errors import ConfigurationError, UnsupportedModelError
from surfw.manifest import Manifest

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Names of the modes in older files, in the order in which several are concatenated."""

_LEAST = 1e-9


@dataclass(frozen=True, kw_only=True)
class SentenceSettings:
    """How a model embeds sentences.

    Attributes:
        modes: the poolings, from `MODES`; several are concatenated.
        normalises: whether the vector is normalised to length 1.
        pools_prompt: whether the tokens of the prompt are pooled, too.
        prompts: texts that may be put before a text, by name.
        default_prompt: name of the prompt used by default.
        most_tokens: longer texts are truncated to this many tokens; None for the model's own limit.
        lower_case: whether texts are lower-cased.
        values: how many leading values of the vector are kept; None for all.
    """

    modes: tuple[str, ...]
    normalises: bool = False
    pools_prompt: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    most_tokens: int | None = None
    lower_case: bool = False
    values: int | None = None


def read_sentences(manifest: Manifest, read_file: Callable[[str], bytes]) -> SentenceSettings | None:
    """Read a model's sentence embedding settings; None if its files have none.

    Raises:
        UnsupportedModelError: they use something that surfw does not support.
        IntegrityError: a file does not match the manifest.
    """
    there = {file.path for file in manifest.files}
    if MODULES_FILE not in there:
        return None

    def read(path: str) -> dict[str, Any]:
        return _object(read_file(path), path, manifest.name) if path in there else {}

    first = read(next((name for name in SENTENCE_FILES[2:] if name in there), ""))
    general = read(SENTENCE_CONFIG_FILE)
    modules = _modules(read_file(MODULES_FILE), manifest.name)
    kinds = [kind for kind, _ in modules]
    embeds = first.get("transformer_task", "feature-extraction") == "feature-extraction"
    if not embeds or general.get("model_type", "SentenceTransformer") != "SentenceTransformer" or len(kinds) == 1:
        return None
    if unknown := [kind for kind in kinds[1:] if kind not in {"Pooling", "Normalize", "Dropout"}]:
        raise _unknown(manifest.name, MODULES_FILE, f"a module {quote(unknown[0])}", "Pooling and Normalize")
    if kinds[0] != "Transformer" or modules[0][1] or kinds.count("Pooling") != 1:
        raise _unknown(
            manifest.name, MODULES_FILE, quote(", ".join(kinds)), "Transformer, Pooling and perhaps Normalize"
        )
    if "message" in first.get("modality_config", {}):
        raise _unknown(manifest.name, "sentence_bert_config.json", "a text as a message", "a text as it is")
    pooling = read(f"{dict(modules)['Pooling']}/config.json")
    modes = _poolings(pooling)
    if not modes or not set(modes) <= set(MODES):
        raise _unknown(
            manifest.name, f"{dict(modules)['Pooling']}/config.json", quote(", ".join(modes)), ", ".join(MODES)
        )
    prompts = general.get("prompts")
    return SentenceSettings(
        modes=modes,
        normalises="Normalize" in kinds,
        pools_prompt=bool(pooling.get("include_prompt", True)),
        prompts={k: v for k, v in prompts.items() if isinstance(v, str)} if isinstance(prompts, dict) else {},
        default_prompt=general.get("default_prompt_name"),
        most_tokens=_count(first.get("max_seq_length")),
        lower_case=bool(first.get("do_lower_case")),
        values=_count(general.get("truncate_dim")),
    )


def encode_sentence(
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    settings: SentenceSettings,
    text: str,
    prompt_name: str | None,
    *,
    where: str,
) -> tuple[dict[str, torch.Tensor], int]:
    """The model's inputs for a text, and how many of its tokens were truncated.

    `prompt_tokens` among the inputs is the number of prompt tokens to exclude from pooling.

    Raises:
        ConfigurationError: there is no such prompt.
    """
    prompt = find_prompt(settings, prompt_name, where=where)
    most = settings.most_tokens
    if most is None:
        positions = getattr(config, "max_position_embeddings", None) or -1
        most = tokenizer.model_max_length if positions == -1 else min(tokenizer.model_max_length, positions)
    reader: Any = _in_lower_case(tokenizer) if settings.lower_case else tokenizer
    cut = {"truncation": "longest_first", "max_length": most} if most < 1 << 30 else {}
    inputs = dict(reader(prompt + text, return_tensors="pt", **cut))
    if prompt and not settings.pools_prompt:
        ids = reader(prompt, **cut)["input_ids"]
        count = len(ids) - (ids[-1] in reader.all_special_ids)
        inputs["prompt_tokens"] = torch.tensor(count)
    used = inputs["input_ids"].shape[1]
    return inputs, len(reader(prompt + text)["input_ids"]) - used if cut and used >= most else 0


def find_prompt(settings: SentenceSettings, name: str | None, *, where: str) -> str:
    """The prompt of that name, or the default one.

    Raises:
        ConfigurationError: there is no such prompt.
    """
    if name is None:
        return settings.prompts.get(settings.default_prompt or "", "")
    if name not in settings.prompts:
        known = ", ".join(map(quote, settings.prompts)) or "none"
        raise ConfigurationError(f"{where} has no prompt {quote(name)}; it has {known} (prompt_name, --prompt-name)")
    return settings.prompts[name]


def pool(states: torch.Tensor, mask: torch.Tensor, settings: SentenceSettings, prompt_tokens: int = 0) -> torch.Tensor:
    """Pool hidden states to one vector for each text.

    Args:
        states: hidden states of the last layer, of shape (texts, tokens, width), floating-point.
        mask: 1 for tokens of a text and 0 for padding, of shape (texts, tokens), int64.
        settings: the poolings and other settings.
        prompt_tokens: number of tokens at the beginning of each text to exclude.

    Returns:
        A tensor of shape (texts, width × poolings), of the states' dtype.
    """
    whole = mask
    if prompt_tokens:
        start = whole.int().argmax(dim=1, keepdim=True)
        mask = whole * (torch.arange(whole.shape[1], device=whole.device) >= start + prompt_tokens)
    vector = torch.cat([_pool_one(mode, states, mask, whole) for mode in settings.modes], dim=-1)
    if settings.normalises:
        vector = torch.nn.functional.normalize(vector, p=2, dim=-1)
    return vector if settings.values is None else vector[..., : settings.values]


def _pool_one(mode: str, states: torch.Tensor, mask: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    exact = torch.float32 if states.dtype in {torch.float16, torch.bfloat16} else states.dtype
    column = mask.unsqueeze(-1)
    if mode == "cls":
        return _take(states, mask.int().argmax(dim=1))
    if mode == "lasttoken":
        seen, back = mask.flip(1).max(1)
        back = torch.where(seen == 0, states.shape[1] - 1, back)
        return _take(states * column.to(states.dtype), states.shape[1] - back - 1)
    if mode == "max":
        return states.masked_fill(column == 0, float("-inf")).max(dim=1).values
    if mode == "weightedmean":
        weights = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=exact).view(1, -1, 1)
        weights = weights - whole.int().argmax(dim=1).view(-1, 1, 1)
        weighted = column.to(exact) * weights
        return ((states * weighted).sum(dim=1) / weighted.sum(dim=1).clamp(min=_LEAST)).to(states.dtype)
    ones = column.to(states.dtype)
    total = (states * ones).sum(dim=1, dtype=exact)
    count = ones.sum(dim=1, dtype=exact).clamp(min=_LEAST)
    return (total / (count if mode == "mean" else count.sqrt())).to(states.dtype)


def _take(states: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return states[torch.arange(states.shape[0], device=states.device), at]


def _poolings(settings: Mapping[str, Any]) -> tuple[str, ...]:
    modes = settings.get("pooling_mode")
    if modes is None:
        return tuple(mode for key, mode in _OLD_MODES.items() if settings.get(key)) or ("mean",)
    return (modes,) if isinstance(modes, str) else tuple(map(str, modes)) if isinstance(modes, list) else ()


def _modules(data: bytes, where: str) -> list[tuple[str, str]]:
    """The kind and folder of each module."""
    try:
        found = [(one["type"].rpartition(".")[2], one["path"]) for one in json.loads(data)]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as exc:
        raise _unknown(where, MODULES_FILE, type(exc).__name__, "a list of modules, each with type and path") from exc
    if not found or not all(isinstance(path, str) for _, path in found):
        raise _unknown(where, MODULES_FILE, "no modules", "a list of modules, each with type and path")
    return found


def _object(data: bytes, path: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _unknown(where, path, "no JSON object", "its settings")
    return found


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _in_lower_case(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A copy of the tokenizer that lower-cases texts, as sentence-transformers makes it."""
    lower: Any = copy.deepcopy(tokenizer)
    if not lower.is_fast:
        lower.do_lower_case = True
        return lower
    backend = lower.backend_tokenizer
    own = backend.normalizer
    several: Any = own
    steps = list(several) if isinstance(own, Sequence) else [] if own is None else [own]
    if not any(isinstance(step, Lowercase) for step in steps):
        backend.normalizer = Sequence([Lowercase(), *steps])
    return lower


def _unknown(where: str, path: str, seen: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where} embeds sentences in a way that surfw does not: its {path} has {seen}, expected {expected}; from "
        "Python, StreamingModel gives the hidden states, for sentence-transformers to go on with"
    )
