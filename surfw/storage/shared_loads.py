"""Ranges of objects in a storage that can only load them whole: all ranges of an object share one load.

Invariants:

- Ranges of an object that is being loaded join that load (*single-flight*), and later ones find it loaded.
- A loaded object is let go when its last byte has been read, or when others need its place: what is kept takes at most
  the budget, or is the one object that was loaded last.
- A load that fails fails those who wait for it; the next range tries anew. Giving up a range stops no load.
- Tasks belong to an event loop. One of another loop is never waited for, so loops may follow one another.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable


class SharedLoads:
    """Objects that are being loaded, and those that were and have bytes left to read."""

    def __init__(self, load: Callable[[str], Awaitable[bytes]], budget_bytes: int) -> None:
        """Start empty; `load` gets a whole object by its key."""
        self.kept_bytes = 0
        self._load = load
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._loading: dict[str, asyncio.Task[bytes]] = {}

    async def get(self, key: str, stop: int | None = None) -> bytes:
        """The whole object, of which the caller reads the bytes before `stop`; None if it reads none of them yet."""
        data = self._kept.get(key)
        if data is None:
            data = await asyncio.shield(self._task(key))
        else:
            self._kept.move_to_end(key)
        if stop is not None and stop >= len(data) and self._kept.get(key) is data:
            self._drop(key)
        return data

    def forget(self, key: str) -> None:
        """What was loaded of an object is no longer what the storage has."""
        self._loading.pop(key, None)
        self._drop(key)

    async def close(self) -> None:
        """Stop loading, and let go of everything."""
        mine = [task for task in self._loading.values() if task.get_loop() is asyncio.get_running_loop()]
        for task in mine:
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)
        self._loading.clear()
        self._kept.clear()
        self.kept_bytes = 0

    def _task(self, key: str) -> asyncio.Task[bytes]:
        task = self._loading.get(key)
        if task is None or task.get_loop() is not asyncio.get_running_loop():
            task = asyncio.create_task(self._run(key), name=f"surfw load {key}")
            task.add_done_callback(_look)
            self._loading[key] = task
        return task

    async def _run(self, key: str) -> bytes:
        task = asyncio.current_task()
        current = False
        try:
            data = await self._load(key)
        finally:
            current = self._loading.get(key) is task
            if current:  # not forgotten, and not another loop's by now
                del self._loading[key]
        if current:
            self._keep(key, data)
        return data

    def _keep(self, key: str, data: bytes) -> None:
        self._drop(key)
        self._kept[key] = data
        self.kept_bytes += len(data)
        while self.kept_bytes > self._budget_bytes and len(self._kept) > 1:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: str) -> None:
        self.kept_bytes -= len(self._kept.pop(key, b""))


def _look(task: asyncio.Task[bytes]) -> None:
    """Take note of an error that nobody waits for any more."""
    if not task.cancelled():
        task.exception()
