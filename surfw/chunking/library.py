"""`ModelChunker`: chunk a checkpoint from Python."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from surfw.chunking.adapter import prepare_adapter, read_base
from surfw.chunking.prepare import PreparedModel, prepare_model
from surfw.chunking.write import Progress, write_model
from surfw.codec import DEFAULT_CODECS, PACKED_CODECS, check_codecs
from surfw.config import OnMissing, display_url, expect
from surfw.encryption import read_key
from surfw.errors import ConfigurationError
from surfw.signing import read_signing_key
from surfw.storage import StorageBackend, open_backend
from surfw.storage.origins import PlacedOptions
from surfw.threads import refuse_event_loop

DEFAULT_OUTPUT_DIR = "./chunks"


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model that was chunked.

    Attributes:
        name: the model's name in the store.
        class_name: the class to build.
        dtype: the dtype to build it with.
        layers: number of chunks that are layers.
        chunks: number of chunks; fine-tunes share equal ones.
        payload_bytes: the size of all its weights.
        digest: BLAKE3 of its manifest: equal for equal models.
        store: the URL of its store.
    """

    name: str
    class_name: str
    dtype: str
    layers: int
    chunks: int
    payload_bytes: int
    digest: str
    store: str


def _takes_only_experts(quantize: str, codecs: Sequence[str]) -> bool:
    if quantize not in {"all", "experts"}:
        raise ConfigurationError(f"quantize is {quantize!r}, expected 'all' or 'experts'")
    if quantize == "experts" and not set(codecs).intersection(PACKED_CODECS):
        raise ConfigurationError(
            "quantize='experts' says what int8 and int4 take; name one of them in codecs, or leave it out"
        )
    return quantize == "experts"


class ModelChunker:
    """Splits one checkpoint into chunks by layer and writes them into a store."""

    def __init__(
        self,
        model_name: str | os.PathLike[str],
        output_dir: str | os.PathLike[str] | None = None,
        *,
        storage_backend: StorageBackend | None = None,
        name: str | None = None,
        base: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        dtype: str | None = None,
        dequantize: str | None = None,
        model_class: Any = None,
        config_from: str | os.PathLike[str] | None = None,
        on_missing: OnMissing = "error",
        codecs: Sequence[str] = DEFAULT_CODECS,
        quantize: Literal["all", "experts"] = "all",
        progress: Progress | None = None,
        storage_options: Mapping[str, Any] | None = None,
        encryption_key_file: str | os.PathLike[str] | None = None,
        signing_key_file: str | os.PathLike[str] | None = None,
    ) -> None:
        """Set up the work; nothing is read or written yet.

        Args:
            model_name: a hub id (`org/name`), a local directory or GGUF file, or a storage URL.
            output_dir: the folder or storage URL of the store, which is created if needed; default: `./chunks`, unless
                a backend is given.
            storage_backend: the storage of the store, which is created if needed; the caller must close it.
            name: the model's name in the store; default: the hub id, or the directory's name.
            base: for a LoRA adapter in peft's format, the model in the store that it changes; excludes `dtype`,
                `dequantize`, `model_class`, `config_from` and `on_missing`.
            revision: branch, tag or commit of the hub repository.
            variant: which weight files to use, if there are several kinds: `fp16` for `model.fp16.safetensors`.
            dtype: convert the weights to this dtype, as `from_pretrained(dtype=…)` would.
            dequantize: instead of `dtype`, convert quantised weights (compressed-tensors, fp8, mxfp4 and mxfp8) to
                dense ones of this dtype, as transformers does.
            model_class: your own subclass of transformers' `PreTrainedModel`, for a model that transformers does not
                know.
            config_from: a local directory with `config.json` and tokenizer, if `model_name` is a directory with weights
                only, as saved by `torch.distributed.checkpoint`.
            on_missing: `error`, or `uninitialized` to chunk a checkpoint that lacks weights of its class.
            codecs: the forms to store for each chunk: `none`, `lossless`, and `int8` and `int4`, which are not exact.
                Next to `none`, `lossless` is kept only where it is at least 10 % smaller.
            quantize: which matrices `int8` and `int4` quantise: all, or only those of the experts of a mixture.
            progress: called with the bytes just finished and the name of their chunk, from a worker thread.
            storage_options: for storage URLs in `output_dir` and `model_name`, such as `{"endpoint_url": "http://…"}`;
                if these are on different servers, only for `output_dir`.
            encryption_key_file: the file with the key that encrypts all forms; default: no encryption.
            signing_key_file: the PEM file with the private key that signs the model; default: no signature.

        Raises:
            ConfigurationError: an argument is invalid, arguments exclude each other, or a file holds no key.
        """
        expect("model_name", model_name, str | os.PathLike, "a hub id, a local directory or a storage URL")
        model = os.fspath(model_name)
        if not model:
            raise ConfigurationError("model_name is empty, expected a hub id, a local directory or a storage URL")
        for key, value in (
            ("name", name),
            ("base", base),
            ("revision", revision),
            ("variant", variant),
            ("dtype", dtype),
            ("dequantize", dequantize),
        ):
            expect(key, value, str | None, "a text or None")
        expect("config_from", config_from, str | os.PathLike | None, "a local directory or None")
        if output_dir is not None:
            expect("output_dir", output_dir, str | os.PathLike, "a folder or a storage URL")
        if output_dir is not None and storage_backend is not None:
            raise ConfigurationError("output_dir and storage_backend exclude each other; give one of them")
        expect("storage_options", storage_options, Mapping | None, "a mapping of names to values, or None")
        if storage_options and storage_backend is not None:
            raise ConfigurationError("storage_options are for output_dir; give them to the backend where it is made")
        self._storage_options = dict(storage_options or {})
        self._backend = storage_backend
        self._output_dir = os.fspath(DEFAULT_OUTPUT_DIR if output_dir is None else output_dir)
        placed = PlacedOptions.of_chunking(model, self._output_dir, self._storage_options)
        self._codecs = check_codecs(codecs)
        self._only_experts = _takes_only_experts(quantize, self._codecs)
        self._key = None if encryption_key_file is None else read_key(encryption_key_file)
        self._signer = None if signing_key_file is None else read_signing_key(signing_key_file)
        self._progress = progress or (lambda *_: None)
        self._base = base
        if base is not None:
            if any(one is not None for one in (dtype, dequantize, model_class, config_from)) or on_missing != "error":
                raise ConfigurationError(
                    "dtype, dequantize, model_class, config_from and on_missing are for whole models; leave them out "
                    "with base"
                )
            if self._key is not None:
                raise ConfigurationError("adapters are not encrypted; leave encryption_key_file out with base")
            if set(self._codecs).intersection(PACKED_CODECS):
                raise ConfigurationError(
                    f"adapters are not quantised; codecs are {self._codecs}, expected none, lossless"
                )
            self._prepare_adapter = partial(
                prepare_adapter, model, name=name, revision=revision, storage_options=placed.for_url(model)
            )
        self._prepare = partial(
            prepare_model,
            model,
            name=name,
            revision=revision,
            variant=variant,
            dtype=dtype,
            dequantize=dequantize,
            model_class=model_class,
            config_from=None if config_from is None else os.fspath(config_from),
            on_missing=on_missing,
            storage_options=placed.for_url(model),
        )

    async def chunk_model(self) -> ModelInfo:
        """Chunk the model. Computation and reading run in threads and do not block the event loop.

        A run that is cancelled or fails leaves nothing visible in the store; the next run resumes where it stopped.

        Raises:
            CheckpointError: the checkpoint is damaged, incomplete, or missing.
            UnsupportedModelError: surfw cannot run it.
            StorageError: writing to the storage failed.
        """
        backend = self._backend
        if backend is None:
            backend = open_backend(self._output_dir, self._storage_options)
        try:
            with await self._prepare_in_thread(backend) as prepared:
                manifest = await write_model(
                    prepared.only_experts() if self._only_experts else prepared,
                    backend,
                    codecs=self._codecs,
                    key=self._key,
                    signer=self._signer,
                    progress=self._progress,
                )
        finally:
            if self._backend is None:
                await backend.close()
        return ModelInfo(
            name=manifest.name,
            class_name=manifest.class_name,
            dtype=manifest.dtype,
            layers=manifest.layer_count,
            chunks=len(manifest.chunks),
            payload_bytes=manifest.payload_bytes,
            digest=manifest.digest,
            store=display_url(backend.url),
        )

    def chunk_model_sync(self) -> ModelInfo:
        """Chunk the model, outside of an event loop.

        Raises:
            ConfigurationError: an event loop runs in this thread.
        """
        refuse_event_loop("chunking a model", "'await chunker.chunk_model()'")
        return asyncio.run(self.chunk_model())

    async def _prepare_in_thread(self, backend: StorageBackend) -> PreparedModel:
        """Open and plan in a thread; on cancellation, close the checkpoint that the thread opened."""
        prepare = self._prepare
        if self._base is not None:
            prepare = partial(self._prepare_adapter, await read_base(backend, self._base), backend)
        preparing = asyncio.ensure_future(asyncio.to_thread(prepare))
        try:
            return await asyncio.shield(preparing)
        except asyncio.CancelledError:
            (outcome,) = await asyncio.gather(preparing, return_exceptions=True)
            if isinstance(outcome, PreparedModel):
                outcome.close()
            raise
