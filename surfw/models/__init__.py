"""Models for people: a streaming model is transformers' own model over a source of weights."""

from surfw.models.base import StreamingBaseModel
from surfw.models.client import WeightClient
from surfw.models.explain import Explanation
from surfw.models.statistics import CacheInfo, InferenceStats
from surfw.models.streaming import (
    StreamingBertModel,
    StreamingGPTModel,
    StreamingLlamaModel,
    StreamingModel,
    StreamingT5Model,
)

__all__ = [
    "CacheInfo",
    "Explanation",
    "InferenceStats",
    "StreamingBaseModel",
    "StreamingBertModel",
    "StreamingGPTModel",
    "StreamingLlamaModel",
    "StreamingModel",
    "StreamingT5Model",
    "WeightClient",
]
