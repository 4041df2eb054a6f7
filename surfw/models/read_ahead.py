"""Reads a model ahead while torch and transformers are being imported, which takes seconds. Does not import torch.

`ReadAheadClient` opens its source and reads the manifest, so that errors there are reported before anything is
imported. Then it reads the tokenizer files, and if the whole model will fit into memory, its chunks in the order they
run. `ReadAhead` is the source with what was read; it hands out each chunk once, as a view.

Invariants:

- What is kept is verified and bounded: mapped chunks are page cache, all others take a small part of the memory.
- Chunks are read in the order they run, two at a time, so that the first arrive early. Chunks in the disk cache are
  verified concurrently, so that the run has its first layers while later ones arrive.
- Reads of coded chunks from another machine start only while the model waits for nothing. A chunk that the model asks
  for before its read has started is left to the model, and is decoded as it arrives.
- Nothing is kept twice: a chunk that was handed out belongs to the caller.
- The first `fetch` of a chunk that was not requested as a view discards everything kept in memory: a caller that
  fetches chunks directly does not use views. Transfers to a disk cache continue if there is memory for them.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from surfw import tracing
from surfw.codec import choose_form, for_run
from surfw.config import MB, CodecChoice
from surfw.errors import ConfigurationError
from surfw.files import expand_home
from surfw.manifest import Chunk, Form, Manifest
from surfw.models.client import WeightClient
from surfw.models.places import Place
from surfw.runtime.buffers import Buffer
from surfw.runtime.memory import find_default_budget
from surfw.source import (
    ChunkSource,
    Read,
    SourceInFront,
    View,
    check_pin,
    find_adapter,
    find_base,
    refuse_second_adapter,
    split_pin,
)
from surfw.storage.origins import is_local_url
from surfw.threads import cancel_all, sleep_when_idle

if TYPE_CHECKING:
    from typing import Unpack

    from surfw.models.options import ConnectionOptions

T = TypeVar("T")

_MODEL_SHARE = 2
"""Chunks are read ahead if the model takes at most 1/2 of the memory: then it will certainly fit as a whole."""

_AMPLE_BYTES = 512 * MB
"""A budget of at least this has memory to fill a disk cache while the model runs."""

_LEAST_STREAMED = 1.1
"""Weights are streamed if they take so many times the budget; of a little less, rows of embeddings may be all."""

_AT_A_TIME = 2
_KEPT_SHARE = 8
"""At most 1/8 of the memory is used for chunks that are not mapped: it counts as used when the budget is calculated."""


class ReadAhead(SourceInFront):
    """A source, with what was read ahead of one of its models."""

    def __init__(
        self,
        source: ChunkSource,
        manifest: Manifest,
        wanted: str | None,
        codec: CodecChoice = "auto",
        *,
        adapter: str | None = None,
        goes_on: bool = False,
    ) -> None:
        """Wrap a source; `begin` starts reading.

        Args:
            source: the source of weights; closed with this.
            manifest: the model's manifest.
            wanted: the name by which the model was requested.
            codec: which forms to read; `auto` reads coded ones from another machine, uncoded ones from this one.
            adapter: the full name of the requested adapter, if the model is its base.
            goes_on: whether transfers to a disk cache continue while the model runs.
        """
        self.url = source.url
        super().__init__(source)
        self._manifest = for_run(manifest, codec, where=source.url)
        self._stored = manifest
        self._is_opened = False
        self._wanted = wanted
        self._name = adapter or manifest.name
        self._files: dict[str, asyncio.Task[bytes]] = {}
        self._goes_on = goes_on
        self._is_free = codec == "auto"
        self._codec = codec if codec != "auto" else "none" if is_local_url(source.url) else "lossless"
        self._chunks: dict[str, tuple[str, asyncio.Task[View | None]]] = {}  # each in one form, by its codec
        self._begun: dict[str, bool] = {}  # chunks whose read has started, and whether it is from a remote source
        self._asked: set[str] = set()  # chunks of `_chunks` requested as views; the model fetches those it did not get
        self._waiting = 0  # number of reads that the model waits for
        self._is_idle = asyncio.Event()
        self._kept: list[asyncio.Task[bool]] = []  # transfers to a disk cache
        self._free_bytes = 0
        self._turns = asyncio.Semaphore(_AT_A_TIME)
        self._keep_turns = asyncio.Semaphore(_AT_A_TIME)  # separate, to verify cached chunks while others arrive
        self._order = asyncio.Lock()  # keeps remote reads in order

    async def begin(self, *, memory_bytes: int, check: Callable[[Manifest], None] = lambda _: None) -> None:
        """Call `check` with the manifest, then start reading the files, and the chunks if they fit into memory.

        Raises:
            NotFoundError: the source is offline, and has no weights in a form that the run reads.
        """
        check(self._stored)
        await self._source.expect_there(self._stored, self._manifest)
        for file in self._manifest.files:
            self._files[file.path] = _start(self._source.file(self._manifest, file.path))
        fits = sum(chunk.payload_bytes for chunk in self._manifest.chunks) <= memory_bytes // _MODEL_SHARE
        self._free_bytes = memory_bytes // _KEPT_SHARE
        used = dict.fromkeys(name for use in self._manifest.order for name in use.chunks)
        for priority, name in enumerate(used, 1):
            chunk = self._manifest.by_name[name]
            form = self._choose_form(chunk)
            if fits:
                self._chunks[name] = form.codec, _start(self._read(chunk, form, priority))
            else:
                self._kept.append(_start(self._keep(chunk, form, priority)))

    def _choose_form(self, chunk: Chunk) -> Form:
        """The form that a run will request first."""
        near = self._source.near(self._manifest, chunk) if self._is_free else ()
        if near and self._codec not in {form.codec for form in near}:
            return near[0]
        return choose_form(chunk, self._codec)

    async def _keep(self, chunk: Chunk, form: Form, priority: int) -> bool:
        """Bring the form into the source's disk cache, if it has one; this takes little memory."""
        async with self._turn(self._keep_turns, chunk, form):
            return await self._source.keep(self._manifest, chunk, form, priority=priority)

    def _is_far(self, chunk: Chunk, form: Form) -> bool:
        """Whether a form can be decoded in parts and is not on this machine."""
        if form.codec != "lossless" or is_local_url(self.url):
            return False
        return form.codec not in {one.codec for one in self._source.near(self._manifest, chunk)}

    @contextlib.asynccontextmanager
    async def _turn(self, turns: asyncio.Semaphore, chunk: Chunk, form: Form) -> AsyncIterator[None]:
        """Hold a slot for a read; remote reads get theirs in order, and only while the model waits for nothing."""
        may_wait = chunk.name in self._chunks and self._is_far(chunk, form)
        async with self._order if may_wait else contextlib.nullcontext():
            await turns.acquire()
            while may_wait and self._waiting:
                turns.release()
                await self._is_idle.wait()
                await turns.acquire()
        try:
            self._begun[chunk.name] = self._is_far(chunk, form)
            yield
        finally:
            turns.release()

    @contextlib.contextmanager
    def _wait(self) -> Iterator[None]:
        """Mark the model as waiting for weights during the body."""
        self._waiting += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._is_idle.set()

    async def _read(self, chunk: Chunk, form: Form, priority: int) -> View | None:
        """The stored bytes of a chunk; None if there is no memory for them."""
        await self._keep(chunk, form, priority)
        if self._is_far(chunk, form):  # there is no disk cache, or it did not take the chunk
            del self._begun[chunk.name]
        async with self._turn(self._turns, chunk, form):
            view = await self._source.view(self._manifest, chunk, form)
            if view is not None or form.stored_bytes > self._free_bytes:
                return view
            self._free_bytes -= form.stored_bytes
            try:
                memory = Buffer(form.stored_bytes).view[: form.stored_bytes]
                read = Read(chunk, form, 0, form.stored_bytes, memory)
                about = {"layer": chunk.name, "bytes": form.stored_bytes, "form": form.codec, "tier": "host"}
                with tracing.span("fetch", f"fetch {chunk.name}", **about):
                    await self._source.fetch(self._manifest, [read], priority=priority)
            except BaseException:
                self._free_bytes += form.stored_bytes
                raise
            return View(memory, lambda: None, is_mapped=False)

    async def resolve(self, name: str | None) -> str:
        """The full name of a model."""
        return self._name if name == self._wanted else await self._source.resolve(name)

    async def manifest(self, model: str) -> Manifest:
        """The manifest of a model, with all its forms."""
        return self._stored if model == self._stored.name else await self._source.manifest(model)

    async def manifest_to_open(self, manifest: Manifest) -> Manifest:
        """The manifest to open a model by; the first to open the model that is read ahead gets what was read."""
        if manifest is not self._stored or self._is_opened:
            return manifest
        self._is_opened = True
        return self._manifest

    async def file(self, manifest: Manifest, path: str) -> bytes:
        """A tokenizer file, read ahead if possible."""
        task = self._files.pop(path, None) if manifest is self._manifest else None
        return await (task or self._source.file(manifest, path))

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> View | None:
        """The form's bytes, read ahead if possible."""
        codec, task = self._chunks.pop(chunk.name, ("", None)) if manifest is self._manifest else ("", None)
        if task is None:
            return await self._source.view(manifest, chunk, form)
        self._asked.add(chunk.name)
        if codec == form.codec and chunk.name in self._begun:
            with self._wait() if self._begun[chunk.name] else contextlib.nullcontext():
                return await task
        await cancel_all([task])
        if not task.cancelled() and not task.exception() and (view := task.result()) and not view.is_mapped:
            self._free_bytes += len(view.memory)
        return await self._source.view(manifest, chunk, form)

    def near(self, manifest: Manifest, chunk: Chunk) -> tuple[Form, ...]:
        """The local forms of a chunk; if no form is local, the one that is being read from a remote source."""
        near = self._source.near(manifest, chunk)
        if near or manifest is not self._manifest or not self._begun.get(chunk.name):
            return near
        codec, task = self._chunks.get(chunk.name, ("", None))
        is_kept = task is not None and not (task.done() and (task.cancelled() or task.exception() or not task.result()))
        return tuple(form for form in chunk.forms if is_kept and form.codec == codec)

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill every read's destination; a chunk that was not requested as a view discards what is kept in memory."""
        if manifest is self._manifest and all(read.chunk.name in self._asked for read in reads):
            with self._wait():
                await self._source.fetch(manifest, reads, priority=priority)
            return
        if manifest.base is None:  # an adapter's chunks come in addition to its base's
            await self._let_go(on_disk=not self._goes_on)
        await self._source.fetch(manifest, reads, priority=priority)

    async def _let_go(self, *, on_disk: bool = True) -> None:
        chunks = [task for _, task in self._chunks.values()]
        tasks: list[asyncio.Task[Any]] = [*chunks, *(self._kept if on_disk else ())]
        self._chunks.clear()
        if on_disk:
            self._kept.clear()
        await cancel_all(tasks)

    async def close(self) -> None:
        """Stop reading, and close the source."""
        files = list(self._files.values())
        self._files.clear()
        await cancel_all(files)
        await self._let_go()
        await self._source.close()


class ReadAheadClient(WeightClient):
    """A `WeightClient` for one model that reads ahead before the model is opened.

    Attributes:
        manifest: the model's manifest, or for an adapter that of its base; set by `begin`.
    """

    manifest: Manifest

    def __init__(
        self,
        source: Place | Sequence[Place],
        model: str | None,
        *,
        memory_bytes: int | None,
        codec: CodecChoice = "auto",
        budget_bytes: int | None = None,
        adapter: str | None = None,
        **connection: "Unpack[ConnectionOptions]",
    ) -> None:
        """Store where the weights are; nothing is contacted before `begin`.

        Args:
            source: see `WeightClient`.
            model: the model's name in the source, in full or a unique last part; None if there is only one.
            memory_bytes: memory for the model's weights; None for the available memory, 0 to read no chunks ahead.
            codec: see `StreamingBaseModel`.
            budget_bytes: the model's memory budget, if any; with a small one, a disk cache is not filled during runs.
            adapter: the name of an adapter that will be applied; `begin` checks that it exists and fits the model.
            **connection: see `WeightClient`.
        """
        super().__init__(source, **connection)
        open_source = self._open_source
        goes_on = budget_bytes is None or budget_bytes >= _AMPLE_BYTES

        async def open_ahead() -> ChunkSource:
            opened = await open_source()
            try:
                wanted, pin = split_pin(model)
                found = await opened.manifest(await opened.resolve(wanted))
                opened.expect_readable(found)
                check_pin(found, pin, where=opened.url)
                base = found if found.base is None else await find_base(opened, found)
                opened.expect_readable(base)
                refuse_second_adapter(found, adapter)
                if adapter is not None:
                    await find_adapter(opened, adapter, base)
                self.manifest = base
                return ReadAhead(opened, base, wanted, codec, adapter=found.name, goes_on=goes_on)
            except BaseException:
                await opened.close()
                raise

        self._open_source = open_ahead
        self._memory_bytes, self._budget_bytes = memory_bytes, budget_bytes
        self._codec = codec

    def begin(
        self, check: Callable[[Manifest], None] = lambda _: None, *, on_cpu: bool = False, streams: bool = False
    ) -> None:
        """Open the source, read the manifest, and unless `check` raises, start reading the rest.

        Args:
            check: called with the manifest.
            on_cpu: whether the model may run on the CPU with its weights as they are stored; if these are streamed,
                idle threads of OpenMP sleep (see `sleep_when_idle`).
            streams: whether they are certainly streamed; otherwise their size and the budget decide.

        Raises:
            SurfwError: the source cannot be reached or has no such model, or `check` refused the manifest.
        """
        memory = find_default_budget().budget_bytes if self._memory_bytes is None else self._memory_bytes

        async def begin(source: ChunkSource) -> None:
            assert isinstance(source, ReadAhead), "this is what it opens"
            await source.begin(memory_bytes=memory, check=check)

        if on_cpu and (streams or self.would_stream(_checkpoint_bytes(self.url))):
            sleep_when_idle()  # now: a checkpoint's folder is opened with torch
        self.run(begin)
        if on_cpu and self.streams:
            sleep_when_idle()

    @property
    def streams(self) -> bool:
        """Whether a considerable part of the weights is read in every pass, because they exceed the budget."""
        run = for_run(self.manifest, self._codec, where=self.url)
        sizes = [
            next((form.stored_bytes for form in chunk.forms if form.is_packed), chunk.payload_bytes)
            for chunk in run.chunks
        ]
        return self.would_stream(sum(sizes))

    def would_stream(self, weights_bytes: int) -> bool:
        """Whether a considerable part of so many bytes of weights would be read in every pass."""
        budget = find_default_budget().budget_bytes if self._budget_bytes is None else self._budget_bytes
        return weights_bytes > _LEAST_STREAMED * budget


def expect_ids(ids: Sequence[int], vocabulary: int, name: str) -> None:
    """Check token ids.

    Raises:
        ConfigurationError: there are none, or one is not in the vocabulary.
    """
    if not all(isinstance(one, int) for one in ids):
        raise ConfigurationError(f"token ids are whole numbers in a list, such as [1, 2, 3], not {str(ids)[:80]}")
    if not ids:
        raise ConfigurationError("the prompt is empty; give at least one token")
    for one in ids:
        if not 0 <= one < vocabulary:
            raise ConfigurationError(
                f"token id {one} is not in the vocabulary of {name}: expected 0 to {vocabulary - 1}"
            )


def expect_vocabularies(name: str, size: int, draft: str, draft_size: int) -> None:
    """Check that a model and its draft have vocabularies of the same size.

    Raises:
        ConfigurationError: they do not.
    """
    if size != draft_size:
        raise ConfigurationError(
            f"the draft {draft} has a vocabulary of {draft_size} tokens, and {name} one of {size}; give a draft with "
            "the same tokenizer"
        )


def expect_prompt(manifest: Manifest, ids: Sequence[int] | None) -> None:
    """Check a prompt against a manifest as far as possible without torch, to refuse it early.

    Args:
        manifest: a model's manifest; without a single vocabulary size, nothing is checked.
        ids: the prompt as token ids; None if it is a text.

    Raises:
        ConfigurationError: the model has no tokenizer, or an id is not in its vocabulary.
    """
    vocabulary = vocabulary_size(manifest)
    if vocabulary is None:
        return
    if ids is not None:
        expect_ids(ids, vocabulary, manifest.name)
    elif not manifest.files:
        raise no_tokenizer(manifest.name)


def vocabulary_size(manifest: Manifest) -> int | None:
    """The size of a model's vocabulary in tokens; None if it has none or several."""
    parts = [one for one in manifest.config.values() if isinstance(one, Mapping)]
    vocabulary = manifest.config.get("vocab_size")
    return vocabulary if isinstance(vocabulary, int) and not any("vocab_size" in one for one in parts) else None


def no_tokenizer(name: str) -> ConfigurationError:
    """The error for a text prompt to a model without a tokenizer."""
    return ConfigurationError(f"{name} has no tokenizer; give the prompt as token ids (--prompt-ids 1,2,3)")


def _checkpoint_bytes(url: str) -> int:
    """The size of the weights of a checkpoint in a local folder; 0 for any other source."""
    if not is_local_url(url):
        return 0
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in expand_home(url).glob("*.safetensors"))
    return 0


def _start(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start a background task; its failure is raised where the task is awaited, and ignored if it is not awaited."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return task
