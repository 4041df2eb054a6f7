"""Buffers of equal chunks, which all models of a process share: fine-tunes of one model have most of their layers.

Two chunks are equal if the bytes that were verified are: the digests of all blocks of the form that was read, with the
same tensors in the same dtypes. What a manifest merely says of a payload is not enough.

Only buffers that a chunk has to itself are shared, not those of a ring, which are written again. A shared buffer is
never written again, and goes when the last model that holds it lets go of it. Each model counts it in its own budget.
"""

import threading
from collections.abc import Hashable, Mapping
from weakref import WeakValueDictionary

import torch

from surfw.manifest import Chunk, Form
from surfw.runtime.buffers import Buffer

_buffers: "WeakValueDictionary[Hashable, Buffer]" = WeakValueDictionary()
_lock = threading.Lock()


def identity(chunk: Chunk, form: Form, dtypes: Mapping[str, torch.dtype], *, capacity_bytes: int) -> Hashable | None:
    """What a filled buffer of a chunk has to agree in to be that of another; None if it cannot be known, or is secret.

    Args:
        chunk: of a manifest.
        form: the one that was read, or would be.
        dtypes: of tensors that do not get the stored one.
        capacity_bytes: of the buffer.
    """
    if not form.is_known or form.seals:
        return None
    tensors = tuple((one.dtype, one.shape, dtypes.get(one.name)) for one in chunk.tensors)
    return chunk.id, form.codec, form.stored_bytes, form.blocks, form.kinds, tensors, capacity_bytes


def share(key: Hashable | None, buffer: Buffer) -> None:
    """Let others have a buffer that is filled, from now on."""
    if key is not None:
        with _lock:
            buffer.is_shared = True
            _buffers.setdefault(key, buffer)


def find(key: Hashable | None) -> Buffer | None:
    """The buffer of an equal chunk, if any model holds one."""
    with _lock:
        return None if key is None else _buffers.get(key)
