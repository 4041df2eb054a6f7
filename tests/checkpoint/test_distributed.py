"""Folders of `torch.distributed.checkpoint` are read exactly as saved, or refused in one line."""

import io
import os
import pickle
import random
import tracemalloc
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as tables
from torch.distributed.checkpoint.filesystem import _StorageInfo

from checkpoint.samples import read, write_config
from surfw.checkpoint import open_checkpoint
from surfw.checkpoint.plain_pickle import Made, Named, read_pickle
from surfw.config import MIB
from surfw.errors import CheckpointError, ConfigurationError, SurfwError, UnsupportedModelError

Box = tuple[tuple[int, ...], tuple[int, ...]]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def plain_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def some_tensors() -> dict[str, torch.Tensor]:
    grid = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "grid": grid, "transposed": grid.T, "column": grid[:, 1], "scalar": torch.tensor(7), "row": grid[2:3],
        "empty": torch.empty(0, 3, dtype=torch.float16), "mask": torch.tensor([True, False, True]),
        "half": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "float8": torch.ones(3, 2).to(torch.float8_e4m3fn), "counts": torch.arange(3).to(torch.uint16),
        "complex": torch.ones(2, dtype=torch.complex64), "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }  # fmt: skip


def save(folder: Path, state: dict[str, Any]) -> Path:
    """Save as torch does, with a single rank."""
    write_config(folder)
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def save_parts(folder: Path, whole: torch.Tensor, boxes: Sequence[Box], **changes: Any) -> Path:
    """Save a checkpoint with one tensor, `w`, in these parts, as several ranks do."""
    write_config(folder)
    chunks, places = [], {}
    with (folder / "__0_0.distcp").open("wb") as file:
        for offsets, sizes in boxes:
            part = whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))].clone()
            start = file.tell()
            torch.save(part, file)
            chunks.append(tables.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            info = {"relative_path": "__0_0.distcp", "offset": start, "length": file.tell() - start} | changes
            places[tables.MetadataIndex("w", offsets)] = _StorageInfo(**info)
    entry = tables.TensorStorageMetadata(tables.TensorProperties(dtype=whole.dtype), whole.shape, chunks)
    write_metadata(folder, tables.Metadata({"w": entry}, None, places))
    return folder


def write_metadata(folder: Path, table: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(table))


def change(folder: Path, work: Callable[[Any], object]) -> Path:
    """Replace the checkpoint's table."""
    table = pickle.loads((folder / ".metadata").read_bytes())
    work(table)
    write_metadata(folder, table)
    return folder


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    state = some_tensors()
    with open_checkpoint(str(save(tmp_path / "made", state))) as checkpoint:
        assert list(checkpoint.tensors) == sorted(state)
        facts = {name: (one.dtype, one.shape, one.start) for name, one in checkpoint.tensors.items()}
        assert facts["transposed"] == ("F32", (6, 4), None)
        assert facts["scalar"] == ("I64", (), None)
        assert facts["float8"] == ("F8_E4M3", (3, 2), None)
        assert {name: read(checkpoint, name) for name in state} == {name: plain_bytes(t) for name, t in state.items()}
        assert checkpoint.name == "made"
        for start, stop in [(0, 0), (1, 2), (3, 50), (95, 96), (16, 48), (0, 96)]:
            for name in ("grid", "transposed"):
                assert read(checkpoint, name, start, stop) == plain_bytes(state[name])[start:stop]


GRID = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
ROWS: list[Box] = [((0, 0, 0), (4, 5, 4)), ((4, 0, 0), (2, 5, 4))]
TILINGS: dict[str, list[Box]] = {
    "rows": ROWS,
    "rows, of which a rank has none": [*ROWS, ((6, 0, 0), (0, 5, 4))],
    "columns": [((0, 0, 0), (6, 5, 1)), ((0, 0, 1), (6, 5, 3))],
    "both": [((a, 0, c), (3, 5, 2)) for a in (0, 3) for c in (0, 2)],
    "no grid": [((0, 0, 0), (6, 2, 4)), ((0, 2, 0), (1, 3, 4)), ((1, 2, 0), (5, 3, 1)), ((1, 2, 1), (5, 3, 3))],
}


@pytest.mark.parametrize("boxes", TILINGS.values(), ids=TILINGS)
def test_parts_of_all_shapes(tmp_path: Path, boxes: list[Box]) -> None:
    with open_checkpoint(str(save_parts(tmp_path, GRID, boxes))) as checkpoint:
        expected = plain_bytes(GRID)
        for start, stop in [(0, 480), (0, 1), (79, 81), (80, 240), (3, 477), (476, 480)]:
            assert read(checkpoint, "w", start, stop) == expected[start:stop]


@pytest.mark.parametrize(
    ("boxes", "fault"),
    [
        (ROWS[:1], "leaves gaps"),
        ([*ROWS, ((5, 0, 0), (1, 5, 4))], "at (5, 0, 0) overlaps another part"),
        ([ROWS[0], ((4, 0, 0), (2, 5, 3))], "leaves gaps"),
        ([], "leaves gaps"),
    ],
)
def test_parts_with_gaps_or_overlaps_are_refused(tmp_path: Path, boxes: list[Box], fault: str) -> None:
    save_parts(tmp_path, GRID, boxes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: what ranks have saved of tensor 'w' {fault}; the files are damaged, incomplete, or of several "
        "checkpoints: copy them again"
    )


@pytest.mark.parametrize("file", ["../outside.distcp", "/etc/passwd", "a/../b.distcp", "", 3, "a\nb"])
def test_files_outside_of_the_folder_are_refused(tmp_path: Path, file: Any) -> None:
    save_parts(tmp_path, GRID, ROWS, relative_path=file)
    with pytest.raises(CheckpointError, match=r"expected a path within the checkpoint's folder$"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"offset": 1 << 40}, "is truncated: it has"),
        ({"offset": -1}, "has more elements than bytes"),
        ({"length": 100}, "has more elements than bytes"),
        ({"length": 1 << 70}, "has more elements than bytes"),
        ({"transform_descriptors": ["zstd"]}, "changed by an extension"),
        ({"relative_path": "__1_0.distcp"}, "__1_0.distcp is missing"),
    ],
)
def test_places_that_cannot_be_are_refused(tmp_path: Path, changes: Any, said: str) -> None:
    with pytest.raises(SurfwError, match=said):
        open_checkpoint(str(save_parts(tmp_path, GRID, ROWS, **changes)))


def _claim(table: Any) -> None:
    entry = table.state_dict_metadata["w"]
    entry.size = torch.Size([1 << 40, 1 << 40, 4])


def _grow(table: Any) -> None:
    table.state_dict_metadata["w"].size = torch.Size([1 << 30, 5, 4])


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (_claim, "more elements than 64 bits can count"),
        (_grow, "leaves gaps"),
        (lambda table: table.storage_data.clear(), "does not say where the part of tensor 'w'"),
        (lambda table: table.state_dict_metadata["w"].chunks.append(3), "ChunkStorageMetadata is not where"),
        (lambda table: table.state_dict_metadata.update(w=3), "TensorStorageMetadata is not where"),
        (lambda table: delattr(table, "storage_data"), "it lacks 'storage_data'"),
        (lambda table: setattr(table, "planner_data", {"w": (1.5,)}), "keys are no tuple"),
        (lambda table: table.state_dict_metadata.clear(), "has no tensors"),
    ],
)
def test_tables_that_cannot_be_are_refused(tmp_path: Path, work: Callable[[Any], object], said: str) -> None:
    change(save_parts(tmp_path, GRID, ROWS), work)
    with pytest.raises(SurfwError, match=said) as caught:
        open_checkpoint(str(tmp_path))
    assert "\n" not in str(caught.value)


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._file}",)


def test_no_code_runs_of_a_table(tmp_path: Path) -> None:
    change(save_parts(tmp_path, GRID, ROWS), lambda table: setattr(table, "planner_data", Evil(tmp_path / "ran")))
    with pytest.raises(UnsupportedModelError, match=r"\.metadata is a pickle that names 'posix.system';"):
        open_checkpoint(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_no_code_runs_of_a_part(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(Evil(tmp_path / "ran"), buffer)
    save_parts(tmp_path, torch.ones(4), [((0,), (4,))])
    evil = buffer.getvalue()
    (tmp_path / "__0_0.distcp").write_bytes(evil)
    change(tmp_path, lambda table: [setattr(at, "length", len(evil)) for at in table.storage_data.values()])
    with (
        open_checkpoint(str(tmp_path)) as checkpoint,
        pytest.raises(UnsupportedModelError, match=r"__0_0.distcp at byte 0 has a pickle that names 'posix.system'"),
    ):
        read(checkpoint, "w")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # operations of another protocol version
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"(\x8c\x02os\x8c\x06system\x93i.",
        pickle.dumps(bytearray(8)),
        b"\x80\x04\x96" + (1 << 60).to_bytes(8, "little") + b".",  # a bytearray of an exabyte
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"}(" + b")" * 40 + b"N" * 40 + b"u.",
        b"\x80\x04}(K\x01K\x02u.",  # keys that are not strings
        b"",
        b".",
        pickle.dumps({"a": 1})[:-3],
    ],
)
def test_other_pickles_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"'(os\.system|builtins\.bytearray)'|it is no pickle of such a table"):
        read_pickle(data, {"torch.Size"})


def test_what_a_pickle_would_make_is_kept_as_it_is_named() -> None:
    made = read_pickle(pickle.dumps([torch.Size([2]), torch.float32, {"a": (None, True, 1.5, 1 << 40)}]), {
        "torch.Size", "torch.float32"})  # fmt: skip
    size, dtype, plain = made
    assert isinstance(size, Made)
    assert (size.name, size.args, size.state) == ("torch.Size", ((2,),), None)
    assert isinstance(dtype, Named)
    assert dtype.name == "torch.float32"
    assert plain == {"a": (None, True, 1.5, 1 << 40)}


def test_what_holds_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surfw.checkpoint.plain_pickle._MOST_PARTS", 100)
    assert read_pickle(pickle.dumps([{} for _ in range(40)]), ()) == [{} for _ in range(40)]
    with pytest.raises(ValueError, match="no pickle of such a table"):
        read_pickle(pickle.dumps([{} for _ in range(101)]), ())


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_damage_anywhere_is_an_error_or_does_not_matter(tmp_path: Path, file: str) -> None:
    """Damage in the weights themselves cannot be detected, as in all checkpoints."""
    save_parts(tmp_path, GRID, TILINGS["both"])
    path, chance = tmp_path / file, random.Random(0)
    sound = path.read_bytes()
    for _ in range(400):
        data = bytearray(sound)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data[: chance.choice([len(data), len(data), chance.randrange(len(data))])])
        with suppress(SurfwError), open_checkpoint(str(tmp_path)) as checkpoint:
            for name, tensor in checkpoint.tensors.items():
                assert len(read(checkpoint, name)) == tensor.nbytes <= len(plain_bytes(GRID))


def test_a_part_that_is_another_tensor_is_refused(tmp_path: Path) -> None:
    save_parts(tmp_path, GRID, ROWS)
    other = tmp_path / "other"
    save_parts(other, GRID.double(), ROWS)
    (tmp_path / "__0_0.distcp").write_bytes((other / "__0_0.distcp").read_bytes())
    places = list(pickle.loads((other / ".metadata").read_bytes()).storage_data.values())

    def move(table: Any) -> None:
        table.storage_data = dict(zip(table.storage_data, places, strict=True))

    change(tmp_path, move)
    with (
        open_checkpoint(str(tmp_path)) as checkpoint,
        pytest.raises(CheckpointError, match=r"F64 of shape '\(4, 5, 4\)', expected F32 of shape \(4, 5, 4\)"),
    ):
        read(checkpoint, "w")


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    save_parts(tmp_path, GRID, [((0, 0, 0), (6, 5, 4))])
    path = tmp_path / "__0_0.distcp"
    with zipfile.ZipFile(path) as archive:
        records = {one.filename: archive.read(one) for one in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    size = path.stat().st_size
    change(tmp_path, lambda table: [setattr(at, "length", size) for at in table.storage_data.values()])
    with (
        open_checkpoint(str(tmp_path)) as checkpoint,
        pytest.raises(CheckpointError, match="its records are compressed"),
    ):
        read(checkpoint, "w")


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    save_parts(tmp_path, GRID, ROWS)
    with open_checkpoint(str(tmp_path)) as checkpoint:
        before = checkpoint.fingerprint()
        os.utime(tmp_path / "__0_0.distcp", ns=(0, 0))
        with pytest.raises(CheckpointError, match="changed since it was opened"):
            read(checkpoint, "w")
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert checkpoint.fingerprint() != before


WEIGHTS = {"a.weight": torch.ones(2), "b.weight": torch.zeros(3)}
MOMENTS = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    "state",
    [
        WEIGHTS,
        {"model": WEIGHTS, "optimizer": MOMENTS, "step": torch.tensor(3)},
        {"app": {"model": WEIGHTS, "optim": MOMENTS}},
        {"state_dict": WEIGHTS, "epoch": 3},
        {"policy": WEIGHTS},
        {"model": {f"module.{name}": one for name, one in WEIGHTS.items()}},
        {"model": {f"_orig_mod.{name}": one for name, one in WEIGHTS.items()}},
        {"module": {name.replace(".", "._checkpoint_wrapped_module."): one for name, one in WEIGHTS.items()}},
    ],
)
def test_tables_as_people_have_them(tmp_path: Path, state: dict[str, Any]) -> None:
    with open_checkpoint(str(save(tmp_path, state))) as checkpoint:
        assert {name: read(checkpoint, name) for name in checkpoint.tensors} == {
            name: plain_bytes(one) for name, one in WEIGHTS.items()
        }


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"actor": WEIGHTS, "critic": WEIGHTS}, "has tensors under ['actor'], ['critic']; expected"),
        ({"a": {"model": WEIGHTS}, "b": {"model": WEIGHTS}}, "has tensors under ['a']['model'], ['b']['model']; exp"),
        ({"optimizer": MOMENTS, "ema": WEIGHTS}, "has tensors under ['ema'], ['optimizer']['state']; expected"),
        ({"step": 3}, "has no tensors; expected those of one model"),
        ({"model": {"a": torch.ones(2), "_orig_mod.a": torch.ones(2)}}, "has tensor 'a' twice, once as '_orig_mod.a'"),
    ],
)
def test_other_tables_are_named(tmp_path: Path, state: dict[str, Any], said: str) -> None:
    save(tmp_path, state)
    with pytest.raises(UnsupportedModelError) as caught:
        open_checkpoint(str(tmp_path))
    assert said in str(caught.value)


def test_of_a_large_tensor_only_some_rows_are_in_memory(tmp_path: Path) -> None:
    whole = torch.arange(4096 * 2048, dtype=torch.float32).reshape(4096, 2048)
    save_parts(tmp_path, whole, [((0, 0), (4096, 1024)), ((0, 1024), (4096, 1024))])
    destination = memoryview(bytearray(MIB))
    with open_checkpoint(str(tmp_path)) as checkpoint:
        tracemalloc.start()
        try:
            checkpoint.read_into("w", destination, 10_000_004, 10_000_004 + MIB)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert bytes(destination) == whole.numpy().reshape(-1)[2_500_001:][: MIB // 4].tobytes()
    assert peak < 3 * MIB


def test_weights_for_transformers_come_first(tmp_path: Path) -> None:
    save(tmp_path, WEIGHTS)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a valid safetensors file|truncated"):
        open_checkpoint(str(tmp_path))


def test_a_configuration_is_taken_from_elsewhere(tmp_path: Path) -> None:
    save(tmp_path / "weights", WEIGHTS)
    (tmp_path / "weights" / "config.json").unlink()
    write_config(tmp_path / "other", vocab_size=7)
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no config\.json; name the folder that has the model's"):
        open_checkpoint(str(tmp_path / "weights"))
    with open_checkpoint(str(tmp_path / "weights"), config_from=str(tmp_path / "other")) as checkpoint:
        assert checkpoint.config["vocab_size"] == 7
        assert list(checkpoint.files) == ["tokenizer.json"]
    for nowhere in (str(tmp_path / "nowhere"), "", "org/name", "s3://bucket/other", "~nobody-here/x", "x" * 5000):
        said = rf"\(config_from=\) is '{nowhere[:200]}', and there is no config\.json that can be read"
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(str(tmp_path / "weights"), config_from=nowhere)
    (tmp_path / "weights" / ".metadata").unlink()  # no other file tells what the ranks' files contain
    for other in (str(tmp_path / "other"), str(tmp_path / "weights"), "org/name"):
        said = r"no folder here that torch\.distributed\.checkpoint saved \(with \.metadata.*config_from=\) out"
        with pytest.raises(ConfigurationError, match=said):
            open_checkpoint(other, config_from=str(tmp_path / "other"))


def test_shards_of_ranks_need_what_they_say_of_their_parts(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_config(tmp_path)
    name = "shard-0000{}-model-00001-of-00001.safetensors"
    info = '{"w": {"saved_offsets": [%s]}}'
    for at in (0, 1):
        save_file(
            {"w": torch.full((2,), float(at))}, tmp_path / name.format(at + 1), {"DCP_SHARDING_INFO": info % (2 * at)}
        )
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert read(checkpoint, "w") == plain_bytes(torch.tensor([0.0, 0, 1, 1]))
    (tmp_path / name.format(1)).unlink()
    with pytest.raises(CheckpointError, match="of tensor 'w' leaves gaps"):
        open_checkpoint(str(tmp_path))
    for metadata in (None, {"DCP_SHARDING_INFO": "[" * 9999}, {"DCP_SHARDING_INFO": '{"w": {"saved_offsets": 3}}'},
                     {"DCP_SHARDING_INFO": info % "-1"}):  # fmt: skip
        save_file({"w": torch.ones(2)}, tmp_path / name.format(1), metadata)
        with pytest.raises(CheckpointError, match=r"does not say which parts|impossible offsets of tensor 'w'"):
            open_checkpoint(str(tmp_path))
