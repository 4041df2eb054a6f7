"""The connection to a server: requests go out, and each answer finds its transfer.

Belongs to the event loop it was opened in. Once it is over it stays so: every request then fails with the same error.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from websockets.client import ClientProtocol
from websockets.frames import CloseCode

from surfw import __version__
from surfw.client.connection import WireConnection
from surfw.client.transfer import Transfer
from surfw.config import MAX_FRAME_BYTES, WireLimits
from surfw.errors import ConnectionFailedError, IntegrityError, RefusedError, RemoteProtocolError
from surfw.wire import (
    Begin,
    Cancel,
    ClientSession,
    Data,
    Failed,
    ListModels,
    Models,
    Request,
    ServerHello,
    printable,
)


@dataclass(slots=True)
class _Pending:
    """A request whose answer is not complete; its transfer is None if it takes no bytes, or was given up."""

    done: asyncio.Future[Models | None]
    transfer: Transfer | None


class Link:
    """One connection, with many requests at a time.

    Attributes:
        limits: what both sides hold each other to.
        greeted: done when hellos were exchanged, or failed if the connection was over before.
        ended: what ended the connection, once it is over: "went away", for example.
    """

    def __init__(self, url: str, limits: WireLimits, silence_seconds: float) -> None:
        """Nothing is connected yet: see `open_link`."""
        self.url = url
        self.limits = limits
        self.greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended: str | None = None
        self._transient = False
        self._session = ClientSession(limits, client=f"surfw/{__version__}")
        self._connection: WireConnection | None = None
        self._silence_seconds = silence_seconds
        self._pending: dict[int, _Pending] = {}
        self._slots = asyncio.Semaphore(0)
        self._receiving = -1
        self._nowhere = memoryview(bytearray(MAX_FRAME_BYTES))

    def attach(self, protocol: ClientProtocol, **options: Any) -> WireConnection:
        """Make the connection that this link receives from."""
        self._connection = WireConnection(protocol, self, **options)
        return self._connection

    @property
    def heard(self) -> float | None:
        """When the last byte came, on the loop's clock; None before the first."""
        return self._connection.heard if self._connection else None

    async def models(self) -> tuple[str, ...]:
        """The names of the server's models."""
        answer = await self._ask(ListModels, None)
        return answer.models if answer else ()

    async def receive(self, make: Callable[[int], Request], transfer: Transfer) -> None:
        """Send the request that `make` gives for an id, and return when its answer is in the transfer.

        However it ends, nothing is written through the transfer afterwards.

        Raises:
            RefusedError: the server does not give it.
            ConnectionFailedError: the connection is over.
        """
        await self._ask(make, transfer)

    async def _ask(self, make: Callable[[int], Request], transfer: Transfer | None) -> Models | None:
        await self._slots.acquire()
        if self.ended:
            self._slots.release()
            raise self._over()
        request = make(self._session.next_id())
        pending = _Pending(asyncio.get_running_loop().create_future(), transfer)
        self._pending[request.id] = pending
        self._send(self._session.send(request))
        try:
            return await self._patiently(pending.done)
        finally:
            self._give_up(request.id, pending)

    async def _patiently(self, answer: asyncio.Future[Models | None]) -> Models | None:
        """Wait for the answer as long as the server says anything at all."""
        loop = asyncio.get_running_loop()
        asked = loop.time()
        while not answer.done():
            patience = max(asked, self.heard or asked) + self._silence_seconds - loop.time()
            if patience <= 0:
                self._end(f"said nothing for {self._silence_seconds:g} seconds", transient=True)
            else:
                await asyncio.wait([answer], timeout=patience)
        return answer.result()

    def _give_up(self, request_id: int, pending: _Pending) -> None:
        """Make sure that nothing more goes to the transfer; if the answer is not complete, cancel it."""
        pending.transfer = None
        if not pending.done.cancel():
            pending.done.exception()  # whoever was cancelled while it failed does not look at it
        if self._session.is_open(request_id) and self._connection and not self.ended:
            if self._receiving == request_id:
                self._connection.reader.abandon()
            self._send(self._session.send(Cancel(request_id)))

    def _send(self, text: str) -> None:
        if self._connection:
            self._connection.send_now(text)

    def place(self, size: int) -> memoryview | None:
        """Where a frame belongs; None for one that may not come, which `binary` then refuses."""
        try:
            self._receiving, offset = self._session.place(size)
        except RemoteProtocolError:
            return None
        transfer = self._pending[self._receiving].transfer
        return transfer.place(offset, size) if transfer else self._nowhere[:size]

    def binary(self, data: bytes | bytearray | memoryview) -> None:
        """A frame arrived."""
        size = len(data)
        request_id, offset = self._session.place(size)
        transfer = self._pending[request_id].transfer
        if transfer and not isinstance(data, memoryview):
            transfer.place(offset, size)[:] = data
        arrival = self._session.receive_binary(size)
        if credit := self._session.credit():
            self._send(credit)
        if transfer:
            transfer.arrived(arrival.stop)
        if arrival.last:
            self._finish(request_id, None)

    def text(self, text: str) -> None:
        """A message arrived."""
        message = self._session.receive(text)
        match message:
            case ServerHello():
                self._send(self._session.hello())
                for _ in range(self._session.requests):
                    self._slots.release()
                if not self.greeted.done():
                    self.greeted.set_result(None)
            case Begin():
                self._begin(self._pending[message.id], message)
            case Data():
                if not self._session.is_open(message.id):
                    self._finish(message.id, None)
            case Models():
                self._finish(message.id, message)
            case Failed():
                self._finish(message.id, RefusedError(f"{self.url}: {message.message}", code=message.code))

    def _begin(self, pending: _Pending, message: Begin) -> None:
        """Begin the transfer; one that does not want what is coming fails at once, and takes nothing."""
        try:
            if pending.transfer:
                pending.transfer.begin(message)
        except IntegrityError as exc:
            pending.transfer = None
            if not pending.done.done():
                pending.done.set_exception(exc)

    def _finish(self, request_id: int, outcome: Models | RefusedError | None) -> None:
        done = self._pending.pop(request_id).done
        self._slots.release()
        if done.done():
            return
        if isinstance(outcome, RefusedError):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)

    def lost(self, error: RemoteProtocolError | None) -> None:
        """The connection is over."""
        if error:
            self._end(f"broke the protocol: {error}")
        elif self._connection and self._connection.close_reason:
            stops = self._connection.close_code == CloseCode.GOING_AWAY
            self._end(f"closed the connection: {self._connection.close_reason}", transient=stops)
        else:
            self._end("went away", transient=True)

    def _end(self, what: str, *, transient: bool = False) -> None:
        """Fail everything that waits, and all that will be asked; the first reason counts."""
        if self.ended:
            return
        self.ended = printable(what)
        self._transient = transient
        if self._connection:
            self._connection.drop()
        waiting: list[asyncio.Future[Any]] = [self.greeted, *(pending.done for pending in self._pending.values())]
        for future in waiting:
            if not future.done():
                future.set_exception(self._over())
        self._slots.release()  # wakes those who wait for a slot, one by the other

    def _over(self) -> ConnectionFailedError:
        return ConnectionFailedError(f"the server at {self.url} {self.ended}", transient=self._transient)

    def abort(self) -> None:
        """Drop the connection without a word."""
        self.greeted.cancel()
        self._end("was left")

    async def close(self) -> None:
        """Say goodbye."""
        if self._connection and not self.ended:
            await self._connection.close()
        self._end("was left")
