"""Shares the memory of equal chunks between the models of a process: fine-tunes of a model share most of its layers.

Two chunks are equal if their verified bytes are: the same digests of all blocks of the form that was read, and the same
tensors in the same dtypes. A payload digest that only the manifest states is not enough.

Mapped files, and buffers that hold a single chunk, are shared; ring buffers are not, since they are overwritten. A
shared buffer is never written again. Shared memory is freed when the last model that holds it releases it. Each model
counts it in its own budget.
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
    """The key under which memory with a chunk is shared; None if block digests are unknown or the form is encrypted.

    Args:
        chunk: of a manifest.
        form: the form that was, or would be, read.
        dtypes: the dtypes of tensors that do not keep the stored one.
        capacity_bytes: of the buffer; None for a view of the stored bytes.
    """
    if not form.is_known or form.seals:
        return None
    tensors = tuple((one.dtype, one.shape, dtypes.get(one.name)) for one in chunk.tensors)
    return chunk.id, form.codec, form.stored_bytes, form.blocks, form.kinds, tensors, capacity_bytes


def share(key: Hashable | None, memory: Buffer | View) -> None:
    """Share memory that holds a chunk, from now on; without a key, do nothing."""
    if key is not None:
        with _lock:
            if isinstance(memory, Buffer):
                memory.is_shared = True
            _held[key] = memory


def find(key: Hashable | None) -> Buffer | View | None:
    """The memory of an equal chunk, if a model holds one and its mapped file has not changed."""
    with _lock:
        memory = None if key is None else _held.get(key)
    if isinstance(memory, View):
        try:
            memory.expect_unchanged()
        except SurfwError:  # its users will get the error; a replaced file may be valid again
            return None
    return memory
