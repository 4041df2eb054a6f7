"""Pins: `name@b3:DIGEST` names exactly one model, wherever and in whatever forms it is stored."""

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from surfw import ModelChunker, StreamingModel
from surfw.checkpoint import demo_checkpoint
from surfw.config import BLOCK_BYTES
from surfw.errors import ConfigurationError, IntegrityError
from surfw.manifest import Manifest, digest_blocks
from surfw.source import check_pin, split_pin
from surfw.storage import FilesystemBackend, Store
from tests.checkpoints import save_llama
from tests.cli.run import complaint, surfw
from tests.stores import make_store


@pytest.fixture
def made(tmp_path: Path) -> Manifest:
    return make_store(tmp_path, sizes=[10, 20])


def test_a_pin_is_split_from_the_name() -> None:
    digest = "0123456789abcdef" * 4
    assert split_pin(None) == (None, None)
    assert split_pin("org/name") == ("org/name", None)
    assert split_pin(f"org/name@b3:{digest}") == ("org/name", digest)
    assert split_pin(f"@b3:{digest}") == (None, digest)
    for wrong in ("", digest[:-1], digest.upper(), f"{digest}0"):
        with pytest.raises(
            ConfigurationError, match=r"name is pinned to .*, expected 64 hexadecimal digits in lower case"
        ):
            split_pin(f"name@b3:{wrong}")


def test_the_identity_is_that_of_the_weights_the_files_and_the_configuration(made: Manifest) -> None:
    first, *others = made.chunks
    coded = replace(first, forms=(*first.forms, replace(first.forms[0], codec="lossless", digest="0" * 64)))
    for same in (
        made.public(),
        replace(made, name="other/name"),
        replace(made, chunks=(coded, *others)),
    ):
        assert same.identity == made.identity
        check_pin(same, made.identity, where="here")
    for other in (
        replace(made, config={**made.config, "vocab_size": 10}),
        replace(made, chunks=(replace(first, id="0" * 64), *others)),
        replace(made, files=made.files[1:]),
        replace(made, order=made.order[::-1]),
        replace(made, dtype="float32"),
    ):
        assert other.identity != made.identity
        with pytest.raises(IntegrityError, match=f"here is not the model .* expected b3:{made.identity}"):
            check_pin(other, made.identity, where="here")


def test_what_has_no_digests_cannot_be_pinned(made: Manifest) -> None:
    form = replace(made.chunks[0].forms[0], digest="", blocks=b"")
    unknown = replace(made, chunks=(replace(made.chunks[0], forms=(form,)), made.chunks[1]))
    with pytest.raises(IntegrityError, match=r"served in place, without digests .* cannot be pinned"):
        check_pin(unknown, unknown.identity, where="here")
    check_pin(unknown, None, where="here")


def test_infer_runs_the_pinned_model_only(tmp_path: Path) -> None:
    assert surfw(tmp_path, "chunk", str(demo_checkpoint()), "--name", "toy", "-q").returncode == 0
    pin = json.loads(surfw(tmp_path, "show", "toy", "--json").stdout)["identity"]
    assert f"@b3:{pin}" in surfw(tmp_path, "show", "toy").stdout.replace("\n", "")
    infer = ("--prompt-ids", "1,2", "--max-new-tokens", "1", "-q")
    assert surfw(tmp_path, "infer", f"toy@b3:{pin}", *infer).returncode == 0
    said = complaint(surfw(tmp_path, "infer", "--model", f"toy@b3:{'0' * 64}", *infer))
    assert f"its identity is b3:{pin}, expected b3:{'0' * 64}" in said


def forge(store: Path, manifest: Manifest, name: str) -> None:
    """Forge a model as someone who can write to the store: other weights and their digests, under the old id."""
    chunk = manifest.by_name[name]
    (form,) = chunk.forms
    (place,) = form.locations
    blob = store / place.object
    data = bytearray(blob.read_bytes())
    data[place.start : place.start + form.stored_bytes] = bytes(form.stored_bytes)
    blob.write_bytes(data)
    payload = memoryview(data)[place.start : place.start + form.stored_bytes]
    blocks = [payload[start : start + BLOCK_BYTES] for start in range(0, len(payload), BLOCK_BYTES)]
    other = replace(chunk, forms=(replace(form, blocks=digest_blocks(blocks).blocks),))
    chunks = tuple(other if one.name == name else one for one in manifest.chunks)
    asyncio.run(Store(FilesystemBackend(store)).publish(replace(manifest, chunks=chunks)))


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("at", [0, 1, -1])
def test_digests_of_blocks_that_do_not_belong_to_the_payload_are_found_out(
    tmp_path: Path, at: int, *, mapped: bool
) -> None:
    store = tmp_path / "store"
    checkpoint = save_llama(tmp_path / "llama", tie_word_embeddings=False)
    ModelChunker(checkpoint, store, codecs=("none",)).chunk_model_sync()
    manifest = Store(FilesystemBackend(store)).parse_manifest("llama", (store / "models" / "llama.json").read_bytes())
    pinned = f"{manifest.name}@b3:{manifest.identity}"
    ids = torch.tensor([[1, 2, 3]])
    options: dict[str, Any] = {} if mapped else {"cache_size": 1}
    with StreamingModel.open(store, pinned, **options) as model:
        before = model(input_ids=ids).logits
    name = manifest.chunks[at].name
    forge(store, manifest, name)
    with StreamingModel.open(store, **options) as model:
        assert not torch.equal(model(input_ids=ids).logits, before), "without a pin, the store is believed"
    with (
        StreamingModel.open(store, pinned, **options) as model,
        pytest.raises(IntegrityError, match=rf"chunk {re.escape(name)} from .* is a payload with BLAKE3"),
    ):
        model(input_ids=ids)


def test_the_digest_that_stands_above_the_pin_is_told_from_it(made: Manifest) -> None:
    with pytest.raises(IntegrityError, match=r"that is its digest, .*; take the pin"):
        check_pin(made, made.digest, where="here")
