"""Storages that record requests, wait until they are released, or fail."""

import asyncio
from pathlib import Path

from surfw.errors import StorageError
from surfw.storage import FilesystemBackend


class RecordingBackend(FilesystemBackend):
    """A folder that records the key of every request."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked: list[str] = []

    async def load(self, key: str) -> bytes:
        self.asked.append(key)
        return await super().load(key)

    async def read_into(self, key: str, start: int, destination: memoryview) -> None:
        self.asked.append(key)
        await super().read_into(key, start, destination)

    async def list(self, prefix: str = "") -> list[str]:
        self.asked.append(prefix)
        return await super().list(prefix)


class GatedBackend(RecordingBackend):
    """A folder whose reads of blobs wait for the gate, and fail on request."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.gate = asyncio.Event()
        self.reading = asyncio.Event()
        self.failing = False

    async def read_into(self, key: str, start: int, destination: memoryview) -> None:
        self.reading.set()
        await self.gate.wait()
        if self.failing:
            raise StorageError("the disk is on fire at /secret/place")
        await super().read_into(key, start, destination)

    @property
    def reads(self) -> int:
        """How many reads of blobs were let through."""
        return sum(key.startswith("blobs/") for key in self.asked)
