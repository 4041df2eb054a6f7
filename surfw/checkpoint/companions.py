"""The files beside the weights: those of the tokenizer, chat templates, and how sentences are embedded.

`TOKENIZER_FILES` are the names that transformers' tokenizer classes give their files (`vocab_files_names`), and the
ones it looks for by itself; a test compares them with the release that is installed. Files of sentence-transformers say
which prompt a text gets, and how the hidden states of its tokens become one vector; it names their folders by number.
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
"""Files that tokenizers are made of, each in the checkpoint's own folder."""

MODULES_FILE = "modules.json"
SENTENCE_CONFIG_FILE = "config_sentence_transformers.json"
SENTENCE_FILES = (
    MODULES_FILE, SENTENCE_CONFIG_FILE, "sentence_bert_config.json", "sentence_roberta_config.json",
    "sentence_distilbert_config.json", "sentence_camembert_config.json", "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json", "sentence_xlnet_config.json",
)  # fmt: skip
"""What sentence-transformers writes beside the weights, in the order in which it looks for settings of its first
module."""

TEMPLATE_FOLDER = "additional_chat_templates"
_SENTENCE_FOLDER = re.compile(r"[0-9]+_[A-Z][A-Za-z]*")
_PATTERNS = re.compile(
    rf"tokenizer\.[0-9][0-9.]*\.json|{TEMPLATE_FOLDER}/[A-Za-z0-9_][A-Za-z0-9._-]*\.jinja"
    rf"|{_SENTENCE_FOLDER.pattern}/config\.json"
)
_KNOWN = frozenset((*TOKENIZER_FILES, *SENTENCE_FILES))


def is_companion(path: str) -> bool:
    """Whether a file of a checkpoint, named from its folder on, is one of those."""
    return path in _KNOWN or bool(_PATTERNS.fullmatch(path))


def is_of_sentences(path: str) -> bool:
    """Whether a file says how sentences are embedded, and does not belong to a tokenizer."""
    return path in SENTENCE_FILES or bool(_SENTENCE_FOLDER.fullmatch(path.partition("/")[0]))


def list_files(folder: Path) -> set[str]:
    """The files of a checkpoint's folder, and of those folders in it where companions may be.

    Raises:
        OSError: it cannot be read.
    """
    names = set()
    for path in folder.iterdir():
        if path.is_file():
            names.add(path.name)
        elif path.is_dir() and (path.name == TEMPLATE_FOLDER or _SENTENCE_FOLDER.fullmatch(path.name)):
            names |= {f"{path.name}/{inner.name}" for inner in path.iterdir() if inner.is_file()}
    return names


def companions(names: Iterable[str]) -> list[str]:
    """Those among the files of a checkpoint, in order."""
    return sorted(filter(is_companion, names))


def module_folders(document: bytes) -> list[str]:
    """The folders that `modules.json` names; none if it is not such a document, which is said where it is used."""
    try:
        modules = json.loads(document)
    except (ValueError, RecursionError):
        return []
    paths = [one.get("path") for one in modules if isinstance(one, dict)] if isinstance(modules, list) else []
    return [path for path in paths if isinstance(path, str) and path]
