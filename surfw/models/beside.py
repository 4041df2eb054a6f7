"""Work in a thread beside an event loop, interrupted when whoever waits for it is cancelled."""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any, TypeVar

from surfw.errors import ModelError
from surfw.runtime.run import Run, current_run

T = TypeVar("T")


async def beside(executor: Executor, work: Callable[[], T]) -> T:
    """Do it in a thread of the executor, as a run of its own.

    When this is cancelled, the run is interrupted, or never begins; this ends only when the thread has let go of it.
    """
    run, context = Run(), contextvars.copy_context()
    context.run(current_run.set, run)
    future = executor.submit(context.run, work)
    try:
        await ended(future)
    except asyncio.CancelledError:
        if not future.cancel():
            run.interrupt(ModelError("the run was cancelled"))
            await ended(future)
        raise
    return future.result()


async def ended(future: "Future[Any]") -> None:
    """Wait until a future is done, however it ends; whoever stops waiting does not cancel it."""
    loop, is_done = asyncio.get_running_loop(), asyncio.Event()

    def tell(_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(is_done.set)

    future.add_done_callback(tell)
    await is_done.wait()
