"""Work is done once for all who want it, some at a time, and not at all for nobody."""

import asyncio
import weakref

from surfw.server.fairness import Reader, SingleFlight
from tests.peers import until


class Work:
    """Work that waits until it is told to go on, and counts."""

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
    """Let everybody go as far as they can."""
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
