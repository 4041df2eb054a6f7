"""What a manifest holds, as values: tensors, chunks and their forms, files, ties, and the execution order."""

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
"""What an encrypted block needs beside it to be decrypted: 32 bytes that its key comes from, and 16 of a tag."""

ADAPTER_VERSION = 6
"""The version of manifests of adapters."""

EXPERTS_VERSION = 7
"""The version of manifests with a chunk for each expert of a mixture; it may have all that the others have."""

Kind = Literal["raw", "int8", "int4"]
"""How a packed form holds a tensor: as in the payload, or quantised."""

Reason = Literal["vectors", "small", "shapes", "dtypes", "others"]
"""Why a tensor is not quantised: it is no matrix; or one that has few weights, a shape that no kernel takes, or another
dtype than float32, float16 and bfloat16; or it belongs to a module that is not quantised."""

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "C64": 64, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
"""Bits of the element types a tensor may have, under their safetensors names."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a chunk: its full name, safetensors dtype, shape, and byte offset in the chunk's payload."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's payload."""
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
    """One way in which a chunk's bytes are stored.

    Attributes:
        codec: how stored bytes become payload bytes; `none` means they are the same. See `surfw.codec`.
        stored_bytes: length of the stored bytes.
        digest: BLAKE3 of the stored bytes, hex; empty until all of them have been read (see `is_known`).
        blocks: BLAKE3 of each block of 1 MiB of the stored bytes (the last may be shorter), raw digests joined.
        locations: where the stored bytes lie, in order; empty once a manifest has crossed the wire.
        frames: the stored bytes of each frame, a part of 1 MiB of the payload that is coded alone; only of `lossless`.
        kinds: how each of the chunk's tensors is held; only of packed forms, `int8` and `int4`.
        seals: of an encrypted form, `SEAL_BYTES` for each block, joined; see `surfw.encryption`. Encrypted bytes are as
            long as what they hide, and lie where that would.
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
        """Whether it holds quantised weights: it is not exact, and stays as it is in memory."""
        return bool(self.kinds)

    @property
    def is_known(self) -> bool:
        """Whether it has digests; without them, its bytes cannot be verified."""
        return bool(self.digest)

    def block_digest(self, index: int) -> bytes:
        """The digest of block `index`."""
        return self.blocks[32 * index : 32 * index + 32]

    def seal(self, index: int) -> bytes:
        """What decrypts block `index`, with the key."""
        return self.seals[SEAL_BYTES * index : SEAL_BYTES * (index + 1)]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The unit that is stored, served and kept resident: the tensors of one executed module.

    Attributes:
        name: path of the module whose tensors these are, such as `model.layers.3`; `path.*` for the tensors that a
            containing module holds directly.
        kind: `layer` for an item of a repeated block, `part` for embeddings, norms and heads, `own` for `path.*`,
            `expert` for one expert of a mixture, which is named `path[index]`: see `surfw.manifest.experts`.
        id: BLAKE3 of the payload, hex; until that has been read, of where it lies (see `Origin.provisional_id`). Where
            the model is encrypted, it is keyed, so that it does not tell which payload it is of.
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
        """The form of that codec, if there is one."""
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
    """What identifies an object of an origin: its size, and its revision as its storage calls it."""

    size: int
    revision: str


@dataclass(frozen=True)
class Origin:
    """A storage whose objects are the chunks of a model that was not copied.

    Attributes:
        url: its address: a folder, or a storage URL without secrets.
        pins: the size and revision of each object that is used, by its name in the origin.
    """

    url: str
    pins: Mapping[str, Pin]

    @cached_property
    def key(self) -> str:
        """BLAKE3 of all of it; it changes whenever an object does."""
        return payload_digest(json.dumps(_origin_document(self), sort_keys=True).encode())

    def provisional_id(self, locations: Sequence[Location]) -> str:
        """The id of a chunk whose payload has not been read: BLAKE3 of the origin's key and the byte ranges."""
        ranges = [[at.object, at.start, at.stop] for at in locations]
        return payload_digest(json.dumps([self.key, ranges]).encode())


@dataclass(frozen=True, slots=True)
class Base:
    """The model that an adapter changes.

    Attributes:
        name: its name in the adapter's store.
        key: its `Manifest.weights_key`: the adapter belongs to these very weights.
    """

    name: str
    key: str


@dataclass(frozen=True)
class Manifest:
    """Everything about a chunked model, or an adapter, but its weights.

    Attributes:
        name: the model's name in its store.
        class_name: the class to build, such as `LlamaForCausalLM`.
        dtype: the dtype the model is built with, such as `bfloat16`.
        config: the model's configuration, as in `config.json`; of an adapter, what `adapter_config.json` says of it.
        generation_config: as in `generation_config.json`, if there is one.
        files: tokenizer files.
        ties: tensors that are the same as another one: their names to its name.
        chunks: in the order of the model's modules.
        order: the execution order, as far as the model's structure tells it. It does not name experts, of which a
            router decides.
        origin: the storage of all locations and files, if it is not the manifest's own.
        key_id: which key the stored bytes of all chunks are encrypted with; empty where they are not.
        base: of an adapter, the model that it changes: its class is that one's, and its chunks have the names of those
            that they change.
        signature: whose it is, if somebody says so; nothing here has checked it.
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
        """The chunks by their name."""
        return {chunk.name: chunk for chunk in self.chunks}

    @cached_property
    def by_id(self) -> dict[str, Chunk]:
        """The chunks by their identity; of chunks with equal payloads, one."""
        return {chunk.id: chunk for chunk in self.chunks}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors of all chunks by their name."""
        return {tensor.name: tensor for chunk in self.chunks for tensor in chunk.tensors}

    @cached_property
    def experts(self) -> dict[str, Experts]:
        """The experts that have chunks of their own, by the path of the module that holds them.

        Raises:
            ValueError: chunks and tensors of experts do not belong together.
        """
        return group_experts(self.chunks)

    @cached_property
    def weights(self) -> dict[str, TensorInfo]:
        """The tensors as the model has them, by their name: as `tensors`, with stacks in place of their slices."""
        whole = {tensor.name: tensor for chunk in self.chunks if chunk.kind != "expert" for tensor in chunk.tensors}
        return whole | {name: stack for experts in self.experts.values() for name, stack in experts.stacks.items()}

    @cached_property
    def home(self) -> dict[str, Chunk]:
        """The chunks by the names of their tensors."""
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
        """BLAKE3 of the names and identities of all chunks: of the same weights, however they are stored."""
        return payload_digest(json.dumps([[chunk.name, chunk.id] for chunk in self.chunks]).encode())

    @cached_property
    def identity(self) -> str:
        """BLAKE3 of what the model is: configuration, files and payloads, whatever its name, forms and locations are.

        Chunks that lack digests are named provisionally: see `is_known`.
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
        """By codec, BLAKE3 of all that proves the bytes of its forms, wherever they lie.

        The identity names payloads, and whoever reads a part of one compares it with digests of blocks, which only a
        manifest has. `lossless` is left out where it is not encrypted: what it decodes to is compared with the
        payload's identity.
        """
        found: dict[str, list[Any]] = {}
        for chunk in self.public().chunks:
            for form in chunk.forms:
                if form.codec != "lossless" or self.key_id:
                    found.setdefault(form.codec, []).append([chunk.name, _form_document(form)])
        return {codec: payload_digest(_encode(forms)) for codec, forms in sorted(found.items())}

    @property
    def is_covered(self) -> bool:
        """Whether the signature, if it is right, speaks of all forms that are there."""
        return self.signature is not None and self.form_digests.items() <= self.signature.forms.items()

    def with_signature_of(self, other: "Manifest") -> "Manifest":
        """The manifest with another one's signature, where that is of the same model in these forms; else with none."""
        signed = replace(self, signature=other.signature)
        return signed if signed.is_covered and self.identity == other.identity else replace(self, signature=None)

    def file(self, path: str) -> ModelFile:
        """The file of that name.

        Raises:
            NotFoundError: the model has no such file.
        """
        for file in self.files:
            if file.path == path:
                return file
        raise NotFoundError(f"{self.name} has no file {path[:80]!r}")

    def public(self) -> "Manifest":
        """The manifest as it may cross the wire: without origin, locations and object names."""
        chunks = tuple(
            replace(chunk, forms=tuple(replace(form, locations=()) for form in chunk.forms)) for chunk in self.chunks
        )
        files = tuple(replace(file, object="") for file in self.files)
        return replace(self, chunks=chunks, files=files, origin=None)

    @property
    def version(self) -> int:
        """The version of the format that it needs."""
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
        """The manifest with missing digests filled in, by the provisional ids of chunks, which get their real ids."""
        return replace(self, chunks=tuple(with_digests(chunk, known.get(chunk.id)) for chunk in self.chunks))

    def encode(self) -> bytes:
        """The manifest as JSON, the same bytes for equal manifests."""
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
    """The chunk with the digests of its one form filled in, if it lacks them and they are given."""
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
