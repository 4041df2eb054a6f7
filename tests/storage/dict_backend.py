"""A minimal custom backend, written from the documentation alone."""

import asyncio
from typing import BinaryIO

from surfw.storage import StorageBackend


class DictBackend(StorageBackend):
    """Objects in a dictionary; it counts the loads of each, and waits for the gate if one is set."""

    url = "a dictionary"

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.objects = objects if objects is not None else {}
        self.loads: list[str] = []
        self.gate: asyncio.Event | None = None

    async def load(self, key: str) -> bytes:
        self.loads.append(key)
        if self.gate is not None:
            await self.gate.wait()
        return self.objects[key]

    async def save(self, key: str, data: bytes | BinaryIO) -> None:
        self.objects[key] = data if isinstance(data, bytes) else b"".join(iter(lambda: data.read(1 << 20), b""))

    async def exists(self, key: str) -> bool:
        return key in self.objects

    async def list(self, prefix: str = "") -> list[str]:
        return [key for key in self.objects if key.startswith(prefix)]


class RemovingBackend(DictBackend):
    """The same with the optional fifth method."""

    async def remove(self, key: str) -> None:
        del self.objects[key]
