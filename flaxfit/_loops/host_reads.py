"""Copies states, logs and outputs from the device to the host, for the loops."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flaxfit._core.types import Logs, PyTree
from flaxfit._loops.dispatch_queue import DispatchQueue
from flaxfit._programs.compile import EpochAccumulators
from flaxfit._reporting.display import Display


def read(tree: PyTree) -> PyTree:
    """Copies device values to the host, after waiting for their computation."""
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
    """Returns a float, or a list of floats for a metric with several values."""
    array = np.asarray(value)
    return float(array) if array.ndim == 0 else array.tolist()


def show_progress(
    display: Display, queue: DispatchQueue, order: Callable[[Logs], Logs]
) -> None:
    """Shows the progress up to the last finished call."""
    running, done = queue.finished
    if running is not None:
        display.update(done, read_logs(running, order))
