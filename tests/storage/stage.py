"""Actors that use one storage, one operation at a time, in the order of a schedule.

Each actor is a machine of its own: it has its own spool, and its own backend for the shared objects.
"""

import asyncio
from collections import deque
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from surfw.errors import StorageError
from tests.storage.dict_backend import RemovingBackend


class Stage:
    """The actors, and what they wait for."""

    def __init__(self, objects: dict[str, bytes], folder: Path) -> None:
        self.objects = objects
        self.folder = folder
        self.removed: list[str] = []
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._killed: set[str] = set()
        self._news = asyncio.Event()

    def machine(self, actor: str) -> "Machine":
        """Return the actor's backend."""
        self._waiting[actor] = deque()
        return Machine(self, actor)

    def enter(self, actor: str, work: Coroutine[Any, Any, Any]) -> None:
        """Start the actor, up to its first operation."""
        self._killed.discard(actor)
        self._tasks[actor] = asyncio.create_task(work)
        self._tasks[actor].add_done_callback(lambda _: self._news.set())

    def kill(self, actor: str) -> None:
        """Kill the actor: none of its later operations reaches the storage."""
        self._killed.add(actor)
        while self._waiting[actor]:
            self._waiting[actor].popleft().set_result(None)

    async def turn(self, actor: str) -> None:
        """Wait until this operation may run."""
        if actor not in self._killed:
            mine = asyncio.get_running_loop().create_future()
            self._waiting[actor].append(mine)
            self._news.set()
            await mine
        if actor in self._killed:
            raise StorageError(f"{actor} was killed")

    async def step(self, actor: str) -> bool:
        """Run one operation of the actor; return False if it has ended."""
        while not self._waiting[actor]:
            if self._tasks[actor].done():
                return False
            self._news.clear()
            await self._news.wait()
        self._waiting[actor].popleft().set_result(None)
        await asyncio.sleep(0)  # now the operation runs
        return True

    async def play(self, schedule: Iterable[str]) -> None:
        """Run operations in this order, skipping actors that have ended."""
        for actor in schedule:
            await self.step(actor)

    async def finish(self) -> dict[str, Any]:
        """Run all actors in turn until they have ended; return the result or error of each."""
        while [await self.step(actor) for actor in self._tasks].count(True):
            pass
        outcomes = await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        return dict(zip(self._tasks, outcomes, strict=True))


class Machine(RemovingBackend):
    """The shared objects, as one actor accesses them."""

    def __init__(self, stage: Stage, actor: str) -> None:
        super().__init__(stage.objects)
        self._stage, self._actor = stage, actor

    async def load(self, key: str) -> bytes:
        await self._stage.turn(self._actor)
        return await super().load(key)

    async def save(self, key: str, data: bytes | BinaryIO) -> None:
        await self._stage.turn(self._actor)
        await super().save(key, data)

    async def exists(self, key: str) -> bool:
        await self._stage.turn(self._actor)
        return await super().exists(key)

    async def list(self, prefix: str = "") -> list[str]:
        await self._stage.turn(self._actor)
        return await super().list(prefix)

    async def remove(self, key: str) -> None:
        await self._stage.turn(self._actor)
        if key in self.objects:
            self._stage.removed.append(key)
        await super().remove(key)

    async def size(self, key: str) -> int:
        await self._stage.turn(self._actor)
        return len(self.objects[key])

    def spool(self) -> Path:
        return self._stage.folder / self._actor / "partial"
