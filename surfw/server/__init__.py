"""Serves a store over WebSocket, through a cache. Imports neither torch nor transformers."""

from surfw.server.server import AdvancedWeightServer, WeightServer
from surfw.wire import ServerHealth, ServerStats

__all__ = ["AdvancedWeightServer", "ServerHealth", "ServerStats", "WeightServer"]
