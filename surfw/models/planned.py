"""What a model that is still to be chunked will need: memory, and how fast a pass can be read, in each form.

Nothing is written. What weights are read shows how well they compress, and how fast the disk is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from surfw.chunking import PreparedModel
from surfw.chunking.forms import CodedEstimate, codecs_of, estimate_coded, planned_form
from surfw.chunking.prepare import PayloadReader
from surfw.codec import for_run
from surfw.manifest import Manifest
from surfw.models.assembly import IN_FLIGHT_BYTES, find_phases, model_needs
from surfw.models.from_manifest import cast_dtypes
from surfw.models.measure import Reading, measure_files
from surfw.runtime.kv_cache import kv_cost
from surfw.runtime.plan import Limit, Needs, least_bytes, plan_residency
from surfw.runtime.rows import tables_of
from surfw.runtime.schedule import Schedule
from surfw.skeleton.build import Skeleton, build_skeleton, read_config, resolve_class
from surfw.skeleton.dtypes import parse_dtype
from surfw.storage import StorageBackend
from surfw.storage.store import MARKER


@dataclass(frozen=True, kw_only=True, slots=True)
class FormNeeds:
    """A model in the forms of one codec alone, and what it needs to be run so.

    Attributes:
        codec: of the forms; chunks that have none of it are as they are.
        bytes: what is stored; of `lossless`, about.
        least_budget_bytes: the smallest budget that the model runs with from any source.
        bytes_per_pass: stored bytes that a pass reads with that budget, once everything that stays is in memory.
        reading_ceiling: the most passes per second, or tokens, that reading and decoding allow with that budget; None
            if nothing is read, or if it is not known how fast.
    """

    codec: str
    bytes: int
    least_budget_bytes: int
    bytes_per_pass: int
    reading_ceiling: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedForms:
    """The forms that a model may be stored in, side by side.

    Attributes:
        needs: of each.
        unit: what a pass yields: `tokens`, or `passes` for models that do not generate.
        coded: what `lossless` comes to; None if it was not tried.
        disk: how fast the disk reads; None if that could not be measured.
        unknown: why not.
    """

    needs: tuple[FormNeeds, ...]
    unit: Literal["tokens", "passes"]
    coded: CodedEstimate | None
    disk: Reading | None
    unknown: str = ""


class PlannedModel:
    """What a prepared model will need.

    Attributes:
        prepared: the model.
    """

    def __init__(self, prepared: PreparedModel) -> None:
        """Nothing is read yet."""
        self.prepared = prepared
        self._dtype = parse_dtype(prepared.dtype)

    @property
    def token_bytes(self) -> int:
        """What each token of a generation adds for the KV cache."""
        model = self._skeleton.model
        return kv_cost(model.config, self._dtype).new_token_bytes if model.can_generate() else 0

    def manifest(self, codecs: Sequence[str]) -> Manifest:
        """The manifest that chunking will write, as far as it is known: without digests, coded forms uncoded."""
        return self.prepared.manifest(
            [
                one.chunk("", *(planned_form(one, codec) for codec in codecs_of(one, codecs)))
                for one in self.prepared.plan.chunks
            ]
        )

    def least_budget_bytes(self, codecs: Sequence[str]) -> int:
        """The smallest budget that the model runs with, stored in these forms."""
        return least_bytes(self._needs(self.manifest(codecs)).from_anywhere())

    def compare(self, codecs: Sequence[str], *, store: StorageBackend | None) -> PlannedForms:
        """What the forms of each codec need, each alone.

        Some weights are read for that: to see how well they compress, and how fast the disk is.

        Args:
            codecs: of `CODECS`.
            store: where the model is to be written; None if it stays in its checkpoint.

        Raises:
            CheckpointError, StorageError: the checkpoint cannot be read.
        """
        coded = estimate_coded(self.prepared.plan, PayloadReader(self.prepared)) if "lossless" in codecs else None
        disk, unknown = _measure_disk(self.prepared, store)
        buffered_bytes = 0 if disk and store else IN_FLIGHT_BYTES  # a store's files are read to where they belong
        needs = tuple(
            self._form_needs(codec, coded if codec == "lossless" else None, disk, buffered_bytes) for codec in codecs
        )
        unit: Literal["tokens", "passes"] = "tokens" if self._skeleton.model.can_generate() else "passes"
        return PlannedForms(needs=needs, unit=unit, coded=coded, disk=disk, unknown=unknown)

    def _form_needs(
        self, codec: str, coded: CodedEstimate | None, disk: Reading | None, buffered_bytes: int
    ) -> FormNeeds:
        manifest = self.manifest((codec,))
        needs = self._needs(manifest, buffered_bytes)
        least = least_bytes(needs.from_anywhere())
        share = coded.share if coded else 1.0
        stored_bytes = sum(form.stored_bytes for chunk in manifest.chunks for form in chunk.forms)
        in_memory = plan_residency(needs, Limit(budget_bytes=least)).bytes_per_pass
        read_bytes = (
            in_memory * stored_bytes / max(1, sum(needs.sizes.values()) + needs.expert_bytes)
        )  # memory is in whole pages
        seconds = read_bytes * share / disk.bytes_per_second if disk else 0.0
        if coded:
            seconds += read_bytes / coded.decoded_per_second  # as `runtime.forms` reckons, it overlaps with nothing
        return FormNeeds(
            codec=codec,
            bytes=round(stored_bytes * share),
            least_budget_bytes=least,
            bytes_per_pass=round(read_bytes * share),
            reading_ceiling=1 / seconds if disk and seconds else None,
        )

    def _needs(self, manifest: Manifest, buffered_bytes: int = IN_FLIGHT_BYTES) -> Needs:
        """In the forms that a run takes by itself, from a source that holds so much."""
        manifest = for_run(manifest, "auto", where=manifest.name)
        tables = tables_of(self._skeleton, manifest)
        dtypes = cast_dtypes(manifest, self._skeleton)
        needs = model_needs(manifest, dtypes, tables, buffered_bytes=buffered_bytes)
        return Schedule(manifest.order, find_phases(manifest, self._skeleton), row_wise=tables).apply_to(needs)

    @cached_property
    def _skeleton(self) -> Skeleton:
        prepared, name = self.prepared, self.prepared.name
        config = read_config(dict(prepared.config), where=name)
        count = sum(len(chunk.tensors) for chunk in prepared.plan.chunks) + len(prepared.loading.ties)
        cls = resolve_class(prepared.class_name, config, where=name)
        return build_skeleton(config, cls, self._dtype, tensor_count=count, where=name)


def _measure_disk(prepared: PreparedModel, store: StorageBackend | None) -> tuple[Reading | None, str]:
    """How fast the disk of a model reads, by the files of its checkpoint; or why that cannot be told."""
    files = [shard.path for shard in prepared.checkpoint.shards]
    if prepared.checkpoint.pins is not None:
        return None, "the checkpoint is not on this machine"
    if store is not None:
        place = store.local_path(MARKER)
        if place is None:
            return None, "the store is not on this machine"
        if {file.stat().st_dev for file in files} != {_device(place)}:
            return None, "the checkpoint is on another disk than the store"
    found = measure_files(files)
    return found, "" if found else "the checkpoint is too small to measure its disk by"


def _device(place: Path) -> int:
    """The device of a file that need not be there yet."""
    return next(folder for folder in (place, *place.absolute().parents) if folder.exists()).stat().st_dev
