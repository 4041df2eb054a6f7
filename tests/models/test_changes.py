"""Changing a store's files in place while a model has them mapped gives an error, and never another result."""

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from surfw.errors import IntegrityError
from surfw.models import StreamingModel
from surfw.storage import FilesystemBackend, Store
from tests.services import warm

IDS = torch.arange(3, 12)[None]


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A store that this test may damage."""
    shutil.copytree(store, tmp_path / "store")
    return tmp_path / "store"


def blob_of(store: Path) -> tuple[Path, int]:
    """The file of the second layer, and its payload's offset."""
    manifest = asyncio.run(Store(FilesystemBackend(store)).manifest("llama"))
    chunk = next(one for one in manifest.chunks if one.name.endswith("layers.1"))
    at = chunk.forms[0].locations[0]
    return store / at.object, at.start


def test_a_change_in_place_is_an_error_at_the_next_pass(copy: Path) -> None:
    file, start = blob_of(copy)
    with StreamingModel.open(str(copy), model="llama", memory_budget="1GB") as model:
        before = model(input_ids=IDS).logits
        with file.open("r+b") as blob:
            blob.seek(start + 2)
            blob.write(b"\x55\x55")
        with pytest.raises(IntegrityError, match=r"was changed in .* while it was in use"):
            model(input_ids=IDS)
        shutil.rmtree(copy)  # the mapping remains, and still counts as changed
        with pytest.raises(IntegrityError, match=r"was changed in .* while it was in use"):
            model(input_ids=IDS)
    assert bool(before.isfinite().all())


def test_a_change_between_two_passes_of_a_run_is_an_error_though_its_weights_stay_in_place(copy: Path) -> None:
    file, start = blob_of(copy)

    def change_between(inner: Any) -> None:
        inner(input_ids=IDS)
        with file.open("r+b") as blob:
            blob.seek(start + 2)
            blob.write(b"\x55\x55")
        inner(input_ids=IDS)

    with (
        StreamingModel.open(str(copy), model="llama", memory_budget="1GB") as model,
        pytest.raises(IntegrityError, match=r"was changed in .* while it was in use"),
    ):
        model.run(change_between)


_CUT = """
import os, sys, torch
from surfw.errors import SurfwError
from surfw.models import StreamingModel
ids = torch.arange(3, 12)[None]
with StreamingModel.open(sys.argv[1], model="llama", memory_budget="1GB") as model:
    model(input_ids=ids)
    os.truncate(sys.argv[2], 100)
    try:
        model(input_ids=ids)
    except SurfwError as exc:
        print(exc)
"""


def test_a_file_that_is_cut_off_does_not_end_the_process(copy: Path) -> None:
    file, _ = blob_of(copy)
    size = file.stat().st_size
    done = warm.run([sys.executable, "-c", _CUT, str(copy), str(file)])
    assert (done.returncode, done.stdout.partition(";")[0]) == (
        0,
        f"{file} was cut off while it was in use: it has 100 bytes, expected {size}",
    ), done.stderr
    assert file.stat().st_size == 100
