"""Whose turn it is, where many connections want the same thing: the loop's time, or reads of the storage.

Every connection has an `Account` for each of the two. A turn has a price, and the next turn goes to whoever has paid
least so far (*start-time fair queueing*, Goyal, Vin and Cheng, 1996): those who want little find it at once, and those
who want much wait behind what they have had. Nobody saves up turns while they want none.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Account:
    """What somebody has paid in a queue, on that queue's scale."""

    __slots__ = ("paid",)

    def __init__(self, paid: float = 0.0) -> None:
        """So much already."""
        self.paid = paid


class FairQueue(Generic[Item]):
    """Items that wait for their turn, in order within an account. Pure: it decides, and does nothing."""

    def __init__(self, is_over: Callable[[Item], bool]) -> None:
        """Start empty; an item that `is_over` when its turn comes is left out, and costs nothing."""
        self._is_over = is_over
        self._waiting: dict[Account, deque[tuple[float, Item]]] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, account: Account, price: float, item: Item) -> None:
        """Let an item wait; its turn will be paid for from the account."""
        self._waiting.setdefault(account, deque()).append((price, item))

    def drop(self, account: Account, item: Item) -> None:
        """Let it wait once less, if it still does."""
        queue = self._waiting.get(account, deque())
        place = next((index for index, (_, waiting) in enumerate(queue) if waiting is item), None)
        if place is not None:
            del queue[place]
        if not queue:
            self._waiting.pop(account, None)

    def take(self) -> Item | None:
        """The item whose turn it is; None if none waits."""
        while self._waiting:
            account = min(self._waiting, key=self._start)  # of equals, the one that has waited longest
            queue = self._waiting.pop(account)
            price, item = queue.popleft()
            if queue:
                self._waiting[account] = queue
            if not self._is_over(item):
                self._now = self._start(account)
                account.paid = self._now + price
                return item
        return None

    def _start(self, account: Account) -> float:
        return max(account.paid, self._now)


class Turns:
    """Turns in the event loop: one step of one connection in each pass of it, and everybody's input and output between.

    So work that comes in faster than it can be done waits where it came from, and a pass stays short.
    """

    def __init__(self) -> None:
        """All turns are free. Belongs to the event loop that it is first used in."""
        self._steps: FairQueue[asyncio.Future[None]] = FairQueue(asyncio.Future.done)
        self._taken = False

    async def turn(self, account: Account) -> None:
        """Wait for a turn; what is done before the next `await` is the step."""
        step = self.ask(account)
        if step is not None:
            await step

    def ask(self, account: Account) -> asyncio.Future[None] | None:
        """A turn to wait for; None if it is granted already."""
        loop = asyncio.get_running_loop()
        step: asyncio.Future[None] = loop.create_future()
        self._steps.put(account, 1, step)
        if not self._taken:
            self._next()
        return None if step.done() else step

    def _next(self) -> None:
        step = self._steps.take()
        self._taken = step is not None
        if step is not None:
            step.set_result(None)
            asyncio.get_running_loop().call_soon(self._next)
