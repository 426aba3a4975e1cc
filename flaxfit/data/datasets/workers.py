"""Runs a function ahead of time in threads or processes, in order and bounded."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeAlias

from flaxfit.data.datasets.processes import Processes

_Queue: TypeAlias = "SimpleQueue[tuple[Any, Future[Any]] | None]"


@dataclass(eq=False)
class OrderedMap:
    """One function applied to many tasks, by this thread, by others or by processes.

    Threads and processes work ahead: results and tasks in flight are at most twice
    their number. Processes are kept for the next call and end with the map.

    Args:
      function: task -> result; pickled for processes.
      threads: the number of threads.
      processes: the number of processes, in place of threads.
    """

    function: Callable[[Any], Any]
    threads: int = 0
    processes: int = 0
    _idle: Processes | None = field(default=None, init=False)

    def __call__(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yields the result of every task, in their order.

        Closing the iterator early cancels the tasks that wait.

        Raises:
          Exception: what a task, or reading the tasks, raised, after all results
            before it.
          ImportError, UsageTypeError, RuntimeError: see `Processes`.
        """
        if self.processes:
            return self._in_processes(tasks)
        if self.threads:
            return _in_threads(self.function, tasks, self.threads)
        return (self.function(task) for task in tasks)

    def _in_processes(self, tasks: Iterable[Any]) -> Iterator[Any]:
        # A second pass at the same time finds none idle and starts its own.
        processes, self._idle = self._idle, None
        if processes is None:
            processes = Processes(self.function, self.processes)
        try:
            yield from _in_order(tasks, processes.submit, 2 * self.processes)
        except BaseException as error:
            processes.close()
            if isinstance(error, BrokenExecutor):
                error.add_note(
                    "If memory ran out, write fewer processes: each holds a copy of "
                    "the items. processes=0 runs the same code in this process."
                )
            raise
        self._idle = processes


def _in_threads(
    function: Callable[[Any], Any], tasks: Iterable[Any], threads: int
) -> Iterator[Any]:
    todo: _Queue = SimpleQueue()
    # Not a ThreadPoolExecutor: its threads are no daemons, so the program could not end
    # while one hangs in a loader.
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


def _work(function: Callable[[Any], Any], todo: _Queue) -> None:
    while (given := todo.get()) is not None:
        task, future = given
        try:
            future.set_result(function(task))
        except BaseException as error:
            future.set_exception(error)
        del given, task, future  # waiting for the next must not keep them alive


def _in_order(
    tasks: Iterable[Any], submit: Callable[[Any], "Future[Any]"], most: int
) -> Iterator[Any]:
    """Yields the results of tasks; at most `most` are submitted at once."""
    waiting: deque[Future[Any]] = deque()
    remaining = iter(tasks)
    ended = False
    while True:
        while not ended and len(waiting) < most:
            try:
                task = next(remaining)
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
