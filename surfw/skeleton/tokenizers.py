"""Makes tokenizers from their files with transformers, and detects errors that transformers does not report.

If a vocabulary is missing, transformers builds a tokenizer that knows only its special tokens; if a library is missing,
its error names another one. Both are errors here. No code that comes with a model is run.
"""

import importlib.util
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from surfw.errors import CheckpointError, SurfwError, UnsupportedModelError
from surfw.skeleton.guards import foreign_errors, no_hub
from surfw.skeleton.sanitise import sanitise_config

logger = logging.getLogger("surfw.skeleton")

_PATH_KEY = re.compile(r"_?name_or_path|vocab|merges|.*_files?|.*_path")
_SETTINGS = "tokenizer_config.json"
_WHOLE = re.compile(r"tokenizer(\.[0-9][0-9.]*)?\.json|tekken\.json|tokenizer\.model.*|tiktoken\.model")
"""Files from which any tokenizer of the library `tokenizers` can be made, even if its class does not name them."""

_NOT_NEEDED = {"tokenizer_file", "tokenizer_config_file", "normalizer_file", "target_vocab_file", "spm_file"}
"""Files named by tokenizer classes whose absence is no error here: optional, or transformers itself fails without."""

_RANKS = re.compile(rb"[A-Za-z0-9+/=]+ [0-9]+\r?\n")
"""Matches the first line of a tiktoken file; SentencePiece files are binary."""

_TEXTS = (
    "The weights arrive while the model runs, don't they? 12,345.6",
    "Ünïcödé – 漢字かな, кириллица, العربية 🙂",
    "  two  spaces,\ta tab\nand a new line; def f(x): return x[0] != 'ab'",
)
"""Sample texts for comparing two tokenizers."""


def registered_names() -> set[str]:
    """The vocabulary file names of tokenizer classes registered with `AutoTokenizer.register`."""
    auto = transformers.models.auto.tokenization_auto
    classes = [*auto.REGISTERED_TOKENIZER_CLASSES.values(), *auto.TOKENIZER_MAPPING._extra_content.values()]  # noqa: SLF001 - where they are kept
    return {
        file for cls in classes if isinstance(names := getattr(cls, "vocab_files_names", None), dict)
        for file in names.values() if isinstance(file, str)
    }  # fmt: skip


def make_tokenizer(
    files: Mapping[str, bytes], config: Mapping[str, Any], *, where: str, advice: str = ""
) -> PreTrainedTokenizerBase:
    """Make a tokenizer from files, given by path; `advice` is appended to every error.

    Raises:
        UnsupportedModelError: transformers cannot make one, or a library or the vocabulary is missing.
    """
    what = f"the tokenizer of {where}"
    if "tokenizer.json" not in files and (lack := _missing_library(files)):
        raise UnsupportedModelError(f"{what} needs {lack}{advice}")
    with tempfile.TemporaryDirectory(prefix="surfw-tokenizer-") as folder:
        for path, data in files.items():
            place = Path(folder, path)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(_sanitise(data, path) if path == _SETTINGS else data)
        Path(folder, "config.json").write_text(json.dumps(sanitise_config(config)[0]))
        tokenizer = _open(folder, what, advice)
    if lack := _missing_vocabulary(tokenizer, files):
        raise UnsupportedModelError(f"{what} has no vocabulary: {lack}{advice}")
    return tokenizer


def check_tokenizer(folder: Path, files: Mapping[str, bytes], config: Mapping[str, Any], *, where: str) -> None:
    """Check that the tokenizer made from the kept files equals the one in the checkpoint's folder.

    If transformers can make no tokenizer from the kept files, this logs a warning: the model still takes token ids.

    Args:
        folder: the checkpoint's folder.
        files: the kept tokenizer files, by path.
        config: the checkpoint's configuration.
        where: names the checkpoint in errors.

    Raises:
        CheckpointError: the vocabulary is missing, or the two tokenizers give different token ids.
    """
    try:
        kept = make_tokenizer(files, config, where=where)
    except UnsupportedModelError as exc:
        if "has no vocabulary" in str(exc):
            raise CheckpointError(
                f"{exc}; download it, or remove {_SETTINGS} from there to have the model without a tokenizer"
            ) from exc
        logger.warning("%s; without it, the model takes token ids only", exc)
        return
    try:
        own = _open(str(folder), f"the tokenizer of {where}", "")
    except SurfwError:  # such as a tokenizer that needs foreign code: there is nothing to compare with
        return
    for text in _TEXTS:
        expected, seen = _ids(own, text), _ids(kept, text)
        if expected != seen:
            raise CheckpointError(
                f"the tokenizer of {where} gives other token ids when it is made of {', '.join(sorted(files))} alone "
                f"(for {text[:30]!r}: {str(seen)[:40]}, not {str(expected)[:40]}); save it again with "
                "save_pretrained, or remove its files to have the model without a tokenizer"
            )


def _ids(tokenizer: Any, text: str) -> list[int] | str:
    """The token ids of a text, or the error of a tokenizer that cannot encode it."""
    try:
        return list(tokenizer(text)["input_ids"])
    except Exception as exc:  # noqa: BLE001 - tokenizers may raise anything
        return f"{type(exc).__name__}: {exc}"


def _open(folder: str, what: str, advice: str) -> PreTrainedTokenizerBase:
    with foreign_errors(what, advice), no_hub():
        opened: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not isinstance(opened, PreTrainedTokenizerBase):
            raise UnsupportedModelError(f"{what} is a {type(opened).__name__}, which surfw does not know{advice}")
        return opened


def _missing_library(files: Mapping[str, bytes]) -> str | None:
    """The missing library that is needed to read these files; None if no library is missing."""
    models = {path: data for path, data in files.items() if path.endswith((".model", ".spm"))}
    ranks = [path for path, data in models.items() if _RANKS.match(data)]
    pieces = [path for path in models if path not in ranks]
    lacks = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
    if pieces and lacks:
        return f"the library sentencepiece for {pieces[0]}: pip install 'surfw[sentencepiece]'"
    if ranks and not _is_installed("tiktoken"):
        return f"the library tiktoken for {ranks[0]}: pip install tiktoken"
    return None


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _missing_vocabulary(tokenizer: PreTrainedTokenizerBase, files: Mapping[str, bytes]) -> str | None:
    """Describe the missing vocabulary files of a tokenizer; None if it has all that it needs."""
    untyped: Any = tokenizer
    named: dict[str, str] = {key: file for key, file in untyped.vocab_files_names.items() if isinstance(file, str)}
    wanted = [file for key, file in named.items() if key not in _NOT_NEEDED]
    reads_whole = "tokenizer_file" in named or untyped.is_fast
    is_whole = reads_whole and any(_WHOLE.fullmatch(path) for path in files)
    absent = [] if is_whole else [file for file in wanted if file not in files]
    if not absent and (not named or len(tokenizer) > len(untyped.added_tokens_decoder)):
        return None
    there = ", ".join(sorted(files)) or "no file"
    expected = " and ".join(absent or wanted) + (" or tokenizer.json" if "tokenizer_file" in named else "")
    return f"{type(tokenizer).__name__} is made of {expected}, and there is {there}"


def _sanitise(data: bytes, path: str) -> bytes:
    """Remove requests for foreign code and paths from a tokenizer's settings; its files are in its folder."""
    try:
        document: Any = json.loads(data)
    except (ValueError, RecursionError):
        return data  # transformers reports the error
    if not isinstance(document, dict):
        return data
    clean, dropped = sanitise_config(document)
    for line in dropped:
        logger.warning("%s: ignored, because surfw runs no code from elsewhere: %s", path, line)
    kept = {key: value for key, value in clean.items() if not _PATH_KEY.fullmatch(key)}
    return json.dumps(kept).encode() if dropped or len(kept) < len(clean) else data
