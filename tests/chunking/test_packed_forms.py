"""Packed forms in a store: written, resumed, verified and copied; invalid ones are refused."""

import asyncio
import json
import re
from pathlib import Path

import pytest
import torch

from surfw import Housekeeping
from surfw.chunking import copy_model, prepare_model, write_model
from surfw.chunking.copy import check_copy
from surfw.chunking.write import check_target
from surfw.errors import CheckpointError, ConfigurationError, ManifestError
from surfw.manifest import Manifest, payload_digest
from surfw.storage import Store, open_backend
from surfw.storage.store import manifest_key
from surfw.storage.store_source import open_storage_source
from tests.checkpoints import save_llama
from tests.chunking.test_codecs import chunk_into
from tests.cli.run import surfw

ALL = ("none", "lossless", "int8", "int4")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA whose layers have several blocks."""
    return save_llama(tmp_path_factory.mktemp("packed") / "tiny", layers=2, hidden=640)


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    """A store with the model in all forms."""
    chunk_into(checkpoint.parent / "all", checkpoint, ALL)
    return checkpoint.parent / "all"


def manifest_in(store: Path) -> Manifest:
    return asyncio.run(Store(open_backend(store)).manifest("tiny"))


def copy(store: Path, to: Path, codecs: tuple[str, ...] | None) -> Manifest:
    async def work() -> Manifest:
        async with await open_storage_source(open_backend(store)) as source:
            return await copy_model(source, "tiny", open_backend(to), codecs=codecs)

    return asyncio.run(work())


def complaints(store: Path) -> list[str]:
    async def verify() -> list[str]:
        async with Housekeeping(str(store)) as housekeeping:
            return [one.complaint for one in (await housekeeping.verify()).damage]

    return asyncio.run(verify())


def test_what_has_no_matrix_stays_as_it_is(store: Path, checkpoint: Path, tmp_path: Path) -> None:
    manifest = manifest_in(store)
    forms = {chunk.name: [form.codec for form in chunk.forms] for chunk in manifest.chunks}
    assert forms["model.layers.1"] == list(ALL)
    assert forms["model.norm"] == ["none"]
    layer, head = manifest.by_name["model.layers.1"], manifest.by_name["lm_head"]
    assert (set(layer.forms[3].kinds), set(layer.forms[2].kinds)) == ({"int4", "raw"}, {"int8", "raw"})
    assert [form.kinds for form in head.forms if form.is_packed] == [("int8",)] * 2
    assert len({form.locations for form in head.forms if form.is_packed}) == 1  # they share a blob
    with pytest.raises(ConfigurationError, match="has tiny with all bits, which int4 alone would replace") as refused:
        chunk_into(store, checkpoint, ("int4",))
    for check in (
        check_target(open_backend(store), "tiny", ("int4",)),
        check_copy(manifest, open_backend(store), codecs=("int4",)),
    ):
        with pytest.raises(ConfigurationError, match=re.escape(str(refused.value))):
            asyncio.run(check)
    asyncio.run(check_target(open_backend(tmp_path / "none-yet"), "tiny", ("int4",)))
    alone = chunk_into(tmp_path / "alone", checkpoint, ("int4",))
    assert {chunk.name: [form.codec for form in chunk.forms] for chunk in alone.chunks} == {
        name: ["none"] if name == "model.norm" else ["int4"] for name in forms
    }
    assert [chunk.id for chunk in alone.chunks] == [chunk.id for chunk in manifest.chunks]
    listed = json.loads(surfw(tmp_path, "list", "--store", str(tmp_path / "alone"), "--json").stdout)["models"]
    assert [one["codecs"] for one in listed] == [["int4"]]
    assert " as int4 " in surfw(tmp_path, "list", "--store", str(tmp_path / "alone")).stdout


@pytest.mark.parametrize(
    ("codecs", "advice"),
    [
        (("none", "int4"), "none,int8,int4"),
        (("none", "lossless"), "none,lossless,int8"),
        (("lossless",), "none,lossless,int8"),
    ],
)
def test_forms_that_will_be_stored_no_more_are_said_before_the_work(
    codecs: tuple[str, ...], advice: str, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chunk_into(tmp_path, checkpoint, ("none", "int8"))
    assert not caplog.messages
    said: list[int] = []
    with prepare_model(str(checkpoint), name="tiny") as prepared:
        backend = open_backend(tmp_path)
        asyncio.run(
            write_model(prepared, backend, codecs=codecs, progress=lambda *_: said.append(len(caplog.messages)))
        )
    assert said
    assert set(said) == {1}
    (message,) = caplog.messages
    assert message == (
        f"tiny is stored as {'it is (none) and as ' * ('none' not in codecs)}int8 too, and will not be any more; to "
        f"keep that, stop this, and give all of them (codecs, --codec): {advice}"
    )


@pytest.mark.parametrize("codecs", [("int8",), ("none", "int4"), None])
def test_a_copy_has_the_forms_that_chunking_gives(
    codecs: tuple[str, ...] | None, store: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Whether the forms exist already, or are made from existing ones."""
    expected = chunk_into(tmp_path / "expected", checkpoint, codecs or ("none", "lossless"))
    chunk_into(tmp_path / "plain", checkpoint, ("lossless",))
    for source in (store, tmp_path / "plain"):
        assert copy(source, tmp_path / f"from-{source.name}", codecs) == expected
    assert complaints(tmp_path / "from-plain") == []


def test_forms_that_are_not_copied_are_said(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chunk_into(tmp_path / "from", checkpoint, ("none", "int4"))
    copy(tmp_path / "from", tmp_path / "named", ("none",))
    assert not caplog.messages
    copy(tmp_path / "from", tmp_path / "to", None)
    said = "of tiny, int4 is not copied; to have it in the copy too, name it (codecs, --codec none,lossless,int4)"
    assert caplog.messages == [said]


def test_a_model_without_exact_forms_is_copied_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    original = chunk_into(tmp_path / "int4", checkpoint, ("int4",))
    for codecs in (None, ("int4",)):
        assert copy(tmp_path / "int4", tmp_path / str(codecs), codecs) == original
    with pytest.raises(ConfigurationError, match="stored as int4 alone, of which int8 cannot be made"):
        copy(tmp_path / "int4", tmp_path / "to", ("int4", "int8"))


def test_a_damaged_form_is_found(checkpoint: Path, tmp_path: Path) -> None:
    manifest = chunk_into(tmp_path, checkpoint, ("int4",))
    assert complaints(tmp_path) == []
    (place,) = manifest.by_name["model.layers.1"].forms[0].locations
    data = bytearray((tmp_path / place.object).read_bytes())
    data[1000] ^= 1
    (tmp_path / place.object).write_bytes(data)
    (complaint,) = complaints(tmp_path)
    assert complaint.startswith("block 0 is damaged")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kinds": None}, "kinds of model.layers.0 is not a list"),
        ({"kinds": ["int4"]}, "are not raw, int8 or int4 for each tensor"),
        ({"kinds": ["int2"] * 9}, "are not raw, int8 or int4 for each tensor"),
        ({"kinds": [[]] * 9}, "are not raw, int8 or int4 for each tensor"),
        ({"kinds": ["int4"] * 9}, "norm.weight cannot be int4"),
        ({"kinds": ["raw"] * 9}, "a form of chunk model.layers.0 has no quantised tensor"),
        ({"stored_bytes": 1 << 40}, "add up to [0-9]+ bytes, not 1099511627776"),
        ({"codec": "int8"}, "has no forms, or one twice"),
    ],
)
def test_wrong_parts_are_refused_before_anything_is_read(
    changes: dict[str, object], says: str, store: Path, tmp_path: Path
) -> None:
    document = json.loads(manifest_in(store).encode())
    chunk = next(one for one in document["chunks"] if one["name"] == "model.layers.0")
    next(form for form in chunk["forms"] if form["codec"] == "int4").update(changes)
    data = json.dumps(document).encode()
    path = tmp_path / manifest_key("tiny")
    path.parent.mkdir(parents=True)
    (tmp_path / "surfw.json").write_bytes((store / "surfw.json").read_bytes())
    path.write_bytes(f"surfw.manifest blake3 {payload_digest(data)}\n".encode() + data)
    with pytest.raises(ManifestError, match=says):
        manifest_in(tmp_path)


def test_weights_that_no_code_can_hold_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "tiny")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight has the weight nan"):
        chunk_into(tmp_path / "store", tmp_path / "tiny", ("none", "int8"))


def test_the_commands_say_what_is_stored_and_read(checkpoint: Path, tmp_path: Path) -> None:
    chunk = ["chunk", str(checkpoint), "--codec", "none,int8,int4"]
    plan = json.loads(surfw(tmp_path, *chunk, "--dry-run", "--json").stdout)
    said = surfw(tmp_path, *chunk)
    assert (said.returncode, said.stderr) == (0, "")
    assert " as int8, and " in said.stdout
    assert " as int4, in " in said.stdout
    assert (
        "\nint4: of 21 weights, 14 in 4 bits, 2 in 8 bits, 5 exact: 5 of one dimension, such as norms\n" in said.stdout
    )
    exact = {"vectors": 5, "small": 0, "shapes": 0, "dtypes": 0, "others": 0}
    assert plan["packed_weights"] == [
        {"codec": "int8", "int4": 0, "int8": 16, "exact": exact},
        {"codec": "int4", "int4": 14, "int8": 2, "exact": exact},
    ]
    assert [one["codec"] for one in plan["forms"]] == list(ALL)
    assert (plan["unit"], plan["disk_bytes_per_second"]) == ("tokens", None)
    int8, int4 = plan["packed_forms"]
    assert int4["bytes"] < int8["bytes"] < plan["payload_bytes"]
    assert int4["least_budget_bytes"] <= int8["least_budget_bytes"] < plan["least_budget_bytes"]
    infer = ["infer", "tiny", "--prompt-ids", "1,2,3", "--max-new-tokens", "1", "--json", "--codec"]
    facts = [json.loads(surfw(tmp_path, *infer, codec).stdout) for codec in ("auto", "int8")]
    assert [one["codec"] for one in facts] == ["none", "int8"]
    refused = surfw(tmp_path, "infer", "tiny", "--prompt-ids", "1", "--source", "none-here", "--codec", "int2")
    assert refused.returncode == 2
