"""Checkpoint → store: `prepare` decides what goes where, `write` streams the bytes there, `in_place` copies nothing."""

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
