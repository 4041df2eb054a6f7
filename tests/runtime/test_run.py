"""A run ends when it is interrupted: at its next check, or while it waits."""

import threading
from concurrent.futures import Future

import pytest

from surfw.errors import ModelClosedError, StorageError
from surfw.runtime.run import Run


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
