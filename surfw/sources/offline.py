"""What stands behind a disk cache where nobody is contacted: it knows which models are there, and delivers nothing."""

from collections.abc import Sequence

from surfw.errors import IntegrityError, NotFoundError, SurfwError, UnknownModelError
from surfw.manifest import Manifest
from surfw.source import ChunkSource, Read, find_model
from surfw.sources.disk import CacheFolder
from surfw.threads import in_thread

NOT_FETCHED = "nothing is fetched offline (offline, --offline, HF_HUB_OFFLINE)"


class OfflineSource(ChunkSource):
    """The models that a source had, as far as a folder has them."""

    def __init__(self, folder: CacheFolder, url: str) -> None:
        """Stand for the source with this address."""
        self.url = url
        self._folder = folder

    async def models(self) -> list[str]:
        """Their names."""
        return sorted({manifest.name for manifest in await in_thread(self._folder.manifests, self.url)})

    async def resolve(self, name: str | None) -> str:
        """The full name of a model that is there."""
        known, where = await self.models(), f"the disk cache in {self._folder.path}"
        if not known:
            raise NotFoundError(f"{where} holds no model of {self.url}, and {NOT_FETCHED}; 'surfw pull' puts one there")
        return find_model(name, known, where=where)

    async def manifest(self, model: str) -> Manifest:
        """The manifest of that name that was used last."""
        found = await in_thread(self._folder.manifests, self.url)
        for manifest in found:
            if manifest.name == model:
                return manifest
        names = sorted({one.name for one in found})
        raise UnknownModelError(model, names, where=f"the disk cache in {self._folder.path}")

    async def file(self, manifest: Manifest, path: str) -> bytes:
        """Say that it is not there.

        Raises:
            NotFoundError: always.
        """
        raise missing(f"{path} of {manifest.name}", "is not", self._folder)

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Say that it is not there.

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
    """The error for what is not in a folder, or damaged there, and cannot be fetched."""
    kind = IntegrityError if "damaged" in how else NotFoundError
    return kind(f"{what} {how} in the disk cache in {folder.path}, and {NOT_FETCHED}; run it once online")
