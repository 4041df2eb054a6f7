"""The values in a manifest: tensors, chunks and their forms, files, ties, and the execution order."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from surfw.errors import NotFoundError
from surfw.manifest.digests import Digests, payload_digest
from surfw.manifest.experts import Experts, group_experts
from surfw.manifest.signature import Signature

FORMAT = "surfw.manifest"
VERSION = 1
IN_PLACE_VERSION = 2
"""The version of manifests with an origin, or with chunks whose digests are not known yet."""

CODED_VERSION = 3
"""The version of manifests with chunks in other forms than `none`."""

PACKED_VERSION = 4
"""The version of manifests with chunks in the forms `int8` and `int4`."""

CIPHER = "AES-256-GCM"

ENCRYPTED_VERSION = 5
"""The version of manifests of models whose stored bytes are encrypted."""

SEAL_BYTES = 48
"""Bytes stored per encrypted block for decryption: 32 to derive its key, and a tag of 16."""

ADAPTER_VERSION = 6
"""The version of manifests of adapters."""

EXPERTS_VERSION = 7
"""The version of manifests with a chunk per expert of a mixture; they may also be in place, coded or encrypted."""

Kind = Literal["raw", "int8", "int4"]
"""How a packed form holds a tensor: as in the payload, or quantised."""

Reason = Literal["vectors", "small", "shapes", "dtypes", "others"]
"""Why a tensor is not quantised: it is not a matrix; it has few weights; no kernel supports its shape; its dtype is not
float32, float16 or bfloat16; or its module is not quantised."""

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "C64": 64, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
"""Bits per element of each supported dtype, by its safetensors name."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a chunk: its full name, safetensors dtype, shape, and byte offset in the chunk's payload."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the payload."""
        return nbytes(self.dtype, self.shape)


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of this safetensors dtype and shape."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


@dataclass(frozen=True, slots=True)
class Location:
    """A byte range (end-exclusive) of a stored object."""

    object: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Form:
    """One way to store a chunk's bytes.

    Attributes:
        codec: how stored bytes become payload bytes; `none` means they are the same. See `surfw.codec`.
        stored_bytes: length of the stored bytes.
        digest: BLAKE3 of the stored bytes, hex; empty until all of them have been read (see `is_known`).
        blocks: BLAKE3 of each block of 1 MiB of the stored bytes (the last may be shorter), raw digests joined.
        locations: byte ranges of the stored bytes, in order; empty once a manifest has crossed the wire.
        frames: stored length of each frame; a frame encodes 1 MiB of the payload independently. Only for `lossless`.
        kinds: how each of the chunk's tensors is held; only for the packed forms, `int8` and `int4`.
        seals: for an encrypted form, `SEAL_BYTES` per block, joined; see `surfw.encryption`. Ciphertext has the length
            of its plaintext and takes its place.
    """

    codec: str
    stored_bytes: int
    digest: str
    blocks: bytes = field(repr=False)
    locations: tuple[Location, ...] = ()
    frames: tuple[int, ...] = field(default=(), repr=False)
    kinds: tuple[Kind, ...] = field(default=(), repr=False)
    seals: bytes = field(default=b"", repr=False)

    @property
    def is_packed(self) -> bool:
        """Whether it holds quantised weights, which are not exact and stay packed in memory."""
        return bool(self.kinds)

    @property
    def is_known(self) -> bool:
        """Whether it has digests; without them, its bytes cannot be verified."""
        return bool(self.digest)

    def block_digest(self, index: int) -> bytes:
        """Return the digest of block `index`."""
        return self.blocks[32 * index : 32 * index + 32]

    def seal(self, index: int) -> bytes:
        """Return the seal of block `index`, which is needed with the key to decrypt it."""
        return self.seals[SEAL_BYTES * index : SEAL_BYTES * (index + 1)]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The unit of storing, serving and residency: the tensors of one executed module.

    Attributes:
        name: path of the module that owns the tensors, such as `model.layers.3`; `path.*` for tensors that a containing
            module owns directly.
        kind: `layer` for an item of a repeated block, `part` for embeddings, norms and heads, `own` for `path.*`,
            `expert` for one expert of a mixture, named `path[index]`: see `surfw.manifest.experts`.
        id: BLAKE3 of the payload, hex; until the payload has been read, of its location (see `Origin.provisional_id`).
            In an encrypted model, the hash is keyed, so that it does not identify the payload.
        payload_bytes: length of the payload.
        tensors: in payload order, without gaps.
        forms: at least one.
    """

    name: str
    kind: str
    id: str
    payload_bytes: int
    tensors: tuple[TensorInfo, ...]
    forms: tuple[Form, ...]

    def form(self, codec: str) -> Form | None:
        """Return the form with this codec, or None."""
        return next((form for form in self.forms if form.codec == codec), None)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A tokenizer file (or chat template) that belongs to the model: its name, size and digest, stored as a blob."""

    path: str
    size: int
    digest: str
    object: str = ""


@dataclass(frozen=True, slots=True)
class Use:
    """One step of the execution order: the module that runs and the names of the chunks it needs."""

    module: str
    chunks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pin:
    """Identifies one version of an object of an origin: its size, and its revision as reported by the storage."""

    size: int
    revision: str


@dataclass(frozen=True)
class Origin:
    """A storage whose objects hold the chunks of a model that was not copied.

    Attributes:
        url: a folder, or a storage URL without secrets.
        pins: the size and revision of each object that is used, by its name in the origin.
    """

    url: str
    pins: Mapping[str, Pin]

    @cached_property
    def key(self) -> str:
        """BLAKE3 of the URL and the pins; it changes whenever an object does."""
        return payload_digest(json.dumps(_origin_document(self), sort_keys=True).encode())

    def provisional_id(self, locations: Sequence[Location]) -> str:
        """Return the id of a chunk whose payload has not been read: BLAKE3 of the origin's key and the byte ranges."""
        ranges = [[at.object, at.start, at.stop] for at in locations]
        return payload_digest(json.dumps([self.key, ranges]).encode())


@dataclass(frozen=True, slots=True)
class Base:
    """The model that an adapter changes.

    Attributes:
        name: its name in the adapter's store.
        key: its `Manifest.weights_key`; the adapter fits only these weights.
    """

    name: str
    key: str


@dataclass(frozen=True)
class Manifest:
    """Everything about a chunked model or adapter except its weights.

    Attributes:
        name: the model's name in its store.
        class_name: the class to build, such as `LlamaForCausalLM`.
        dtype: the dtype the model is built with, such as `bfloat16`.
        config: the model's configuration, as in `config.json`; for an adapter, its LoRA settings.
        generation_config: as in `generation_config.json`, if there is one.
        files: tokenizer files.
        ties: tied tensors: maps each name to the name of the stored tensor.
        chunks: in the order of the model's modules.
        order: the execution order, as far as the model's structure defines it. Experts are not listed, since a router
            selects them.
        origin: the storage that holds all locations and files, if it is not the manifest's own.
        key_id: the id of the key that encrypts the stored bytes of all chunks; empty if they are not encrypted.
        base: for an adapter, the model that it changes. The adapter has the class of its base, and its chunks are named
            like the base chunks that they change.
        signature: the signature, if there is one; it has not been verified.
    """

    name: str
    class_name: str
    dtype: str
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    files: tuple[ModelFile, ...]
    ties: Mapping[str, str]
    chunks: tuple[Chunk, ...]
    order: tuple[Use, ...]
    origin: Origin | None = None
    key_id: str = ""
    base: Base | None = None
    signature: Signature | None = None

    @cached_property
    def by_name(self) -> dict[str, Chunk]:
        """The chunks by name."""
        return {chunk.name: chunk for chunk in self.chunks}

    @cached_property
    def by_id(self) -> dict[str, Chunk]:
        """The chunks by id; one of several with equal payloads."""
        return {chunk.id: chunk for chunk in self.chunks}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors of all chunks by name."""
        return {tensor.name: tensor for chunk in self.chunks for tensor in chunk.tensors}

    @cached_property
    def experts(self) -> dict[str, Experts]:
        """The experts with their own chunks, by the path of the module that holds them.

        Raises:
            ValueError: the chunks and tensors of experts are inconsistent.
        """
        return group_experts(self.chunks)

    @cached_property
    def weights(self) -> dict[str, TensorInfo]:
        """The tensors as the model has them, by name: like `tensors`, but with stacks in place of their slices."""
        whole = {tensor.name: tensor for chunk in self.chunks if chunk.kind != "expert" for tensor in chunk.tensors}
        return whole | {name: stack for experts in self.experts.values() for name, stack in experts.stacks.items()}

    @cached_property
    def home(self) -> dict[str, Chunk]:
        """The chunk of each tensor, by the tensor's name."""
        return {tensor.name: chunk for chunk in self.chunks for tensor in chunk.tensors}

    @property
    def payload_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(chunk.payload_bytes for chunk in self.chunks)

    @property
    def layer_count(self) -> int:
        """How many chunks are layers."""
        return sum(chunk.kind == "layer" for chunk in self.chunks)

    @cached_property
    def digest(self) -> str:
        """BLAKE3 of the manifest without its locations: the same for every copy of a chunked model."""
        return payload_digest(self.public().encode())

    @cached_property
    def weights_key(self) -> str:
        """BLAKE3 of the names and ids of all chunks: it identifies the weights, however they are stored."""
        return payload_digest(json.dumps([[chunk.name, chunk.id] for chunk in self.chunks]).encode())

    @cached_property
    def identity(self) -> str:
        """BLAKE3 of the model's configuration, files and payloads, independent of its name, forms and locations.

        Chunks that lack digests count with their provisional ids: see `is_known`.
        """
        document = json.loads(self.encode())
        for chunk in document["chunks"]:
            del chunk["forms"]
        for file in document["files"]:
            file.pop("object", None)
        for name in ("format", "version", "name", "origin", "signature"):
            document.pop(name, None)
        return payload_digest(_encode(document))

    @cached_property
    def form_digests(self) -> dict[str, str]:
        """For each codec, BLAKE3 of everything that verifies the bytes of its forms, independent of their locations.

        `identity` covers whole payloads, but a reader of part of one verifies it by block digests, which only the
        manifest has. `lossless` is left out unless it is encrypted: its decoded bytes are verified against the
        payload's id.
        """
        found: dict[str, list[Any]] = {}
        for chunk in self.public().chunks:
            for form in chunk.forms:
                if form.codec != "lossless" or self.key_id:
                    found.setdefault(form.codec, []).append([chunk.name, _form_document(form)])
        return {codec: payload_digest(_encode(forms)) for codec, forms in sorted(found.items())}

    @property
    def is_covered(self) -> bool:
        """Whether the signature, if it is valid, covers all forms."""
        return self.signature is not None and self.form_digests.items() <= self.signature.forms.items()

    def with_signature_of(self, other: "Manifest") -> "Manifest":
        """Return the manifest with another's signature if that covers this model and its forms, else with none."""
        signed = replace(self, signature=other.signature)
        return signed if signed.is_covered and self.identity == other.identity else replace(self, signature=None)

    def file(self, path: str) -> ModelFile:
        """Return the file with this path.

        Raises:
            NotFoundError: the model has no such file.
        """
        for file in self.files:
            if file.path == path:
                return file
        raise NotFoundError(f"{self.name} has no file {path[:80]!r}")

    def public(self) -> "Manifest":
        """Return the manifest as it may cross the wire: without origin, locations and object names."""
        chunks = tuple(
            replace(chunk, forms=tuple(replace(form, locations=()) for form in chunk.forms)) for chunk in self.chunks
        )
        files = tuple(replace(file, object="") for file in self.files)
        return replace(self, chunks=chunks, files=files, origin=None)

    @property
    def version(self) -> int:
        """The format version that the manifest requires."""
        if self.base is not None:
            return ADAPTER_VERSION
        if any(chunk.kind == "expert" for chunk in self.chunks):
            return EXPERTS_VERSION
        if self.key_id:
            return ENCRYPTED_VERSION
        forms = [form for chunk in self.chunks for form in chunk.forms]
        if any(form.is_packed for form in forms):
            return PACKED_VERSION
        if any(form.codec != "none" for form in forms):
            return CODED_VERSION
        return VERSION if self.origin is None and self.is_known else IN_PLACE_VERSION

    @property
    def is_known(self) -> bool:
        """Whether all chunks have digests."""
        return all(form.is_known for chunk in self.chunks for form in chunk.forms)

    def with_digests(self, known: Mapping[str, Digests]) -> "Manifest":
        """Return the manifest with missing digests filled in, by provisional chunk id; chunks get real ids."""
        return replace(self, chunks=tuple(with_digests(chunk, known.get(chunk.id)) for chunk in self.chunks))

    def encode(self) -> bytes:
        """Encode the manifest as JSON; equal manifests give equal bytes."""
        document: dict[str, Any] = {
            "format": FORMAT,
            "version": self.version,
            "name": self.name,
            "class": self.class_name,
            "dtype": self.dtype,
            "config": self.config,
            "generation_config": self.generation_config,
            "files": [
                {"path": file.path, "size": file.size, "digest": file.digest}
                | ({"object": file.object} if file.object else {})
                for file in self.files
            ],
            "ties": self.ties,
            "chunks": [_chunk_document(chunk) for chunk in self.chunks],
            "order": [{"module": use.module, "chunks": list(use.chunks)} for use in self.order],
        }
        document |= {"origin": _origin_document(self.origin)} if self.origin else {}
        document |= {"encryption": {"cipher": CIPHER, "key": self.key_id}} if self.key_id else {}
        document |= {"base": {"name": self.base.name, "key": self.base.key}} if self.base else {}
        document |= {"signature": _signature_document(self.signature)} if self.signature else {}
        return _encode(document)


def with_digests(chunk: Chunk, digests: Digests | None) -> Chunk:
    """Return the chunk with the digests of its only form filled in, if it lacks them and they are given."""
    if digests is None or all(form.is_known for form in chunk.forms):
        return chunk
    (form,) = chunk.forms
    return replace(chunk, id=digests.digest, forms=(replace(form, digest=digests.digest, blocks=digests.blocks),))


def _encode(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _signature_document(signature: Signature) -> dict[str, Any]:
    return {"key": signature.key_id, "forms": dict(signature.forms), "value": signature.value.hex()}


def _origin_document(origin: Origin) -> dict[str, Any]:
    pins = {name: {"size": pin.size, "revision": pin.revision} for name, pin in origin.pins.items()}
    return {"url": origin.url, "objects": pins}


def _chunk_document(chunk: Chunk) -> dict[str, Any]:
    return {
        "name": chunk.name,
        "kind": chunk.kind,
        "id": chunk.id,
        "payload_bytes": chunk.payload_bytes,
        "tensors": [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "offset": t.offset} for t in chunk.tensors
        ],
        "forms": [_form_document(form) for form in chunk.forms],
    }


def _form_document(form: Form) -> dict[str, Any]:
    places = [{"object": at.object, "start": at.start, "stop": at.stop} for at in form.locations]
    return (
        {"codec": form.codec, "stored_bytes": form.stored_bytes}
        | ({"digest": form.digest, "blocks": form.blocks.hex()} if form.is_known else {})
        | ({"frames": list(form.frames)} if form.frames else {})
        | ({"kinds": list(form.kinds)} if form.kinds else {})
        | ({"seals": form.seals.hex()} if form.seals else {})
        | ({"locations": places} if places else {})
    )
