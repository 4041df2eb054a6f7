"""The contents of a `torch.distributed.checkpoint`: its tensors, and the parts of them that each rank saved.

They are listed in a pickle (`.metadata`), which is read as inert data (`surfw.checkpoint.plain_pickle`), or in the
headers of safetensors files (`HuggingFaceStorageWriter(save_distributed=True)`). Neither is trusted before it is
checked: the parts of a tensor must cover it without gaps or overlaps, and lie in files in the checkpoint's folder.
"""

import itertools
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from surfw.checkpoint.layout import DISTRIBUTED_FILE, is_plain, ranks_files, read_small
from surfw.checkpoint.plain_pickle import ForeignNameError, Made, Named, read_pickle
from surfw.checkpoint.shard import TORCH_DTYPES, Identity, identify, open_weights, read_header, read_weights
from surfw.config import MIB, quote
from surfw.errors import CheckpointError, UnsupportedModelError
from surfw.manifest import nbytes

_METADATA_BYTES = 256 * MIB
_MOST_DIMENSIONS = 64
_MOST_ELEMENTS = 1 << 63
_MOST_CELLS = 1 << 20
"""The most cells into which the edges of all parts may divide a tensor."""

_CLASSES = "torch.distributed.checkpoint.metadata."
_STORED_AT = "torch.distributed.checkpoint.filesystem._StorageInfo"
_EXPECTED = {
    *(_CLASSES + name for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    _STORED_AT, "torch.Size", "torch.serialization._get_layout", *TORCH_DTYPES,
    "torch.complex128", "torch.float8_e4m3fnuz", "torch.float8_e5m2fnuz", "torch.float8_e8m0fnu",
    "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
}  # fmt: skip
"""The global names that the pickle may contain."""

_MODELS = ("model", "state_dict", "model_state_dict", "module")
"""Common keys of the model's tensors in a checkpoint that also has an optimizer's."""

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What `torch.compile`, FSDP1 and activation checkpointing insert into names, wherever they wrap a module."""

_REPLICATED = "module."
"""The prefix that `DistributedDataParallel` adds to all names."""


@dataclass(frozen=True, slots=True)
class Place:
    """Position of a part's elements: the file offset of the first, in bytes, and the strides, in elements."""

    start: int
    strides: tuple[int, ...]


@dataclass(slots=True)
class Part:
    """The part of a tensor that a rank saved: a box of its elements.

    Attributes:
        offsets, sizes: the box.
        file: the file that holds it.
        start, length: its bytes in the file: the elements, or a `torch.save` archive of one tensor.
        place: position of the elements in the file; None for an archive that has not been opened yet.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class Parted:
    """A tensor and its saved parts; empty parts are left out."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """The tensors of a model by name, and the identities of the files that hold them."""

    tensors: Mapping[str, Parted]
    files: Mapping[Path, Identity]


def contiguous(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements."""
    return tuple(itertools.accumulate(reversed(sizes[1:]), lambda one, size: one * size, initial=1))[::-1][: len(sizes)]


def read_table(folder: Path, names: Collection[str]) -> Table:
    """Read which tensors the model in a folder has; `names` are the folder's files.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete.
        UnsupportedModelError: surfw does not support this kind of checkpoint.
    """
    found = _read_metadata(folder) if DISTRIBUTED_FILE in names else _read_headers(folder, ranks_files(names))
    for name, tensor in found.items():
        if fault := _find_fault(tensor):
            raise CheckpointError(
                f"{folder}: what ranks have saved of tensor {quote(name)} {fault}; the files are damaged, incomplete, "
                "or of several checkpoints: copy them again"
            )
    files = {}
    for file in sorted({part.file for tensor in found.values() for part in tensor.parts}):
        fd = open_weights(file)
        files[file] = identify(file, fd)
        os.close(fd)
    for tensor in found.values():
        for part in tensor.parts:
            if part.start + part.length > files[part.file].size_bytes:
                raise CheckpointError(
                    f"{part.file} is truncated: it has {files[part.file].size_bytes} bytes, a tensor ends at byte "
                    f"{part.start + part.length}; copy it again"
                )
    return Table(found, files)


def _read_metadata(folder: Path) -> dict[str, Parted]:
    """Read the tensors from the `.metadata` of `FileSystemWriter`."""
    path = folder / DISTRIBUTED_FILE
    try:
        root = _state(read_pickle(read_small(path, _METADATA_BYTES), _EXPECTED), "Metadata")
        stored = _stored_at(_table(root["storage_data"]))
        entries = _tensors(_table(root["state_dict_metadata"]), root.get("planner_data"))
    except ForeignNameError as exc:
        raise UnsupportedModelError(
            f"{path} is a pickle that names {exc}; torch.distributed.checkpoint does not describe tensors with "
            "that class, and surfw loads nothing that a pickle names. Save the checkpoint again with plain "
            "tensors, or take one that you trust"
        ) from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise _damaged(path, exc) from exc
    chosen = _choose(entries, folder)
    try:
        return {name: _describe(fqn, entry, stored, path) for name, (fqn, entry) in chosen.items()}
    except (ValueError, KeyError, TypeError) as exc:
        raise _damaged(path, exc) from exc


def _damaged(path: Path, error: Exception) -> CheckpointError:
    seen = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    return CheckpointError(f"{path} is damaged, or not from torch.distributed.checkpoint ({seen}); copy it again")


_Entries = dict[tuple[str, ...], dict[str, tuple[str, dict[str, Any]]]]
"""Maps the key path of each nested dict to its tensors: last key to (full name, metadata)."""


def _tensors(entries: Mapping[Any, Any], keys: Any) -> _Entries:
    """Group the tensors by their key path in the saved state, if that is recorded."""
    found: _Entries = {}
    for fqn, entry in entries.items():
        if not isinstance(fqn, str):
            raise TypeError("a tensor's name is no text")
        if isinstance(entry, Made) and entry.name == f"{_CLASSES}BytesStorageMetadata":
            continue
        path = keys.get(fqn, (fqn,)) if isinstance(keys, dict) else (fqn,)
        if not isinstance(path, tuple) or not path or not all(isinstance(key, str | int) for key in path):
            raise TypeError("a tensor's keys are no tuple of texts and numbers")
        *above, last = map(str, path)
        found.setdefault(tuple(above), {})[last] = fqn, _state(entry, "TensorStorageMetadata")
    return found


def _choose(entries: _Entries, folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Select the model's tensors among the saved ones, by their transformers names.

    Raises:
        UnsupportedModelError: the selection is ambiguous or empty.
    """
    named = [keys for keys in entries if keys and keys[-1] in _MODELS]
    chosen = named or ([()] if () in entries else list(entries))
    if len(chosen) != 1:
        places = sorted({"".join(f"[{quote(key)}]" for key in keys[:2]) for keys in chosen})
        seen = f"has tensors under {', '.join(places[:5])}" + ", …" * (len(places) > 5) if places else "has no tensors"
        raise UnsupportedModelError(
            f"{folder} {seen}; expected those of one model, under their names or in a table that is called "
            f"{' or '.join(map(repr, _MODELS))}: save it so, such as dcp.save({{'model': model.state_dict()}})"
        )
    return _without_wrappers(entries[chosen[0]], folder)


def _without_wrappers(
    tensors: Mapping[str, tuple[str, dict[str, Any]]], folder: Path
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Strip the prefixes of wrappers from the names."""
    found = {}
    is_replicated = all(name.startswith(_REPLICATED) for name in tensors)
    for name, one in tensors.items():
        plain = name.removeprefix(_REPLICATED) if is_replicated else name
        for wrapper in _WRAPPERS:
            plain = plain.replace(wrapper, "")
        if plain in found:
            raise UnsupportedModelError(
                f"{folder} has tensor {quote(plain)} twice, once as {quote(name)}; save it once"
            )
        found[plain] = one
    return found


def _describe(
    fqn: str, entry: Mapping[str, Any], stored: Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]], path: Path
) -> Parted:
    properties = entry["properties"]
    if not _is_made(properties, "TensorProperties") or not isinstance(properties.state, tuple):
        raise TypeError(f"tensor {quote(fqn)} has no properties")
    dtype = properties.state[0].name if properties.state and isinstance(properties.state[0], Named) else "no dtype"
    if dtype not in TORCH_DTYPES:
        raise UnsupportedModelError(
            f"{path}: tensor {quote(fqn)} is of a kind that surfw does not read ({dtype}); expected "
            f"{', '.join(TORCH_DTYPES.values())}"
        )
    chunks, parts = entry["chunks"], []
    if not isinstance(chunks, list):
        raise TypeError(f"tensor {quote(fqn)} has no list of parts")
    for chunk in chunks:
        box = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = _size(box["offsets"]), _size(box["sizes"])
        if 0 in sizes:
            continue
        at = stored.get((fqn, offsets))
        if at is None:
            raise ValueError(f"it does not say where the part of tensor {quote(fqn)} at {offsets} is")
        file, start, length = at["relative_path"], at["offset"], at["length"]
        if not is_plain(file, ""):
            raise CheckpointError(
                f"{path} places tensor {quote(fqn)} in {quote(file)}, expected a path within the checkpoint's folder"
            )
        if at.get("transform_descriptors"):
            raise UnsupportedModelError(
                f"{path}: tensor {quote(fqn)} was changed by an extension as it was written; save it without"
            )
        if not _are_counts((start, length)) or nbytes(TORCH_DTYPES[dtype], sizes) > length:
            raise ValueError(f"the part of tensor {quote(fqn)} at {offsets} has more elements than bytes")
        parts.append(Part(offsets, sizes, path.parent / file, start, length))
    return Parted(TORCH_DTYPES[dtype], _size(entry["size"]), tuple(sorted(parts, key=lambda part: part.offsets)))


def _stored_at(storage: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...]], Mapping[str, Any]]:
    """Map tensor name and offsets of each part to its storage info."""
    found: dict[tuple[str, tuple[int, ...]], Mapping[str, Any]] = {}
    for index, info in storage.items():
        key = _state(index, "MetadataIndex")
        if key.get("offset") is None:
            continue  # not a part of a tensor
        if not isinstance(key["fqn"], str) or not isinstance(info, Made) or info.name != _STORED_AT:
            raise TypeError("it does not say where a tensor is")
        found[key["fqn"], _size(key["offset"])] = _table(info.state)
    return found


def _state(value: Any, name: str) -> dict[str, Any]:
    """Return the fields of an object of the named class."""
    if not _is_made(value, name):
        raise TypeError(f"{name} is not where it is expected")
    return _table(value.state)


def _is_made(value: Any, name: str) -> TypeGuard[Made]:
    return isinstance(value, Made) and value.name == _CLASSES + name


def _table(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError("a table is not where it is expected")
    return value


def _size(value: Any) -> tuple[int, ...]:
    """Return a `torch.Size` as a tuple."""
    sizes = value.args[0] if isinstance(value, Made) and value.name == "torch.Size" and len(value.args) == 1 else None
    if not isinstance(sizes, tuple) or not _are_counts(sizes) or len(sizes) > _MOST_DIMENSIONS:
        raise TypeError("a size is no tuple of numbers")
    if math.prod(max(size, 1) for size in sizes) >= _MOST_ELEMENTS:
        raise ValueError("a size has more elements than 64 bits can count")
    return sizes


def _are_counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < _MOST_ELEMENTS for value in values)


def _read_headers(folder: Path, names: Iterable[str]) -> dict[str, Parted]:
    """Read the tensors from the headers of all ranks' safetensors files."""
    found: dict[str, tuple[str, list[Part]]] = {}
    for name in names:
        path = folder / name
        fd = open_weights(path)
        try:
            header = read_header(identify(path, fd).size_bytes, partial(read_weights, path, fd), where=str(path))
        finally:
            os.close(fd)
        try:
            said = _table(json.loads(header.metadata["DCP_SHARDING_INFO"]))
            offsets = {tensor.name: tuple(_table(said[tensor.name])["saved_offsets"]) for tensor in header.tensors}
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise CheckpointError(
                f"{path} does not say which parts of tensors it holds (DCP_SHARDING_INFO in its header), as "
                "torch.distributed.checkpoint does; copy it again"
            ) from exc
        for tensor in header.tensors:
            at = offsets[tensor.name]
            if len(at) != len(tensor.shape) or not _are_counts(at):
                raise CheckpointError(f"{path} has impossible offsets of tensor {quote(tensor.name)}; copy it again")
            place = Place(tensor.start, contiguous(tensor.shape))
            part = Part(at, tensor.shape, path, tensor.start, tensor.stop - tensor.start, place)
            dtype, parts = found.setdefault(tensor.name, (tensor.dtype, []))
            if dtype != tensor.dtype or len(parts[0].sizes if parts else at) != len(at):
                raise CheckpointError(
                    f"{path} has tensor {quote(tensor.name)} as {tensor.dtype} of {len(at)} dimensions, another file "
                    f"as {dtype}; the files are of several checkpoints: copy them again"
                )
            parts.append(part)
    tensors = {}
    for name, (dtype, parts) in found.items():
        ends = ([at + size for at, size in zip(part.offsets, part.sizes, strict=True)] for part in parts)
        shape = tuple(map(max, zip(*ends, strict=True)))
        kept = sorted((part for part in parts if 0 not in part.sizes), key=lambda part: part.offsets)
        tensors[name] = Parted(dtype, shape, tuple(kept))
    return tensors


def _find_fault(tensor: Parted) -> str | None:
    """Return a description of the fault if the parts do not cover a tensor exactly once, else None.

    The edges of all parts divide the tensor into cells, and each cell must be in exactly one part.
    """
    shape, parts = tensor.shape, tensor.parts
    if not math.prod(shape):
        return None
    if any(not len(part.offsets) == len(part.sizes) == len(shape) for part in parts):
        return f"has other dimensions than it ({len(shape)})"
    ends = [tuple(at + size for at, size in zip(part.offsets, part.sizes, strict=True)) for part in parts]
    for part, end in zip(parts, ends, strict=True):
        if any(one > size for one, size in zip(end, shape, strict=True)):
            return f"at {part.offsets} ends at {end}, beyond its shape {shape}"
    places = []
    for dim, size in enumerate(shape):
        edges = {0, size, *(part.offsets[dim] for part in parts), *(end[dim] for end in ends)}
        places.append({edge: at for at, edge in enumerate(sorted(edges))})
    cells = math.prod(len(place) - 1 for place in places)
    if cells > _MOST_CELLS:
        return f"cuts it into {cells} cells"
    seen: set[tuple[int, ...]] = set()
    for part, end in zip(parts, ends, strict=True):
        ranges = (range(at[low], at[high]) for at, low, high in zip(places, part.offsets, end, strict=True))
        for cell in itertools.product(*ranges):
            if cell in seen:
                return f"at {part.offsets} overlaps another part"
            seen.add(cell)
    return None if len(seen) == cells else "leaves gaps"
