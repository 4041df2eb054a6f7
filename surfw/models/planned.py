"""What a model will need once it is chunked: memory, and the read speed of a pass, in each form.

Nothing is written. Some weights are read to measure how well they compress and how fast the disk is.
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
    """What a model needs if it is stored in the forms of one codec alone.

    Attributes:
        codec: the codec; chunks without a form of it are stored as they are.
        bytes: stored size; for `lossless`, an estimate.
        least_budget_bytes: the smallest budget that the model runs with, from any source.
        bytes_per_pass: stored bytes read per pass with that budget, once all resident chunks are in memory.
        reading_ceiling: the most units per second (see `PlannedForms.unit`) that reading and decoding allow with that
            budget; None if nothing is read or the speed is unknown.
    """

    codec: str
    bytes: int
    least_budget_bytes: int
    bytes_per_pass: int
    reading_ceiling: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedForms:
    """A comparison of the forms that a model may be stored in.

    Attributes:
        needs: the needs of each form.
        unit: what a pass yields: `tokens`, or `passes` for models that do not generate.
        coded: the estimate for `lossless`; None if it was not tried.
        disk: measured read speed of the disk; None if it could not be measured.
        unknown: why it could not be measured.
    """

    needs: tuple[FormNeeds, ...]
    unit: Literal["tokens", "passes"]
    coded: CodedEstimate | None
    disk: Reading | None
    unknown: str = ""


class PlannedModel:
    """The needs of a prepared model.

    Attributes:
        prepared: the model.
    """

    def __init__(self, prepared: PreparedModel) -> None:
        self.prepared = prepared
        self._dtype = parse_dtype(prepared.dtype)

    @property
    def token_bytes(self) -> int:
        """KV cache memory per token of a generation."""
        model = self._skeleton.model
        return kv_cost(model.config, self._dtype).new_token_bytes if model.can_generate() else 0

    def manifest(self, codecs: Sequence[str]) -> Manifest:
        """The manifest that chunking will write, as far as known: without digests, and with coded forms uncoded."""
        return self.prepared.manifest(
            [
                one.chunk("", *(planned_form(one, codec) for codec in codecs_of(one, codecs)))
                for one in self.prepared.plan.chunks
            ]
        )

    def least_budget_bytes(self, codecs: Sequence[str]) -> int:
        """The smallest budget that the model runs with if it is stored in these forms."""
        return least_bytes(self._needs(self.manifest(codecs)).from_anywhere())

    def compare(self, codecs: Sequence[str], *, store: StorageBackend | None) -> PlannedForms:
        """Compare the needs of each codec's forms, each stored alone.

        This reads some weights, to measure how well they compress and how fast the disk is.

        Args:
            codecs: codecs from `CODECS`.
            store: where the model will be written; None if it stays in its checkpoint.

        Raises:
            CheckpointError, StorageError: the checkpoint cannot be read.
        """
        coded = estimate_coded(self.prepared.plan, PayloadReader(self.prepared)) if "lossless" in codecs else None
        disk, unknown = _measure_disk(self.prepared, store)
        buffered_bytes = 0 if disk and store else IN_FLIGHT_BYTES  # a store is read directly into place
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
        )  # memory is rounded up to whole pages
        seconds = read_bytes * share / disk.bytes_per_second if disk else 0.0
        if coded:
            seconds += read_bytes / coded.decoded_per_second  # as `runtime.forms` assumes, without overlap
        return FormNeeds(
            codec=codec,
            bytes=round(stored_bytes * share),
            least_budget_bytes=least,
            bytes_per_pass=round(read_bytes * share),
            reading_ceiling=1 / seconds if disk and seconds else None,
        )

    def _needs(self, manifest: Manifest, buffered_bytes: int = IN_FLIGHT_BYTES) -> Needs:
        """Needs with the forms that a run chooses by default, from a source that buffers `buffered_bytes`."""
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
    """Measure the disk by reading the checkpoint's files; or return why that is impossible."""
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
    """The device of a path that need not exist yet."""
    return next(folder for folder in (place, *place.absolute().parents) if folder.exists()).stat().st_dev
