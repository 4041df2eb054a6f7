"""A client for a server's models. Imports neither torch nor the server."""

from surfw.client.connect import probe
from surfw.client.stats import read_stats
from surfw.client.wire_source import WireSource, open_wire_source

__all__ = ["WireSource", "open_wire_source", "probe", "read_stats"]
