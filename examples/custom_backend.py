"""A custom storage backend: chunk a model into a dictionary, serve it from there, and run it.

    python examples/custom_backend.py

It works offline, with the small model that comes with surfw. Test your own backends with `surfw.testing`.
"""

import asyncio
from typing import BinaryIO

from surfw import ModelChunker, NotFoundError, StorageBackend, StreamingModel, WeightServer, demo_checkpoint


class DictBackend(StorageBackend):
    """A backend that stores objects in a dictionary, with only the four required methods."""

    url = "a dictionary"

    def __init__(self) -> None:
        """Create an empty storage."""
        self.objects: dict[str, bytes] = {}

    async def load(self, key: str) -> bytes:
        """Return the whole object."""
        if key not in self.objects:
            raise NotFoundError(f"{key} is not in the dictionary")
        return self.objects[key]

    async def save(self, key: str, data: bytes | BinaryIO) -> None:
        """Store an object; large objects are passed as a binary file."""
        self.objects[key] = data if isinstance(data, bytes) else data.read()

    async def exists(self, key: str) -> bool:
        """Return whether the object exists."""
        return key in self.objects

    async def list(self, prefix: str = "") -> list[str]:
        """Return the keys that start with the prefix."""
        return [key for key in self.objects if key.startswith(prefix)]


async def main() -> None:
    """Chunk, serve and run the model."""
    backend = DictBackend()
    chunker = ModelChunker(str(demo_checkpoint()), storage_backend=backend)
    await chunker.chunk_model()
    print(f"The dictionary holds {len(backend.objects)} objects.")

    prompt = "Weight streaming is"
    print(prompt, end="", flush=True)
    async with (
        WeightServer(storage_backend=backend, port=0) as server,
        await StreamingModel.open_async(server.url, model="demo") as model,
    ):
        async for text in model.stream(prompt, max_new_tokens=40):
            print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    asyncio.run(main())
