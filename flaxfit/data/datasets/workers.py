"""Maps a function over tasks in threads or processes that work ahead, in order."""

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
    """Applies one function to many tasks, in the calling thread, threads or processes.

    Workers work ahead: at most two tasks per worker are submitted and not yet yielded.
    Processes stay for the next call, and end with this object.

    Args:
      function: task -> result; it is pickled for processes.
      threads: the number of threads; 0 for the calling thread.
      processes: the number of processes, instead of threads.
    """

    function: Callable[[Any], Any]
    threads: int = 0
    processes: int = 0
    _idle: Processes | None = field(default=None, init=False)

    def __call__(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yields the result of every task, in the order of the tasks.

        Closing the iterator early drops the waiting tasks, and kills the processes.

        Raises:
          Exception: an error of a task, or of reading `tasks`, after the results of
            all earlier tasks.
          ImportError, UsageTypeError, RuntimeError: see `Processes`.
        """
        if self.processes:
            return self._in_processes(tasks)
        if self.threads:
            return _in_threads(self.function, tasks, self.threads)
        return (self.function(task) for task in tasks)

    def _in_processes(self, tasks: Iterable[Any]) -> Iterator[Any]:
        # A second pass at the same time finds no idle processes and starts its own.
        processes, self._idle = self._idle, None
        if processes is None:
            processes = Processes(self.function, self.processes)
        try:
            yield from _in_order(tasks, processes.submit, 2 * self.processes)
        except BaseException as error:
            processes.close()
            if isinstance(error, BrokenExecutor):
                error.add_note(
                    "If memory ran out, use fewer processes: each holds a copy of the "
                    "items. processes=0 runs the same code in this process."
                )
            raise
        self._idle = processes


def _in_threads(
    function: Callable[[Any], Any], tasks: Iterable[Any], threads: int
) -> Iterator[Any]:
    todo: _Queue = SimpleQueue()
    # Not a ThreadPoolExecutor: its threads are not daemons, so one that hangs in a
    # loader would keep the program from ending.
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
        del given, task, future  # or they stay alive while this waits for the next


def _in_order(
    tasks: Iterable[Any], submit: Callable[[Any], "Future[Any]"], most: int
) -> Iterator[Any]:
    """Yields the results of tasks; submits up to `most` tasks ahead."""
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
