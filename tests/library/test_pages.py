"""The pages' Python code runs as written, from the first snippet of a page to the last."""

import ast
import asyncio
import contextlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import surfw
from surfw import ModelChunker
from tests import pages
from tests.adapters import save_adapter
from tests.checkpoints import save_bert, save_llama
from tests.exactness.families import FAMILIES
from tests.servers import serve

SNIPPETS = pages.blocks("python")


def example(name: str) -> Any:
    """An example's module."""
    spec = importlib.util.spec_from_file_location(name, pages.ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_models(folder: Path) -> Any:
    """Save the models that the snippets call my-model, my-adapter, my-bert and so on; return the mixer's class."""
    save_adapter(save_llama(folder / "my-model"), folder / "my-adapter", target_modules=["q_proj", "v_proj"])
    save_llama(folder / "small-model", layers=1)
    save_bert(folder / "my-bert")
    torch.manual_seed(0)
    FAMILIES["gpt2"].build().save_pretrained(folder / "my-gpt")
    FAMILIES["t5"].build().save_pretrained(folder / "my-t5")
    custom = example("custom_model")
    custom.TinyMixer(custom.TinyConfig()).save_pretrained(folder / "my-mixer")
    headless = folder / "my-headless"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=130, **sizes)).save_pretrained(headless)
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    return custom.TinyMixer


def places(request: pytest.FixtureRequest) -> dict[str, str]:
    """This machine's replacements for places in the snippets; None for a service that is not installed."""
    found: dict[str, str] = {}
    with contextlib.suppress(pytest.skip.Exception):
        found["redis://127.0.0.1:6379"] = request.getfixturevalue("redis_url")
    with contextlib.suppress(pytest.skip.Exception):
        s3 = request.getfixturevalue("s3")
        found |= {"http://127.0.0.1:9000": s3.endpoint, "my-bucket": s3.bucket()}
        found |= {"my-key": s3.key, "my-secret": s3.secret}
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The variables of each page's snippets, which ran one after another in one folder."""
    folder = tmp_path_factory.mktemp("pages")
    mixer = save_models(folder)
    names: dict[str, Any] = {one.page: {"__name__": "page", "TinyMixer": mixer} for one in SNIPPETS}
    for name in ("my-model", "small-model", "my-bert", "my-gpt", "my-t5"):
        ModelChunker(folder / name, folder / "served").chunk_model_sync()
    here = places(request)
    away = [place for place in ("redis://127.0.0.1:6379", "http://127.0.0.1:9000") if place not in here]
    before = Path.cwd()
    os.chdir(folder)
    try:
        with serve(folder / "served") as served:
            here["ws://127.0.0.1:8765"] = served.url
            for snippet in SNIPPETS:
                if not any(place in snippet.text for place in away):
                    run(snippet, here, names[snippet.page])
        yield names
    finally:
        os.chdir(before)


def run(snippet: pages.Block, here: dict[str, str], names: dict[str, Any]) -> None:
    """Run a snippet with this machine's places, as `python -m asyncio` would."""
    text = snippet.text
    for written, place in here.items():
        text = text.replace(written, place)
    code = compile("\n" * snippet.line + text, snippet.page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(eval(code, names))
    else:
        eval(code, names)


def test_the_snippets_did_what_they_say(told: dict[str, Any]) -> None:
    guide = told["surfw/models/GUIDE.md"]
    assert guide["info"].name == "my-model"
    assert guide["health"]["ready"]
    assert guide["stats"]["cache"]["capacity_bytes"] == 200_000_000
    assert guide["output"].logits.shape[:2] == (1, 16)
    assert 16 < guide["tokens"].shape[1] <= 36
    assert guide["cache"]["cache_size"] == 2
    assert guide["times"]["total_inferences"] == 3
    assert guide["settings"].cache_layers == 3
    assert sorted((one.index, one.error) for one in guide["many"]) == [(0, None), (1, None), (2, None)]
    (missing,) = {str(one.message) for one in guide["told"] if "UNINITIALIZED" in str(one.message)}
    assert missing.startswith("my-headless: 2 weights of BertForSequenceClassification are UNINITIALIZED")
    assert told["surfw/wire/PROTOCOL.md"]["payload"]
    storage = told["surfw/storage/GUIDE.md"]
    assert "info" not in storage or storage["info"].name == "demo"  # the former if S3 is missing
    assert storage["verified"].damage == ()


def test_the_snippets_use_every_public_name(told: dict[str, Any]) -> None:
    used = {
        name
        for snippet in SNIPPETS
        for line in ast.walk(ast.parse(snippet.text))
        if isinstance(line, ast.ImportFrom) and line.module == "surfw"
        for name in (alias.name for alias in line.names)
    }
    errors = {name for name in surfw.__all__ if name.endswith("Error")}
    assert used <= set(surfw.__all__)
    assert set(surfw.__all__) - errors <= used
    assert len(errors & used) >= 5


def test_the_backend_of_the_guide_passes_the_suite_of_the_guide(tmp_path: Path) -> None:
    backend = next(snippet.text for snippet in SNIPPETS if "class DictBackend" in snippet.text)
    suite = next(snippet.text for snippet in SNIPPETS if "StorageBackendSuite" in snippet.text)
    (tmp_path / "test_it.py").write_text(f"{backend}\n\n{suite}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_it.py")],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed is not None
    assert int(passed[1]) >= 15
