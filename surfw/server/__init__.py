"""A store behind a WebSocket, through a cache. Imports neither torch nor transformers."""

from surfw.server.server import WeightServer

__all__ = ["WeightServer"]
