"""Worker processes that end with their parent, however it ends.

They are new interpreters which do not import the user's script: what is defined there
travels by value, so that the script needs no `if __name__ == "__main__"`.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from importlib import import_module
from itertools import cycle
from queue import SimpleQueue
from types import ModuleType
from typing import IO, Any

_SECONDS_OF_REST = 10.0

# The pipes are taken away from file numbers 0 and 1, lest what `load` prints, or a
# program that it starts reads, comes between. The work is read before anything slow is
# imported, so that sending it does not wait for that.
_BEGIN = """
import os, pickle, sys
source, channel = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
sys.path[:], work = pickle.load(source)
from flaxfit.data.datasets.processes import serve
serve(source, channel, work)
"""


class Processes:
    """Python processes that all do the same work, on one task after the other.

    They begin at once. An accelerator is not theirs: jax, where the work uses it, runs
    on the processor.

    Args:
      function: the work; pickled once, and sent to each of them.
      number: how many.

    Raises:
      ImportError: cloudpickle is not installed.
      TypeError: the function, or what it holds, cannot be pickled.
    """

    def __init__(self, function: Callable[[Any], Any], number: int) -> None:
        work = _dump_work(function, number)
        self._workers = [_Worker() for _ in range(number)]
        # At the end of the interpreter as well.
        self._end = weakref.finalize(self, _end, self._workers)
        self._turns = cycle(self._workers)
        self._lock = threading.Lock()
        self._resting: threading.Timer | None = None
        for worker in self._workers:
            worker.begin(work)

    def submit(self, task: Any) -> "Future[Any]":
        """Gives a task to the process whose turn it is, and returns its result to be.

        The result raises what the work raised, with the traceback there in a note; or
        RuntimeError where the process ended.
        """
        return next(self._turns).submit(task)

    def rest(self) -> None:
        """Lets them wait for more tasks, after the last result, but not for long."""
        # Whoever keeps the traceback of a failed fit keeps the data, too.
        timer = threading.Timer(_SECONDS_OF_REST, _end_rest, [weakref.ref(self)])
        timer.daemon = True
        self._resting = timer
        timer.start()

    def wake(self) -> bool:
        """Returns whether they are still there, and lets them."""
        with self._lock:
            if self._resting is not None:
                self._resting.cancel()
                self._resting = None
            return self._end.alive

    def end_rest(self) -> None:
        """Ends them if they still rest."""
        with self._lock:
            if self._resting is not None:
                self._end()

    def close(self) -> None:
        """Ends the processes, in the middle of their work."""
        self._end()


class _Worker:
    """One process, and the thread that receives its results."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-c", _BEGIN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            # Ctrl-C is for this process to answer, and not for all of them.
            start_new_session=True,
        )
        self._lock = threading.Lock()
        self._given: deque[Future[Any]] = deque()
        self._lost: RuntimeError | None = None

    def begin(self, work: bytes) -> None:
        """Sends the work."""
        path = [os.path.abspath(entry) for entry in sys.path]
        self._send(pickle.dumps((path, work)))
        threading.Thread(
            target=self._receive, name="flaxfit-receiver", daemon=True
        ).start()

    def submit(self, task: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        with self._lock:
            if self._lost is not None:
                future.set_exception(self._lost)
                return future
            self._given.append(future)
        self._send(pickle.dumps(pickle.dumps(task)))
        return future

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        # That it has ended is told by its results, which are missing.
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def _receive(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as channel:
            while (answer := _read(channel)) is not None:
                self._settle(self._given.popleft(), answer)
        with self._lock:
            self._lost = RuntimeError(_lost_text(self._process.wait()))
            for future in self._given:
                future.set_exception(self._lost)

    @staticmethod
    def _settle(future: "Future[Any]", answer: bytes) -> None:
        try:
            result, error = pickle.loads(answer)
        except Exception as caught:
            caught.add_note("while reading what a process has loaded")
            error = caught
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def _end_rest(processes: "weakref.ref[Processes]") -> None:
    there = processes()
    if there is not None:
        there.end_rest()


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.end()


def _read(source: IO[bytes]) -> bytes | None:
    """Returns what comes next, None at the end; in the middle of it is an end too."""
    try:
        received: bytes = pickle.load(source)
    except (EOFError, OSError, pickle.UnpicklingError):
        return None
    return received


def _lost_text(code: int) -> str:
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        advice = (
            "If memory ran out, write fewer processes: each holds a copy of the items."
        )
    else:
        how = f"ended with exit code {code}"
        advice = "Its own words are above; processes=0 runs the same code in this one."
    return f"a process that loads data {how}, in the middle of its work. {advice}"


def _dump_work(function: Callable[[Any], Any], number: int) -> bytes:
    cloudpickle = _import_cloudpickle(number)
    try:
        work: bytes = cloudpickle.dumps(function)
    except Exception as error:
        raise TypeError(
            f"processes={number}: load and the items are sent to other processes, but "
            f"they cannot be pickled ({error}). Open files, locks and connections "
            f"inside of load, or write threads={number}."
        ) from error
    return work


def _import_cloudpickle(number: int) -> ModuleType:
    try:
        return import_module("cloudpickle")
    except ImportError as error:
        raise ImportError(
            f"processes={number} needs cloudpickle, which comes with Grain: "
            f'pip install "flaxfit[data]". Or write threads={number}.'
        ) from error


def serve(source: IO[bytes], channel: IO[bytes], work: bytes) -> None:
    """Works in a process of `Processes`; returns never.

    Args:
      source: where tasks come from; the process ends where it does.
      channel: where results go.
      work: the pickled function.
    """
    tasks: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_take, args=(source, tasks), daemon=True).start()
    function = _load_work(work)
    while True:
        answer = _answer(function, tasks.get())
        with contextlib.suppress(OSError):  # nobody is there: `_take` ends the process
            pickle.dump(answer, channel)
            channel.flush()


def _take(source: IO[bytes], tasks: "SimpleQueue[bytes]") -> None:
    while (task := _read(source)) is not None:
        tasks.put(task)
    # Not exit(): the main thread is at work.
    os._exit(0)


def _load_work(work: bytes) -> Callable[[Any], Any]:
    try:
        function: Callable[[Any], Any] = pickle.loads(work)
    except Exception as caught:
        error = caught
        error.add_note("while a process read load and the items, which were sent to it")

        def function(task: Any) -> Any:
            del task
            raise error

    return function


def _answer(function: Callable[[Any], Any], task: bytes) -> bytes:
    """Returns a pickled pair: the result and None, or None and the error."""
    cloudpickle = import_module("cloudpickle")
    try:
        result = function(pickle.loads(task))
    except Exception as error:
        return _dump_error(error)
    try:
        answer: bytes = cloudpickle.dumps((result, None))
    except Exception as error:
        error.add_note("while sending what was loaded back from a process")
        return _dump_error(error)
    return answer


def _dump_error(error: Exception) -> bytes:
    cloudpickle = import_module("cloudpickle")
    trace = "".join(traceback.format_tb(error.__traceback__))
    error.add_note(f"in another process:\n{trace}")
    try:
        answer: bytes = cloudpickle.dumps((None, error))
        pickle.loads(answer)
    except Exception:
        # Its class wants arguments, or it holds what cannot be sent.
        told = RuntimeError(f"{type(error).__name__}: {error}")
        for note in error.__notes__:
            told.add_note(note)
        return cloudpickle.dumps((None, told))
    return answer
