"""Runs functions ahead of time in threads or processes, in order and bounded."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeAlias

from flaxfit.data.datasets.processes import Processes

Submit: TypeAlias = Callable[[Any], "Future[Any]"]
"""`task -> what will be its result`."""

_Todo: TypeAlias = "SimpleQueue[tuple[Any, Future[Any]] | None]"


class OrderedMap:
    """The same work on every task: in the caller's thread, in others, or in processes.

    Threads and processes work ahead: of results and work under way there are at most
    twice as many as of them. Processes stay for the tasks of the next call, if it
    comes soon, and end with the map.

    Args:
      function: the work; for processes it is pickled.
      threads: how many threads work at once.
      processes: how many processes work instead.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        threads: int = 0,
        processes: int = 0,
    ) -> None:
        self._function = function
        self._threads = threads
        self._processes = processes
        self._idle: Processes | None = None

    def __call__(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yields the result of every task, in their order.

        Whoever closes the iterator before its end calls off what waits.

        Raises:
          Exception: what a task raised, or reading the tasks, after all results
            before it.
          ImportError, TypeError, RuntimeError: see `Processes`.
        """
        if self._processes:
            return self._in_processes(tasks)
        if self._threads:
            return _in_threads(self._function, tasks, self._threads)
        return map(self._function, tasks)

    def _in_processes(self, tasks: Iterable[Any]) -> Iterator[Any]:
        idle, self._idle = self._idle, None
        if idle is None or not idle.wake():
            idle = Processes(self._function, self._processes)
        processes = idle
        try:
            yield from _in_order(tasks, processes.submit, 2 * self._processes)
        except BaseException:
            processes.close()
            raise
        self._idle = processes
        processes.rest()


def _in_threads(
    function: Callable[[Any], Any], tasks: Iterable[Any], threads: int
) -> Iterator[Any]:
    todo: _Todo = SimpleQueue()
    # Daemons, which a ThreadPoolExecutor has none of: nobody waits at exit for one that
    # hangs in a loader.
    for number in range(threads):
        name = f"flaxfit-worker-{number}"
        Thread(target=_work, args=(function, todo), name=name, daemon=True).start()

    def submit(task: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        todo.put((task, future))
        return future

    try:
        yield from _in_order(tasks, submit, 2 * threads)
    finally:
        with suppress(Empty):
            while True:
                todo.get_nowait()
        for _ in range(threads):
            todo.put(None)


def _work(function: Callable[[Any], Any], todo: _Todo) -> None:
    while (given := todo.get()) is not None:
        task, future = given
        try:
            future.set_result(function(task))
        except BaseException as error:
            future.set_exception(error)
        del given, task, future  # while it waits for the next


def _in_order(tasks: Iterable[Any], submit: Submit, most: int) -> Iterator[Any]:
    """Yields the results of tasks, of which `most` are submitted at once."""
    waiting: deque[Future[Any]] = deque()
    left = iter(tasks)
    ended = False
    while True:
        while not ended and len(waiting) < most:
            try:
                task = next(left)
            except StopIteration:
                ended = True
            except Exception as error:
                ended = True
                waiting.append(Future())
                waiting[-1].set_exception(error)
            else:
                waiting.append(submit(task))
        if not waiting:
            return
        yield waiting.popleft().result()
