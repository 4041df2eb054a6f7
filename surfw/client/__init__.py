"""A server's models, over the wire. Imports neither torch nor the server."""

from surfw.client.opening import probe
from surfw.client.source import WireSource, open_wire_source

__all__ = ["WireSource", "open_wire_source", "probe"]
