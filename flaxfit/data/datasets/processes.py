"""A pool of worker processes, started and watched by loky.

Beyond loky, the function is sent to each process only once, no process outlives this
one, and this one does not wait for tasks when it exits.
"""

import os
import pickle
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from flaxfit._core.errors import UsageTypeError

_IDLE_SECONDS = 30.0


class Processes:
    """Python processes that apply one function, each to one task at a time.

    They start immediately and do not import the user's script: functions of the script
    are pickled by value, so it needs no `if __name__ == "__main__"`. jax runs on the
    CPU in them. Idle processes end after 30 seconds; the next task starts new ones.

    Args:
      function: the function; it is pickled once and sent to each process.
      number: the number of processes.

    Raises:
      ImportError: loky is not installed.
      UsageTypeError: the function, or an object it holds, cannot be pickled.
    """

    def __init__(self, function: Callable[[Any], Any], number: int) -> None:
        loky = _import_loky(number)
        self._executor = loky.ProcessPoolExecutor(
            number,
            timeout=_IDLE_SECONDS,
            initializer=_begin,
            initargs=(_dump_function(function, number), os.getpid()),
            env={
                "JAX_PLATFORMS": "cpu",
                # loky restarts processes that grow by 300 MB; they may cache data.
                "LOKY_MAX_MEMORY_LEAK_SIZE": "1e18",
            },
        )
        self._end = weakref.finalize(
            self, self._executor.shutdown, wait=False, kill_workers=True
        )
        with _sigint_blocked():
            self._executor.submit(int)  # starts them
        # At exit, before `atexit` functions run, loky waits for the tasks in flight.
        # The function registered last runs first, so this one runs before loky's.
        threading._register_atexit(self._end)  # type: ignore[attr-defined]

    def submit(self, task: Any) -> "Future[Any]":
        """Submits a task to the next free process; returns the future of its result.

        The future raises the function's error, with the traceback of the process as its
        cause, or loky's `BrokenProcessPool` (a RuntimeError) if a process died.
        """
        try:
            with _sigint_blocked():
                return self._executor.submit(_apply, task)
        except RuntimeError as error:
            # Raised here, the error would come before the results of earlier tasks.
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed

    def close(self) -> None:
        """Kills the processes, even in the middle of a task."""
        # This must not wait: the garbage collector may call it in a thread of loky.
        self._end()


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """A context in which new processes ignore Ctrl-C, which this process handles.

    They inherit the signal mask, so Ctrl-C cannot reach them even at their start.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _import_loky(number: int) -> ModuleType:
    try:
        return import_module("loky")
    except ImportError as error:
        raise ImportError(
            f"processes={number} needs loky: pip install loky. Or write "
            f"threads={number}."
        ) from error


def _dump_function(function: Callable[[Any], Any], number: int) -> bytes:
    try:
        return _dumps(function)
    except Exception as error:
        raise UsageTypeError(
            f"processes={number}: load and the items cannot be pickled ({error}).",
            "Open files, locks and connections inside load.",
            f"threads={number}.",
        ) from error


def _dumps(value: Any) -> bytes:
    pickled: bytes = import_module("cloudpickle").dumps(value)
    return pickled


# What follows runs in the worker processes.

_function: ContextVar[Callable[[Any], Any]] = ContextVar("function")


def _begin(function: bytes, parent: int) -> None:
    """Prepares a worker process: its function, output, and end with its parent."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # Standard output is buffered, and would be lost when the process is killed.
    sys.stdout = sys.stderr
    try:
        _function.set(pickle.loads(function))
    except Exception as error:
        error.add_note("while a process unpickled load and the items")
        _function.set(partial(_raise, error))


def _raise(error: Exception, task: Any) -> Any:
    del task
    raise error


def _end_with(parent: int) -> None:
    """Ends this process once its parent has ended for any reason."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def _apply(task: Any) -> Any:
    try:
        return _Result(_function.get()(task))
    except BaseException as error:
        raise _sendable(error) from error.__cause__


class _Result:
    """A value that unpickles as itself; a note is added if it cannot be pickled."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            return pickle.loads, (_dumps(self._value),)
        except Exception as error:
            error.add_note("while sending a loaded batch back from its process")
            raise


def _sendable(error: BaseException) -> Exception:
    """Returns the error; a RuntimeError if it is unpicklable or not an Exception."""
    if isinstance(error, Exception):
        with suppress(Exception):
            pickle.loads(_dumps(error))
            return error
    substitute = RuntimeError(f"{type(error).__name__}: {error}")
    for note in getattr(error, "__notes__", ()):
        substitute.add_note(note)
    return substitute
