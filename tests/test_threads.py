"""Work in threads comes to its end before whoever waits for it goes on, however often that is cancelled."""

import asyncio
import threading

import pytest

from surfw.errors import ConfigurationError
from surfw.threads import in_thread, refuse_event_loop, to_its_end


def test_a_result_and_an_error_come_through() -> None:
    async def main() -> None:
        assert await in_thread(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await in_thread(divmod, 7, 0)

    asyncio.run(main())


def test_a_thread_is_waited_for_however_often_it_is_cancelled() -> None:
    began, may_end, wrote = threading.Event(), threading.Event(), []

    def work() -> None:
        began.set()
        assert may_end.wait(60)
        wrote.append(1)

    async def main() -> None:
        task = asyncio.create_task(in_thread(work))
        assert await asyncio.to_thread(began.wait, 60)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert wrote == [1]

    asyncio.run(main())


def test_the_error_of_work_that_nobody_wants_any_more_is_let_be() -> None:
    async def main() -> None:
        failing: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def wait() -> None:
            await failing

        task = asyncio.create_task(to_its_end(wait()))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        failing.set_exception(ZeroDivisionError())
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_an_event_loop_is_not_blocked() -> None:
    refuse_event_loop("this", "that")

    async def main() -> None:
        with pytest.raises(ConfigurationError, match="this here would block the event loop; use that"):
            refuse_event_loop("this", "that")

    asyncio.run(main())
