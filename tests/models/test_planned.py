"""The figures of a dry run for each form equal what the model then takes."""

import asyncio
from pathlib import Path

import pytest

from surfw.chunking import prepare_model, write_model
from surfw.codec import CODECS, form_bytes
from surfw.models import StreamingModel, measure, planned
from surfw.models.measure import Reading
from surfw.models.planned import FormNeeds, PlannedModel
from surfw.storage import StorageBackend, open_backend
from tests.checkpoints import save_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA whose layers have several frames, and do not all fit into the smallest budget."""
    return save_llama(tmp_path_factory.mktemp("planned") / "m", layers=6, hidden=640)


def compare(checkpoint: Path, backend: StorageBackend | None) -> planned.PlannedForms:
    with prepare_model(str(checkpoint)) as prepared:
        return PlannedModel(prepared).compare(CODECS, store=backend)


def test_each_form_takes_what_was_planned(checkpoint: Path) -> None:
    backend = open_backend(checkpoint.parent / "store")
    forms = compare(checkpoint, backend)
    assert forms.coded is not None
    assert forms.disk is not None
    for needs in forms.needs:
        with prepare_model(str(checkpoint), name=needs.codec) as prepared:
            manifest = asyncio.run(write_model(prepared, backend, codecs=(needs.codec,)))
        stored_bytes = sum(form_bytes(manifest).values())
        assert needs.bytes == (pytest.approx(stored_bytes, rel=0.02) if needs.codec == "lossless" else stored_bytes)
        with StreamingModel.open(backend.url, needs.codec, memory_budget=needs.least_budget_bytes) as model:
            share = forms.coded.share if needs.codec == "lossless" else 1.0
            assert needs.bytes_per_pass == pytest.approx(model.plan.bytes_per_pass * share, rel=0.01) != 0
        assert needs.reading_ceiling == pytest.approx(expected_ceiling(needs, forms.disk, forms))


def expected_ceiling(needs: FormNeeds, disk: Reading, forms: planned.PlannedForms) -> float:
    seconds = needs.bytes_per_pass / disk.bytes_per_second
    if needs.codec == "lossless" and forms.coded:
        seconds += needs.bytes_per_pass / forms.coded.share / forms.coded.decoded_per_second
    return 1 / seconds


def test_why_a_disk_is_not_measured(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_backend(checkpoint.parent / "store")
    monkeypatch.setattr(measure, "_LEAST_BYTES", 1 << 40)
    assert compare(checkpoint, folder).unknown == "the checkpoint is too small to measure its disk by"
    assert compare(checkpoint, open_backend("s3://bucket/store")).unknown == "the store is not on this machine"
    monkeypatch.setattr(planned, "_device", lambda _: -1)
    forms = compare(checkpoint, folder)
    assert forms.unknown == "the checkpoint is on another disk than the store"
    assert [one.reading_ceiling for one in forms.needs] == [None] * 4
