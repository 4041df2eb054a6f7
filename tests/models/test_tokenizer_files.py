"""Each kind of tokenizer is stored with its model, whatever its files, and gives the ids that transformers gives."""

import ast
import asyncio
import io
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizer

from surfw.checkpoint.companions import TOKENIZER_FILES, is_companion
from surfw.chunking import prepare_model, write_model
from surfw.errors import CheckpointError, UnsupportedModelError
from surfw.models import StreamingModel
from surfw.skeleton import tokenizers
from surfw.skeleton.tokenizers import make_tokenizer
from surfw.storage import open_backend
from tests.models.test_streaming import opener

TEXT = "The weights arrive while the model runs. Two of them, don't they?"
SPECIAL = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}


def save_pieces(path: Path, **settings: Any) -> None:
    """A small SentencePiece model, trained on a few words."""
    model = io.BytesIO()
    texts = [TEXT, "A layer is fetched while the one before it computes.", "Numbers such as 12345 and x = f(y)"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=50, minloglevel=2, **SPECIAL | settings
    )
    path.write_bytes(model.getvalue())


def save_deberta(folder: Path) -> None:
    pieces = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    save_pieces(folder / "spm.model", **pieces)


def save_rembert(folder: Path) -> None:
    save_pieces(folder / "sentencepiece.model")


def save_speecht5(folder: Path) -> None:
    save_pieces(folder / "spm_char.model", model_type="char")


def save_marian(folder: Path) -> None:
    save_pieces(folder / "source.spm")
    save_pieces(folder / "target.spm")
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "source.spm"))
    words = {pieces.id_to_piece(at): at for at in range(len(pieces))} | {"<pad>": len(pieces)}
    (folder / "vocab.json").write_text(json.dumps(words))


def save_bertweet(folder: Path) -> None:
    (folder / "vocab.txt").write_text(
        "".join(f"{word} 9\n" for word in ("The", "wei@@", "ghts", "model", "while", "the"))
    )
    (folder / "bpe.codes").write_text("w e 9\nwe i 8\ng h 7\ngh t 6\nght s</w> 5\nT h 4\nTh e</w> 3\n")


def save_rocbert(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "weights", "arrive", "two"]
    (folder / "vocab.txt").write_text("\n".join(words))
    for name in ("word_shape.json", "word_pronunciation.json"):
        (folder / name).write_text(json.dumps({word: at for at, word in enumerate(words)}))


def save_templates(folder: Path) -> None:
    """A tokenizer with a second chat template, in the folder that transformers uses for them."""
    shutil.copy(Path(__file__).parents[2] / "surfw/demo/tokenizer.json", folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("tools: {{ messages[0]['content'] }}")


KINDS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "deberta-v2": ("DebertaV2Tokenizer", save_deberta),
    "rembert": ("RemBertTokenizer", save_rembert),
    "speecht5": ("SpeechT5Tokenizer", save_speecht5),
    "marian": ("MarianTokenizer", save_marian),
    "bertweet": ("BertweetTokenizer", save_bertweet),
    "roc_bert": ("RoCBertTokenizer", save_rocbert),
    "templates": ("PreTrainedTokenizerFast", save_templates),
}


@pytest.fixture
def bert(checkpoints: Path, tmp_path: Path) -> Path:
    """A model's folder without a tokenizer."""
    folder = Path(shutil.copytree(checkpoints / "bert", tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def chunk(folder: Path) -> Path:
    store = folder.parent / "store"
    with prepare_model(str(folder), name="model") as prepared:
        asyncio.run(write_model(prepared, open_backend(store)))
    return store


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_transformers_ids(kind: str, bert: Path) -> None:
    class_name, save = KINDS[kind]
    save(bert)
    (bert / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name}))
    expected = AutoTokenizer.from_pretrained(bert)
    store = chunk(bert)
    shutil.rmtree(bert)
    with StreamingModel.open(opener(store)) as model:
        seen = model.tokenizer
    assert type(seen) is type(expected)
    assert seen(TEXT).input_ids == expected(TEXT).input_ids
    assert len(set(seen(TEXT).input_ids)) > 2, "it knows words"
    assert seen.chat_template == expected.chat_template
    assert (kind == "templates") == isinstance(seen.chat_template, dict)


def test_the_list_of_files_is_that_of_transformers() -> None:
    named = set[str]()
    for path in Path(transformers.__path__[0], "models").glob("*/tokenization*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "VOCAB_FILES_NAMES":
                values = next(one for one in ast.walk(node.value) if isinstance(one, ast.Dict)).values
                named |= {one.value for one in values if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    assert len(named) > 20
    assert named <= set(TOKENIZER_FILES)
    assert is_companion("additional_chat_templates/a.jinja")
    assert is_companion("tokenizer.4.0.json")
    assert not is_companion("additional_chat_templates/../config.jinja")
    assert not is_companion("model.safetensors")


@pytest.mark.parametrize(
    ("class_name", "file"),
    [("DebertaV2Tokenizer", "spm.model"), ("BertTokenizer", "vocab.txt"), ("BigBirdTokenizer", "spiece.model")],
)
def test_a_missing_vocabulary_is_refused(class_name: str, file: str, bert: Path) -> None:
    (bert / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name}))
    complaint = (
        rf"the tokenizer of .*/model has no vocabulary: {class_name} is made of {file} or tokenizer.json, and there is "
        "tokenizer_config.json; download it, or remove tokenizer_config.json"
    )
    with pytest.raises(CheckpointError, match=complaint):
        chunk(bert)
    with pytest.raises(UnsupportedModelError, match="has no vocabulary"):
        make_tokenizer({"tokenizer_config.json": (bert / "tokenizer_config.json").read_bytes()}, {}, where="a")


def test_a_missing_library_is_named_with_its_extra(
    bert: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_deberta(bert)
    monkeypatch.setattr(tokenizers, "_is_installed", lambda _: False)
    with caplog.at_level(logging.WARNING, "surfw"):
        store = chunk(bert)
    (said,) = caplog.messages
    assert said == (
        f"the tokenizer of {bert} needs the library sentencepiece for spm.model: pip install 'surfw[sentencepiece]'; "
        "without it, the model takes token ids only"
    )
    with (
        StreamingModel.open(opener(store)) as model,
        pytest.raises(
            UnsupportedModelError, match=r"pip install 'surfw\[sentencepiece\]'; give the prompt as token ids"
        ),
    ):
        _ = model.tokenizer
    with pytest.raises(UnsupportedModelError, match=r"needs the library tiktoken for .*: pip install tiktoken"):
        make_tokenizer({"tokenizer.model": b"aGVsbG8= 0\nIHdvcmxk 1\n"}, {"model_type": "llama"}, where="a")


class OwnTokenizer(PreTrainedTokenizer):
    """A tokenizer class of the program's own: a token for each byte, from a file with an unusual name."""

    vocab_files_names = {"vocab_file": "own.alphabet"}  # noqa: RUF012 - as transformers declares it

    def __init__(self, vocab_file: str, **settings: Any) -> None:
        self.letters = Path(vocab_file).read_text()
        super().__init__(unk_token="?", **settings)

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {letter: at for at, letter in enumerate(self.letters)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return max(0, self.letters.find(token))

    def _convert_id_to_token(self, index: int) -> str:
        return self.letters[index]


def test_files_of_a_registered_class_are_kept(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = transformers.models.auto.tokenization_auto.REGISTERED_TOKENIZER_CLASSES
    monkeypatch.setitem(registry, "OwnTokenizer", OwnTokenizer)
    (bert / "own.alphabet").write_text("?abcdefgh")
    (bert / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OwnTokenizer"}))
    with StreamingModel.open(opener(chunk(bert))) as model:
        assert model.tokenizer("head").input_ids == [8, 5, 1, 4]


def test_other_ids_are_refused(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when transformers uses a file in the folder that is not stored."""
    save_templates(bert)
    (bert / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    vocabulary = json.loads((bert / "tokenizer.json").read_text())

    def read(path: Path, limit: int) -> bytes:
        vocabulary["pre_tokenizer"] = None
        return json.dumps(vocabulary).encode() if path.name == "tokenizer.json" else path.read_bytes()

    monkeypatch.setattr("surfw.chunking.prepare.read_small", read)
    with pytest.raises(
        CheckpointError,
        match=r"gives other token ids when it is made of .*tokenizer.json, tokenizer_config.json alone \(for ",
    ):
        chunk(bert)
