"""Turns go to whoever has paid least, and a pass of the loop has one step."""

import asyncio

from surfw.server.fairness import Account, FairQueue, Turns


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
