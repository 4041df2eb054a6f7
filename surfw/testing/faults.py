"""A TCP proxy that injects network faults, for testing clients and servers.

    from surfw.testing import Fault, FaultProxy

    with FaultProxy("ws://127.0.0.1:8765", [[Fault("cut", at=5_000_000)], []]) as proxy:
        run_my_client(proxy.url)  # the first connection is cut after 5 MB, the second has no faults

It listens on a free local port until the context ends, which also closes all connections. Faults follow a fixed
schedule: `Fault.draw` returns the same schedule for the same seed. `hold` stops all traffic, like a pulled cable, until
`release`; `drop` ends all connections.
"""

import contextlib
import random
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

DOWN, UP = "down", "up"
KINDS = ("delay", "throttle", "cut", "flip", "truncate", "half-open", "reset", "duplicate")
_ANNOUNCEMENT, _BEGINNING = b'{"type":"data"', b'{"type":"begin"'
_READ_BYTES = 1 << 14
_CLOSE_SECONDS = 5.0
_SLOW_BYTES = 1 << 11


@dataclass(frozen=True)
class Fault:
    """A fault in one direction of a connection.

    Attributes:
        kind: one of `KINDS`.
        direction: `DOWN` to the client, `UP` to the server.
        at: the offset of the fault in bytes, from `marker`, or from the start of the connection if `marker` is empty.
        marker: bytes in the stream, such as the start of an announcement; the next occurrence counts.
        amount: seconds of a delay or throttle; the bit to flip; or the number of bytes to drop or duplicate.
    """

    kind: str
    direction: str = DOWN
    at: int = 0
    marker: bytes = b""
    amount: float = 0

    def __post_init__(self) -> None:
        """Validate the fault.

        Raises:
            ValueError: the kind or the direction is unknown.
        """
        if self.kind not in KINDS or self.direction not in {DOWN, UP}:
            known = ", ".join(KINDS)
            raise ValueError(f"a fault is {self.kind!r} {self.direction!r}, expected {known}, and {DOWN!r} or {UP!r}")

    @staticmethod
    def draw(seed: int, reach_bytes: int) -> "list[list[Fault]]":
        """Draw a random schedule: the faults of the first, second, … connection; later ones have none.

        Args:
            seed: determines the schedule.
            reach_bytes: an upper limit for `at` in the stream to the client.
        """
        draw = random.Random(seed)  # noqa: S311 - no secrets are made of it
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
    """A proxy for the server at `target`, a URL. Use it as a context manager.

    Attributes:
        flips: for each flipped bit, the original bytes of that direction of its connection, and the byte's offset.
        passed_bytes: how many bytes were forwarded to clients.
        connections: how many connections were opened so far.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, target: str, schedule: Sequence[Sequence[Fault]] = (), *, keeps_sent: bool = True) -> None:
        """Listen. Nothing is forwarded before the context is entered.

        Args:
            target: the server's URL.
            schedule: the faults of the first, second, … connection; later ones have none.
            keeps_sent: whether to keep all bytes, for `flips`; disable this for long runs.
        """
        parts = urlsplit(target)
        self.target = (parts.hostname or "", parts.port or 80)
        self.schedule = [list(faults) for faults in schedule]
        self.over = threading.Event()
        self.flips: list[tuple[bytearray, int]] = []
        self.passed_bytes = self.connections = 0
        self.keeps_sent = keeps_sent
        self.flowing = threading.Event()
        self.flowing.set()
        self.ends: set[socket.socket] = set()
        self.lock = threading.Lock()
        self._thread: threading.Thread | None = None
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        """The proxy's URL, to use instead of the server's."""
        return f"ws://127.0.0.1:{self.server_address[1]}"

    def hold(self) -> None:
        """Stop forwarding, like a pulled cable; connections stay open."""
        self.flowing.clear()

    def release(self) -> None:
        """Resume forwarding, including the bytes that arrived meanwhile."""
        self.flowing.set()

    def drop(self) -> None:
        """End all connections."""
        with self.lock:
            for end in self.ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        """Start forwarding."""
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End all connections and stop listening."""
        self.over.set()
        self.flowing.set()
        self.shutdown()
        if self._thread is not None:
            self._thread.join()
        self.server_close()
        ends = time.monotonic() + _CLOSE_SECONDS
        while self.ends and time.monotonic() < ends:
            time.sleep(0.005)


class _Handler(socketserver.BaseRequestHandler):
    server: FaultProxy
    request: socket.socket

    def handle(self) -> None:
        """Forward bytes between the client and a new connection to the server, until either ends."""
        with self.server.lock:
            self.server.connections += 1
            faults = self.server.schedule.pop(0) if self.server.schedule else []
        with contextlib.suppress(OSError), socket.create_connection(self.server.target) as upstream:
            stuck = threading.Event()
            ends = {self.request, upstream}
            with self.server.lock:
                self.server.ends |= ends
            for end in (self.request, upstream):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pumps = [
                _Pump(
                    self.server,
                    source,
                    sink,
                    [fault for fault in faults if fault.direction == direction],
                    stuck,
                    is_down=direction == DOWN,
                )
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
        with self.server.lock:
            self.server.ends -= ends


class _Pump:
    """One direction of a connection."""

    def __init__(
        self,
        proxy: FaultProxy,
        source: socket.socket,
        sink: socket.socket,
        faults: list[Fault],
        stuck: threading.Event,
        *,
        is_down: bool,
    ) -> None:
        self.proxy, self.over, self.stuck = proxy, proxy.over, stuck
        self.source, self.sink, self.faults = source, sink, faults
        self.is_down = is_down
        self.flips = proxy.flips
        self.sent = bytearray()
        self.gone = 0
        self.left_out = 0

    def run(self) -> None:
        """Forward bytes until the source ends."""
        with contextlib.suppress(OSError):
            while data := self.source.recv(_READ_BYTES):
                if self.stuck.is_set():
                    self.over.wait()
                    return
                self.proxy.flowing.wait()
                self.pass_on(data)
        with contextlib.suppress(OSError):  # also after a reset, so that the other end notices
            self.sink.shutdown(socket.SHUT_WR)

    def pass_on(self, data: bytes) -> None:
        """Send data, and apply the faults that fall into it."""
        if self.proxy.keeps_sent:
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
        """The fault's offset in the data, or None."""
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
        if self.is_down:
            with self.proxy.lock:
                self.proxy.passed_bytes += len(kept)

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
        self.sink.shutdown(socket.SHUT_RD)  # else the other direction would continue to read and keep it open
        self.sink.close()
        self.source.shutdown(socket.SHUT_RDWR)
        return b""
