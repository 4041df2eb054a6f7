"""A model's tokenizer, from the files its manifest names. No code that comes with a model is run."""

import logging
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from surfw.checkpoint.companions import is_companion, is_of_sentences
from surfw.manifest import Manifest
from surfw.skeleton.tokenizers import make_tokenizer, registered_names

logger = logging.getLogger("surfw.models")


def open_tokenizer(manifest: Manifest, read_file: Callable[[str], bytes]) -> PreTrainedTokenizerBase | None:
    """Build a model's tokenizer from the files that its manifest lists; None if it lists none.

    Raises:
        IntegrityError: a file does not match the manifest.
        UnsupportedModelError: transformers cannot build a tokenizer from the files.
    """
    files = {}
    for file in manifest.files:
        if is_of_sentences(file.path):
            continue
        if is_companion(file.path) or file.path in registered_names():
            files[file.path] = read_file(file.path)
        else:
            logger.warning("%s: ignored, because surfw knows no tokenizer with such a file", file.path)
    if not files:
        return None
    advice = "; give the prompt as token ids (--prompt-ids 1,2,3)"
    return make_tokenizer(files, manifest.config, where=manifest.name, advice=advice)
