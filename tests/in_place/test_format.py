"""Manifests of models in place, and late digests: they are read back as written, and invalid ones are refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.config import BLOCK_BYTES
from surfw.errors import ManifestError
from surfw.manifest import (
    Chunk,
    Digester,
    Form,
    Location,
    Manifest,
    ModelFile,
    Origin,
    Pin,
    TensorInfo,
    Use,
    digest_blocks,
    parse_digests,
    parse_manifest,
    payload_digest,
)

ORIGIN = Origin("s3://bucket/models", {"a.safetensors": Pin(100, '"tag"'), "tokenizer.json": Pin(3, "1 2 3")})
PLACES = (Location("a.safetensors", 8, 28), Location("a.safetensors", 40, 44))
DATA = bytes(range(24))
MANIFEST = Manifest(
    name="mine",
    class_name="ToyModel",
    dtype="float32",
    config={"model_type": "toy"},
    generation_config=None,
    files=(ModelFile("tokenizer.json", 3, payload_digest(b"abc"), "tokenizer.json"),),
    ties={},
    chunks=(
        Chunk(
            "layers.0", "layer", ORIGIN.provisional_id(PLACES), 24, (TensorInfo("w", "F32", (6,), 0),),
            (Form("none", 24, "", b"", PLACES),),
        ),
    ),
    order=(Use("layers.0", ("layers.0",)),),
    origin=ORIGIN,
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.sampled_from([0, 1, 77, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 5]), max_size=5))
def test_parts_of_any_length_have_the_digests_of_the_whole(parts: list[int]) -> None:
    digester = Digester()
    for index, size in enumerate(parts):
        digester.update(bytes([index]) * size)
    whole = b"".join(bytes([index]) * size for index, size in enumerate(parts))
    found = digester.result()
    assert found == digest_blocks([whole])
    assert parse_digests(json.dumps(found.document()).encode(), len(whole), where="here") == found


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"digest": "aa", "blocks": ""}', b"[" * 100_000])
def test_digests_that_are_none(answer: bytes) -> None:
    with pytest.raises(ManifestError, match=r"^what was said cannot be read: "):
        parse_digests(answer, 1, where="what was said")


def test_it_is_read_back_and_what_crosses_the_wire_says_nothing_of_where_things_lie() -> None:
    assert json.loads(MANIFEST.encode())["version"] == 2
    assert parse_manifest(MANIFEST.encode(), where="here") == MANIFEST
    public = parse_manifest(MANIFEST.public().encode(), where="there")
    assert public == MANIFEST.public()
    assert b"bucket" not in public.encode()
    assert b"a.safetensors" not in public.encode()


def test_with_its_digests_it_is_as_that_of_a_copy() -> None:
    digests = digest_blocks([DATA])
    known = MANIFEST.with_digests({MANIFEST.chunks[0].id: digests})
    assert (known.chunks[0].id, known.is_known, MANIFEST.is_known) == (digests.digest, True, False)
    assert json.loads(known.encode())["version"] == 2
    assert json.loads(known.public().encode())["version"] == 1
    assert known.with_digests({known.chunks[0].id: digest_blocks([b"other"])}) == known


def test_a_pin_is_part_of_every_identity() -> None:
    other = replace(ORIGIN, pins=dict(ORIGIN.pins) | {"a.safetensors": Pin(100, '"other"')})
    assert other.key != ORIGIN.key
    assert other.provisional_id(PLACES) != ORIGIN.provisional_id(PLACES)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d["chunks"][0]["forms"][0]["locations"][1].update(start=97, stop=101), "do not lie in its origin"),
        (lambda d: d["chunks"][0]["forms"][0]["locations"][0].update(object="b"), "do not lie in its origin"),
        (lambda d: d["files"][0].update(object="blobs/aa/x.json"), "do not lie in its origin"),
        (
            lambda d: d["origin"]["objects"].update({"../x": {"size": 1, "revision": "r"}}),
            "not one of plain file",
        ),
        (lambda d: d["chunks"][0]["forms"][0].update(codec="future"), "lacks digests, and is stored in another form"),
        (lambda d: d.update(version=1), "malformed: KeyError 'digest'"),
    ],
)
def test_what_breaks_a_rule_is_refused(change: Any, complaint: str) -> None:
    document = json.loads(MANIFEST.encode())
    change(document)
    with pytest.raises(ManifestError, match=complaint):
        parse_manifest(json.dumps(document).encode(), where="here")
