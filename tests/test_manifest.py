"""The format: written manifests are read back, and invalid ones are refused with one kind of error."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.config import BLOCK_BYTES
from surfw.errors import ManifestError, NotFoundError
from surfw.manifest import (
    DTYPE_BITS,
    Chunk,
    Form,
    Location,
    Manifest,
    ModelFile,
    TensorInfo,
    Use,
    check_model_name,
    decode_line,
    digest_blocks,
    encode_line,
    encode_stored_manifest,
    has_digest,
    nbytes,
    parse_manifest,
    parse_stored_manifest,
    payload_digest,
)

SAMPLE = Manifest(
    name="org/sample",
    class_name="LlamaForCausalLM",
    dtype="bfloat16",
    config={"model_type": "llama", "layers": [1, 2.5, None, True], "nested": {"text": "ü\n"}},
    generation_config={"eos_token_id": 2},
    files=(ModelFile("tokenizer.json", 3, payload_digest(b"abc"), "blobs/aa/abc.json"),),
    ties={"lm_head.weight": "embed.weight"},
    chunks=(
        Chunk(
            "embed", "part", payload_digest(bytes(24)), 24,
            (TensorInfo("embed.weight", "BF16", (2, 6), 0),),
            (Form("none", 24, payload_digest(bytes(24)), blake3(bytes(24)).digest(), (Location("a", 8, 32),)),),
        ),
        Chunk(
            "layers.0", "layer", payload_digest(b"1234567"), 7,
            (TensorInfo("layers.0.a", "I32", (), 0), TensorInfo("layers.0.b", "U8", (3, 1), 4)),
            (Form(
                "none", 7, payload_digest(b"1234567"), blake3(b"1234567").digest(),
                (Location("a", 40, 44), Location("b", 0, 3)),
            ),),
        ),
    ),
    order=(Use("embed", ("embed",)), Use("layers.0", ("layers.0",)), Use("head", ("embed", "layers.0"))),
)  # fmt: skip

names = st.text("abz.0_é ", min_size=1, max_size=12)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", max_size=6), inner, max_size=3)
)
configs = st.dictionaries(st.text("abc_", max_size=6), json_values, max_size=4)
shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@st.composite
def chunks(draw: st.DrawFn, name: str) -> Chunk:
    """A chunk with some tensors, in one form."""
    tensors, size = [], 0
    for index in range(draw(st.integers(1, 3))):
        tensor = TensorInfo(f"{name}/{index}", draw(st.sampled_from(sorted(DTYPE_BITS))), draw(shapes), size)
        tensors.append(tensor)
        size += tensor.nbytes
    digest, blocks = digest_blocks([bytes(size)])
    middle = draw(st.integers(0, size))
    places = draw(
        st.sampled_from(
            [(), (Location("o", 5, 5 + size),), (Location("o", 0, middle), Location("p", 9, 9 + size - middle))]
        )
    )
    return Chunk(
        name, draw(st.sampled_from(["layer", "part", "own"])), digest, size, tuple(tensors),
        (Form("none", size, digest, blocks, places),),
    )  # fmt: skip


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """A manifest that follows the rules."""
    made = tuple(draw(chunks(name)) for name in draw(st.lists(names, max_size=3, unique=True)))
    tensors = [tensor.name for chunk in made for tensor in chunk.tensors]
    targets = st.sampled_from(tensors) if tensors else st.nothing()
    uses = st.lists(st.sampled_from([chunk.name for chunk in made]), max_size=3).map(tuple) if made else st.just(())
    return Manifest(
        name=draw(st.sampled_from(["a", "org/a-1.b_c"])),
        class_name=draw(names),
        dtype=draw(names),
        config=draw(configs),
        generation_config=draw(st.none() | configs),
        files=(),
        ties=draw(st.dictionaries(st.text("xyz", min_size=1), targets, max_size=2)),
        chunks=made,
        order=tuple(Use(module, draw(uses)) for module in draw(st.lists(names, max_size=4))),
    )


def parse(manifest: Manifest) -> Manifest:
    return parse_manifest(manifest.encode(), where="test")


@given(manifests())
def test_what_is_written_is_read_back(manifest: Manifest) -> None:
    assert parse(manifest) == manifest


@given(manifests())
def test_equal_manifests_have_equal_bytes(manifest: Manifest) -> None:
    turned = replace(manifest, config=dict(reversed([*manifest.config.items()])))
    assert turned.encode() == manifest.encode()


@given(manifests())
def test_the_public_manifest_says_of_no_place_and_is_the_same_model(manifest: Manifest) -> None:
    public = parse(manifest.public())
    assert [form.locations for chunk in public.chunks for form in chunk.forms] == [()] * len(manifest.chunks)
    assert b'"locations"' not in manifest.public().encode()
    assert b'"object"' not in manifest.public().encode()
    assert public.digest == manifest.digest


def test_the_sample_says_what_it_holds() -> None:
    assert parse(SAMPLE) == SAMPLE
    assert SAMPLE.payload_bytes == 31
    assert SAMPLE.layer_count == 1
    assert list(SAMPLE.by_name) == ["embed", "layers.0"]
    assert SAMPLE.by_id[payload_digest(b"1234567")].name == "layers.0"
    assert SAMPLE.chunks[0].form("none") is SAMPLE.chunks[0].forms[0]
    assert SAMPLE.chunks[0].form("lossless") is None
    assert SAMPLE.file("tokenizer.json").size == 3
    with pytest.raises(NotFoundError, match=r"org/sample has no file 'vocab\.txt'"):
        SAMPLE.file("vocab.txt")


def test_the_digest_depends_on_what_runs_and_not_on_where_it_lies() -> None:
    moved = json.loads(SAMPLE.encode())
    moved["chunks"][0]["forms"][0]["locations"] = [{"object": "elsewhere", "start": 0, "stop": 24}]
    moved["files"][0]["object"] = "elsewhere"
    assert parse_manifest(json.dumps(moved).encode(), where="t").digest == SAMPLE.digest
    assert replace(SAMPLE, dtype="float32").digest != SAMPLE.digest


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values of a document."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


PLACES = sorted(places(json.loads(SAMPLE.encode())), key=repr)
strange = json_values | st.sampled_from(
    ["\ud800", "a\nb", "\x1b[31m", "x" * 5000, "../x", "0" * 64, -1, 2**46 + 1, 1e400, True, [[]], {"": None}]
)


def consistent_or_refused(data: bytes) -> None:
    """The parser returns a manifest that can be written and read again, or raises `ManifestError`."""
    try:
        manifest = parse_manifest(data, where="test")
    except ManifestError as error:
        text = str(error)
        assert "test" in text or "model name" in text
        return
    again = parse(manifest)
    assert again == manifest
    assert again.digest == manifest.digest


@settings(max_examples=400)
@given(st.sampled_from(PLACES), strange, st.sampled_from(["replace", "delete", "insert"]))
def test_a_changed_document_is_consistent_or_refused(path: tuple[Any, ...], value: Any, how: str) -> None:
    document = json.loads(SAMPLE.encode())
    if path:
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        if how == "delete":
            del holder[path[-1]]
        elif how == "insert" and isinstance(holder, list):
            holder.insert(path[-1], value)
        else:
            holder[path[-1]] = value
    else:
        document = value
    consistent_or_refused(json.dumps(document).encode())


@settings(max_examples=300)
@given(st.integers(0, len(SAMPLE.encode()) - 1), st.binary(max_size=4), st.integers(0, 8))
def test_changed_bytes_are_consistent_or_refused(at: int, new: bytes, removed: int) -> None:
    data = SAMPLE.encode()
    consistent_or_refused(data[:at] + new + data[at + removed :])


@given(st.binary(max_size=60))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(data, where="test")


def edit(document: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    holder: Any = document
    for key in parents:
        holder = holder[key]
    holder[last] = value


DEEP: Any = {}
for _ in range(80):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("format", "surfw.store", "its format is not 'surfw.manifest'"),
        ("version", 8, "has format version '8'; this surfw reads 1 to 7. Chunk the model again"),
        ("name", "../x", "model name '../x' cannot be used"),
        ("class", "a\x1b[2J", "class is not a printable text"),
        ("files", {}, "files is not a list"),
        ("files/0/path", "../tokenizer.json", "is not one of plain file names"),
        ("files/0/path", "x" * 200, "is not one of plain file names"),
        ("files/0/object", 5, "the object of tokenizer.json is not a printable text"),
        ("files/0/digest", "A" * 64, "the digest of tokenizer.json is not a BLAKE3 in hex"),
        ("ties", {"a": "nowhere"}, "the tie of a to nowhere leads nowhere"),
        ("ties", {"layers.0.a": "embed.weight"}, "the tie of layers.0.a to embed.weight leads nowhere"),
        ("chunks", "none", "chunks is not a list"),
        ("chunks/0/name", "layers.0", "two chunks have the same name"),
        ("chunks/0/kind", "head", "chunk embed has an unknown kind"),
        ("chunks/0/tensors", [], "chunk embed has no tensors"),
        ("chunks/0/tensors/0/name", "layers.0.a", "two tensors have the same name"),
        ("chunks/0/tensors/0/dtype", "BF15", "has the unknown dtype 'BF15'"),
        ("chunks/0/tensors/0/shape", [1] * 17, "has no usable shape"),
        ("chunks/0/tensors/0/shape", [2, -6], "is -6, expected an integer from 0 to 2^46"),
        ("chunks/0/tensors/0/shape", [True, 12], "is True, expected an integer"),
        ("chunks/0/tensors/0/shape", [1 << 40, 1 << 40], "would have"),
        ("chunks/1/tensors/1/offset", 5, "leave gaps, overlap, or do not add up to 7 bytes"),
        ("chunks/1/tensors/1/offset", 3, "leave gaps, overlap, or do not add up to 7 bytes"),
        ("chunks/1/payload_bytes", 8, "leave gaps, overlap, or do not add up to 8 bytes"),
        ("chunks/0/forms", [], "has no forms, or one twice"),
        ("chunks/0/forms/0/stored_bytes", 25, "the locations of chunk embed do not add up to 25 bytes"),
        ("chunks/0/forms/0/blocks", "", "does not list 1 block digests"),
        ("chunks/0/forms/0/digest", "0" * 64, "the form 'none' of chunk embed is not its payload"),
        ("chunks/0/forms/0/locations/0/stop", 33, "do not add up to 24 bytes"),
        ("order/0/chunks", ["head"], "the execution order names a chunk that is not there"),
        ("order/0/chunks", "embed", "the chunks of module embed is not a list"),
        ("config", [], "config is not an object"),
        ("config/x", float("nan"), "config.x is no number"),
        ("config", DEEP, "is nested more than 64 deep"),
        ("generation_config", 5, "generation_config is not an object"),
    ],
)  # fmt: skip
def test_each_rule_has_its_complaint(path: str, value: Any, complaint: str) -> None:
    document = json.loads(SAMPLE.encode())
    edit(document, path, value)
    with pytest.raises(ManifestError) as caught:
        parse_manifest(json.dumps(document).encode(), where="there")
    assert complaint in str(caught.value)


def test_files_and_forms_are_not_named_twice() -> None:
    document = json.loads(SAMPLE.encode())
    document["files"] *= 2
    with pytest.raises(ManifestError, match="two files have the same path"):
        parse_manifest(json.dumps(document).encode(), where="there")
    document = json.loads(SAMPLE.encode())
    document["chunks"][0]["forms"] = [copy.deepcopy(document["chunks"][0]["forms"][0])] * 2
    with pytest.raises(ManifestError, match="has no forms, or one twice"):
        parse_manifest(json.dumps(document).encode(), where="there")


@pytest.mark.parametrize("name", ["a", "A1", "org/a", "a.b-c_d", "0", "org.x/7b", "x" * 200])
def test_model_names(name: str) -> None:
    assert check_model_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "/", "/a", "a/", "a//b", "a/b/c", "../a", "a/..", "a..b", ".a", "-a", "a b", "a\\b", "a\0", "é", "a\n",
     "x" * 201, "a.json", "a.json/b"],
)  # fmt: skip
def test_names_that_could_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ManifestError, match="cannot be used: expected 'name' or 'org/name'"):
        check_model_name(name)


@given(st.text(max_size=20))
def test_two_models_never_lie_in_each_others_way(name: str) -> None:
    try:
        check_model_name(name)
    except ManifestError:
        return
    assert not name.endswith(".json")
    assert not name.partition("/")[0].endswith(".json")
    assert ".." not in name


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        ("F32", (), 4),
        ("BF16", (3, 5), 30),
        ("U8", (0, 7), 0),
        ("C64", (2,), 16),
        ("BOOL", (9,), 9),
        ("F8_E4M3", (4,), 4),
    ],
)
def test_bytes_of_a_tensor(dtype: str, shape: tuple[int, ...], size: int) -> None:
    assert nbytes(dtype, shape) == size


SIZES = [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES]


@pytest.mark.parametrize("size", SIZES)
def test_blocks_are_digested_one_by_one(size: int) -> None:
    data = bytes(index % 251 for index in range(size % 1000)) + bytes(size - size % 1000)
    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, size, BLOCK_BYTES)]
    expected = b"".join(blake3(block).digest() for block in blocks)
    assert digest_blocks([data]) == (blake3(data).hexdigest(), expected)
    assert digest_blocks(blocks) == (blake3(data).hexdigest(), expected)
    form = Form("none", size, blake3(data).hexdigest(), expected)
    assert [form.block_digest(index) for index in range(len(blocks))] == [blake3(block).digest() for block in blocks]


def test_a_manifest_of_another_version_is_told_apart_from_a_broken_one() -> None:
    with pytest.raises(ManifestError, match="has format version '99'; this surfw reads 1 to 7"):
        parse_manifest(b'{"format": "surfw.manifest", "version": 99}', where="there")
    with pytest.raises(ManifestError, match="the manifest from there is malformed: KeyError 'generation_config'"):
        parse_manifest(b'{"format": "surfw.manifest", "version": 1}', where="there")


def refused(data: bytes) -> bool:
    try:
        parse_stored_manifest(data, where="there")
    except ManifestError:
        return True
    return False


def test_a_stored_manifest_is_its_digest_and_its_json() -> None:
    data = encode_stored_manifest(SAMPLE)
    assert data == f"surfw.manifest blake3 {payload_digest(SAMPLE.encode())}\n".encode() + SAMPLE.encode()
    assert (parse_stored_manifest(data, where="there"), has_digest(data)) == (SAMPLE, True)


def test_no_flipped_bit_of_a_stored_manifest_goes_unnoticed() -> None:
    data = bytearray(encode_stored_manifest(SAMPLE))
    accepted = []
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            if not refused(bytes(data)):
                accepted.append((at, bit))
            data[at] ^= 1 << bit
    assert accepted == []


def test_no_cut_of_a_stored_manifest_is_taken_for_a_whole_one() -> None:
    data = encode_stored_manifest(SAMPLE)
    first_line = data.index(b"\n") + 1
    assert [at for at in range(len(data)) if not refused(data[:at])] == []
    assert [at for at in range(1, len(data)) if not refused(data[at:])] == [first_line]  # the whole JSON


def test_a_manifest_of_the_first_release_has_no_digest_and_is_accepted_whole_only() -> None:
    data = SAMPLE.encode()
    assert (parse_stored_manifest(data, where="there"), has_digest(data)) == (SAMPLE, False)
    assert all(refused(one) for one in (b" " + data, b"\n" + data, data[:-1], data + b"x", data + data, b"", b"{}"))


def test_what_a_damaged_manifest_is_told_of() -> None:
    data = encode_stored_manifest(SAMPLE)
    with pytest.raises(ManifestError) as caught:
        parse_stored_manifest(data.replace(b"bfloat16", b"afloat16"), where="there")
    assert str(caught.value).startswith("the manifest from there is damaged: the digest of its bytes is ")
    assert str(caught.value).endswith(", and its first line has another; chunk the model again")
    for stored, seen in ((b"", "it is empty"), (b"\xff\0", r"it begins with '\ufffd\x00', expected 'surfw.manifest ")):
        with pytest.raises(ManifestError) as caught:
            parse_stored_manifest(stored, where="there")
        assert str(caught.value).startswith(f"the manifest from there is damaged: {seen}")


@given(st.dictionaries(st.text(max_size=5), st.text() | st.integers(), max_size=3), st.data())
def test_a_line_of_a_log_is_read_back_or_refused(document: dict[str, Any], data: st.DataObject) -> None:
    (line,) = encode_line(document).split(b"\n")[1:-1]
    assert decode_line(line) == document
    at, bit = data.draw(st.integers(0, len(line) - 1)), data.draw(st.integers(0, 7))
    damaged = line[:at] + bytes([line[at] ^ 1 << bit]) + line[at + 1 :]
    for other in (damaged, line[:at]):
        with pytest.raises(ValueError, match="the line is not what was written"):
            decode_line(other)


def test_a_number_that_json_has_not_is_refused() -> None:
    data = SAMPLE.encode().replace(b"2.5", b"1e400")
    with pytest.raises(ManifestError, match=r"config\.layers is no number that JSON has"):
        parse_manifest(data, where="there")


@pytest.mark.parametrize("crowd", [b"[]," * 1_000_001, b"0," * 4_000_001])
def test_a_manifest_of_more_values_than_memory_has_room_for_is_not_parsed(crowd: bytes) -> None:
    with pytest.raises(ManifestError, match="not more than 1000000 objects and lists with 4000000 values"):
        parse_manifest(b'{"config":[' + crowd + b"0]}", where="here")


def experts_manifest() -> Manifest:
    """One layer, and two experts of it, each with two slices."""
    path, chunks = "layers.0.experts", []
    for index in range(2):
        payload = bytes([index]) * 12
        slices = (
            TensorInfo(f"{path}.up[{index}]", "U8", (2, 4), 0),
            TensorInfo(f"{path}.down[{index}]", "U8", (4,), 8),
        )
        form = Form("none", 12, payload_digest(payload), blake3(payload).digest(), (Location("a", 0, 12),))
        chunks.append(Chunk(f"{path}[{index}]", "expert", payload_digest(payload), 12, slices, (form,)))
    return replace(SAMPLE, chunks=(*SAMPLE.chunks, *chunks))


def test_experts_are_grouped_by_their_module() -> None:
    manifest = experts_manifest()
    again = parse_manifest(manifest.encode(), where="there")
    assert again == manifest
    assert again.version == 7
    (experts,) = again.experts.values()
    assert experts.path == "layers.0.experts"
    assert [chunk.name for chunk in experts.chunks] == ["layers.0.experts[0]", "layers.0.experts[1]"]
    assert again.weights["layers.0.experts.up"].shape == (2, 2, 4)
    assert again.weights["layers.0.experts.down"].shape == (2, 4)
    assert "layers.0.experts.up[0]" not in again.weights
    assert again.weights["embed.weight"] == again.tensors["embed.weight"]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"name":"layers.0.experts[1]"', '"name":"layers.0.experts[2]"', r"experts\[2\] is not expert 1 of its module"),
        ('"name":"layers.0.experts[0]"', '"name":"layers.0.experts[00]"', r"experts\[00\] is not expert 0"),
        ('"layers.0.experts.up[1]"', '"layers.0.experts.up[0]"', "two tensors have the same name"),
        ('"layers.0.experts.up[1]"', '"layers.0.experts.up[7]"', r"of chunk layers\.0\.experts\[1\] are not slices"),
        ("layers.0.experts.up", "layers.1.experts.up", r"are not of the module layers\.0\.experts"),
        ('"embed.weight"', '"layers.0.experts.up"', "is there twice, whole and in slices"),
        ('"version":7', '"version":4', "has an unknown kind"),
    ],
)  # fmt: skip
def test_experts_that_do_not_belong_together_are_refused(old: str, new: str, complaint: str) -> None:
    document = experts_manifest().encode().decode()
    assert old in document
    with pytest.raises(ManifestError, match=complaint):
        parse_manifest(document.replace(old, new).encode(), where="there")
