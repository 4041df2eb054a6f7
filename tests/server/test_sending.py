"""Turns to send are given in order, and cancelled waiters leave nothing behind."""

import asyncio
from typing import Any

from surfw.config import WireLimits
from surfw.metrics import Metrics
from surfw.server.sending import Sender
from surfw.wire import ServerSession


def test_who_gives_up_waiting_is_forgotten() -> None:
    async def main() -> None:
        websocket: Any = None
        sender = Sender(websocket, ServerSession(WireLimits(), server="s"), Metrics())  # the window is 0: all wait

        async def wait(priority: int) -> None:
            async with sender.turn(priority, 1):
                raise AssertionError("there is no room")

        first = asyncio.create_task(wait(0))
        for _ in range(3):
            others = [asyncio.create_task(wait(1)) for _ in range(20)]
            await asyncio.sleep(0)
            assert len(sender._waiting) == 21
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            assert len(sender._waiting) == 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert not sender._waiting

    asyncio.run(main())
