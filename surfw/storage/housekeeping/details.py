"""The details of a model in a store, without reading weights."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from surfw.codec import form_bytes
from surfw.storage.backends import open_backend
from surfw.storage.expert_usage import read_usage
from surfw.storage.housekeeping import StoredModel, summarise
from surfw.storage.housekeeping.prune import survey
from surfw.storage.origins import PlacedOptions
from surfw.storage.store import Store, objects_of


@dataclass(frozen=True, kw_only=True)
class StoredChunk:
    """A chunk of a stored model: name, kind (see `Chunk`), number of tensors and payload size."""

    name: str
    kind: str
    tensors: int
    payload_bytes: int


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file that belongs to a stored model, such as a tokenizer's."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class UsedExperts:
    """How the experts of a mixture were used.

    Attributes:
        tokens: the approximate number of tokens computed.
        quarter_share: the share of all choices that fell on the most-chosen quarter of the experts.
    """

    tokens: int
    quarter_share: float


@dataclass(frozen=True, kw_only=True)
class ModelDetails(StoredModel):
    """A model in a store, with its parts.

    Attributes:
        store: the address of the store.
        digest: BLAKE3 of its manifest: equal for equal models.
        identity: BLAKE3 of its configuration, files and payloads, to which it can be pinned; None if digests of its
            weights are unknown.
        form_bytes: the stored bytes by codec.
        key_id: the id of the key that encrypts its forms; None if they are not encrypted.
        signed_by: the id of the key in its signature, which is not verified here; None if it is not signed.
        files: its tokenizer files.
        parts: its chunks, in module order.
        experts: how its experts were used so far on this machine; None if it has none, or no usage is known.
    """

    store: str
    digest: str
    identity: str | None
    form_bytes: Mapping[str, int]
    key_id: str | None
    signed_by: str | None
    files: tuple[StoredFile, ...]
    parts: tuple[StoredChunk, ...]
    experts: UsedExperts | None = None


async def describe_model(url: str, model: str, *, storage_options: Mapping[str, Any] | None = None) -> ModelDetails:
    """Describe a model.

    Args:
        url: the folder or storage URL of the store.
        model: its name, in full or a unique last part.
        storage_options: options for the storage.

    Raises:
        UnknownModelError: no model or several models match.
        ManifestError: its manifest is not valid.
        StorageError: the store cannot be read.
    """
    backend = open_backend(url, storage_options)
    store = Store(backend, PlacedOptions(backend.url, storage_options or {}))
    try:
        await store.check()
        name = await store.resolve(model)
        manifest = await store.facts(name)
        others = [one for one in (await survey(store)).manifests if one.name != name]
    finally:
        await store.close(owned=True)
    usage = await asyncio.to_thread(read_usage, manifest) if manifest.experts else None
    uses = Counter(key for one in (manifest, *others) for key in objects_of(one))
    return ModelDetails(
        **asdict(summarise(manifest, objects_of(manifest), uses)),
        store=store.url,
        digest=manifest.digest,
        identity=manifest.identity if manifest.is_known else None,
        form_bytes=form_bytes(manifest),
        key_id=manifest.key_id or None,
        signed_by=manifest.signature.key_id if manifest.signature else None,
        files=tuple(StoredFile(name=file.path, bytes=file.size) for file in manifest.files),
        parts=tuple(
            StoredChunk(name=chunk.name, kind=chunk.kind, tensors=len(chunk.tensors), payload_bytes=chunk.payload_bytes)
            for chunk in manifest.chunks
        ),
        experts=UsedExperts(tokens=usage.tokens, quarter_share=usage.concentration()) if usage else None,
    )
