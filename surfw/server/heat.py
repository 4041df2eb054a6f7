"""What of each model is in a server's cache, and how often it was hit there: a cell for each chunk, in its order."""

from collections import Counter, defaultdict

from surfw.config import PAGE_BYTES
from surfw.manifest import Form, Manifest
from surfw.server.catalog import Catalog
from surfw.server.pages import PageCache
from surfw.wire import ModelHeat

_MOST_MODELS, _MOST_CELLS = 16, 256


def heat_of(catalog: Catalog, pages: PageCache) -> list[ModelHeat]:
    """The models that were read last; a chunk's share is that of the form which is cached most."""
    cached: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for page in pages.cache:
        cached[page.object].append((page.start, page.stop))
    return [_model(manifest, cached, pages.hits) for manifest in catalog.known()[-_MOST_MODELS:]]


def _model(manifest: Manifest, cached: dict[str, list[tuple[int, int]]], hits: Counter[tuple[str, int]]) -> ModelHeat:
    chunks = manifest.chunks[:_MOST_CELLS]
    return {
        "model": manifest.name,
        "chunks": len(manifest.chunks),
        "resident": [round(max((_share(form, cached) for form in one.forms), default=0.0), 2) for one in chunks],
        "hits": [sum(_hits(form, hits) for form in one.forms) for one in chunks],
    }


def _share(form: Form, cached: dict[str, list[tuple[int, int]]]) -> float:
    held = sum(
        max(0, min(stop, place.stop) - max(start, place.start))
        for place in form.locations
        for start, stop in cached.get(place.object, ())
    )
    return min(1.0, held / form.stored_bytes) if form.stored_bytes else 0.0


def _hits(form: Form, hits: Counter[tuple[str, int]]) -> int:
    return sum(
        hits[place.object, start] for place in form.locations for start in range(place.start, place.stop, PAGE_BYTES)
    )
