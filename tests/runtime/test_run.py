"""A run ends when it is interrupted; the event loop reports its errors, and ends with everything it runs."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from surfw.errors import ModelClosedError, StorageError
from surfw.runtime.run import IoThread, Run
from tests.toys import Gate


def test_what_nobody_interrupts_goes_on() -> None:
    done: Future[int] = Future()
    done.set_result(1)
    run = Run()
    run.check()
    run.wait_for(done)


def test_the_first_interrupt_counts() -> None:
    run = Run()
    run.interrupt(ModelClosedError("closed"))
    run.interrupt(StorageError("later"))
    for _ in range(2):
        with pytest.raises(ModelClosedError, match="closed"):
            run.check()


def test_an_interrupt_ends_a_wait_for_what_never_comes() -> None:
    run, never, waiting = Run(), Future[None](), threading.Event()
    errors: list[Exception] = []

    def work() -> None:
        waiting.set()
        try:
            run.wait_for(never)
        except StorageError as exc:
            errors.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    assert waiting.wait(60)
    run.interrupt(StorageError("enough"))
    thread.join(60)
    assert [str(error) for error in errors] == ["enough"]
    assert not never.done()


def test_a_future_that_failed_ends_the_wait_without_its_error() -> None:
    failed: Future[None] = Future()
    failed.set_exception(StorageError("not the waiter's"))
    Run().wait_for(failed)


def surfw_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("surfw")]


async def where() -> str:
    return threading.current_thread().name


def test_coroutines_run_in_the_thread() -> None:
    io = IoThread("surfw-test")
    assert io.run(where()) == "surfw-test"
    assert io.submit(where()).result() == "surfw-test"
    io.close()
    assert surfw_threads() == []


def test_errors_come_back() -> None:
    async def fail() -> None:
        raise ZeroDivisionError("on purpose")

    io = IoThread()
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        io.run(fail())
    assert io.run(where()) == "surfw-io"
    io.close()


def test_closing_cancels_what_runs_and_waits_for_its_end() -> None:
    started, ended = threading.Event(), []

    async def forever() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(threading.current_thread().name)

    io = IoThread()
    work = io.submit(forever())
    assert started.wait(60)
    io.close()
    assert ended == ["surfw-io"]
    assert work.cancelled()
    io.close()
    assert surfw_threads() == []


def test_an_interrupt_cancels_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    started, cancelled = threading.Event(), threading.Event()

    async def forever() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def interrupt() -> None:
        assert started.wait(60)
        raise KeyboardInterrupt

    io = IoThread()
    submit = io.submit

    def interrupted(work: Any) -> Any:
        future: Any = submit(work)
        monkeypatch.setattr(future, "result", interrupt)
        return future

    monkeypatch.setattr(io, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        io.run(forever())
    assert cancelled.wait(60)
    monkeypatch.undo()
    io.close()


def test_a_closed_thread_takes_no_work() -> None:
    io = IoThread()
    io.close()
    with pytest.raises(ModelClosedError, match="the client has been closed; open it again"):
        io.submit(where())


def test_a_job_is_done_only_when_its_coroutine_has_ended() -> None:
    gate = Gate(stubborn=True)

    io = IoThread()
    job = io.submit(gate.passes("end"))
    gate.wait_for("end")
    assert job.cancel()
    assert job.cancel()  # even after two requests, it ends only after it has released everything
    io.run(where())
    assert not job.done()
    gate.open("end")
    with pytest.raises(CancelledError):
        job.result(60)
    assert job.cancelled()
    assert not job.cancel()
    io.close()


def test_blocking_calls_run_in_threads_that_end_with_it() -> None:
    async def blocking() -> str:
        return await asyncio.to_thread(lambda: threading.current_thread().name)

    io = IoThread()
    assert io.run(blocking()).startswith("surfw-io-worker")
    io.close()
    assert surfw_threads() == []


class Memory:
    """The memory that a job uses."""


def test_a_cancelled_job_lets_go_of_what_it_worked_with_at_once() -> None:
    async def fill(_: Memory) -> None:
        await asyncio.sleep(3600)

    io = IoThread()
    gc.disable()  # otherwise it might release it
    try:
        memory = Memory()
        seen = weakref.ref(memory)
        job = io.submit(fill(memory))
        del memory
        io.run(asyncio.sleep(0))  # it has begun
        job.cancel()
        with pytest.raises(CancelledError):
            job.result(60)
        io.run(asyncio.sleep(0))
        assert seen() is None
    finally:
        gc.enable()
        io.close()
