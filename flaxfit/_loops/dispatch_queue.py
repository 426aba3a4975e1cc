"""Tunes the steps per call and bounds how far calls run ahead of the device."""

import time
from collections import deque
from typing import Any, NamedTuple

import jax

from flaxfit._core.types import PyTree

# Long enough to make the cost of a call negligible, short enough for Ctrl-C and a
# progress bar. Not shorter: XLA allocates its memory again for every call, which takes
# a quarter of the time of a small Transformer on a CPU if a call is one step of 60 ms.
_SECONDS_PER_CALL = 0.25
# How far the host may run ahead of the call that is running: enough to keep the device
# busy, and not so far that batches pile up in its memory.
_SECONDS_AHEAD = 0.15
_FEWEST_CALLS_AHEAD = 2
_MOST_CALLS_AHEAD = 8
# The first measured time is only an estimate: calls grow by this factor at most.
_GROWTH = 4


class _Call(NamedTuple):
    """A call in flight.

    Attributes:
      token: arrays that are ready when the call has finished.
      result: the value for `finished`.
      steps: the steps of the epoch up to the end of this call.
      began: when it was dispatched; infinity if it is not timed.
    """

    token: Any
    result: Any
    steps: int
    began: float


class DispatchQueue:
    """Tracks the calls in flight.

    Args:
      steps_per_call: steps of every call; None to tune them by timing.

    Attributes:
      steps_per_call: the largest number of steps for the next call.
      finished: the result of the last finished call, None at first, and the epoch's
        steps up to its end. Reading that result does not wait for the device.
    """

    def __init__(self, steps_per_call: int | None = None) -> None:
        self._fixed = steps_per_call
        self.steps_per_call = steps_per_call or 1
        self._in_flight: deque[_Call] = deque()
        self._last_end = 0.0
        self._seconds_per_call = 0.0
        self._seconds_per_step = 0.0
        self.finished: tuple[Any, int] = (None, 0)
        self._submitted = 0

    @property
    def idle(self) -> bool:
        """Whether no call is in flight."""
        self._retire_finished()
        return not self._in_flight

    @property
    def seconds_left(self) -> float:
        """Estimates how long the calls in flight will take."""
        if not self._in_flight or not self._seconds_per_step:
            return 0.0
        steps = self._submitted - self.finished[1]
        elapsed = time.perf_counter() - max(self._in_flight[0].began, self._last_end)
        return max(0.0, steps * self._seconds_per_step - max(elapsed, 0.0))

    def begin(self, done: int = 0) -> None:
        """Starts an epoch in which `done` steps are finished already."""
        self._in_flight.clear()
        self.finished, self._submitted = (None, done), done

    def submit(self, token: PyTree, result: Any, steps: int, *, compiled: bool) -> None:
        """Adds a call, and waits while too many are in flight.

        Args:
          token: arrays that are ready when the call has finished.
          result: the value for `finished` once the call has finished.
          steps: the number of steps of the call.
          compiled: whether the program was compiled for this call, which then is not
            timed.
        """
        self._submitted += steps
        began = float("inf") if compiled else time.perf_counter()
        self._in_flight.append(_Call(token, result, self._submitted, began))
        ahead = self._calls_ahead()
        if len(self._in_flight) > ahead:
            # On a CPU, waking for every call would slow down the computation.
            self._retire(len(self._in_flight) - max(1, ahead // 2))
        self._retire_finished()

    def ignore_timing(self) -> None:
        """Excludes the calls in flight from timing: the host was busy elsewhere."""
        self._in_flight = deque(c._replace(began=float("inf")) for c in self._in_flight)

    def wait_all(self) -> None:
        """Waits for all calls."""
        if self._in_flight:
            self._retire(len(self._in_flight))

    def _retire_finished(self) -> None:
        while self._in_flight and _is_ready(self._in_flight[0].token):
            self._retire(1)

    def _calls_ahead(self) -> int:
        if not self._seconds_per_call:
            return _FEWEST_CALLS_AHEAD
        calls = round(_SECONDS_AHEAD / self._seconds_per_call)
        return max(_FEWEST_CALLS_AHEAD, min(_MOST_CALLS_AHEAD, calls))

    def _retire(self, calls: int) -> None:
        """Waits for the oldest calls and measures their time."""
        done = [self._in_flight.popleft() for _ in range(calls)]
        last = done[-1]
        jax.block_until_ready(last.token)
        end = time.perf_counter()
        seconds = end - max(self._last_end, done[0].began)
        steps = last.steps - self.finished[1]
        self.finished, self._last_end = (last.result, last.steps), end
        if any(call.began == float("inf") for call in done):
            return
        self._seconds_per_call = seconds / calls
        self._seconds_per_step = seconds / steps
        if self._fixed is None:
            wanted = int(_SECONDS_PER_CALL * steps / max(seconds, 1e-9))
            self.steps_per_call = max(1, min(wanted, _GROWTH * self.steps_per_call))


def _is_ready(token: PyTree) -> bool:
    return all(leaf.is_ready() for leaf in jax.tree.leaves(token))
