"""Small real files: safetensors as bytes, and whole checkpoints in a folder."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from surfw.checkpoint import Checkpoint

CONFIG = {"model_type": "llama", "hidden_size": 8}


def pack(header: object, payload: bytes = b"") -> bytes:
    """Make a safetensors file from any header and payload."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    """The header's entry for one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def arrays(*names: str) -> dict[str, np.ndarray]:
    """Tensors of different sizes with distinguishable bytes."""
    return {name: np.arange(1, 5 * (i + 2) + 1, dtype=np.float32).reshape(5, -1) + i for i, name in enumerate(names)}


def write_config(folder: Path, **more: object) -> Path:
    """Make a folder with just a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | more))
    return folder


def write_single(folder: Path) -> dict[str, np.ndarray]:
    """Write a checkpoint of one safetensors file; return its tensors."""
    write_config(folder)
    tensors = arrays("b", "a", "c")
    save_file(tensors, folder / "model.safetensors")
    return tensors


def write_sharded(folder: Path) -> dict[str, np.ndarray]:
    """Write a checkpoint of two shards with an index; return its tensors."""
    write_config(folder)
    tensors = arrays("z.weight", "a.weight", "m.weight")
    shards = {
        "model-00001-of-00002.safetensors": ("z.weight", "m.weight"),
        "model-00002-of-00002.safetensors": ("a.weight",),
    }
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    write_index(folder, {name: file for file, names in shards.items() for name in names})
    return tensors


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> None:
    """Write an index of shards."""
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read(checkpoint: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> bytes:
    """Return bytes of a tensor, by default all."""
    stop = checkpoint.tensors[name].nbytes if stop is None else stop
    data = bytearray(stop - start)
    checkpoint.read_into(name, memoryview(data), start, stop)
    return bytes(data)
