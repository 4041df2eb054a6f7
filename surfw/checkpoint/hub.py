"""Download models from the Hugging Face hub: only the files that are needed, into the hub library's own cache.

Small files are fetched first, so that a checkpoint that cannot be chunked is refused before gigabytes are downloaded.
If the hub does not answer, a copy in the cache is used. The library retries, resumes and authenticates; its errors are
translated here.
"""

import glob
import logging
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surfw.checkpoint.companions import companions
from surfw.checkpoint.layout import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    HUB,
    find_adapter_weights,
    find_weights,
    no_checkpoint,
    read_config,
    read_weights,
)
from surfw.config import display_url
from surfw.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

logger = logging.getLogger("surfw.checkpoint")

_ANSWER_SECONDS = 10


def download_model(
    repo_id: str,
    revision: str | None,
    variant: str | None = None,
    *,
    show_progress: bool = False,
    may_be_quantised: bool = False,
) -> Path:
    """Fetch the files of a model that are not in the hub's cache yet, and return their directory in it.

    See `open_checkpoint` for the arguments and errors.
    """
    try:
        names = {file.rfilename for file in _ask(repo_id, revision).siblings or ()}
    except Exception as exc:  # noqa: BLE001  # the library also raises errors of its HTTP client, whichever that is
        return _find_cached(repo_id, revision, exc)
    entry = find_weights(names, f"{HUB}{repo_id}", variant)
    if CONFIG_FILE not in names:
        raise no_checkpoint(f"{HUB}{repo_id}")
    small = {CONFIG_FILE, GENERATION_FILE} & names | set(companions(names))
    fetch = partial(_fetch, repo_id, revision, show_progress=show_progress)
    folder = fetch(small | ({entry} if entry.endswith(".json") else set()))
    read_config(folder, may_be_quantised=may_be_quantised)
    shards = read_weights(folder, entry).shards
    if missing := set(shards) - names:
        raise CheckpointError(
            f"{HUB}{repo_id} is incomplete: its {entry} names {min(missing)}, which is not there; ask its owner"
        )
    return fetch(shards)


def download_adapter(
    repo_id: str, revision: str | None, check: Callable[[Path], object], *, show_progress: bool = False
) -> Path:
    """Fetch the files of an adapter that are not in the hub's cache yet, and return their directory in it.

    `check` refuses unsupported settings before the weights are fetched.
    """
    try:
        names = {file.rfilename for file in _ask(repo_id, revision).siblings or ()}
    except Exception as exc:  # noqa: BLE001  # as above
        return _find_cached(repo_id, revision, exc, ADAPTER_CONFIG_FILE)
    weights = find_adapter_weights(names, f"{HUB}{repo_id}")
    fetch = partial(_fetch, repo_id, revision, show_progress=show_progress)
    check(fetch({ADAPTER_CONFIG_FILE} | set(companions(names))))
    return fetch([weights])


def resolve_commit(repo_id: str, revision: str | None) -> str:
    """Return the commit to which a branch or tag of a hub model currently points.

    Raises:
        CheckpointError: the model cannot be reached, or has no such revision.
    """
    from huggingface_hub import constants

    try:
        found = _ask(repo_id, revision).sha
    except Exception as exc:
        raise CheckpointError(
            f"{HUB}{repo_id} cannot be reached at {display_url(constants.ENDPOINT)} ({_reason(exc, revision)}); "
            "check the name and the network, or name another hub in HF_ENDPOINT"
        ) from exc
    if not found:
        raise CheckpointError(f"the hub does not say which commit of {repo_id} it has")
    return found


def _ask(repo_id: str, revision: str | None) -> "ModelInfo":
    """Request the repository's metadata: a single request, which fails at once if the hub is unreachable."""
    from huggingface_hub import HfApi

    return HfApi().model_info(repo_id, revision=revision, timeout=_ANSWER_SECONDS)


def _fetch(repo_id: str, revision: str | None, names: Collection[str], *, show_progress: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """Draws on the real stderr, past rich's proxy, or never, even if the environment enables bars."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            settings["file"] = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
            if not show_progress:
                settings["disable"] = True
            super().__init__(*args, **settings)  # type: ignore[no-untyped-call]

    patterns = [glob.escape(name) for name in sorted(names)]
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, tqdm_class=Bar))
    except Exception as exc:
        raise CheckpointError(
            f"{HUB}{repo_id} could not be downloaded ({_reason(exc, revision)}); run again, what has arrived is kept"
        ) from exc


def _find_cached(repo_id: str, revision: str | None, cause: Exception, file: str = CONFIG_FILE) -> Path:
    """Return the copy of an earlier download; used if the hub does not answer."""
    from huggingface_hub import snapshot_download

    reason = _reason(cause, revision)
    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=[file], local_files_only=True)
    except Exception:  # noqa: BLE001  # as above
        raise CheckpointError(
            f"model {repo_id!r} is neither a directory here nor a hub model that can be reached ({reason}); "
            f"{_advise(cause)}, or give a local directory"
        ) from cause
    logger.warning("%s: using the copy in %s, because the hub could not be asked (%s)", repo_id, folder, reason)
    return Path(folder)


def _advise(error: Exception) -> str:
    """Say what to check first: the name if the hub itself answered, otherwise the network."""
    from huggingface_hub import errors

    answers = (errors.HFValidationError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    return "check the name" if isinstance(error, answers) else "check the network and the name"


def _reason(error: Exception, revision: str | None) -> str:
    """Describe briefly why the hub request failed."""
    from huggingface_hub import errors

    known: dict[type[Exception], str] = {
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
        errors.HFValidationError: "it cannot be a hub id",
        errors.GatedRepoError: "access is restricted: ask for it on the model's page, then run 'hf auth login'",
        errors.RepositoryNotFoundError: "the hub has no such model, or it is private",
        errors.RevisionNotFoundError: f"the model has no revision {revision!r}",
    }
    for kind, text in known.items():
        if isinstance(error, kind):
            return text
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
