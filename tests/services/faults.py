"""A TCP proxy that does to bytes what networks do, by a schedule that a seed makes: the same faults at each run."""

import contextlib
import random
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

DOWN, UP = "down", "up"
KINDS = ("delay", "throttle", "cut", "flip", "truncate", "half-open", "reset", "duplicate")
_ANNOUNCEMENT, _BEGINNING = b'{"type":"data"', b'{"type":"begin"'
_READ_BYTES = 1 << 14
_SLOW_BYTES = 1 << 11


@dataclass(frozen=True)
class Fault:
    """One thing that happens to the bytes of one direction of a connection.

    Attributes:
        kind: one of `KINDS`.
        direction: `DOWN` to the client, `UP` to the server.
        at: how many bytes go before, counted from `marker`, or from the connection's first byte if it is empty.
        marker: a text in the stream, such as the beginning of an announcement; its next occurrence counts.
        amount: seconds of a delay or throttle; which bit is flipped; bytes that are left out, or come twice.
    """

    kind: str
    direction: str
    at: int
    marker: bytes
    amount: float


def make_schedule(seed: int, reach_bytes: int) -> list[list[Fault]]:
    """The faults of the first, second, … connection; there are none after the last of them."""
    draw = random.Random(seed)
    schedule = [[_draw_fault(draw, reach_bytes) for _ in range(draw.choice([1, 1, 2, 3]))]]
    while draw.random() < 0.4:
        schedule.append([_draw_fault(draw, reach_bytes)])
    return schedule


def _draw_fault(draw: random.Random, reach_bytes: int) -> Fault:
    kind = draw.choice([*KINDS, "flip", "flip"])
    amount: float = {
        "delay": draw.uniform(0.01, 0.2),
        "throttle": draw.uniform(0.01, 0.2),
        "flip": draw.randrange(8),
    }.get(kind, draw.choice([1, 7, 100, 5000]))
    direction = UP if draw.random() < 0.15 else DOWN
    if direction == UP:
        return Fault(kind, UP, int(10 ** draw.uniform(0, 3.5)), b"", amount)
    place = draw.choice(["early", "anywhere", "anywhere", "anywhere", "announcement", "beginning"])
    if place == "anywhere":
        return Fault(kind, DOWN, draw.randrange(reach_bytes), b"", amount)
    if place == "early":
        return Fault(kind, DOWN, int(10 ** draw.uniform(0, 4)), b"", amount)
    return Fault(kind, DOWN, draw.randrange(60), _ANNOUNCEMENT if place == "announcement" else _BEGINNING, amount)


class FaultProxy(socketserver.ThreadingTCPServer):
    """Before the server at `target`, a URL.

    Attributes:
        flips: each flip of a bit: all that was sent that way on its connection, as it was before, and the byte's place.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, target: str, schedule: list[list[Fault]]) -> None:
        parts = urlsplit(target)
        self.target = (parts.hostname or "", parts.port or 80)
        self.schedule = list(schedule)
        self.over = threading.Event()
        self.flips: list[tuple[bytearray, int]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.server_address[1]}"


class _Handler(socketserver.BaseRequestHandler):
    server: FaultProxy
    request: socket.socket

    def handle(self) -> None:
        faults = self.server.schedule.pop(0) if self.server.schedule else []
        with contextlib.suppress(OSError), socket.create_connection(self.server.target) as upstream:
            stuck = threading.Event()
            for end in (self.request, upstream):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pumps = [
                _Pump(self, source, sink, [fault for fault in faults if fault.direction == direction], stuck)
                for source, sink, direction in ((upstream, self.request, DOWN), (self.request, upstream, UP))
            ]
            threads = [threading.Thread(target=pump.run, daemon=True) for pump in pumps]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and not self.server.over.wait(0.02):
                pass
            for end in (self.request, upstream):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


class _Pump:
    """One direction of a connection."""

    def __init__(
        self,
        handler: _Handler,
        source: socket.socket,
        sink: socket.socket,
        faults: list[Fault],
        stuck: threading.Event,
    ) -> None:
        self.over, self.stuck = handler.server.over, stuck
        self.source, self.sink, self.faults = source, sink, faults
        self.flips = handler.server.flips
        self.sent = bytearray()
        self.gone = 0
        self.left_out = 0

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.source.recv(_READ_BYTES):
                if self.stuck.is_set():
                    self.over.wait()
                    return
                self.pass_on(data)
            self.sink.shutdown(socket.SHUT_WR)

    def pass_on(self, data: bytes) -> None:
        """Send the data, with what happens to it."""
        self.sent += data
        while data:
            found = [(place, fault) for fault in self.faults if (place := self.find(fault, data)) is not None]
            place, fault = min(found, key=lambda one: one[0]) if found else (len(data), None)
            self.send(data[:place])
            data = data[place:]
            if fault is not None:
                self.faults.remove(fault)
                data = getattr(self, fault.kind.replace("-", "_"))(data, fault)

    def find(self, fault: Fault, data: bytes) -> int | None:
        """Where in the data the fault comes about, if it does."""
        start = -self.gone
        if fault.marker:
            start = data.find(fault.marker)
            if start < 0:
                return None
        place = start + fault.at
        return place if 0 <= place < len(data) else None

    def send(self, data: bytes) -> None:
        self.gone += len(data)
        kept = data[self.left_out :]
        self.left_out -= len(data) - len(kept)
        self.sink.sendall(kept)

    def delay(self, data: bytes, fault: Fault) -> bytes:
        self.over.wait(fault.amount)
        return data

    def throttle(self, data: bytes, fault: Fault) -> bytes:
        for _ in range(8):
            self.send(data[: _SLOW_BYTES // 8])
            data = data[_SLOW_BYTES // 8 :]
            time.sleep(fault.amount / 8)
        return data

    def flip(self, data: bytes, fault: Fault) -> bytes:
        self.flips.append((self.sent, self.gone))
        return bytes([data[0] ^ 1 << int(fault.amount)]) + data[1:]

    def truncate(self, data: bytes, fault: Fault) -> bytes:
        self.left_out += int(fault.amount)
        return data

    def duplicate(self, data: bytes, fault: Fault) -> bytes:
        self.sink.sendall(data[: int(fault.amount)])
        return data

    def half_open(self, data: bytes, fault: Fault) -> bytes:
        del data, fault
        self.stuck.set()
        self.over.wait()
        return b""

    def cut(self, data: bytes, fault: Fault) -> bytes:
        del data, fault
        for end in (self.sink, self.source):
            end.shutdown(socket.SHUT_RDWR)
        return b""

    def reset(self, data: bytes, fault: Fault) -> bytes:
        del data, fault
        self.sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sink.close()
        self.source.shutdown(socket.SHUT_RDWR)
        return b""


@contextlib.contextmanager
def faults_before(target: str, schedule: list[list[Fault]]) -> Iterator[FaultProxy]:
    """A running proxy. It is over, with all of its connections, when the context ends."""
    with FaultProxy(target, schedule) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.over.set()
            proxy.shutdown()
            thread.join()
