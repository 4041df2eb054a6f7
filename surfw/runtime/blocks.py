"""Runs of whole blocks of a chunk, on demand: the way to a part of a tensor whose chunk is not in memory.

A source delivers whole blocks of 1 MiB only, as only these can be verified. What a block holds is the caller's matter.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError

from surfw.config import BLOCK_BYTES
from surfw.errors import ManifestError, ModelClosedError
from surfw.manifest import Chunk, Form, Manifest
from surfw.metrics import Metrics
from surfw.runtime.io_thread import IoThread, Job
from surfw.runtime.run import Run
from surfw.source import ChunkSource, Read

_DEMAND = 0


class BlockReader:
    """Reads blocks of one model's chunks, for the run that works at present."""

    def __init__(
        self, source: ChunkSource, manifest: Manifest, io: IoThread, metrics: Metrics, run: Callable[[], Run]
    ) -> None:
        """Name where the blocks come from, who counts, and how to know which run waits for them."""
        self.manifest = manifest
        self.metrics = metrics
        self._source = source
        self._io = io
        self._run = run

    def start(self, chunk: Chunk, runs: Sequence[tuple[int, memoryview]]) -> Job[None]:
        """Start to read runs of neighbouring blocks, in one fetch.

        Args:
            chunk: where they lie.
            runs: the first block of each, and the memory it goes to: whole blocks, as many as that holds; only a run
                that ends with the chunk may be shorter.

        Raises:
            ModelClosedError: the source has been closed.
            ManifestError: the chunk is not stored as it is.
        """
        form = plain_form(chunk)
        reads = [Read(chunk, form, at * BLOCK_BYTES, at * BLOCK_BYTES + into.nbytes, into) for at, into in runs]
        return self._io.submit(self._fetch(reads))

    def wait(self, job: Job[None]) -> None:
        """Wait for what was started; if the run is interrupted, or the wait is, it is cancelled.

        Raises:
            IntegrityError: bytes are not what the manifest promises.
            StorageError, WireError: they could not be had.
            ModelClosedError: the source was closed meanwhile.
            Exception: what the run was interrupted with.
        """
        run = self._run()
        try:
            if not job.done():
                with self.metrics.span("stall"):
                    run.wait_for(job)
            run.check()
            job.result()
        except CancelledError as exc:
            raise ModelClosedError(f"the source of {self.manifest.name} was closed while it was read") from exc
        except BaseException:
            job.cancel()
            raise

    async def _fetch(self, reads: Sequence[Read]) -> None:
        start = time.perf_counter()
        await self._source.fetch(self.manifest, reads, priority=_DEMAND)
        self.metrics.add("fetched_bytes", sum(read.stop - read.start for read in reads))
        self.metrics.latency("fetch").observe(time.perf_counter() - start)


def plain_form(chunk: Chunk) -> Form:
    """The form of a chunk whose stored bytes are its tensors' bytes.

    Raises:
        ManifestError: the chunk is stored otherwise.
    """
    form = chunk.form("none")
    if form is None:
        offered = ", ".join(form.codec for form in chunk.forms)
        raise ManifestError(f"chunk {chunk.name} is stored as {offered}, expected none: its parts cannot be read alone")
    return form
