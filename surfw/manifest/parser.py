"""Parse manifests: every value is checked before it is used, and sizes are capped before parsing."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from surfw.config import (
    BLOCK_BYTES,
    MANIFEST_BYTES,
    MAX_JSON_DEPTH,
    MAX_JSON_PARTS,
    MAX_JSON_VALUES,
    is_crowded,
    printable,
)
from surfw.errors import ManifestError
from surfw.manifest.digests import count_blocks, is_digest, payload_digest
from surfw.manifest.facts import (
    ADAPTER_VERSION,
    CIPHER,
    CODED_VERSION,
    DTYPE_BITS,
    ENCRYPTED_VERSION,
    EXPERTS_VERSION,
    FORMAT,
    IN_PLACE_VERSION,
    PACKED_VERSION,
    SEAL_BYTES,
    VERSION,
    Base,
    Chunk,
    Form,
    Kind,
    Location,
    Manifest,
    ModelFile,
    Origin,
    Pin,
    TensorInfo,
    Use,
)
from surfw.manifest.parts import fits, packed_bytes, plan_parts
from surfw.manifest.signature import SIGNATURE_BYTES, Signature

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_CODEC = re.compile(r"[a-z0-9_-]{1,40}")
_KEY_ID = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*){0,3}")
_VERSIONS = frozenset(
    {VERSION, IN_PLACE_VERSION, CODED_VERSION, PACKED_VERSION, ENCRYPTED_VERSION, ADAPTER_VERSION, EXPERTS_VERSION}
)
_KINDS = frozenset({"layer", "part", "own"})
_MAX_BYTES = 1 << 46
_MAX_FILES_BYTES = 1 << 29
_MAX_DIMENSIONS = 16
_MAX_SIGNED_FORMS = 16
_MAX_FILE_NAME = 128
_MAX_OBJECT_NAME = 255

# The first bytes of a stored manifest with a digest. One flipped bit can turn the `s` into `{`, the first byte of a
# manifest without a digest; but no JSON begins with `{u`, and truncation keeps the `s`.
_DIGEST_LINE = f"{FORMAT} blake3 "


def check_model_name(name: str) -> str:
    """Check and return a model's name: `name` or `org/name` of letters, digits, `.`, `_` and `-`.

    Raises:
        ManifestError: the name is not valid.
    """
    is_file = any(part.endswith(".json") for part in name.split("/"))  # the path of another model's manifest
    if not _NAME.fullmatch(name) or len(name) > 200 or ".." in name or is_file:
        raise ManifestError(
            f"model name {name[:80]!r} cannot be used: expected 'name' or 'org/name' of letters, digits, "
            "'.', '_' and '-', not ending in .json; choose another with --name"
        )
    return name


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    """Parse a manifest's JSON and check every rule of the format; `where` names its source in errors.

    Raises:
        ManifestError: the bytes are not a manifest, have a version that this surfw does not know, or break a rule.
    """
    if len(data) > MANIFEST_BYTES or is_crowded(data):
        raise ManifestError(
            f"the manifest from {where} has {len(data)} bytes; expected at most {MANIFEST_BYTES}, and not more than "
            f"{MAX_JSON_PARTS} objects and lists with {MAX_JSON_VALUES} values"
        )
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as exc:
        complaint = f"the manifest from {where} is not JSON: {str(exc)[:200]}"
        raise ManifestError(complaint, advice="chunk the model again") from exc
    try:
        return _Parser(where).manifest(document)
    except (KeyError, TypeError, AttributeError, ValueError) as exc:
        raise ManifestError(f"the manifest from {where} is malformed: {type(exc).__name__} {str(exc)[:200]}") from exc


def encode_stored_manifest(manifest: Manifest) -> bytes:
    """Encode a manifest as it is stored: a line with the BLAKE3 of its JSON, then the JSON."""
    document = manifest.encode()
    return f"{_DIGEST_LINE}{payload_digest(document)}\n".encode() + document


def has_digest(data: bytes) -> bool:
    """Whether a stored manifest begins with its digest; those written by surfw 0.1.0 do not."""
    return not data.startswith(b"{")


def parse_stored_manifest(data: bytes, *, where: str) -> Manifest:
    """Parse a stored manifest and verify its digest; `where` names its source in errors.

    A manifest without a digest is accepted if its bytes are exactly one JSON object.

    Raises:
        ManifestError: the bytes are damaged, more than `MANIFEST_BYTES`, or not a manifest; see `parse_manifest`.
    """
    if len(data) > MANIFEST_BYTES:  # including the line with the digest: a store loads no more
        raise ManifestError(f"the manifest from {where} has {len(data)} bytes, expected at most {MANIFEST_BYTES}")
    if not has_digest(data):
        return parse_manifest(data, where=where)
    line, _, document = data.partition(b"\n")
    if line != f"{_DIGEST_LINE}{payload_digest(document)}".encode():
        begin = line[: len(_DIGEST_LINE)].decode("ascii", "replace")
        if not data:
            seen = "it is empty"
        elif begin == _DIGEST_LINE:
            seen = f"the digest of its bytes is {payload_digest(document)}, and its first line has another"
        else:
            seen = f"it begins with {begin!a}, expected {_DIGEST_LINE!a}"
        raise ManifestError(f"the manifest from {where} is damaged: {seen}", advice="chunk the model again")
    return parse_manifest(document, where=where)


class _Parser:
    """Turns a decoded document into a manifest; every `ManifestError` names the source."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.in_place = False  # whether digests may be missing
        self.is_encrypted = False
        self.kinds_known = _KINDS

    def require(self, truth: bool, complaint: str) -> None:
        if not truth:
            raise ManifestError(f"the manifest from {self.where} is not valid: {complaint}")

    def size(self, value: Any, what: str) -> int:
        valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_BYTES
        self.require(valid, f"{what} is {printable(str(value)[:40])}, expected an integer from 0 to 2^46")
        return int(value)

    def text(self, value: Any, what: str) -> str:
        valid = isinstance(value, str) and len(value) <= 4096 and value.isprintable()
        self.require(valid, f"{what} is not a printable text of at most 4096 characters")
        return str(value)

    def items(self, value: Any, what: str) -> list[Any]:
        self.require(isinstance(value, list), f"{what} is not a list")
        return [*value]

    def settings(self, value: Any, what: str, depth: int = 0) -> Any:
        """Check that a configuration can be encoded as JSON again unchanged, and return it."""
        self.require(depth <= MAX_JSON_DEPTH, f"{what} is nested more than {MAX_JSON_DEPTH} deep")
        if isinstance(value, dict):
            for key, inner in value.items():
                self.settings(inner, f"{what}.{self.text(key, 'a key of ' + what)}"[:80], depth + 1)
        elif isinstance(value, list):
            for inner in value:
                self.settings(inner, what, depth + 1)
        elif isinstance(value, str):
            value.encode()  # a lone surrogate is a ValueError
        else:
            is_number = not isinstance(value, float) or math.isfinite(value)  # 1e400 is read as infinity
            self.require(is_number, f"{what} is no number that JSON has")
        return value

    def digest(self, value: Any, what: str) -> str:
        self.require(is_digest(value), f"{what} is not a BLAKE3 in hex")
        return str(value)

    def manifest(self, document: Any) -> Manifest:
        self.require(isinstance(document, dict) and document.get("format") == FORMAT, f"its format is not {FORMAT!r}")
        version = document.get("version")
        if isinstance(version, bool) or version not in _VERSIONS:
            raise ManifestError(
                f"the manifest from {self.where} has format version {str(version)[:40]!r}; this surfw reads "
                f"{VERSION} to {EXPERTS_VERSION}. Chunk the model again, or use the surfw that wrote it"
            )
        self.in_place = version in {IN_PLACE_VERSION, EXPERTS_VERSION}
        self.is_encrypted = version == ENCRYPTED_VERSION or (version == EXPERTS_VERSION and "encryption" in document)
        self.kinds_known = _KINDS | {"expert"} if version == EXPERTS_VERSION else _KINDS
        generation = document["generation_config"]
        self.require(isinstance(document["config"], dict), "config is not an object")
        self.require(generation is None or isinstance(generation, dict), "generation_config is not an object")
        manifest = Manifest(
            name=check_model_name(self.text(document["name"], "name")),
            class_name=self.text(document["class"], "class"),
            dtype=self.text(document["dtype"], "dtype"),
            config=self.settings(document["config"], "config"),
            generation_config=self.settings(generation, "generation_config"),
            files=tuple(self.file(file) for file in self.items(document["files"], "files")),
            ties={self.text(name, "a tie"): self.text(to, "a tie") for name, to in document["ties"].items()},
            chunks=tuple(self.chunk(chunk) for chunk in self.items(document["chunks"], "chunks")),
            order=tuple(self.use(use) for use in self.items(document["order"], "order")),
            origin=self.origin(document["origin"]) if self.in_place and "origin" in document else None,
            key_id=self.key_id(document["encryption"]) if self.is_encrypted else "",
            base=self.base(document["base"]) if version == ADAPTER_VERSION else None,
            signature=self.signature(document["signature"]) if "signature" in document else None,
        )
        self.consistent(manifest)
        return manifest

    def key_id(self, document: Any) -> str:
        cipher, key_id = document["cipher"], document["key"]
        self.require(cipher == CIPHER, f"it is encrypted with {str(cipher)[:40]!a}, expected {CIPHER}")
        known = isinstance(key_id, str) and bool(_KEY_ID.fullmatch(key_id))
        self.require(known, "the name of its key is not 32 hex digits")
        return str(key_id)

    def file(self, document: Any) -> ModelFile:
        path = self.text(document["path"], "a file's path")
        plain = len(path) <= _MAX_FILE_NAME and bool(_FILE.fullmatch(path))
        self.require(plain, f"file path {path[:80]!r} is not one of plain file names")
        size = self.size(document["size"], f"the size of {path}")
        digest = self.digest(document["digest"], f"the digest of {path}")
        return ModelFile(path, size, digest, self.text(document.get("object", ""), f"the object of {path}"))

    def use(self, document: Any) -> Use:
        module = self.text(document["module"], "a module")
        chunks = self.items(document["chunks"], f"the chunks of module {module}")
        return Use(module, tuple(self.text(name, "a chunk name") for name in chunks))

    def chunk(self, document: Any) -> Chunk:
        name = self.text(document["name"], "a chunk's name")
        self.require(document["kind"] in self.kinds_known, f"chunk {name} has an unknown kind")
        size = self.size(document["payload_bytes"], f"payload_bytes of chunk {name}")
        tensors = tuple(self.tensor(tensor, name) for tensor in self.items(document["tensors"], f"tensors of {name}"))
        self.require(bool(tensors), f"chunk {name} has no tensors")
        ends = [*(tensor.offset for tensor in tensors), size]
        gapless = ends[0] == 0 and all(
            tensor.offset + tensor.nbytes == end for tensor, end in zip(tensors, ends[1:], strict=True)
        )
        self.require(gapless, f"the tensors of chunk {name} leave gaps, overlap, or do not add up to {size} bytes")
        forms = tuple(
            self.form(form, name, size, tensors) for form in self.items(document["forms"], f"forms of {name}")
        )
        chunk = Chunk(name, document["kind"], self.digest(document["id"], f"the id of {name}"), size, tensors, forms)
        codecs = [form.codec for form in forms]
        self.require(bool(forms) and len(set(codecs)) == len(codecs), f"chunk {name} has no forms, or one twice")
        known = all(form.is_known for form in forms) or codecs == ["none"]
        self.require(known, f"chunk {name} lacks digests, and is stored in another form than 'none'")
        plain = chunk.form("none")
        is_payload = self.is_encrypted or plain is None or plain.digest in {chunk.id, ""}
        same = plain is None or (plain.stored_bytes == size and is_payload)
        self.require(same, f"the form 'none' of chunk {name} is not its payload")
        return chunk

    def tensor(self, document: Any, chunk: str) -> TensorInfo:
        name, dtype, shape = document["name"], document["dtype"], document["shape"]
        self.text(name, f"a tensor of chunk {chunk}")
        self.require(dtype in DTYPE_BITS, f"tensor {name[:200]} has the unknown dtype {str(dtype)[:40]!r}")
        self.require(isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS, f"tensor {name} has no usable shape")
        sizes = tuple(self.size(size, f"a dimension of {name}") for size in shape)
        tensor = TensorInfo(name, dtype, sizes, self.size(document["offset"], f"the offset of {name}"))
        self.require(tensor.nbytes <= _MAX_BYTES, f"tensor {name} would have {tensor.nbytes} bytes")
        return tensor

    def form(self, document: Any, chunk: str, payload_bytes: int, tensors: Sequence[TensorInfo]) -> Form:
        codec = self.text(document["codec"], f"a codec of chunk {chunk}")
        size = self.size(document["stored_bytes"], f"stored_bytes of chunk {chunk}")
        frames = self.frames(document.get("frames", []), chunk, payload_bytes, size) if codec == "lossless" else ()
        kinds = self.kinds(document["kinds"], chunk, tensors, size) if codec in {"int8", "int4"} else ()
        digest, blocks = "", b""
        if not self.in_place or "digest" in document:
            digest = self.digest(document["digest"], f"the digest of {chunk}")
            blocks = bytes.fromhex(document["blocks"])
            expected = count_blocks(size)
            self.require(len(blocks) == 32 * expected, f"chunk {chunk} does not list {expected} block digests")
        locations = tuple(
            Location(
                self.text(at["object"], "an object"), self.size(at["start"], "start"), self.size(at["stop"], "stop")
            )
            for at in self.items(document.get("locations", []), f"locations of {chunk}")
        )
        if locations:
            covered = sum(at.stop - at.start for at in locations)
            forward = all(at.start <= at.stop for at in locations)
            self.require(forward and covered == size, f"the locations of chunk {chunk} do not add up to {size} bytes")
        seals = bytes.fromhex(document.get("seals", "")) if self.is_encrypted else b""
        expected = SEAL_BYTES * count_blocks(size) if self.is_encrypted else 0
        self.require(len(seals) == expected, f"chunk {chunk} has {len(seals)} bytes of seals, expected {expected}")
        return Form(codec, size, digest, blocks, locations, frames, kinds, seals)

    def frames(self, document: Any, chunk: str, payload_bytes: int, stored_bytes: int) -> tuple[int, ...]:
        """Return the sizes of a chunk's frames: one per MiB of payload, none longer than the bytes it encodes."""
        sizes = [self.size(size, f"a frame of chunk {chunk}") for size in self.items(document, f"frames of {chunk}")]
        starts = range(0, payload_bytes, BLOCK_BYTES)
        fitting = len(sizes) == len(starts) and all(
            0 < size <= min(BLOCK_BYTES, payload_bytes - start) for size, start in zip(sizes, starts, strict=True)
        )
        self.require(fitting, f"the frames of chunk {chunk} are not one for each MiB of its payload, none longer")
        self.require(sum(sizes) == stored_bytes, f"the frames of chunk {chunk} do not add up to {stored_bytes} bytes")
        return tuple(sizes)

    def kinds(self, document: Any, chunk: str, tensors: Sequence[TensorInfo], stored_bytes: int) -> tuple[Kind, ...]:
        """Return how a packed form holds each tensor, and check that its stored size matches."""
        kinds = self.items(document, f"kinds of {chunk}")
        known = len(kinds) == len(tensors) and all(kind in get_args(Kind) for kind in kinds)
        self.require(known, f"the kinds of chunk {chunk} are not raw, int8 or int4 for each tensor")
        self.require(set(kinds) != {"raw"}, f"a form of chunk {chunk} has no quantised tensor")
        for tensor, kind in zip(tensors, kinds, strict=True):
            self.require(fits(tensor, kind), f"tensor {tensor.name} cannot be {kind}")
        size = packed_bytes(plan_parts(tensors, kinds))
        self.require(size == stored_bytes, f"the parts of chunk {chunk} add up to {size} bytes, not {stored_bytes}")
        return tuple(kinds)

    def base(self, document: Any) -> Base:
        name = check_model_name(self.text(document["name"], "the name of its base"))
        return Base(name, self.digest(document["key"], "the key of its base"))

    def signature(self, document: Any) -> Signature:
        key_id, value, forms = document["key"], bytes.fromhex(document["value"]), document["forms"]
        self.require(isinstance(key_id, str) and bool(_KEY_ID.fullmatch(key_id)), "its signature names no key")
        self.require(len(value) == SIGNATURE_BYTES, f"its signature has {len(value)} bytes, not {SIGNATURE_BYTES}")
        self.require(len(forms) <= _MAX_SIGNED_FORMS, f"its signature speaks of {len(forms)} forms")
        signed = {}
        for codec, digest in forms.items():
            self.require(bool(_CODEC.fullmatch(codec)), f"its signature speaks of a form {codec[:40]!a}")
            signed[codec] = self.digest(digest, f"what its signature says of {codec}")
        return Signature(key_id, signed, value)

    def origin(self, document: Any) -> Origin:
        self.require(isinstance(document["objects"], dict), "the objects of its origin are no object")
        pins = {}
        for name, pin in document["objects"].items():
            plain = len(name) <= _MAX_OBJECT_NAME and bool(_FILE.fullmatch(name))
            self.require(plain, f"object {name[:80]!a} of its origin is not one of plain file names")
            revision = self.text(pin["revision"], f"the revision of {name}")
            pins[name] = Pin(self.size(pin["size"], f"the size of {name}"), revision)
        return Origin(self.text(document["url"], "the URL of its origin"), pins)

    def within_origin(self, manifest: Manifest, pins: Mapping[str, Pin]) -> None:
        ends = [(at.object, at.stop) for chunk in manifest.chunks for form in chunk.forms for at in form.locations]
        for name, stop in [*ends, *((file.object, file.size) for file in manifest.files)]:
            inside = name in pins and stop <= pins[name].size
            self.require(inside, f"bytes before {stop} of {name[:80]!a} do not lie in its origin")

    def consistent(self, manifest: Manifest) -> None:
        if manifest.origin is not None:
            self.within_origin(manifest, manifest.origin.pins)
        together = sum(file.size for file in manifest.files)
        self.require(together <= _MAX_FILES_BYTES, f"its tokenizer files have {together} bytes")
        chunks = self.unique([chunk.name for chunk in manifest.chunks], "two chunks have the same name")
        tensors = [tensor.name for chunk in manifest.chunks for tensor in chunk.tensors]
        known = self.unique(tensors, "two tensors have the same name")
        self.unique([file.path for file in manifest.files], "two files have the same path")
        stacks = {name for experts in manifest.experts.values() for name in experts.stacks}
        self.require(stacks.isdisjoint(known), "a stack of experts is there twice, whole and in slices")
        for name, to in manifest.ties.items():
            self.require(to in known and name not in known, f"the tie of {name} to {to} leads nowhere")
        used = {name for use in manifest.order for name in use.chunks}
        self.require(used <= chunks, "the execution order names a chunk that is not there")

    def unique(self, names: list[str], complaint: str) -> set[str]:
        self.require(len(set(names)) == len(names), complaint)
        return set(names)
