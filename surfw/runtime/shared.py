"""Memory of equal chunks, which all models of a process share: fine-tunes of one model have most of their layers.

Two chunks are equal if the bytes that were verified are: the digests of all blocks of the form that was read, with the
same tensors in the same dtypes. What a manifest merely says of a payload is not enough.

Shared are mapped files, and buffers that a chunk has to itself, not those of a ring, which are written again. A shared
buffer is never written again, and either goes when the last model that holds it lets go of it. Each model counts it in
its own budget.
"""

import threading
from collections.abc import Hashable, Mapping
from weakref import WeakValueDictionary

import torch

from surfw.errors import SurfwError
from surfw.manifest import Chunk, Form
from surfw.runtime.buffers import Buffer
from surfw.source import View

_held: "WeakValueDictionary[Hashable, Buffer | View]" = WeakValueDictionary()
_lock = threading.Lock()


def identity(
    chunk: Chunk, form: Form, dtypes: Mapping[str, torch.dtype], *, capacity_bytes: int | None
) -> Hashable | None:
    """What memory with a chunk has to agree in to be that of another; None if it cannot be known, or is secret.

    Args:
        chunk: of a manifest.
        form: the one that was read, or would be.
        dtypes: of tensors that do not get the stored one.
        capacity_bytes: of the buffer; None for a view of the stored bytes.
    """
    if not form.is_known or form.seals:
        return None
    tensors = tuple((one.dtype, one.shape, dtypes.get(one.name)) for one in chunk.tensors)
    return chunk.id, form.codec, form.stored_bytes, form.blocks, form.kinds, tensors, capacity_bytes


def share(key: Hashable | None, memory: Buffer | View) -> None:
    """Let others have memory with a chunk, from now on."""
    if key is not None:
        with _lock:
            if isinstance(memory, Buffer):
                memory.is_shared = True
            _held[key] = memory


def find(key: Hashable | None) -> Buffer | View | None:
    """The memory of an equal chunk, if any model holds some, and no file shows that it has changed since."""
    with _lock:
        memory = None if key is None else _held.get(key)
    if isinstance(memory, View):
        try:
            memory.expect_unchanged()
        except SurfwError:  # whoever uses it hears of that; a file in its place may be right
            return None
    return memory
