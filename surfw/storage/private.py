"""Where the private stores lie: each has the manifest of one model that is served from where it is."""

from pathlib import Path

from blake3 import blake3

from surfw.config import surfw_home


def private_store(place: str) -> Path:
    """The folder of the store for the one model that lies at a place and is not copied."""
    address = place if "://" in place else str(Path(place).expanduser().absolute())
    return surfw_home() / "in-place" / blake3(address.rstrip("/").encode()).hexdigest()[:32]
