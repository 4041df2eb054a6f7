"""Sentence embeddings equal those of sentence-transformers bit for bit; unsupported settings are refused."""

import asyncio
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from surfw.chunking import prepare_model, write_model
from surfw.cli.infer_summary import encoder_text
from surfw.errors import ConfigurationError, UnsupportedModelError
from surfw.models import StreamingModel
from surfw.models.inference import InferenceRequest, InferenceResult, answer
from surfw.storage import open_backend
from tests.exactness.test_real_bert import checkpoint
from tests.models.test_heads import PLAIN, WORDS
from tests.models.test_streaming import opener

TEXTS = ["the weights arrive while a layer runs .", "who runs in berlin ?", "two", "  The layer\nRUNS "]


def save(
    folder: Path, *, causal: bool = False, settings: Any = None, general: Any = None, normalise: bool = True
) -> Path:
    """Save a small model with modules for sentence embeddings."""
    torch.manual_seed(4)
    model = LlamaForCausalLM(LlamaConfig(**PLAIN)) if causal else BertModel(BertConfig(**PLAIN))
    model.eval().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": False})
    )
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), *([("Normalize", "2_Normalize")] if normalise else [])]
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (kind, path) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32} | (settings or {"pooling_mode_mean_tokens": True})
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    if general is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(general))
    return folder


def embed(folder: Path, texts: list[str], **options: Any) -> list[InferenceResult]:
    """Return the embeddings of a chunked copy."""
    store = folder.with_name(f"{folder.name}-store")
    if not store.exists():
        with prepare_model(str(folder), name="model") as prepared:
            asyncio.run(write_model(prepared, open_backend(store)))
    with StreamingModel.open(opener(store)) as model:
        return [answer(model, model.tokenizer, InferenceRequest(prompt=text, **options)) for text in texts]


def expect_equal(folder: Path, texts: list[str], reference: SentenceTransformer, **options: Any) -> None:
    reference[0].model = copy.deepcopy(reference[0].model)  # with tensors at addresses of their own
    for text, seen in zip(texts, embed(folder, texts, **options), strict=True):
        assert seen.embedding == reference.encode([text], convert_to_tensor=True, **options)[0].tolist(), text


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        {"pooling_mode": "max"},
        {"pooling_mode": "mean"},
        {"pooling_mode_mean_sqrt_len_tokens": True},
        {"pooling_mode": "weightedmean"},
        {"pooling_mode": "lasttoken"},
        {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True])
def test_each_pooling_is_that_of_sentence_transformers(causal: bool, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = save(tmp_path / "model", causal=causal, settings=settings, normalise=causal)
    expect_equal(folder, TEXTS, SentenceTransformer(str(folder), device="cpu"))


def test_the_real_minilm_is_equal_to_the_last_bit(tmp_path: Path) -> None:
    folder = tmp_path / "minilm"
    folder.symlink_to(checkpoint())
    texts = ["The weights arrive while the model runs.", "A cat sleeps.", "words " * 400, ""]
    expect_equal(folder, texts, SentenceTransformer(str(checkpoint()), device="cpu"))
    (result,) = embed(folder, texts[:1])
    assert "length 1.0000" in (encoder_text(result) or "")
    assert "(mean over tokens, length 1, by modules.json; all with --json)" in (encoder_text(result) or "")


def test_each_model_is_read_by_its_own_files_after_a_switch(tmp_path: Path) -> None:
    for name in ("sentences", "words"):
        save(tmp_path / name, causal=True)
    (tmp_path / "words/modules.json").unlink()
    for name in ("sentences", "words"):
        with prepare_model(str(tmp_path / name), name=name) as prepared:
            asyncio.run(write_model(prepared, open_backend(tmp_path / "store")))
    asked = InferenceRequest(prompt=TEXTS[0], max_new_tokens=2)
    with StreamingModel.open(opener(tmp_path / "store"), "sentences") as model:
        for name in ("sentences", "words", "sentences"):
            model.switch(name)
            assert (answer(model, model.tokenizer, asked).embedding is not None) == (name == "sentences")


PROMPTS = {"prompts": {"query": "who runs in berlin ? ", "passage": "the . "}, "default_prompt_name": "query"}


@pytest.mark.parametrize("options", [{}, {"prompt_name": "passage"}, {"prompt_name": "query"}])
@pytest.mark.parametrize("include", [True, False])
def test_prompts_stand_before_the_text(include: bool, options: dict[str, str], tmp_path: Path) -> None:
    settings = {"pooling_mode": "weightedmean", "include_prompt": include}
    folder = save(tmp_path / "model", settings=settings, general=PROMPTS)
    expect_equal(folder, TEXTS, SentenceTransformer(str(folder), device="cpu"), **options)
    with pytest.raises(ConfigurationError, match=r"has no prompt 'other'; it has 'query', 'passage' \(prompt_name"):
        embed(folder, TEXTS, prompt_name="other")


@pytest.mark.parametrize(
    "first", [{"max_seq_length": 5, "do_lower_case": True}, {"max_seq_length": 6}, {"max_seq_length": None}], ids=str
)
def test_long_texts_are_cut_where_sentence_transformers_cuts_them(
    first: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path / "model", general={"truncate_dim": 8})
    (folder / "sentence_bert_config.json").write_text(json.dumps(first))
    texts = [*TEXTS, "two weights " * 60]
    expect_equal(folder, texts, SentenceTransformer(str(folder), device="cpu"))
    most = first["max_seq_length"] or 64
    assert f"model reads {most} tokens of a text: the {122 - most} after them are left out" in caplog.messages


def test_what_sentence_transformers_saves_itself(tmp_path: Path) -> None:
    reference = SentenceTransformer(str(save(tmp_path / "old")), device="cpu")
    reference.save(str(tmp_path / "new"))
    expect_equal(tmp_path / "new", TEXTS, reference)


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        (
            "modules.json",
            [{"path": "", "type": "a.Transformer"}, {"path": "1_Dense", "type": "a.Dense"}],
            "a module 'Dense'",
        ),
        (
            "modules.json",
            [{"path": "", "type": "a.BoW"}, {"path": "1_Pooling", "type": "a.Pooling"}],
            "'BoW, Pooling'",
        ),
        ("modules.json", {}, "no modules, expected a list of modules"),
        ("modules.json", [{"path": ""}], "KeyError, expected a list of modules"),
        ("1_Pooling/config.json", [], "no JSON object, expected its settings"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "'median', expected cls, max"),
    ],
)
def test_other_ways_are_refused(file: str, content: Any, complaint: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(
        UnsupportedModelError, match=f"model embeds sentences in a way that surfw does not: its {file} has {complaint}"
    ):
        embed(folder, TEXTS)


def test_a_cross_encoder_is_no_embedder(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", causal=True, general={"model_type": "CrossEncoder"})
    (result,) = embed(folder, TEXTS[:1], max_new_tokens=2)
    assert result.embedding is None
    assert len(result.token_ids) == 2
