"""Measures how a fit spends its time. Knows nothing of devices."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flaxfit._reporting.display import format_count, format_table

PHASES = (
    "compiling",
    "waiting_for_data",
    "stepping",
    "evaluating",
    "callbacks",
    "saving",
)
# The remark on slow input appears if at least this share of the training was waiting,
_MUCH_WAITING = 0.2
# and if the training took at least this many seconds.
_LONG_ENOUGH = 0.5


class Clock:
    """Splits the time of one thread among phases; nested phases count once.

    The work of other threads is not counted.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase = "stepping"
        self._thread = threading.get_ident()
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside the block as `name`."""
        if threading.get_ident() != self._thread:
            yield
            return
        outer = self.switch(name)
        try:
            yield
        finally:
            self.switch(outer)

    def switch(self, name: str) -> str:
        """Counts the time from now on as `name`; returns the phase before it."""
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        outer, self._phase, self._since = self._phase, name, now
        return outer

    def move(self, seconds: float, phase: str) -> None:
        """Moves `seconds` from the current phase to another one."""
        self._seconds[self._phase] -= seconds
        self._seconds[phase] += seconds

    def lap(self) -> dict[str, float]:
        """Returns the seconds of every phase since the last lap."""
        self.switch(self._phase)
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds


class Timing:
    """How a `fit` spent its time; `print` it, or read the attributes.

    Attributes:
      seconds: phase -> seconds of each epoch. The phases are `compiling`,
        `waiting_for_data` (the device had nothing to do), `stepping`, `evaluating`,
        `callbacks`, `saving` and `total`. Saving after an epoch counts for the next
        epoch, after the last one for none. The time before the first epoch counts for
        the first.
      steps: training steps of each epoch.
      examples: training examples of each epoch, without padding and weights of 0.
      flops_per_step: returns the FLOPs of a step; None before the first step.
      clock: measures the running epoch.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self.seconds: dict[str, list[float]] = {name: [] for name in (*PHASES, "total")}
        self.steps: list[int] = []
        self.examples: list[int] = []
        self.flops_per_step: Callable[[], float | None] | None = None

    def append(self, seconds: Mapping[str, float], steps: int, examples: int) -> None:
        """Adds an epoch."""
        for name in PHASES:
            self.seconds[name].append(seconds[name])
        self.seconds["total"].append(sum(seconds.values()))
        self.steps.append(steps)
        self.examples.append(examples)

    @property
    def examples_per_second(self) -> list[float]:
        """Training examples per second of stepping and waiting for data, by epoch."""
        return [_rate(n, s) for n, s in zip(self.examples, self._train(), strict=True)]

    @property
    def steps_per_second(self) -> list[float]:
        """Training steps per second of stepping and waiting for data, by epoch."""
        return [_rate(n, s) for n, s in zip(self.steps, self._train(), strict=True)]

    @property
    def flops_per_second(self) -> list[float] | None:
        """FLOP/s of training in each epoch.

        None if the backend does not report them, before the first step, and in a copy
        that was pickled.

        Reading this counts the FLOPs in the step's program, which takes a moment.
        FLOPs of custom kernels are not included.
        """
        flops = self.flops_per_step and self.flops_per_step()
        return None if flops is None else [flops * r for r in self.steps_per_second]

    @property
    def remark(self) -> str | None:
        """A sentence if training waits for its input much of the time, else None."""
        waiting = sum(self.seconds["waiting_for_data"])
        training = waiting + sum(self.seconds["stepping"])
        if training < _LONG_ENOUGH or waiting < _MUCH_WAITING * training:
            return None
        return (
            f"the input holds training back: {waiting / training:.0%} of the training "
            f"time ({waiting:.1f} s) was spent waiting for batches"
        )

    def _train(self) -> list[float]:
        waiting, stepping = self.seconds["waiting_for_data"], self.seconds["stepping"]
        return [w + s for w, s in zip(waiting, stepping, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        # The function cannot be pickled, and the clock belongs to a thread.
        return {**vars(self), "flops_per_step": None, "clock": None}

    def __repr__(self) -> str:
        total = sum(self.seconds["total"])
        rows = {}
        for name, values in self.seconds.items():
            spent = sum(values)
            share = f" ({spent / total:.0%})" if total and name != "total" else ""
            rows[name.replace("_", " ")] = f"{spent:.2f} s{share}"
        training = sum(self._train())
        rows["examples/s"] = format_count(_rate(sum(self.examples), training))
        rows["steps/s"] = format_count(_rate(sum(self.steps), training))
        if self.remark:
            rows["remark"] = self.remark
        return format_table(rows)


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
