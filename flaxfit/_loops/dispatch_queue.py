"""Tunes the steps per call and bounds how far calls run ahead of the device."""

import time
from collections import deque
from typing import Any

import jax

from flaxfit._core.types import PyTree

# Long enough for a call to cost nothing, and short enough for Ctrl-C and a progress
# bar. Not shorter: XLA has to get its memory anew for every call, which for a small
# Transformer on a CPU is a quarter of the time if a call is a single step of 60 ms.
_SECONDS_PER_CALL = 0.25
# What may be under way beyond the call that runs: enough to keep the device busy, and
# not so much that batches pile up in its memory.
_SECONDS_AHEAD = 0.15
_FEWEST_CALLS_AHEAD = 2
_MOST_CALLS_AHEAD = 8
# A first guess of the time is a guess: chunks grow by this factor at most.
_GROWTH = 4


class Pace:
    """Follows the calls that are under way.

    Args:
      steps_per_call: steps of every call; None to go by the clock.
    """

    def __init__(self, steps_per_call: int | None = None) -> None:
        self._fixed = steps_per_call
        self._steps = steps_per_call or 1
        self._under_way: deque[tuple[Any, Any, int, float]] = deque()
        self._last_end = 0.0
        self._seconds_per_call = 0.0
        self._seconds_per_step = 0.0
        self._finished: tuple[Any, int] = (None, 0)
        self._begun = 0

    @property
    def steps(self) -> int:
        """The steps to take in the next call, at most."""
        return self._steps

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        self._collect()
        return not self._under_way

    @property
    def finished(self) -> tuple[Any, int]:
        """The result of the last finished call, None at first, and the steps up to it.

        Reading it waits for nothing.
        """
        return self._finished

    def begin(self, done: int = 0) -> None:
        """Begins an epoch: steps are counted anew, from those that are done."""
        self._under_way.clear()
        self._finished, self._begun = (None, done), done

    def follow(self, token: PyTree, result: Any, steps: int, *, compiled: bool) -> None:
        """Notes a call, and waits while too many are under way.

        Args:
          token: arrays that are ready when the call is done.
          result: what `finished` is to give.
          steps: how many it takes.
          compiled: whether it was compiled for, and so says nothing about time.
        """
        self._begun += steps
        began = float("inf") if compiled else time.perf_counter()
        self._under_way.append((token, result, self._begun, began))
        ahead = self._calls_ahead()
        if len(self._under_way) > ahead:
            # To wake up for every call would take the device's time, on a CPU.
            self._retire(len(self._under_way) - max(1, ahead // 2))
        self._collect()

    @property
    def seconds_left(self) -> float:
        """How long what is under way will take, by what came before."""
        if not self._under_way or not self._seconds_per_step:
            return 0.0
        steps = self._begun - self._finished[1]
        gone = time.perf_counter() - max(self._under_way[0][3], self._last_end)
        return max(0.0, steps * self._seconds_per_step - max(gone, 0.0))

    def distract(self) -> None:
        """Notes that the host did something else: what is under way tells no time."""
        self._under_way = deque(
            (token, result, upto, float("inf"))
            for token, result, upto, _ in self._under_way
        )

    def drain(self) -> None:
        """Waits for all calls."""
        if self._under_way:
            self._retire(len(self._under_way))

    def _collect(self) -> None:
        """Retires what is done, without waiting."""
        while self._under_way and _is_ready(self._under_way[0][0]):
            self._retire(1)

    def _calls_ahead(self) -> int:
        if not self._seconds_per_call:
            return _FEWEST_CALLS_AHEAD
        calls = round(_SECONDS_AHEAD / self._seconds_per_call)
        return max(_FEWEST_CALLS_AHEAD, min(_MOST_CALLS_AHEAD, calls))

    def _retire(self, calls: int) -> None:
        """Waits for the oldest calls, and takes their time."""
        done = [self._under_way.popleft() for _ in range(calls)]
        token, result, upto, _ = done[-1]
        jax.block_until_ready(token)
        end = time.perf_counter()
        seconds = end - max(self._last_end, done[0][3])
        measured = all(began < float("inf") for *_, began in done)
        steps = upto - self._finished[1]
        self._finished, self._last_end = (result, upto), end
        if not measured:
            return
        self._seconds_per_call = seconds / calls
        self._seconds_per_step = seconds / steps
        if self._fixed is None:
            wanted = int(_SECONDS_PER_CALL * steps / max(seconds, 1e-9))
            self._steps = max(1, min(wanted, _GROWTH * self._steps))


def _is_ready(token: PyTree) -> bool:
    return all(leaf.is_ready() for leaf in jax.tree.leaves(token))
