"""Fresh worker processes with one thread each, which end with the process that started them."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Final

_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@contextlib.contextmanager
def start_pool(
    processes: int, num_tasks: int, initializer: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """Start processes; what has not begun when the context is left is cancelled.

    They are spawned: forked ones would share the thread pools of libraries that are loaded here.

    Args:
        processes: How many to start, at most one for each task.
        num_tasks: Number of tasks there will be.
        initializer: Called once in every process.
        arguments: Of the initializer.
    """
    context = multiprocessing.get_context("spawn")
    number = min(processes, max(num_tasks, 1))
    with _one_thread_each():
        pool = ProcessPoolExecutor(number, context, initializer=_begin, initargs=(initializer, arguments))
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """Set a process up: a parent that is killed cannot tell it to end, so it watches for that; one that is interrupted can."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker process"
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Give processes that are started meanwhile one thread each; libraries read this when they are loaded."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
