"""Each head's printed output equals that of transformers' model; heads without such an output are refused."""

import asyncio
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer, pipeline

from surfw.chunking import prepare_model, write_model
from surfw.cli.infer_summary import encoder_text
from surfw.errors import ConfigurationError, UnsupportedModelError
from surfw.models import StreamingModel
from surfw.models.inference import InferenceRequest, InferenceResult, answer
from surfw.storage import open_backend
from tests.models.test_streaming import opener

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", "the", "weights", "arrive", "while", "a", "layer",
    "runs", "who", "where", "berlin", "in", "two", ".", "?",
]  # fmt: skip
PLAIN = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": len(WORDS), "max_position_embeddings": 64,
}  # fmt: skip
DISTIL = {"dim": 32, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": len(WORDS)}
CANINE = {name: value for name, value in PLAIN.items() if name != "vocab_size"} | {
    "max_position_embeddings": 256, "local_transformer_stride": 32, "num_hash_buckets": 64,
}  # fmt: skip
CLIP_TEXT = {**PLAIN, "eos_token_id": 6, "bos_token_id": 5}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": len(WORDS), "max_position_embeddings": 64,
}  # fmt: skip
TEXT, OTHER = "the weights arrive", "who runs in berlin ?"


@pytest.fixture
def made(tmp_path: Path) -> Iterator["Maker"]:
    maker = Maker(tmp_path)
    yield maker
    maker.close()


class Maker:
    """Makes small models with random weights, and opens them over a store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: list[StreamingModel] = []
        self.path = folder

    def model(
        self, class_name: str, settings: dict[str, Any], tokenizer: str = "BertTokenizer", **more: str
    ) -> StreamingModel:
        """Make a model of this class, with a tokenizer of words."""
        torch.manual_seed(5)
        self.path = self.folder / f"model-{len(self.opened)}"
        cls = getattr(transformers, class_name)
        cls(cls.config_class(**settings)).eval().save_pretrained(self.path)
        (self.path / "vocab.txt").write_text("\n".join(WORDS))
        (self.path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer} | more))
        store = self.folder / f"store-{len(self.opened)}"
        with prepare_model(str(self.path)) as prepared:
            asyncio.run(write_model(prepared, open_backend(store)))
        self.opened.append(StreamingModel.open(opener(store)))
        return self.opened[-1]

    def resident(self) -> Any:
        """The last model made, loaded by transformers."""
        cls = getattr(transformers, json.loads((self.path / "config.json").read_text())["architectures"][0])
        return copy.deepcopy(cls.from_pretrained(self.path))

    def output(self, *texts: Any, **options: Any) -> Any:
        """The output of transformers' model for these texts."""
        inputs = AutoTokenizer.from_pretrained(self.path)(*texts, return_tensors="pt", **options)
        with torch.no_grad():
            return self.resident()(**inputs)

    def close(self) -> None:
        for model in self.opened:
            model.close()


def ask(model: StreamingModel, text: str = TEXT, *pairs: str, **options: Any) -> InferenceResult:
    return answer(model, model.tokenizer, InferenceRequest(prompt=text, pairs=pairs, **options))


def predictions(model: StreamingModel, text: str = TEXT, *pairs: str) -> list[dict[str, Any]]:
    found = ask(model, text, *pairs).predictions
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("class_name", "settings"),
    [
        ("BertForSequenceClassification", PLAIN | {"num_labels": 1}),
        ("DistilBertForSequenceClassification", DISTIL | {"num_labels": 1}),
        ("ElectraForSequenceClassification", PLAIN | {"num_labels": 3, "problem_type": "regression"}),
    ],
)
def test_a_single_label_is_a_score(class_name: str, settings: dict[str, Any], made: Maker) -> None:
    model = made.model(class_name, settings)
    (one,) = predictions(model)
    expected = made.output(TEXT).logits[0].tolist()
    assert [found["score"] for found in one["candidates"]] == expected
    assert all("probability" not in found for found in one["candidates"])
    assert encoder_text(ask(model)) == ", ".join(f"LABEL_{at} {score:.4f}" for at, score in enumerate(expected))


def test_a_reranker_scores_each_pair_in_one_pass(made: Maker) -> None:
    model = made.model("BertForSequenceClassification", PLAIN | {"num_labels": 1})
    found = predictions(model, TEXT, OTHER, "berlin", "two layer runs in the .")
    texts = [OTHER, "berlin", "two layer runs in the ."]
    expected = made.output([TEXT] * 3, texts, padding=True).logits[:, 0].tolist()
    assert [(one["pair"], one["candidates"][0]["score"]) for one in found] == list(enumerate(expected))
    assert model.get_inference_stats()["total_inferences"] == 1


def test_a_reward_model_judges_an_answer_in_its_chat_template(made: Maker) -> None:
    template = "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}who{% endif %}"
    model = made.model(
        "LlamaForSequenceClassification", PLAIN | {"num_labels": 1}, chat_template=template, pad_token="[PAD]"
    )
    (one,) = predictions(model, TEXT, OTHER)
    said = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": OTHER}]
    inputs = AutoTokenizer.from_pretrained(made.path).apply_chat_template(said, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert one["candidates"][0]["score"] == made.resident()(**inputs).logits[0, 0].item()


@pytest.mark.parametrize("class_name", ["BertForSequenceClassification", "DistilBertForSequenceClassification"])
@pytest.mark.parametrize("kind", ["multi_label_classification", "single_label_classification", None])
def test_labels_have_the_probabilities_of_transformers_pipeline(class_name: str, kind: str | None, made: Maker) -> None:
    settings = DISTIL if class_name.startswith("Distil") else PLAIN
    model = made.model(class_name, settings | {"num_labels": 3, "problem_type": kind})
    (one,) = predictions(model)
    classify = pipeline("text-classification", made.resident(), tokenizer=AutoTokenizer.from_pretrained(made.path))
    expected = classify(TEXT, top_k=None)
    assert [found["text"] for found in one["candidates"]] == [found["label"] for found in expected]
    assert [found["probability"] for found in one["candidates"]] == pytest.approx(
        [f["score"] for f in expected], abs=1e-7
    )


@pytest.mark.parametrize(
    ("class_name", "settings"), [("BertForTokenClassification", PLAIN), ("DistilBertForTokenClassification", DISTIL)]
)
def test_each_token_has_its_labels(class_name: str, settings: dict[str, Any], made: Maker) -> None:
    model = made.model(class_name, settings | {"num_labels": 3})
    found = predictions(model, OTHER)
    expected = made.output(OTHER).logits[0].softmax(-1)
    assert [one["token"] for one in found] == ["[CLS]", *OTHER.split(), "[SEP]"]
    for one, row in zip(found, expected, strict=True):
        assert one["candidates"][0]["probability"] == row.max().item()
    assert (encoder_text(ask(model, OTHER)) or "").splitlines()[4].startswith("token 4 'berlin': LABEL_")


@pytest.mark.parametrize(
    ("class_name", "settings"),
    [("BertForQuestionAnswering", PLAIN), ("ElectraForQuestionAnswering", PLAIN | {"embedding_size": 32})],
)
def test_the_answer_is_a_part_of_the_second_text(class_name: str, settings: dict[str, Any], made: Maker) -> None:
    model = made.model(class_name, settings)
    question, text = "who runs ?", "the  weights arrive in berlin while a layer runs ."
    (one,) = predictions(model, question, text)
    tokenizer = AutoTokenizer.from_pretrained(made.path)
    encoded = tokenizer(question, text, return_offsets_mapping=True)
    output = made.output(question, text)
    inside = [at for at, part in enumerate(encoded.sequence_ids()) if part == 1]
    start, end = (logits[0, inside].softmax(-1) for logits in (output.start_logits, output.end_logits))
    scores = {
        (first, last): (start[first] * end[last]).item()
        for first in range(len(inside)) for last in range(first, min(len(inside), first + 15))
    }  # fmt: skip
    for seen, (first, last) in zip(
        one["candidates"], sorted(scores, key=scores.__getitem__, reverse=True), strict=False
    ):
        begin, stop = encoded["offset_mapping"][inside[first]][0], encoded["offset_mapping"][inside[last]][1]
        assert (seen["start"], seen["end"], seen["text"]) == (begin, stop, text[begin:stop])
        assert seen["probability"] == pytest.approx(scores[first, last])
    with pytest.raises(ConfigurationError, match=r"reads two texts: give the text that holds the answer too .*--pair"):
        ask(model)


@pytest.mark.parametrize(
    ("class_name", "settings"), [("BertForMultipleChoice", PLAIN), ("DistilBertForMultipleChoice", DISTIL)]
)
def test_the_likeliest_choice_comes_first(class_name: str, settings: dict[str, Any], made: Maker) -> None:
    model = made.model(class_name, settings)
    choices = ["in berlin .", "who ?", "two weights arrive"]
    (one,) = predictions(model, TEXT, *choices)
    inputs = AutoTokenizer.from_pretrained(made.path)([TEXT] * 3, choices, return_tensors="pt", padding=True)
    with torch.no_grad():
        chances = made.resident()(**{key: value[None] for key, value in inputs.items()}).logits[0].softmax(-1)
    order = chances.argsort(descending=True).tolist()
    assert [found["text"] for found in one["candidates"]] == [choices[at] for at in order]
    assert [found["probability"] for found in one["candidates"]] == chances[order].tolist()


@pytest.mark.parametrize(
    ("class_name", "settings"), [("BertForNextSentencePrediction", PLAIN), ("FNetForNextSentencePrediction", PLAIN)]
)
def test_whether_a_sentence_follows(class_name: str, settings: dict[str, Any], made: Maker) -> None:
    model = made.model(class_name, settings)
    (one,) = predictions(model, TEXT, OTHER)
    inputs = AutoTokenizer.from_pretrained(made.path)(TEXT, OTHER, return_tensors="pt")
    if class_name.startswith("FNet"):
        inputs.pop("attention_mask")  # which the model does not accept
    with torch.no_grad():
        expected = made.resident()(**inputs).logits[0].softmax(-1).tolist()
    seen = {found["text"]: found["probability"] for found in one["candidates"]}
    assert [seen["follows"], seen["does not follow"]] == expected


@pytest.mark.parametrize(
    ("class_name", "settings", "field"),
    [
        ("BertForPreTraining", PLAIN, "seq_relationship_logits"),
        ("AlbertForPreTraining", PLAIN | {"embedding_size": 16}, "sop_logits"),
    ],
)
def test_both_heads_of_a_pretrained_model(class_name: str, settings: dict[str, Any], field: str, made: Maker) -> None:
    model = made.model(class_name, settings)
    for texts in (("the [MASK] arrive",), ("the [MASK] arrive", OTHER)):
        word, follows = predictions(model, *texts)
        output = made.output(*texts)
        assert word["position"] == 2
        assert word["candidates"][0]["probability"] == output.prediction_logits[0, 2].softmax(-1).max().item()
        assert follows["candidates"][0]["probability"] == getattr(output, field)[0].softmax(-1).max().item()
    with pytest.raises(
        ConfigurationError, match=r"reads one text and a second one; give no third one \(pairs, --pair\)"
    ):
        predictions(model, TEXT, OTHER, "berlin")


def test_a_model_for_any_number_of_tokens_draws_no_warning(made: Maker, caplog: pytest.LogCaptureFixture) -> None:
    """XLNet has -1 positions."""
    model = made.model(
        "XLNetForSequenceClassification",
        {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32, "vocab_size": len(WORDS)},
    )
    assert len(predictions(model)) == 1
    assert caplog.messages == []


def test_which_tokens_were_replaced(made: Maker) -> None:
    model = made.model("ElectraForPreTraining", PLAIN)
    expected = made.output(TEXT).logits[0].sigmoid().tolist()
    assert [one["candidates"][0]["probability"] for one in predictions(model)] == expected


@pytest.mark.parametrize(
    ("class_name", "settings", "field", "how"),
    [
        ("CLIPTextModelWithProjection", CLIP_TEXT | {"projection_dim": 16}, "text_embeds", "projection"),
        ("ClapTextModelWithProjection", PLAIN | {"projection_dim": 16}, "text_embeds", "projection"),
        ("DPRQuestionEncoder", PLAIN, "pooler_output", "pooler"),
        ("DPRContextEncoder", PLAIN, "pooler_output", "pooler"),
    ],
)
def test_a_vector_of_the_models_own(
    class_name: str, settings: dict[str, Any], field: str, how: str, made: Maker
) -> None:
    model = made.model(class_name, settings)
    result = ask(model)
    assert result.embedding == getattr(made.output(TEXT), field)[0].tolist()
    assert result.pooling == {"modes": [how], "normalised": False, "from": "model"}


@pytest.mark.parametrize("class_name", ["CLIPModel", "ClapModel"])
def test_the_text_part_of_a_model_of_two_kinds(class_name: str, made: Maker) -> None:
    other = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings: dict[str, Any] = {"text_config": CLIP_TEXT, "projection_dim": 16}
    if class_name == "CLIPModel":
        settings["vision_config"] = other | {"image_size": 8, "patch_size": 4}
    else:
        settings["audio_config"] = {
            "depths": [1], "num_attention_heads": [2], "hidden_size": 32, "patch_embeds_hidden_size": 32,
            "spec_size": 16, "num_mel_bins": 8, "window_size": 2,
        }  # fmt: skip
    model = made.model(class_name, settings)
    inputs = AutoTokenizer.from_pretrained(made.path)(TEXT, return_tensors="pt")
    inputs.pop("token_type_ids")
    with torch.no_grad():
        expected = made.resident().get_text_features(**inputs)
    assert ask(model).embedding == getattr(expected, "pooler_output", expected)[0].tolist()


@pytest.mark.parametrize(
    ("class_name", "settings"),
    [
        ("FNetModel", PLAIN),
        ("CanineModel", CANINE),
        ("DistilBertModel", DISTIL),
    ],
)
def test_a_model_without_a_head_gives_the_mean_and_says_so(
    class_name: str, settings: dict[str, Any], made: Maker
) -> None:
    model = made.model(class_name, settings)  # CANINE's ids are characters, so any tokenizer works
    result = ask(model)
    inputs = AutoTokenizer.from_pretrained(made.path)(TEXT, return_tensors="pt")
    if class_name.startswith("FNet"):
        inputs.pop("attention_mask")
    with torch.no_grad():
        states = made.resident()(**inputs).last_hidden_state[0]
    assert result.embedding == states.mean(0).tolist()
    assert "(mean over tokens, since there is no modules.json; all with --json)" in (encoder_text(result) or "")
    with pytest.raises(ConfigurationError, match=r"reads one text; give no second one \(pairs, --pair\)"):
        ask(model, TEXT, OTHER)


@pytest.mark.parametrize(
    ("class_name", "settings", "complaint"),
    [
        (
            "T5Model",
            {"num_layers": 1, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_heads": 2, "vocab_size": len(WORDS)},
            r"an encoder and a decoder without a head.*model\(input_ids=…, decoder_input_ids=…\)",
        ),
        ("BartModel", SEQ2SEQ, r"an encoder and a decoder without a head"),
        (
            "XLNetForQuestionAnswering",
            {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32, "vocab_size": len(WORDS)},
            r"gives start_top_log_probs, .*, which surfw has no words for; use it from Python",
        ),
        (
            "ViTModel",
            {**PLAIN, "image_size": 8, "patch_size": 4},
            r"takes pixel_values, not text; .*model\(pixel_values=…\)",
        ),
        (
            "LxmertModel",
            PLAIN | {"l_layers": 1, "x_layers": 1, "r_layers": 1},
            r"does not run on a text alone \(ValueError: `visual_feats` cannot be `None`\)",
        ),
        (
            "TapasForSequenceClassification",
            PLAIN,
            r"does not run on a text alone \(IndexError: .*\); use it from Python",
        ),
    ],
)
def test_what_has_no_form_for_people_is_refused(
    class_name: str, settings: dict[str, Any], complaint: str, made: Maker
) -> None:
    model = made.model(class_name, settings)
    pairs = (OTHER,) if "QuestionAnswering" in class_name else ()
    with pytest.raises(UnsupportedModelError, match=rf"^model-0 \({class_name}\) .*{complaint}"):
        ask(model, TEXT, *pairs)


def test_what_a_generating_model_does_not_read(made: Maker) -> None:
    model = made.model("BertLMHeadModel", PLAIN | {"is_decoder": True})
    with pytest.raises(ConfigurationError, match=r"generates text from one prompt; leave out --pair \(pairs=\)"):
        ask(model, TEXT, OTHER)
    with pytest.raises(ConfigurationError, match=r"pairs is \[''\], expected a list of texts that are not empty"):
        InferenceRequest(prompt="a", pairs=[""])
