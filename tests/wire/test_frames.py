"""Our header of a binary frame is the library's."""

import pytest
from websockets.frames import Frame, Opcode

from surfw.wire import binary_header


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65535, 65536, 512 * 1024])
def test_header_is_what_the_library_writes(length: int) -> None:
    payload = bytes(length)
    assert binary_header(length) + payload == Frame(Opcode.BINARY, payload).serialize(mask=False)
