"""Fair sharing of the event loop's time, and of reads from the storage, between connections.

Every connection has an `Account` for each of the two. A turn has a price, and the next turn goes to the account that
has paid least so far (*start-time fair queueing*, Goyal, Vin and Cheng, 1996). A client that wants little is served at
once; one that wants much waits in proportion to what it has already had. Turns cannot be saved up.

`Turns` shares the loop's time. `Flights` shares reads, and reads only once what several clients want. Its invariants:

- A request for a key that is being worked on joins that work. Cancelling a wait does not stop the work for the others.
- Work is queued on the account of each request for it, so that no one waits longer because others want the same. It
  begins at the first of these turns, and that account pays.
- Queued work that no one waits for is dropped; once it has begun, it runs to its end.
- A failure is raised for everyone who waits. If no one does, it is ignored.
- Everyone who waits can observe progress; see `Reader.progress_bytes`.
"""

import asyncio
from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from surfw.server.futures import Asked
from surfw.threads import cancel_all

Item = TypeVar("Item")
Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(slots=True, eq=False)
class Account:
    """What one client has paid in a queue, on that queue's scale."""

    paid: float = 0.0


class FairQueue(Generic[Item]):
    """Queued items, by account, and within an account by priority. It only decides the order; it does no work itself.

    An item with a priority of at most 0 is needed now; others are prefetches. An item that is needed now goes before
    the prefetches of other accounts, unless its own account has paid more than theirs by `lead` or more.
    """

    def __init__(self, is_over: Callable[[Item], bool], lead: float = 0.0) -> None:
        """Start empty. Items that are over (`is_over`) when their turn comes are skipped, and cost nothing."""
        self._is_over = is_over
        self._lead = lead
        self._waiting: dict[Account, list[tuple[int, int, float, Item]]] = {}
        self._now = 0.0
        self._asked = 0
        self._last = Account()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, account: Account, price: float, item: Item, priority: int = 0) -> None:
        """Queue an item; the account pays for it when its turn comes. Lower priorities are more urgent."""
        if account not in self._waiting:  # a new account starts at the current level: no turns are saved up
            self._waiting[account] = []
            account.paid = max(account.paid, self._now)
        self._asked += 1
        entry = priority, self._asked, price, item
        insort(self._waiting[account], entry, key=lambda one: one[:2])

    def drop(self, account: Account, item: Item) -> None:
        """Remove an item that the account queued, if it is still queued; once if it was queued several times."""
        self._pick(account, lambda waiting: waiting is item)

    def take(self) -> Item | None:
        """Remove and return the next item; None if the queue is empty."""
        while self._waiting:
            account = min(self._waiting, key=self._turn)  # among equals, the one that has waited longest
            queue = self._waiting.pop(account)
            *_, price, item = queue.pop(0)
            if queue:
                self._waiting[account] = queue
            if not self._is_over(item):
                self._now = max(self._now, account.paid)
                self._last = account
                account.paid += price
                return item
        return None

    def take_too(self, belongs: Callable[[Item], bool]) -> Item | None:
        """Remove and return an item that `belongs` to the last turn, if any; the account of that turn pays for it."""
        account = self._last
        entry = self._pick(account, lambda item: belongs(item) and not self._is_over(item))
        if entry is None:
            return None
        account.paid += entry[2]
        return entry[3]

    def _pick(self, account: Account, fits: Callable[[Item], bool]) -> tuple[int, int, float, Item] | None:
        queue = self._waiting.get(account, [])
        place = next((index for index, (*_, item) in enumerate(queue) if fits(item)), None)
        if place is None:
            return None
        picked = queue.pop(place)
        if not queue:
            del self._waiting[account]
        return picked

    def _turn(self, account: Account) -> float:
        """The account's start tag: what it has paid, plus `lead` if its most urgent item is a prefetch."""
        return account.paid + (self._lead if self._waiting[account][0][0] > 0 else 0.0)


class Turns:
    """Turns in the event loop: each iteration has one step of one connection, besides the I/O of all.

    This keeps iterations short, and work that arrives faster than it can be done waits at the client that sent it.
    """

    def __init__(self) -> None:
        """Start with no one waiting. Belongs to the event loop in which it is first used."""
        self._steps: FairQueue[asyncio.Future[None]] = FairQueue(asyncio.Future.done)
        self._taken = False

    async def turn(self, account: Account) -> None:
        """Wait for a turn; the caller's code up to its next `await` is the step."""
        await self.ask(account)

    def ask(self, account: Account) -> asyncio.Future[None]:
        """Return a future that is done when the turn comes, which may be immediately."""
        step: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._steps.put(account, 1, step)
        if not self._taken:
            self._next()
        return step

    def _next(self) -> None:
        step = self._steps.take()
        self._taken = step is not None
        if step is not None:
            step.set_result(None)
            asyncio.get_running_loop().call_soon(self._next)


@dataclass(slots=True, eq=False)
class Reader:
    """A request, or other work, that reads from the storage.

    Attributes:
        account: the account that pays for the reads.
        fresh: whether to read from the storage even if the data is cached.
        priority: how urgent the reads are: at most 0 if they are needed now; lower is more urgent.
        chunk: the id of the chunk that is read, if it is one.
        asked: the rest of the request, if the client announced the chunk in a schedule.
        read_bytes: bytes read so far, without the reads in progress.
        waits_for: the reads that it waits for, all of one `Flights` at a time.
        seen_bytes: the total `read_bytes` of those `Flights` when progress was last counted.
    """

    account: Account = field(default_factory=Account)
    fresh: bool = False
    priority: int = 0
    chunk: str = ""
    asked: Asked | None = None
    read_bytes: int = 0
    waits_for: "list[Flight[Any, Any]]" = field(default_factory=list)
    seen_bytes: int = 0

    @property
    def progress_bytes(self) -> int:
        """The storage's progress on what this reader waits for: a count of bytes that only rises.

        It counts the bytes of its own reads. While all of those are queued, it also counts reads for others, since they
        come first. So a moving queue is progress, but a hanging read of its own is not, whatever others get.
        """
        if self.waits_for:
            total = self.waits_for[0].flights.read_bytes
            if not any(flight.has_begun for flight in self.waits_for):
                self.read_bytes += total - self.seen_bytes
            self.seen_bytes = total
        return self.read_bytes + sum(flight.reader.progress_bytes for flight in self.waits_for)


@dataclass(slots=True, eq=False)
class Flight(Generic[Key, Value]):
    """Work for one key.

    Attributes:
        flights: the `Flights` that it belongs to.
        key: the key.
        reader: a reader of its own for the work, whose progress those who wait for it observe.
        outcome: the result.
        waiters: how many wait for the result.
        task: the task that does the work, once it has begun.
    """

    flights: "Flights[Key, Value]"
    key: Key
    reader: Reader
    outcome: asyncio.Future[Value]
    waiters: int = 0
    task: asyncio.Task[None] | None = None

    @property
    def has_begun(self) -> bool:
        """Whether the work has begun."""
        return self.task is not None

    def land(self, value: Value) -> None:
        """Deliver the result to everyone who waits; no one can join any more."""
        self.flights.forget(self)
        self.outcome.set_result(value)


Run = list[Flight[Key, Value]]
"""Flights that are worked on as one, in order. Those that have landed are removed, so that their results are freed."""


class Flights(ABC, Generic[Key, Value]):
    """Does the work for a key once for everyone who asks for it meanwhile, with at most `slots` runs of keys at a time.

    Attributes:
        read_bytes: bytes read so far, for anyone.
    """

    def __init__(self, slots: int, *, lead: float = 0.0) -> None:
        """Start idle; for `lead`, see `FairQueue`."""
        self.read_bytes = 0
        self._own = Account()
        self._slots = slots
        self._flights: dict[Key, Flight[Key, Value]] = {}
        self._queue: FairQueue[Flight[Key, Value]] = FairQueue(
            lambda flight: flight.has_begun or flight.outcome.done(), lead
        )
        self._begun: dict[asyncio.Task[None], Run[Key, Value]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._flights

    def __len__(self) -> int:
        return len(self._flights)

    def running(self) -> Iterator[tuple[Key, Reader]]:
        """The keys that are being worked on, each with the reader of its work."""
        for task, run in self._begun.items():
            if not task.done():
                yield from ((flight.key, flight.reader) for flight in run)

    async def join(self, key: Key, reader: Reader | None = None, price: float = 1) -> Value:
        """Wait for the work for a key, starting it if needed; return its result or raise its exception.

        The reader observes its progress, and pays the price if the work begins at its turn; None stands for the server.
        """
        reader = reader or Reader(self._own)
        flight = self._flights.get(key)
        if flight is None:
            outcome = asyncio.get_running_loop().create_future()
            flight = self._flights[key] = Flight(self, key, Reader(reader.account), outcome)
        flight.waiters += 1
        reader.waits_for.append(flight)
        reader.seen_bytes = self.read_bytes
        if not flight.has_begun:
            self._queue.put(reader.account, price, flight, reader.priority)
            self._begin()
        try:
            value = await asyncio.shield(flight.outcome)
            reader.read_bytes += flight.reader.progress_bytes
            return value
        finally:
            reader.waits_for.remove(flight)
            flight.waiters -= 1
            # It may have begun on another account; the queue must not keep it and its outcome until our turn.
            self._queue.drop(reader.account, flight)
            if not flight.waiters:
                self._drop(flight)

    def detach(self, key: Key) -> None:
        """Let no one else join the work for a key if it has begun; the next request starts it again."""
        flight = self._flights.get(key)
        if flight is not None and flight.has_begun:
            self.forget(flight)

    def belongs(self, run: Run[Key, Value], key: Key) -> bool:
        """Whether the work for a key, which is queued on the same account, is to be done together with a run."""
        return False

    @abstractmethod
    async def do(self, run: Run[Key, Value]) -> None:
        """Do the work of a run: remove each flight from it and land it; flights left in it end as this does.

        It adds what it reads to `reader.read_bytes` of each flight, for those who wait for it, and to `read_bytes`, for
        those queued behind it.
        """

    def _begin(self) -> None:
        """Begin queued work while slots are free."""
        while len(self._begun) < self._slots and (flight := self._queue.take()) is not None:
            run = [flight]
            while (more := self._queue.take_too(lambda other: self.belongs(run, other.key))) is not None:  # noqa: B023
                run.append(more)
            task = asyncio.create_task(self.do(run), name=f"surfw {flight.key}")
            for one in run:
                one.task = task
            self._begun[task] = run
            task.add_done_callback(partial(self._finished, run))

    def _finished(self, run: Run[Key, Value], task: asyncio.Task[None]) -> None:
        del self._begun[task]
        for flight in run:
            self.forget(flight)
            if task.cancelled():
                flight.outcome.cancel()
            elif (exc := task.exception()) is not None:
                flight.outcome.set_exception(exc)
                flight.outcome.exception()  # marks it as retrieved, in case no one waits for it any more
        self._begin()

    def forget(self, flight: Flight[Key, Value]) -> None:
        """Let no one join it any more. A later flight for the same key is not affected."""
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    def _drop(self, flight: Flight[Key, Value]) -> None:
        """Cancel work that has not begun."""
        if not flight.has_begun:
            self.forget(flight)
            flight.outcome.cancel()

    async def close(self) -> None:
        """Stop all work."""
        for flight in list(self._flights.values()):
            self._drop(flight)
        await cancel_all(self._begun)


class SingleFlight(Flights[Key, Value]):
    """Does `work(key, reader)`, one key at a time in each slot."""

    def __init__(self, work: Callable[[Key, Reader], Coroutine[Any, Any, Value]], slots: int) -> None:
        """Start idle."""
        super().__init__(slots)
        self._work = work

    async def do(self, run: Run[Key, Value]) -> None:
        """Do the work of the one flight."""
        value = await self._work(run[0].key, run[0].reader)
        run.pop(0).land(value)
