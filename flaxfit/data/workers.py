"""Work on what comes next, in threads or processes: ordered, and bounded."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any


def ordered_map(
    function: Callable[[Any], Any],
    tasks: Iterable[Any],
    *,
    threads: int = 0,
    processes: int = 0,
) -> Iterator[Any]:
    """Yields `function(task)` of every task, in their order.

    Args:
      function: the work; for processes it is pickled.
      tasks: what to work on; for processes a sequence.
      threads: how many threads work at once; at most twice as many results wait.
      processes: how many processes work instead, by Grain.

    Raises:
      Exception: what a task raised, after the results before it.
    """
    if processes:
        return _in_processes(function, list(tasks), processes)
    if threads:
        return _in_threads(function, iter(tasks), threads)
    return map(function, tasks)


def _in_threads(
    function: Callable[[Any], Any], tasks: Iterator[Any], threads: int
) -> Iterator[Any]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="flaxfit-worker")
    waiting: deque[Future[Any]] = deque()
    try:
        while True:
            room = 2 * threads - len(waiting)
            waiting.extend(pool.submit(function, task) for task in islice(tasks, room))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _in_processes(
    function: Callable[[Any], Any], tasks: Sequence[Any], processes: int
) -> Iterator[Any]:
    raise NotImplementedError
