"""Measures where the time of a fit went. Knows nothing of devices."""

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
# From this share of the time on, the input is said to hold training back.
_MUCH_WAITING = 0.2
_LONG_ENOUGH = 0.5  # seconds of a fit, below which nothing is worth a remark


class Clock:
    """Splits the time that goes by among phases, each moment to the innermost one.

    It is that of one thread; what others do in the meantime is not counted.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase = "stepping"
        self._thread = threading.get_ident()
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside as `name`."""
        if threading.get_ident() != self._thread:
            yield
            return
        outer = self.switch(name)
        try:
            yield
        finally:
            self.switch(outer)

    def switch(self, name: str) -> str:
        """Counts the time from here on as `name`; returns what it was counted as."""
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        outer, self._phase, self._since = self._phase, name, now
        return outer

    def move(self, seconds: float, phase: str) -> None:
        """Counts `seconds` that went by in the current phase as another one."""
        self._seconds[self._phase] -= seconds
        self._seconds[phase] += seconds

    def lap(self) -> dict[str, float]:
        """Returns the seconds of every phase since the last lap."""
        self.switch(self._phase)
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds


class Timing:
    """Where the time of a `fit` went; `print` it, or look things up.

    Attributes:
      seconds: phase -> seconds of each epoch. The phases are `compiling`,
        `waiting_for_data` (the device had nothing to do), `stepping`, `evaluating`,
        `callbacks`, `saving` and `total`. An epoch's saving and callbacks are those
        up to its end; what comes before the first epoch counts to it.
      steps: training steps of each epoch.
      examples: training examples of each epoch, without fill and those of weight 0.
      flops_per_step: counts the FLOPs of a step of the program that was run.
      clock: measures the running epoch.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self.seconds: dict[str, list[float]] = {name: [] for name in (*PHASES, "total")}
        self.steps: list[int] = []
        self.examples: list[int] = []
        self.flops_per_step: Callable[[], float | None] | None = None

    def close_epoch(self, steps: int, examples: int) -> None:
        """Adds an epoch, with the time since the last one."""
        self.append(self.clock.lap(), steps, examples)

    def append(self, seconds: Mapping[str, float], steps: int, examples: int) -> None:
        """Adds an epoch."""
        for name in PHASES:
            self.seconds[name].append(seconds[name])
        self.seconds["total"].append(sum(seconds.values()))
        self.steps.append(steps)
        self.examples.append(examples)

    @property
    def examples_per_second(self) -> list[float]:
        """Examples per second of training in each epoch, without compiling."""
        return [_rate(n, s) for n, s in zip(self.examples, self._train(), strict=True)]

    @property
    def steps_per_second(self) -> list[float]:
        """Steps per second of training in each epoch, without compiling."""
        return [_rate(n, s) for n, s in zip(self.steps, self._train(), strict=True)]

    @property
    def flops_per_second(self) -> list[float] | None:
        """FLOP/s of training in each epoch; None where the backend does not tell.

        The FLOPs of a step are counted in its program when this is asked for, which
        takes a moment. What a custom kernel computes is not among them.
        """
        flops = self.flops_per_step and self.flops_per_step()
        return None if flops is None else [flops * r for r in self.steps_per_second]

    @property
    def remark(self) -> str | None:
        """What holds training back, if it is the input; else None."""
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
        # Numbers can be pickled; a function of the trainer's program cannot, and the
        # clock is that of a thread of this process.
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
