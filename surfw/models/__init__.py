"""Models for people: a streaming model is transformers' own model over a source of weights."""

from surfw.models.streaming import StreamingModel

__all__ = ["StreamingModel"]
