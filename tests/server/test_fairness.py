"""Turns go to the account that has paid least, one per pass of the loop; shared work is done once."""

import asyncio
import weakref

from surfw.server.fairness import Account, FairQueue, Reader, SingleFlight, Turns
from tests.peers import until


def names(queue: FairQueue[str], count: int) -> str:
    return "".join(queue.take() or "-" for _ in range(count))


def test_who_wants_little_goes_before_who_had_much() -> None:
    queue: FairQueue[str] = FairQueue(lambda item: item == "x")
    greedy, modest = Account(), Account()
    for _ in range(4):
        queue.put(greedy, 10, "g")
    assert names(queue, 2) == "gg"
    queue.put(modest, 1, "m")
    queue.put(modest, 1, "m")
    assert names(queue, 4) == "mmgg"
    assert names(queue, 1) == "-"


def test_equals_take_turns_in_order() -> None:
    queue: FairQueue[str] = FairQueue(lambda item: item == "x")
    one, two = Account(), Account()
    for item in "abc":
        queue.put(one, 1, item)
    for item in "def":
        queue.put(two, 1, item)
    assert names(queue, 6) == "adbecf"


def test_prices_are_weights() -> None:
    queue: FairQueue[str] = FairQueue(lambda item: item == "x")
    dear, cheap = Account(), Account()
    for _ in range(40):
        queue.put(dear, 4, "d")
        queue.put(cheap, 1, "c")
    assert names(queue, 20).count("c") == 16


def test_nobody_saves_up_turns() -> None:
    queue: FairQueue[str] = FairQueue(lambda item: item == "x")
    early, late = Account(), Account()
    for _ in range(100):
        queue.put(early, 1, "e")
    names(queue, 50)
    for _ in range(50):
        queue.put(late, 1, "l")
    assert 4 <= names(queue, 10).count("l") <= 6


def test_what_is_over_costs_nothing_and_what_is_dropped_is_gone() -> None:
    queue: FairQueue[str] = FairQueue(lambda item: item == "x")
    one, two = Account(), Account()
    queue.put(one, 100, "x")
    queue.put(one, 1, "a")
    queue.put(two, 1, "b")
    dropped = "gone"
    queue.put(two, 1, dropped)
    queue.drop(two, dropped)
    queue.drop(two, dropped)
    assert len(queue) == 3
    assert names(queue, 3) == "ba-"
    assert one.paid < 100


def test_a_pass_of_the_loop_has_one_step_and_the_modest_go_first() -> None:
    async def main() -> None:
        turns, greedy, modest = Turns(), Account(), Account()
        order: list[str] = []
        passes = 0

        async def steps(account: Account, name: str, count: int) -> None:
            for _ in range(count):
                await turns.turn(account)
                order.append(f"{name}{passes}")

        flood = [asyncio.create_task(steps(greedy, "g", 10)) for _ in range(5)]
        for _ in range(20):
            passes += 1
            await asyncio.sleep(0)
        assert 15 <= len(order) <= 20, "about one a pass"
        asked = len(order)
        good = asyncio.create_task(steps(modest, "m", 1))
        await good
        assert len(order) - asked <= 4, "it does not wait for the fifty"
        await asyncio.gather(*flood)
        assert len(order) == 51

    asyncio.run(main())


class Work:
    """Work that counts its runs and waits until it is released."""

    def __init__(self, slots: int) -> None:
        self.gate = asyncio.Event()
        self.begun: list[str] = []
        self.flights: SingleFlight[str, str] = SingleFlight(self._do, slots)

    async def _do(self, key: str, _: Reader) -> str:
        self.begun.append(key)
        await self.gate.wait()
        if key == "bad":
            raise LookupError(key)
        return key.upper()

    def want(self, *keys: str) -> list[asyncio.Task[str]]:
        return [asyncio.create_task(self.flights.join(key)) for key in keys]


async def settle() -> None:
    """Let all tasks run as far as they can."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_all_who_want_a_key_share_its_work_and_its_failure() -> None:
    async def main() -> None:
        work = Work(slots=2)
        wanted = work.want("a", "a", "bad", "bad", "a")
        await settle()
        assert ("a" in work.flights, "c" in work.flights, len(work.flights)) == (True, False, 2)
        work.gate.set()
        ended = await asyncio.gather(*wanted, return_exceptions=True)
        assert [repr(one) for one in ended] == ["'A'", "'A'", "LookupError('bad')", "LookupError('bad')", "'A'"]
        assert work.begun == ["a", "bad"]
        assert len(work.flights) == 0
        assert await work.flights.join("a") == "A"
        assert work.begun == ["a", "bad", "a"]

    asyncio.run(main())


def test_only_so_many_are_worked_on_at_a_time_and_in_order() -> None:
    async def main() -> None:
        work = Work(slots=2)
        wanted = work.want("a", "b", "c", "d")
        await settle()
        assert work.begun == ["a", "b"]
        wanted[2].cancel()
        await settle()
        assert "c" not in work.flights
        work.gate.set()
        assert await asyncio.gather(*(wanted[index] for index in (0, 1, 3))) == ["A", "B", "D"]
        assert work.begun == ["a", "b", "d"]

    asyncio.run(main())


def test_work_that_was_dropped_is_not_joined_but_begun_again() -> None:
    async def main() -> None:
        work = Work(slots=1)
        first, dropped = work.want("a", "b")
        await settle()
        dropped.cancel()
        await asyncio.wait([dropped])
        (again,) = work.want("b")
        await settle()
        work.gate.set()
        assert await asyncio.gather(first, again) == ["A", "B"]

    asyncio.run(main())


def test_closing_stops_what_has_begun_and_what_is_queued() -> None:
    async def main() -> None:
        work = Work(slots=1)
        wanted = work.want("a", "b")
        await settle()
        await work.flights.close()
        await asyncio.wait(wanted)
        assert all(one.cancelled() for one in wanted)
        assert (work.begun, len(work.flights)) == (["a"], 0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_who_joins_waits_no_longer_than_on_its_own_account() -> None:
    async def main() -> None:
        work = Work(slots=1)
        greedy, modest = Reader(), Reader()
        wanted = [asyncio.create_task(work.flights.join(key, greedy, 100)) for key in "abcd"]
        await settle()
        good = asyncio.create_task(work.flights.join("d", modest, 1))
        await settle()
        work.gate.set()
        assert await good == "D"
        await asyncio.gather(*wanted)
        assert work.begun == ["a", "d", "b", "c"]

    asyncio.run(main())


def test_nothing_of_what_came_of_it_is_kept() -> None:
    class Result:
        pass

    async def main() -> None:
        gate = asyncio.Event()
        results: list[weakref.ref[Result]] = []

        async def work(key: str, _: Reader) -> Result:
            await gate.wait()
            result = Result()
            results.append(weakref.ref(result))
            return result

        async def want(flights: SingleFlight[str, Result], key: str, reader: Reader) -> None:
            await flights.join(key, reader)

        flights = SingleFlight(work, 1)
        readers = [Reader() for _ in range(4)]
        wanted = [asyncio.create_task(want(flights, key, reader)) for key in "ab" for reader in readers]
        wanted += [asyncio.create_task(want(flights, key, readers[0])) for key in "cdefgh"]
        await settle()
        gate.set()
        await until(lambda: len(results) == 4)
        await asyncio.sleep(0)
        assert [result() for result in results[:2]] == [None, None], "what waits in line holds no results of others"
        await asyncio.gather(*wanted)

    asyncio.run(main())


def test_what_is_detached_is_done_again() -> None:
    async def main() -> None:
        work = Work(slots=2)
        (first,) = work.want("a")
        await settle()
        work.flights.detach("a")
        (second,) = work.want("a")
        await settle()
        assert work.begun == ["a", "a"]
        work.gate.set()
        assert await asyncio.gather(first, second) == ["A", "A"]

    asyncio.run(main())


def test_of_an_account_what_is_needed_now_goes_first() -> None:
    queue: FairQueue[str] = FairQueue(lambda item: item == "x")
    account = Account()
    for item, priority in (("p", 2), ("q", 1), ("r", 1), ("a", 0), ("b", 0), ("z", -1)):
        queue.put(account, 1, item, priority)
    assert names(queue, 7) == "zabqrp-"


def test_what_is_needed_now_goes_before_what_others_want_ahead_up_to_a_lead() -> None:
    queue: FairQueue[str] = FairQueue(lambda item: item == "x", lead=3)
    ahead, now = Account(), Account()
    for _ in range(10):
        queue.put(ahead, 1, "p", 1)
        queue.put(now, 1, "n")
    assert names(queue, 3) == "nnn"
    assert names(queue, 10).count("n") == 5, "then they take turns"


def test_what_belongs_to_a_turn_is_taken_with_it_and_paid_for() -> None:
    queue: FairQueue[str] = FairQueue(lambda item: item == "x")
    one, two = Account(), Account()
    for item in "axbcd":
        queue.put(one, 1, item)
    queue.put(two, 1, "B")
    assert queue.take() == "a"
    assert queue.take_too(lambda item: item in "Bbx") == "b", "not what is over, or of somebody else"
    assert queue.take_too(lambda item: item in "Bbx") is None
    assert one.paid == 2
    assert names(queue, 4) == "Bcd-"
