"""Faces for four well-known families: the model's name first, and a server's address as the default.

They run nothing of their own. A model of another family is refused with its name, so that a mistaken one is noticed
before a byte of weights is fetched.
"""

from typing import Self, Unpack

from surfw.config import DEFAULT_PORT
from surfw.models.client import Source
from surfw.models.options import ModelOptions, OpenOptions
from surfw.models.streaming import StreamingModel

DEFAULT_URI = f"ws://localhost:{DEFAULT_PORT}"
DEFAULT_CACHE_SIZE = 5


class _Family(StreamingModel):
    """What the families share: how they are constructed."""

    def __init__(
        self,
        model_name: str | None = None,
        websocket_uri: Source = DEFAULT_URI,
        cache_size: int | None = None,
        *,
        memory_budget: int | str | None = None,
        **options: Unpack[ModelOptions],
    ) -> None:
        """Note what is wanted; the first use opens it.

        Args:
            model_name: the model's name at the server; None for the only one there.
            websocket_uri: the server, or any other source that `StreamingModel` takes.
            cache_size: how many layers are kept in memory; 5, unless there is a `memory_budget`.
            memory_budget: in place of it, what weights in memory may take.
            **options: see `StreamingBaseModel`.
        """
        if cache_size is None and memory_budget is None:
            cache_size = DEFAULT_CACHE_SIZE
        super().__init__(websocket_uri, model_name, cache_size=cache_size, memory_budget=memory_budget, **options)

    @classmethod
    def _over(cls, source: Source, model: str | None, **options: Unpack[OpenOptions]) -> Self:
        return cls(model, source, **options)


class StreamingBertModel(_Family):
    """A model of the BERT family over a server: BERT, RoBERTa, DistilBERT, ALBERT, ELECTRA and their like."""

    model_types = frozenset(
        {"bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "camembert", "mobilebert", "modernbert"}
    )


class StreamingGPTModel(_Family):
    """A model of the GPT family over a server: GPT-2, GPT-Neo, GPT-J, GPT-NeoX and their like."""

    model_types = frozenset({"openai-gpt", "gpt2", "gpt_neo", "gptj", "gpt_neox", "gpt_bigcode", "gpt_oss"})


class StreamingT5Model(_Family):
    """A model of the T5 family over a server: T5, mT5, UMT5."""

    model_types = frozenset({"t5", "mt5", "umt5"})


class StreamingLlamaModel(_Family):
    """A model of the LLaMA family over a server: LLaMA and its close relatives Mistral and Qwen."""

    model_types = frozenset({"llama", "mistral", "ministral", "qwen2", "qwen3"})
