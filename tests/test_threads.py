"""Work in threads ends before the waiting caller goes on, even if it is cancelled repeatedly."""

import asyncio
import functools
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from surfw.errors import ConfigurationError
from surfw.threads import DaemonThreads, in_thread, on_loop, refuse_event_loop, to_its_end


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


def test_daemon_threads_take_calls_in_order_and_few_at_a_time() -> None:
    threads, may_end, names = DaemonThreads(2, "daemon"), threading.Event(), set[str]()

    def work(index: int) -> int:
        assert may_end.wait(60)
        names.add(threading.current_thread().name)
        assert threading.current_thread().daemon
        return index

    async def main() -> None:
        calls = [threads.submit(functools.partial(work, index)) for index in range(6)]
        assert sum(one.name == "daemon" for one in threading.enumerate()) == 2
        calls[4].cancel()
        may_end.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(found.pop(4), asyncio.CancelledError)
        assert found == [0, 1, 2, 3, 5]
        with pytest.raises(ZeroDivisionError):
            await threads.submit(lambda: 1 // 0)
        threads.close()
        assert await threads.submit(lambda: 7) == 7

    asyncio.run(main())
    threads.close()
    assert names == {"daemon"}


def test_nobody_waits_for_a_daemon_thread() -> None:
    code = (
        "import asyncio, threading\nfrom surfw.threads import DaemonThreads\n"
        "async def main():\n    call = DaemonThreads(1, 'x').submit(threading.Event().wait)\n"
        "    await asyncio.wait([call], timeout=0.1)\n    call.cancel()\nasyncio.run(main())"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


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


@pytest.fixture
def other_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_work_on_another_loop_gives_its_result_and_its_error(other_loop: asyncio.AbstractEventLoop) -> None:
    async def where() -> object:
        return asyncio.get_running_loop()

    async def fail() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        assert await on_loop(other_loop, where) is other_loop
        assert await on_loop(asyncio.get_running_loop(), where) is asyncio.get_running_loop()
        with pytest.raises(ZeroDivisionError):
            await on_loop(other_loop, fail)

    asyncio.run(main())


def test_cancelled_work_on_another_loop_has_ended_when_the_wait_for_it_has(
    other_loop: asyncio.AbstractEventLoop,
) -> None:
    began, seen = threading.Event(), []

    async def work() -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            seen.append("ended")

    async def main() -> None:
        task = asyncio.create_task(on_loop(other_loop, work))
        assert await asyncio.to_thread(began.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == ["ended"]

    asyncio.run(main())


def test_work_that_is_cancelled_before_it_begins_never_does(other_loop: asyncio.AbstractEventLoop) -> None:
    gate, seen = threading.Event(), []

    async def work() -> None:
        seen.append("began")

    async def main() -> None:
        other_loop.call_soon_threadsafe(gate.wait)
        task = asyncio.create_task(on_loop(other_loop, work))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert seen == []


def test_an_event_loop_is_not_blocked() -> None:
    refuse_event_loop("this", "that")

    async def main() -> None:
        with pytest.raises(ConfigurationError, match="this here would block the event loop; use that"):
            refuse_event_loop("this", "that")

    asyncio.run(main())
