"""Helpers for threads and event loops: awaiting work to its end, and keeping event loops unblocked."""

import asyncio
import concurrent.futures
import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from surfw.errors import ConfigurationError

T = TypeVar("T")


def sleep_when_idle() -> None:
    """Let idle threads of OpenMP sleep after some 20 µs, unless the environment says otherwise; before torch is loaded.

    By default they spin for milliseconds between two operations, and take the processors from the threads that read,
    verify and decode the next layer. Where nothing is streamed, spinning is faster.
    """
    if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


async def to_its_end(
    work: "Coroutine[Any, Any, T] | asyncio.Future[T]", *, on_cancel: Callable[[], object] = lambda: None
) -> T:
    """Await work that must not outlive the call, such as writes to memory that is reused afterwards.

    If cancelled, even repeatedly, this still waits until the work has ended, and then raises the cancellation. Each
    cancellation calls `on_cancel`, which may ask the work to end sooner.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as exc:
            cancelled = exc
            on_cancel()
    if cancelled is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # retrieve it, so that asyncio does not log it
    raise cancelled


async def in_thread(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """`asyncio.to_thread` that, if cancelled, still waits until the function has returned."""
    return await to_its_end(asyncio.to_thread(function, *arguments, **options))


async def together(works: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Await coroutines concurrently. The first failure cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except BaseExceptionGroup as failed:
        first = failed.exceptions[0]
        raise first from first.__cause__


async def cancel_all(tasks: Iterable["asyncio.Future[Any]"]) -> None:
    """Cancel all tasks and wait until they have ended, ignoring their outcomes."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await to_its_end(asyncio.gather(*ending, return_exceptions=True))


class DaemonThreads:
    """A pool of daemon threads for calls that may wait long for a network; the interpreter exits without joining them.

    The queue of calls is unbounded. The threads end when the pool is closed or garbage-collected.
    """

    def __init__(self, most: int, name: str) -> None:
        """Create a pool of at most `most` threads, started on demand."""
        self._most = most
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running = 0
        self._lock = threading.Lock()

    def submit(self, function: Callable[[], T]) -> "asyncio.Future[T]":
        """Call the function in a thread. Cancelling the future prevents the call, or ends the wait for its result."""
        settled: concurrent.futures.Future[T] = concurrent.futures.Future()

        def call() -> None:
            if not settled.set_running_or_notify_cancel():
                return
            try:
                settled.set_result(function())
            except BaseException as exc:  # noqa: BLE001 - raised by the future
                settled.set_exception(exc)

        with self._lock:
            self._calls.put(call)
            if self._running < self._most:
                if not self._running:
                    weakref.finalize(self, _end, self._calls, self._most)
                self._running += 1
                threading.Thread(target=_work, args=(self._calls,), name=self._name, daemon=True).start()
        return asyncio.wrap_future(settled)

    def close(self) -> None:
        """End the threads after all queued calls; later calls start new threads."""
        with self._lock:
            calls, self._calls = self._calls, queue.SimpleQueue()
            _end(calls, self._running)
            self._running = 0


def _work(calls: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    while call := calls.get():
        call()
        del call  # release what it references while waiting for the next call


def _end(calls: "queue.SimpleQueue[Callable[[], None] | None]", threads: int) -> None:
    for _ in range(threads):
        calls.put(None)


async def on_loop(loop: asyncio.AbstractEventLoop, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine on another thread's event loop. A cancellation is passed on, and waits until it has ended."""
    if loop is asyncio.get_running_loop():
        return await work()
    running: asyncio.Task[Any] | None = None
    given_up = False

    async def run() -> T:
        nonlocal running
        running = asyncio.current_task()
        if given_up:
            raise asyncio.CancelledError
        return await work()

    def give_up() -> None:
        nonlocal given_up
        given_up = True
        loop.call_soon_threadsafe(lambda: running.cancel() if running else None)

    return await to_its_end(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(run(), loop)), on_cancel=give_up)


def refuse_event_loop(what: str, instead: str) -> None:
    """Refuse a blocking operation in a thread with a running event loop.

    Raises:
        ConfigurationError: an event loop runs in this thread.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ConfigurationError(f"{what} here would block the event loop; use {instead}")
