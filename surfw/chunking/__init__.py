"""Checkpoint → store: `prepare` plans the chunks, `write` stores them, `in_place` uses a checkpoint without copying."""

from surfw.chunking.adapter import prepare_adapter, read_base
from surfw.chunking.copy import copy_model
from surfw.chunking.prepare import PreparedModel, prepare_model
from surfw.chunking.write import Outcome, Progress, write_model

__all__ = [
    "Outcome",
    "PreparedModel",
    "Progress",
    "copy_model",
    "prepare_adapter",
    "prepare_model",
    "read_base",
    "write_model",
]
