"""Clients' messages are processed in portions, in turns; a client that does not read is not processed further."""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from websockets.protocol import State

from surfw.bench.raw_peer import RawPeer, message, ping
from surfw.config import KIB, MIB, WireLimits
from surfw.server import listening, reception, sending
from surfw.server.connection import Connection
from surfw.server.reception import PORTION_BYTES, show_address
from tests.certificates import for_server, make_certificate
from tests.peers import bare_client, serving, until
from tests.stores import make_store

SMALL = WireLimits(frame_bytes=128 * KIB, run_bytes=128 * KIB, window_bytes=256 * KIB)


def test_a_backlog_of_one_client_is_worked_off_between_the_messages_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path, sizes=[100])
    order: list[str] = []
    ask: list[Any] = []
    take = Connection._take

    def noted(self: Connection, taken: Any) -> None:
        order.append(self._peer)
        while ask:
            ask.pop()()  # while the backlog is processed
        take(self, taken)

    monkeypatch.setattr(Connection, "_take", noted)

    async def main() -> None:
        async with serving(tmp_path) as server, bare_client(server.url) as flood, bare_client(server.url) as good:
            cancels = [json.dumps({"type": "cancel", "id": number}) for number in range(400)]
            flood.websocket.transport.pause_reading()
            for cancel in cancels:
                flood.websocket.protocol.send_text(cancel.encode())
            flood.websocket.transport.write(b"".join(flood.websocket.protocol.data_to_send()))
            ask.append(lambda: good.websocket.transport.write(message("models", id=0)))
            assert (await good.hear_text())["models"] == ["toy/model"]
            mine = show_address(good.websocket.local_address)
            assert order.count(mine) == 1
            assert order.index(mine) < 100, "the others' four hundred did not go first"
            await until(lambda: len(order) == 401)
            flood.websocket.transport.abort()

    asyncio.run(main())


def test_newcomers_pay_from_one_account_and_go_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path, sizes=[100])
    opened: list[tuple[float, float]] = []
    plain = reception.FairConnection.opened

    def noted(self: reception.FairConnection) -> None:
        shared = self.account
        assert shared is self._newcomers.account
        plain(self)
        assert self.account is not shared
        opened.append((shared.paid, self.account.paid))

    monkeypatch.setattr(reception.FairConnection, "opened", noted)

    async def main() -> None:
        async with serving(tmp_path) as server:
            for _ in range(3):
                async with bare_client(server.url):
                    pass

    asyncio.run(main())
    before, now = zip(*opened, strict=True)
    assert before == now, "a newcomer has paid what those before it paid"
    assert 0 < now[0] < now[1] < now[2]


def test_a_client_that_pings_and_never_reads_is_not_listened_to_for_long(tmp_path: Path) -> None:
    make_store(tmp_path, sizes=[100])

    async def main() -> None:
        async with serving(tmp_path, limits=SMALL) as server:
            peer = await asyncio.to_thread(lambda: RawPeer(server.port, receive_bytes=4096).shake_hands())
            await asyncio.to_thread(peer.greet)
            (connection,) = server._connections
            transport = connection._websocket.transport
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            with peer:
                peer.socket.setblocking(False)
                one = ping(bytes(125))
                pings, sent = one * 100, 0
                stalled = 0
                while stalled < 100:
                    try:
                        sent += peer.socket.send(pings[sent % len(one) :])
                        stalled = 0
                    except BlockingIOError:
                        stalled += 1
                        await asyncio.sleep(0.005)
                    await asyncio.sleep(0)
                    assert transport.get_write_buffer_size() < SMALL.run_bytes + 10 * PORTION_BYTES
                    assert sent < 100_000_000, "it was listened to although it did not read"

    asyncio.run(main())


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_client_that_reads_nothing_does_not_keep_the_server_from_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_wrong: bool
) -> None:
    monkeypatch.setattr(listening, "_CLOSE_SECONDS", 0.1)
    manifest = make_store(tmp_path, sizes=[16 * MIB])
    chunk = {"model": manifest.name, "chunk": manifest.chunks[0].id, "form": "none", "start": 0, "stop": 16 * MIB}

    async def main() -> None:
        async with serving(tmp_path) as server:
            with await asyncio.to_thread(lambda: RawPeer(server.port, receive_bytes=4096).shake_hands()) as peer:
                await asyncio.to_thread(peer.greet)
                peer.send(message("get", id=0, **chunk))
                (connection,) = server._connections
                await until(lambda: connection._websocket.outbox.is_waiting)
                if is_wrong:
                    peer.send(b"\x81\x01x")  # without a mask, which ends the session
                    await until(lambda: connection._websocket.state is not State.OPEN)
                async with asyncio.timeout(10):
                    await server.stop()

    asyncio.run(main())


def test_a_message_in_endless_fragments_is_not_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path, sizes=[100])
    goes_on = asyncio.Event()
    monkeypatch.setattr(sending.Sender, "keep_up", lambda _: goes_on.wait())  # the client reads nothing
    first, more = b"\x01\x80" + bytes(4), b"\x00\x80" + bytes(4)

    async def main() -> None:
        async with serving(tmp_path, limits=SMALL) as server:
            with await asyncio.to_thread(lambda: RawPeer(server.port).shake_hands()) as peer:
                await asyncio.to_thread(peer.greet)
                peer.send(message("models", id=0))
                assert (await asyncio.to_thread(peer.hear_text))["models"] == ["toy/model"]
                peer.send(first + more * 2000)
                peer.socket.settimeout(5)
                try:
                    with pytest.raises(ConnectionResetError, match="closed: a message in more than 1024 fragments"):
                        await asyncio.to_thread(peer.hear)
                finally:
                    goes_on.set()

    asyncio.run(main())


def test_too_many_connections_without_a_tls_handshake_push_each_other_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "_MOST_OPENING", 4)
    make_store(tmp_path / "store", sizes=[100])
    tls = for_server(make_certificate(tmp_path))

    async def main() -> None:
        async with serving(tmp_path / "store", ssl=tls) as server:
            silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(6)]
            async with asyncio.timeout(3):  # less than the server's time limit for a handshake
                assert [await silent[index][0].read() for index in (0, 1)] == [b"", b""]
            newcomers = server._newcomers
            assert len(newcomers) == 4
            silent[2][1].write(b"no TLS at all")
            await until(lambda: len(newcomers) == 3)
            for _, writer in silent:
                writer.close()
            await until(lambda: len(newcomers) == 0)

    asyncio.run(main())


def test_too_many_connections_that_say_nothing_push_each_other_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "_MOST_OPENING", 4)
    make_store(tmp_path, sizes=[100])

    async def main() -> None:
        async with serving(tmp_path) as server, bare_client(server.url) as good:
            silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(6)]
            assert await silent[0][0].read() == b""
            assert await silent[1][0].read() == b""
            async with bare_client(server.url) as other:
                await other.say("models", id=0)
                assert (await other.hear_text())["models"] == ["toy/model"]
            await good.say("models", id=0)
            assert (await good.hear_text())["models"] == ["toy/model"]
            for _, writer in silent:
                writer.close()

    asyncio.run(main())


def test_pings_are_answered_in_one_go(tmp_path: Path) -> None:
    make_store(tmp_path, sizes=[100])

    async def main() -> None:
        async with serving(tmp_path) as server:
            peer = await asyncio.to_thread(lambda: RawPeer(server.port).shake_hands())
            await asyncio.to_thread(peer.greet)
            (connection,) = server._connections
            writes: list[int] = []
            websocket, write = connection._websocket, connection._websocket.transport.write
            websocket.transport.write = lambda data: (writes.append(len(data)), write(data))  # type: ignore[func-returns-value]
            await asyncio.to_thread(peer.send, ping() * 40 + message("models", id=0))
            assert (await asyncio.to_thread(peer.hear_text))["models"] == ["toy/model"]
            assert sum(writes[:-1]) == 80
            assert len(writes) <= 4
            peer.close()

    asyncio.run(main())
