"""A model's tokenizer is stored with the model, and runs no code."""

import asyncio
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from surfw.chunking import prepare_model, write_model
from surfw.errors import IntegrityError, UnsupportedModelError
from surfw.models import StreamingModel
from surfw.storage import FilesystemBackend, open_backend
from surfw.storage.store_source import open_storage_source
from tests.models.test_streaming import opener


def changed(checkpoints: Path, tmp_path: Path, file: str, change: Callable[[str], str]) -> Path:
    """A store with the LLaMA and one changed tokenizer file."""
    folder = Path(shutil.copytree(checkpoints / "llama", tmp_path / "llama"))
    (folder / file).write_text(change((folder / file).read_text()))
    with prepare_model(str(folder)) as prepared:
        asyncio.run(write_model(prepared, open_backend(tmp_path / "store")))
    return tmp_path / "store"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_tokenizer_is_the_checkpoints(store: Path, checkpoints: Path, name: str) -> None:
    text = "A layer is fetched while the one before it computes."
    expected = AutoTokenizer.from_pretrained(checkpoints / name)
    with StreamingModel.open(opener(store), name) as model:
        tokenizer = model.tokenizer
    assert tokenizer is not None
    assert tokenizer(text).input_ids == expected(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.special_tokens_map == expected.special_tokens_map


def test_a_model_without_a_tokenizer_has_none(store: Path) -> None:
    with StreamingModel.open(opener(store), "t5") as model:
        assert model.find_tokenizer() is None
        with pytest.raises(UnsupportedModelError, match="t5 has no tokenizer; make one yourself"):
            _ = model.tokenizer


def test_code_of_a_tokenizer_is_ignored_with_a_word(
    checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def ask_for_code(text: str) -> str:
        return json.dumps(json.loads(text) | {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}})

    store = changed(checkpoints, tmp_path, "tokenizer_config.json", ask_for_code)
    with caplog.at_level(logging.WARNING, "surfw"), StreamingModel.open(opener(store)) as model:
        tokenizer = model.tokenizer
    assert tokenizer is not None
    assert type(tokenizer).__module__.startswith("transformers.")
    assert len(caplog.records) == 2, "when it was chunked, and when it was read"
    for record in caplog.records:
        assert record.getMessage().startswith(
            "tokenizer_config.json: ignored, because surfw runs no code from elsewhere: auto_map"
        )


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": 9}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_files_that_make_no_tokenizer(checkpoints: Path, tmp_path: Path, file: str, content: str) -> None:
    store = changed(checkpoints, tmp_path, file, lambda _: content)
    complaint = "^the tokenizer of llama cannot be used: .*; give the prompt as token ids \\(--prompt-ids 1,2,3\\)$"
    with StreamingModel.open(opener(store)) as model, pytest.raises(UnsupportedModelError, match=complaint):
        _ = model.tokenizer


def test_a_damaged_file_is_noticed(store: Path) -> None:
    class Damaged(FilesystemBackend):
        async def load(self, key: str) -> bytes:
            data = await super().load(key)
            return data.replace(b"<s>", b"<S>") if key.startswith("blobs/") else data

    with (
        StreamingModel.open(lambda: open_storage_source(Damaged(store)), "llama") as model,
        pytest.raises(IntegrityError, match=r"tokenizer.* of llama in .* is damaged; chunk the model again"),
    ):
        _ = model.tokenizer
