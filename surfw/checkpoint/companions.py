"""Companion files of the weights: tokenizer files, chat templates, and settings for sentence embeddings.

`TOKENIZER_FILES` are the file names of transformers' tokenizer classes (`vocab_files_names`), and those that
transformers itself looks for; a test compares them with the installed release. Files of sentence-transformers define
the prompts for texts and the pooling of token states into one vector; its folders have numbered names.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "spm.model", "spm_char.model",
    "sentencepiece.bpe.model", "sentencepiece.model", "tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v2",
    "tokenizer.model.v3", "tokenizer.model.v7", "tiktoken.model", "tekken.json", "bpe.codes", "dict.txt",
    "source.spm", "target.spm", "target_vocab.json", "vocab-src.json", "vocab-tgt.json", "entity_vocab.json",
    "emoji.json", "normalizer.json", "word_shape.json", "word_pronunciation.json", "prophetnet.tokenizer",
    "byte_maps.json",
)  # fmt: skip
"""Tokenizer files, which lie directly in the checkpoint's folder."""

MODULES_FILE = "modules.json"
SENTENCE_CONFIG_FILE = "config_sentence_transformers.json"
SENTENCE_FILES = (
    MODULES_FILE, SENTENCE_CONFIG_FILE, "sentence_bert_config.json", "sentence_roberta_config.json",
    "sentence_distilbert_config.json", "sentence_camembert_config.json", "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json", "sentence_xlnet_config.json",
)  # fmt: skip
"""Files that sentence-transformers writes next to the weights, in the order in which it looks for the settings of its
first module."""

TEMPLATE_FOLDER = "additional_chat_templates"
_SENTENCE_FOLDER = re.compile(r"[0-9]+_[A-Z][A-Za-z]*")
_PATTERNS = re.compile(
    rf"tokenizer\.[0-9][0-9.]*\.json|{TEMPLATE_FOLDER}/[A-Za-z0-9_][A-Za-z0-9._-]*\.jinja"
    rf"|{_SENTENCE_FOLDER.pattern}/config\.json"
)
_KNOWN = frozenset((*TOKENIZER_FILES, *SENTENCE_FILES))


def is_companion(path: str) -> bool:
    """Whether a file, by its path in the checkpoint's folder, is a companion."""
    return path in _KNOWN or bool(_PATTERNS.fullmatch(path))


def is_of_sentences(path: str) -> bool:
    """Whether a file is for sentence embeddings, and not for a tokenizer."""
    return path in SENTENCE_FILES or bool(_SENTENCE_FOLDER.fullmatch(path.partition("/")[0]))


def list_files(folder: Path) -> set[str]:
    """List the files in a checkpoint's folder, and in those of its subfolders that may have companions.

    Raises:
        OSError: the folder cannot be read.
    """
    names = set()
    for path in folder.iterdir():
        if path.is_file():
            names.add(path.name)
        elif path.is_dir() and (path.name == TEMPLATE_FOLDER or _SENTENCE_FOLDER.fullmatch(path.name)):
            names |= {f"{path.name}/{inner.name}" for inner in path.iterdir() if inner.is_file()}
    return names


def companions(names: Iterable[str]) -> list[str]:
    """Return the companions among the files of a checkpoint, sorted."""
    return sorted(filter(is_companion, names))


def module_folders(document: bytes) -> list[str]:
    """Return the folders that `modules.json` names; none if it is invalid, which is reported where it is used."""
    try:
        modules = json.loads(document)
    except (ValueError, RecursionError):
        return []
    paths = [one.get("path") for one in modules if isinstance(one, dict)] if isinstance(modules, list) else []
    return [path for path in paths if isinstance(path, str) and path]
