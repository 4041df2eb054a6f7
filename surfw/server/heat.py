"""How much of each model is cached, and how often it was hit: a value for each chunk, in order.

This is computed for every request for statistics, in the event loop. So the cached pages are sorted once, and a chunk's
share is the difference of two prefix sums. Pages are cut from the start of each location, so none spans two locations.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate

from surfw.manifest import Form, Manifest
from surfw.server.catalog import Catalog
from surfw.server.pages import PageCache
from surfw.wire import ModelHeat

_MOST_MODELS, _MOST_CELLS = 16, 256


class _Sums:
    """Prefix sums of counts at positions in objects."""

    def __init__(self, counts: Iterable[tuple[str, int, int]]) -> None:
        """Sort counts, each given as an object, a position in it, and a number."""
        found: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for name, place, count in counts:
            found[name].append((place, count))
        self._sums = {
            name: ([place for place, _ in pairs], [0, *accumulate(count for _, count in pairs)])
            for name, pairs in ((name, sorted(pairs)) for name, pairs in found.items())
        }

    def within(self, form: Form) -> int:
        """Return the sum of the counts within a form's locations."""
        total = 0
        for location in form.locations:
            places, sums = self._sums.get(location.object, ([], [0]))
            total += sums[bisect_left(places, location.stop)] - sums[bisect_left(places, location.start)]
        return total


def heat_of(catalog: Catalog, pages: PageCache) -> list[ModelHeat]:
    """Return the heat of the most recently read models; a chunk's share is that of its most cached form."""
    held = _Sums((page.object, page.start, page.size) for page in pages.cache)
    hits = _Sums((name, start, count) for (name, start), count in pages.hits.items())
    return [_model(manifest, held, hits) for manifest in catalog.known()[-_MOST_MODELS:]]


def _model(manifest: Manifest, held: _Sums, hits: _Sums) -> ModelHeat:
    chunks = manifest.chunks[:_MOST_CELLS]
    return {
        "model": manifest.name,
        "chunks": len(manifest.chunks),
        "resident": [round(max((_share(form, held) for form in one.forms), default=0.0), 2) for one in chunks],
        "hits": [sum(map(hits.within, one.forms)) for one in chunks],
    }


def _share(form: Form, held: _Sums) -> float:
    return min(1.0, held.within(form) / form.stored_bytes) if form.stored_bytes else 0.0
