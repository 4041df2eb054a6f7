"""Runs of a model, which another thread can interrupt, and the event loop thread that they wait for.

Models are synchronous; sources are asynchronous. Coroutines run on an `IoThread`, and a run waits for them with
`Run.wait_for`, so that an interrupt also ends the wait. Asynchronous callers run models with `run_in_executor`.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, InvalidStateError, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

from surfw.errors import ModelClosedError, ModelError
from surfw.skeleton.default_dtype import runs
from surfw.threads import cancel_all, to_its_end

T = TypeVar("T")
_WORKERS = 8

current_run: "ContextVar[Run | None]" = ContextVar("surfw_run", default=None)
"""The run that this thread works for, so that a waiting caller can interrupt it."""


class Run:
    """A forward or a generation that another thread may interrupt.

    It calls `pause` at every layer and waits with `wait_for`, so it ends within one layer's computation.
    """

    def __init__(self) -> None:
        """Begin, not interrupted."""
        self._stop: Future[None] = Future()

    def interrupt(self, error: Exception) -> None:
        """Make the run end with this error; only the first call has an effect."""
        with suppress(InvalidStateError):
            self._stop.set_exception(error)

    def check(self) -> None:
        """Raise if the run was interrupted.

        Raises:
            Exception: the error that it was interrupted with.
        """
        if self._stop.done():
            self._stop.result()

    def pause(self) -> None:
        """As `check`, but first wait while another thread builds a model with a different default dtype."""
        while (build := runs.build) is not None and runs.builder != threading.get_ident():
            self.wait_for(build)
        self.check()

    def wait_for(self, future: "Future[Any]") -> None:
        """Wait until a future is done, successfully or not.

        Raises:
            Exception: the run was interrupted with this error in the meantime.
        """
        with runs.resting():
            wait([future, self._stop], return_when=FIRST_COMPLETED)
        self.check()


class Job(Future[T]):
    """A coroutine on an I/O thread.

    It is done only once the coroutine has ended. `cancel` asks it to end early; until it has, the job is not done, and
    the memory that the coroutine writes to must not be reused.
    """

    _task: asyncio.Task[T] | None = None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Use this loop; `begin` has to be called on it first."""
        super().__init__()
        self._loop = loop
        self._is_unwanted = False

    @property
    def is_ending(self) -> bool:
        """Whether it was cancelled and has not ended yet."""
        return self._is_unwanted and not self.done()

    def cancel(self) -> bool:
        """Ask the coroutine to end; False if it has ended."""
        if self.done():
            return False
        if not self._is_unwanted:
            self._is_unwanted = True
            self._loop.call_soon_threadsafe(self._cancel_task)
        return True

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def begin(self, work: Coroutine[Any, Any, T]) -> None:
        """Start the coroutine; called on the loop."""
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[T]) -> None:
        self._task = None  # a cancelled task keeps its frames alive, and with them the memory that it was to fill
        if task.cancelled():
            super().cancel()
            self.set_running_or_notify_cancel()
        elif exc := task.exception():
            self.set_exception(exc)
        else:
            self.set_result(task.result())


class IoThread:
    """Runs coroutines for code that is not asynchronous."""

    def __init__(self, name: str = "surfw-io") -> None:
        """Start the thread; blocking calls of coroutines run in threads whose names begin with its name."""
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(_WORKERS, thread_name_prefix=f"{name}-worker"))
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._lock = threading.Lock()
        self._closed = False
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Job[T]:
        """Start a coroutine; the job can be waited for, or cancelled, from any thread.

        Raises:
            ModelClosedError: the thread has been closed.
        """
        with self._lock:
            if self._closed:
                work.close()
                raise ModelClosedError("the client has been closed; open it again")
            job: Job[T] = Job(self._loop)
            self._loop.call_soon_threadsafe(job.begin, work)
        return job

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end; interrupting the program or the current run cancels it.

        Raises:
            ModelClosedError: the thread is closed, or was closed in the meantime.
        """
        job = self.submit(work)
        try:
            if run := current_run.get():
                run.wait_for(job)
            return job.result()
        except CancelledError as exc:
            raise ModelClosedError("the client was closed while it was used; open it again") from exc
        except BaseException:
            job.cancel()
            raise

    def close(self) -> None:
        """Cancel what still runs, and end the thread. Closing twice has no effect."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(_end_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _end_others() -> None:
    """Cancel all other tasks of this loop, and wait for them and for its executor."""
    await cancel_all(asyncio.all_tasks() - {asyncio.current_task()})
    await asyncio.get_running_loop().shutdown_default_executor()


async def run_in_executor(executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """Do the work in a thread of the executor, as a run of its own.

    Cancelling this interrupts the run, or keeps it from starting; the cancellation takes effect only once the thread
    has ended the work.
    """
    run, context = Run(), copy_context()
    context.run(current_run.set, run)
    future = executor.submit(context.run, work)
    try:
        await wait_until_done(future)
    except asyncio.CancelledError:
        if not future.cancel():
            run.interrupt(ModelError("the run was cancelled"))
            await to_its_end(wait_until_done(future))
        raise
    return future.result()


async def wait_until_done(future: "Future[Any]") -> None:
    """Wait until a future is done, successfully or not; cancelling the wait does not cancel the future."""
    loop, is_done = asyncio.get_running_loop(), asyncio.Event()

    def tell(_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed, so nobody waits any more
            loop.call_soon_threadsafe(is_done.set)

    future.add_done_callback(tell)
    await is_done.wait()
