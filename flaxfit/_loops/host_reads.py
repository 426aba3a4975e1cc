"""Reads device values on the host: the only place in the loops that waits."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flaxfit._core.types import Logs, PyTree
from flaxfit._loops.dispatch_queue import Pace
from flaxfit._programs.compile import EpochAccumulators
from flaxfit._reporting.display import Display


def read(tree: PyTree) -> PyTree:
    """Copies device values to the host: the one place of the loops that waits."""
    return jax.device_get(tree)


def read_logs(
    running: EpochAccumulators, order: Callable[[Logs], Logs]
) -> dict[str, Any]:
    """Returns the values of the accumulators as floats, in one read."""
    return as_values(read(running.logs), order)


def as_values(logs: Logs, order: Callable[[Logs], Logs]) -> dict[str, Any]:
    """Returns the values of accumulators on the host as floats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: as_number(log.compute()) for name, log in order(logs).items()}


def as_number(value: Any) -> Any:
    """Returns a float, or a list of floats of a metric that has several values."""
    array = np.asarray(value)
    return float(array) if array.ndim == 0 else array.tolist()


def show_progress(display: Display, pace: Pace, order: Callable[[Logs], Logs]) -> None:
    """Shows how far the device is, by the last call that it has finished."""
    running, done = pace.finished
    if running is not None:
        display.update(done, read_logs(running, order))
