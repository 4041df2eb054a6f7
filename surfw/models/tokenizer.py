"""A model's tokenizer, from the files its manifest names. No code that comes with a model is run."""

import json
import logging
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from surfw.checkpoint.layout import TOKENIZER_FILES
from surfw.manifest import Manifest
from surfw.skeleton.guards import foreign_errors
from surfw.skeleton.sanitise import sanitise_config

logger = logging.getLogger("surfw.models")

_PATH_KEY = re.compile(r"_?name_or_path|vocab|merges|.*_files?|.*_path")


def open_tokenizer(manifest: Manifest, read_file: Callable[[str], bytes]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model, made of the files that its manifest lists; None if it lists none.

    Raises:
        IntegrityError: a file is not what the manifest promises.
        UnsupportedModelError: transformers cannot make a tokenizer of the files.
    """
    if not manifest.files:
        return None
    with tempfile.TemporaryDirectory(prefix="surfw-tokenizer-") as folder:
        for file in manifest.files:
            if file.path not in TOKENIZER_FILES:
                logger.warning("%s: ignored, because surfw knows no tokenizer with such a file", file.path)
                continue
            data = read_file(file.path)
            (Path(folder) / file.path).write_bytes(
                _sanitise(data, file.path) if file.path == "tokenizer_config.json" else data
            )
        (Path(folder) / "config.json").write_text(json.dumps(sanitise_config(manifest.config)[0]))
        advice = "; give the prompt as token ids (--prompt-ids 1,2,3)"
        with foreign_errors(f"the tokenizer of {manifest.name}", advice):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _sanitise(data: bytes, path: str) -> bytes:
    """The tokenizer's settings, without requests for foreign code, and without paths: its files are in its folder."""
    try:
        document: Any = json.loads(data)
    except (ValueError, RecursionError):
        return data  # transformers says what is wrong with it
    if not isinstance(document, dict):
        return data
    clean, dropped = sanitise_config(document)
    for line in dropped:
        logger.warning("%s: ignored, because surfw runs no code from elsewhere: %s", path, line)
    kept = {key: value for key, value in clean.items() if not _PATH_KEY.fullmatch(key)}
    return json.dumps(kept).encode() if dropped or len(kept) < len(clean) else data
