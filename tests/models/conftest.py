"""A store with small models of several kinds, chunked once for all tests in this folder."""

import asyncio
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from surfw.chunking import prepare_model, write_model
from surfw.storage import open_backend
from tests.checkpoints import save_bert, save_llama
from tests.exactness.families import FAMILIES

UNTOUCHED = ("deberta-outside-weights", "t5", "electra-classifier")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each model."""
    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "llama", tie_word_embeddings=True)
    save_bert(folder / "bert")
    for name in UNTOUCHED:
        torch.manual_seed(3)
        FAMILIES[name].build().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def store(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all of them."""
    path = tmp_path_factory.mktemp("store")
    shutil.rmtree(path)
    for folder in sorted(checkpoints.iterdir()):
        with prepare_model(str(folder)) as prepared:
            asyncio.run(write_model(prepared, open_backend(path)))
    return path


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Every thread of surfw that a test started has ended after the test."""
    before = set(threading.enumerate())
    yield
    started = set(threading.enumerate()) - before
    assert [thread.name for thread in started if thread.name.startswith("surfw")] == []
