"""The small model that comes with surfw: a checkpoint as any other, with a tokenizer."""

from pathlib import Path

import surfw


def demo_checkpoint() -> Path:
    """The folder of the model that comes with surfw: a LLaMA of 3.5 MB that continues sentences about surfw."""
    return Path(surfw.__file__).parent / "demo"
