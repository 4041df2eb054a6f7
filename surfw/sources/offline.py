"""The source behind an offline disk cache: it knows the cached models, and delivers nothing else."""

from collections.abc import Sequence

from surfw.errors import IntegrityError, NotFoundError, SurfwError, UnknownModelError
from surfw.manifest import Manifest
from surfw.source import ChunkSource, Read, find_model
from surfw.sources.disk import CacheFolder
from surfw.threads import in_thread

NOT_FETCHED = "nothing is fetched offline (offline, --offline, HF_HUB_OFFLINE)"


class OfflineSource(ChunkSource):
    """The cached models of a source."""

    def __init__(self, folder: CacheFolder, url: str) -> None:
        """Stand in for the source with this address."""
        self.url = url
        self._folder = folder

    async def models(self) -> list[str]:
        """Return the names of the cached models."""
        return sorted({manifest.name for manifest in await in_thread(self._folder.manifests, self.url)})

    async def resolve(self, name: str | None) -> str:
        """Return the full name of a cached model."""
        known, where = await self.models(), f"the disk cache in {self._folder.path}"
        if not known:
            raise NotFoundError(f"{where} holds no model of {self.url}, and {NOT_FETCHED}; 'surfw pull' puts one there")
        return find_model(name, known, where=where)

    async def manifest(self, model: str) -> Manifest:
        """Return the most recently used manifest of this name."""
        found = await in_thread(self._folder.manifests, self.url)
        for manifest in found:
            if manifest.name == model:
                return manifest
        names = sorted({one.name for one in found})
        raise UnknownModelError(model, names, where=f"the disk cache in {self._folder.path}")

    async def file(self, manifest: Manifest, path: str) -> bytes:
        """Report the file as missing.

        Raises:
            NotFoundError: always.
        """
        raise missing(f"{path} of {manifest.name}", "is not", self._folder)

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Report the bytes as missing.

        Raises:
            NotFoundError: always.
        """
        del priority
        size = sum(read.stop - read.start for read in reads)
        what = f"chunk {reads[0].chunk.name} of {manifest.name}"
        raise missing(what, f"is not whole: {size} bytes are missing", self._folder)

    async def close(self) -> None:
        """Do nothing."""


def missing(what: str, how: str, folder: CacheFolder) -> SurfwError:
    """Return the error for bytes that are missing or damaged in the cache and cannot be fetched."""
    kind = IntegrityError if "damaged" in how else NotFoundError
    return kind(f"{what} {how} in the disk cache in {folder.path}, and {NOT_FETCHED}; run it once online")
