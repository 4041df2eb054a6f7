"""Adapt the library's messages to the command line: options instead of arguments. Pure.

The library names both, such as `--model (model=)`; the part for Python is removed here.
"""

import re

_PATTERNS = {
    r"(--[a-z-]+(?: [a-z]+)?) \([a-z_]+=[^()]*\)": r"\1",  # --model (model=)
    r"\([a-z_]+, (--[a-z-]+)\)": r"(\1)",  # (memory_budget, --memory-budget)
    r"\bon_missing='([^']*)'": r"--on-missing \1",
}

PHRASES = {
    ", or have the KV cache quantised, which is not exact (generate(cache_implementation='quantized'))": "",
    "does not generate; call it, or use forward_async": "does not generate tokens",
    "(max_new_tokens)": "(--max-new-tokens)",
    "give a temperature, top_p or top_k": "give --temperature, --top-p or --top-k",
    "certificates were given (ssl=)": "certificates were given",
    "or use another folder": "or use another folder (--store, --source, SURFW_HOME)",
    "give sse='aws:kms' with it": "give --storage-option sse=aws:kms with it",
    "named by endpoint_url or": "named by --storage-option endpoint_url=URL or",
    "give them as arguments, in": "give them in",
    "name its class (model_class=…), or register it with AutoConfig.register and AutoModel.register": (
        "a newer transformers may; a class of your own can be named from Python"
    ),
}
"""Phrases of the library, and what the command line says instead."""


def with_options(text: str) -> str:
    """Return the library's error or warning with options instead of arguments."""
    for pattern, option in _PATTERNS.items():
        text = re.sub(pattern, option, text)
    for phrase, other in PHRASES.items():
        text = text.replace(phrase, other)
    return text
