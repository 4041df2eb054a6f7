"""A run of a model, which can be interrupted from outside; where it runs, and the event loop that it waits for.

Models are not asynchronous; sources are. Coroutines run on an `IoThread`, and a run waits for them with
`Run.wait_for`, so that an interrupt ends the wait as well. Asynchronous callers run models with `run_in_executor`.
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
"""The run that this thread works for, so that those who wait for the thread can interrupt it."""


class Run:
    """A forward, or a generation, that another thread may interrupt.

    What runs calls `pause` at every layer, and waits with `wait_for`, so that it ends within one layer's computation.
    """

    def __init__(self) -> None:
        """Begin; nothing has interrupted it."""
        self._stop: Future[None] = Future()

    def interrupt(self, error: Exception) -> None:
        """Make the run end with this error; the first one counts."""
        with suppress(InvalidStateError):
            self._stop.set_exception(error)

    def check(self) -> None:
        """Go on, unless the run was interrupted.

        Raises:
            Exception: what it was interrupted with.
        """
        if self._stop.done():
            self._stop.result()

    def pause(self) -> None:
        """As `check`, but first wait while another thread builds a model under another default dtype."""
        while (build := runs.build) is not None and runs.builder != threading.get_ident():
            self.wait_for(build)
        self.check()

    def wait_for(self, future: "Future[Any]") -> None:
        """Wait until a future is done, however it ends.

        Raises:
            Exception: what the run was interrupted with in the meantime.
        """
        with runs.resting():
            wait([future, self._stop], return_when=FIRST_COMPLETED)
        self.check()


class Job(Future[T]):
    """A coroutine on an I/O thread.

    Done only when the coroutine has ended. `cancel` asks it to end early; until it has, the job is not done, and
    the memory that the coroutine writes to is still its own.
    """

    _task: asyncio.Task[T] | None = None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop, on which `begin` comes before all else."""
        super().__init__()
        self._loop = loop
        self._is_unwanted = False

    @property
    def is_ending(self) -> bool:
        """Whether it was asked to end, and has not yet."""
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
        self._task = None  # a cancelled one holds its frames, and with them the memory that it was to fill
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
        """Run a coroutine to its end; an interrupt, of the program or of the run this belongs to, cancels it.

        Raises:
            ModelClosedError: the thread is closed, or was closed meanwhile.
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
        """Cancel what still runs, and end the thread. Closing twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(_end_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _end_others() -> None:
    """Cancel all other work of this loop, and wait for it and for its threads."""
    await cancel_all(asyncio.all_tasks() - {asyncio.current_task()})
    await asyncio.get_running_loop().shutdown_default_executor()


async def run_in_executor(executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """Do the work in a thread of the executor, as a run of its own.

    When this is cancelled, the run is interrupted, or never begins; this ends only when the thread has let go of it.
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
    """Wait until a future is done, however it ends; cancelling the wait does not cancel it."""
    loop, is_done = asyncio.get_running_loop(), asyncio.Event()

    def tell(_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed, and with it the wait
            loop.call_soon_threadsafe(is_done.set)

    future.add_done_callback(tell)
    await is_done.wait()
