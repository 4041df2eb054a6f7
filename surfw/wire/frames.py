"""The header of a binary WebSocket frame from a server: RFC 6455, section 5.2.

A server sends weights as a header and then the cached bytes themselves, so that they are not copied into a frame first.
Everything else about WebSocket is the library's: handshake, control frames, closing, and all of the receiving side.
"""

import struct

_FINAL_BINARY = 0x82


def binary_header(length: int) -> bytes:
    """The header of an unfragmented, unmasked binary frame with `length` bytes of payload."""
    if length < 126:
        return struct.pack("!BB", _FINAL_BINARY, length)
    if length < 1 << 16:
        return struct.pack("!BBH", _FINAL_BINARY, 126, length)
    return struct.pack("!BBQ", _FINAL_BINARY, 127, length)
