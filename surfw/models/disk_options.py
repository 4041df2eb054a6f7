"""Options of a disk cache: its size, its folder, and offline use. Does not import torch."""

import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from surfw.config import expect, is_size, parse_size, suggest_size, surfw_home
from surfw.errors import ConfigurationError
from surfw.files import expand_home
from surfw.source import ChunkSource
from surfw.sources.disk import CacheFolder
from surfw.sources.disk_cache import DiskCache
from surfw.storage.origins import is_local_url

OpenSource = Callable[[], Coroutine[Any, Any, ChunkSource]]
"""Opens a source, on its event loop."""

_YES = {"1", "ON", "YES", "TRUE"}
"""True values of `HF_HUB_OFFLINE`, as huggingface_hub reads it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskOptions:
    """Options of a disk cache.

    Attributes:
        budget_bytes: the cache's size limit; None for no cache, except offline.
        folder: the cache's folder; None for `$SURFW_HOME/cache`.
        offline: read only from the cache.
    """

    budget_bytes: int | None = None
    folder: Path | None = None
    offline: bool = False

    def wrap(self, urls: Sequence[str], open_source: OpenSource) -> OpenSource:
        """Return a function that opens a source behind the cache; a local source is opened without one.

        Args:
            urls: the address of the source, or of all its parts, without secrets.
            open_source: opens the source.
        """
        if all(map(is_local_url, urls)) or (self.budget_bytes is None and not self.offline):
            return open_source
        return partial(_open_cached, self, urls[0], open_source)

    def open_folder(self) -> CacheFolder:
        """The cache folder, not opened yet."""
        return CacheFolder(self.folder or default_folder(), self.budget_bytes)


def default_folder() -> Path:
    """The default folder of a disk cache."""
    return surfw_home() / "cache"


def disk_options(
    disk_cache: int | str | None, cache_dir: str | os.PathLike[str] | None, offline: bool | None
) -> DiskOptions:
    """Validate the options.

    Args:
        disk_cache: size limit: a number of bytes, or a size such as `20GB`; None for no cache.
        cache_dir: the folder; None for `$SURFW_HOME/cache`.
        offline: read only from the cache; None for the value of `HF_HUB_OFFLINE` if there is a cache.

    Raises:
        ConfigurationError: an option is invalid.
    """
    expect("cache_dir", cache_dir, str | os.PathLike | None, "a folder or None")
    if offline is not None and not isinstance(offline, bool):
        raise ConfigurationError(f"offline is {offline!a:.80}, expected True, False or None")
    size = parse_size(disk_cache) if isinstance(disk_cache, str) and is_size(disk_cache) else disk_cache
    if isinstance(disk_cache, str) and (meant := suggest_size(disk_cache)):
        raise ConfigurationError(f"disk_cache is {disk_cache!r}, which is bytes; did you mean {meant!r}?")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size <= 0):
        raise ConfigurationError(
            f"disk_cache is {disk_cache!a:.80}, expected a number of bytes, or a size such as '20GB'"
        )
    if offline is None:
        offline = size is not None and os.environ.get("HF_HUB_OFFLINE", "").upper() in _YES
    folder = None if cache_dir is None else expand_home(cache_dir)
    return DiskOptions(budget_bytes=size, folder=folder, offline=offline)


async def _open_cached(options: DiskOptions, url: str, open_source: OpenSource) -> ChunkSource:
    source = None if options.offline else await open_source()
    cache = DiskCache(source, options.open_folder(), url)
    try:
        await cache.open()
    except BaseException:
        await cache.close()
        raise
    return cache
