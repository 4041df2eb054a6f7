"""A server's models, over the wire. Imports neither torch nor the server."""

from surfw.client.opening import probe
from surfw.client.source import WireSource, open_wire_source
from surfw.client.stats import is_ready, read_stats

__all__ = ["WireSource", "is_ready", "open_wire_source", "probe", "read_stats"]
