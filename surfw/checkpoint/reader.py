"""A checkpoint, open for reading: its configuration, its tokenizer files, and the bytes of each of its tensors.

The shards' contents count, not the index: as in transformers, every tensor of every shard is used, and if two shards
have a tensor of the same name, the later one wins. If a shard lacks a tensor that the index lists, a warning is logged.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from blake3 import blake3

from surfw.checkpoint.companions import companions, list_files
from surfw.checkpoint.layout import (
    CONFIG_FILE,
    Weights,
    find_weights,
    is_distributed,
    read_config,
    read_generation_config,
    read_weights,
)
from surfw.checkpoint.shard import Identity, SafetensorsShard, Shard, SourceTensor, translate_errors
from surfw.config import PIECE_BYTES, quote
from surfw.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from surfw.files import describe_file
from surfw.manifest import Pin

logger = logging.getLogger("surfw.checkpoint")

_SNAPSHOTS, _CACHED = "snapshots", "models--"
"""The hub's cache keeps `org/name` in `models--org--name/snapshots/COMMIT`."""


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. Use it as a context manager, or `close()` it.

    Attributes:
        name: the hub id, or the directory's name.
        path: the directory that holds its files; for a `torch.distributed.checkpoint`, only the small files.
        config: `config.json`, unchanged: nothing in it is trusted yet.
        generation_config: `generation_config.json`, if there is one.
        files: files of the tokenizer and of sentence embeddings, by path in the checkpoint's folder.
        shards: the weight files, in transformers' order.
        url: a folder, or the URL of a remote storage, in which case `path` has copies of the small files.
        pins: for a remote checkpoint, size and revision of its objects when they were opened, by name.
        release: closes the other resources of the checkpoint.
    """

    name: str
    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    files: Mapping[str, Path]
    shards: tuple[Shard, ...] = field(repr=False)
    url: str
    pins: Mapping[str, Pin] | None = None
    release: Callable[[], object] = lambda: None

    @cached_property
    def tensors(self) -> dict[str, SourceTensor]:
        """The tensors by name, in the order in which transformers finds them."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @cached_property
    def _homes(self) -> dict[Path, Shard]:
        return {shard.path: shard for shard in self.shards}

    def read_into(self, name: str, destination: memoryview, start: int, stop: int) -> None:
        """Fill `destination`, a view of bytes, with the bytes `start` to `stop` of the contiguous tensor.

        Raises:
            CheckpointError: the shard changed since it was opened, or cannot be read.
        """
        tensor = self.tensors[name]
        if not 0 <= start <= stop <= tensor.nbytes or len(destination) != stop - start:
            raise ValueError(
                f"bytes {start}-{stop} of tensor {name}, which has {tensor.nbytes}, into a buffer of {len(destination)}"
            )
        self._homes[tensor.file].read_into(tensor, destination, start)

    def digest(self, name: str) -> bytes:
        """Return the BLAKE3 of a tensor's bytes, which are read piece by piece.

        Raises:
            CheckpointError: see `read_into`.
        """
        whole, size = blake3(), self.tensors[name].nbytes
        buffer = memoryview(bytearray(min(size, PIECE_BYTES)))
        for start in range(0, size, PIECE_BYTES):
            piece = buffer[: size - start]
            self.read_into(name, piece, start, start + len(piece))
            whole.update(piece)
        return whole.digest()

    def fingerprint(self) -> tuple[Identity, ...]:
        """Return the identity (name, size, modification time) of every shard; it changes when the source does."""
        return tuple(shard.identity for shard in self.shards)

    def close(self) -> None:
        """Close every shard, and whatever else was opened."""
        for shard in self.shards:
            shard.close()
        self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def demo_checkpoint() -> Path:
    """Return the folder of the bundled model: a LLaMA of 3.5 MB that continues sentences about surfw."""
    return Path(__file__).parents[1] / "demo"


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    config_from: str | None = None,
    show_progress: bool = False,
    may_be_quantised: bool = False,
) -> Checkpoint:
    """Open a checkpoint by name, downloading it from the hub if it is not a local directory.

    Args:
        model: a local directory, or a hub id (`org/name`).
        revision: branch, tag or commit of the hub repository.
        variant: which weight files to use, if there are several kinds: `fp16` for `model.fp16.safetensors`.
        config_from: a local directory with `config.json` and tokenizer, if `model` is a directory with weights only,
            as saved by `torch.distributed.checkpoint`.
        show_progress: let the hub library draw progress bars on stderr, if that is a terminal.
        may_be_quantised: accept quantised weights.

    Raises:
        CheckpointError: it is damaged or incomplete, or neither a local directory nor a reachable hub model.
        UnsupportedModelError: surfw cannot chunk this kind of checkpoint.
        ConfigurationError: `revision` is given for a local directory, or `config_from` for weights that do not need it.
    """
    folder = local_directory(model, "a checkpoint")
    if folder is None:
        if config_from is not None:
            raise not_distributed(model)
        from surfw.checkpoint.hub import download_model

        folder = download_model(
            model, revision, variant, show_progress=show_progress, may_be_quantised=may_be_quantised
        )
        return open_directory(folder, name=model, variant=variant, may_be_quantised=may_be_quantised)
    refuse_revision(revision, model)
    with translate_errors(folder):
        names = list_files(folder)
    if is_distributed(names):
        return _open_distributed(folder, names, config_from, may_be_quantised=may_be_quantised)
    if config_from is not None:
        raise not_distributed(model)
    return open_directory(folder, names=names, variant=variant, may_be_quantised=may_be_quantised)


def refuse_revision(revision: str | None, model: str) -> None:
    """Refuse a revision for a local directory.

    Raises:
        ConfigurationError: a revision is given.
    """
    if revision is not None:
        raise ConfigurationError(
            f"revision {revision!r} is for hub models, but {model} is a directory here; leave it out"
        )


def not_distributed(model: str) -> ConfigurationError:
    """Return the error for `config_from` with a model that `torch.distributed.checkpoint` did not save."""
    return ConfigurationError(
        f"{model} is no folder here that torch.distributed.checkpoint saved (with .metadata, or one safetensors file "
        "of each rank); name such a folder, or leave --config-from (config_from=) out"
    )


def _config_folder(config_from: str) -> Path:
    """Return the folder `config_from`.

    Raises:
        CheckpointError: there is no such folder with a readable `config.json`.
    """
    with contextlib.suppress(OSError, RuntimeError):  # such as a name that is too long, or `~` of an unknown user
        folder = Path(config_from).expanduser()
        if config_from and (folder / CONFIG_FILE).is_file():
            return folder
    raise CheckpointError(
        f"--config-from (config_from=) is {config_from[:200]!a}, and there is no {CONFIG_FILE} that can be read in "
        "such a folder here; name the folder on this machine that has the model's, and its tokenizer"
    )


def _open_distributed(
    folder: Path, names: Collection[str], config_from: str | None, *, may_be_quantised: bool
) -> Checkpoint:
    """Open a `torch.distributed.checkpoint` in a folder with these files; see `open_checkpoint`."""
    settings = folder if config_from is None else _config_folder(config_from)
    if config_from is None and CONFIG_FILE not in names:
        raise CheckpointError(
            f"{folder} has weights that torch.distributed.checkpoint saved, and no {CONFIG_FILE}; name the folder that "
            "has the model's, and its tokenizer: --config-from (config_from=) FOLDER"
        )
    config = read_config(settings, may_be_quantised=may_be_quantised)
    from surfw.checkpoint.distributed import DistributedShard

    with translate_errors(settings):
        files = companions(list_files(settings))
    return Checkpoint(
        name=folder_name(folder),
        path=settings,
        config=config,
        generation_config=read_generation_config(settings),
        files={file: settings / file for file in files},
        shards=(DistributedShard(folder, names),),
        url=str(folder.absolute()),
    )


def open_shard(path: Path) -> Shard:
    """Open a local weight file; its suffix determines the format."""
    if path.suffix == ".safetensors":
        return SafetensorsShard(path)
    from surfw.checkpoint.legacy import LegacyShard

    return LegacyShard(path)


def open_directory(
    folder: Path,
    *,
    name: str | None = None,
    names: Collection[str] | None = None,
    open_shard: Callable[[Path], Shard] = open_shard,
    where: str | None = None,
    variant: str | None = None,
    may_be_quantised: bool = False,
) -> Checkpoint:
    """Open the checkpoint in a local directory.

    Args:
        folder: the directory.
        name: default: the directory's name.
        names: its files; default: those in the directory. Shards may be elsewhere, if `open_shard` finds them.
        open_shard: opens a weight file; default: from the directory.
        where: names the directory in errors, if it only has copies of the files.
        variant: see `open_checkpoint`.
        may_be_quantised: accept quantised weights.

    Raises:
        CheckpointError: it is damaged or incomplete.
        UnsupportedModelError: surfw cannot chunk this kind of checkpoint.
    """
    if names is None:
        with translate_errors(folder):
            names = list_files(folder)
    where = where or str(folder)
    entry = find_weights(names, where, variant)
    config = read_config(folder, where, may_be_quantised=may_be_quantised)
    weights = read_weights(folder, entry, where)
    with ExitStack() as opened:
        shards = []
        for file in weights.shards:
            shards.append(open_shard(folder / file))
            opened.callback(shards[-1].close)
        checkpoint = Checkpoint(
            name=name or folder_name(folder),
            path=folder,
            config=config,
            generation_config=read_generation_config(folder, where),
            files={file: folder / file for file in companions(names)},
            shards=tuple(shards),
            url=str(folder.absolute()),
        )
        _check_promises(checkpoint, weights, where, entry)
        opened.pop_all()
    return checkpoint


def folder_name(folder: Path) -> str:
    """Return the name of the model in a folder: the folder's name, or the hub id if it is in the hub's cache.

    For a symbolic link, this is the link's own name, not its target's; for a GGUF file, its name without the suffix.
    """
    path = Path(os.path.abspath(folder.expanduser()))  # noqa: PTH100 - resolve() follows links, and absolute() keeps ..
    cached = path.parent.parent.name
    if path.parent.name == _SNAPSHOTS and cached.startswith(_CACHED):
        return cached.removeprefix(_CACHED).replace("--", "/", 1)
    return path.stem if path.suffix.lower() == ".gguf" and path.is_file() else path.name


def _check_promises(checkpoint: Checkpoint, weights: Weights, where: str, index: str) -> None:
    """Warn about tensors that are not where the index says. The model's class later decides if any are missing."""
    holds = {
        (tensor.name, file)
        for file, one in zip(weights.shards, checkpoint.shards, strict=True)
        for tensor in one.tensors
    }
    astray = [(tensor, file) for tensor, file in weights.promised.items() if (tensor, file) not in holds]
    if astray:
        tensor, file = astray[0]
        found = "another has it" if tensor in checkpoint.tensors else "and no other does"
        more = f", and {len(astray) - 1} more like it" * (len(astray) > 1)
        logger.warning(
            "%s/%s places tensor %s in %s, which does not hold it (%s)%s: the files may be of different downloads",
            where, index, quote(tensor), file, found, more,
        )  # fmt: skip
    if not checkpoint.tensors:
        raise UnsupportedModelError(f"{where} has no tensors in {index}; expected the weights of a model")


def local_directory(model: str, what: str) -> Path | None:
    """Return the local directory `model`; None if it can only be a hub id. `what` describes its contents in errors.

    Raises:
        CheckpointError: it can be neither.
    """
    path = Path(model)
    try:
        path = path.expanduser()
        if path.is_dir():
            return path
        is_file = path.is_file()
    except PermissionError:
        with translate_errors(model):
            raise
    except (OSError, RuntimeError):  # such as a name that is too long, or `~` of an unknown user
        return None
    if is_file:
        raise CheckpointError(describe_file(path))
    if model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1:
        raise CheckpointError(f"{model} is not a directory here; give the directory of {what}, or a hub id")
    return None
