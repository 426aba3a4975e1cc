"""`evaluate` and `predict` against hand-written jitted loops and Keras."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flaxfit_rival import FlaxfitFit
from keras_rival import KerasFit
from race import race
from rivals import loss_and_metric
from tables import Report, number, ratio, spread
from workloads import Workload

OWN = "flaxfit"
_HEADER = (
    "run by",
    "examples/s",
    "its time / flaxfit's",
    "range over rounds",
)


class HandWritten:
    """Jitted loops over batches, with one read at the end.

    Args:
      workload: whose data is run.
      resident: whether the data is on the device before the clock starts.
    """

    def __init__(self, workload: Workload, *, resident: bool) -> None:
        self._workload = workload
        self._arrays = workload.x, workload.y
        if resident:
            self._arrays = jax.device_put(self._arrays)
        self._variables = jax.device_put(workload.variables)
        self._apply = jax.jit(partial(_outputs, workload, resident))
        self._add = jax.jit(partial(_add, workload, resident), donate_argnums=1)
        self._resident = resident

    def _batches(self) -> Any:
        """Yields the arguments of a step: whole data and a row, or a batch."""
        (x, y), size = self._arrays, self._workload.batch_size
        for row in range(0, len(x), size):
            if self._resident:
                yield x, y, np.int32(row)
            else:
                yield x[row : row + size], y[row : row + size], None

    def evaluate(self) -> tuple[float, float]:
        """Returns the mean loss and metric over the data."""
        totals: Any = (np.float32(0), np.float32(0))
        for x, y, row in self._batches():
            totals = self._add(self._variables, totals, x, y, row)
        loss, metric = jax.device_get(totals)
        steps = self._workload.steps
        return float(loss) / steps, float(metric) / steps

    def predict(self) -> np.ndarray:
        """Returns the outputs for the data's inputs."""
        parts = [self._apply(self._variables, x, row) for x, _, row in self._batches()]
        return np.concatenate(jax.device_get(parts))


def _outputs(
    workload: Workload, resident: bool, variables: Any, x: jax.Array, row: Any
) -> jax.Array:
    if resident:
        x = jax.lax.dynamic_slice_in_dim(x, row, workload.batch_size)
    return workload.module.apply(variables, x, **workload.flag(False))


def _add(
    workload: Workload,
    resident: bool,
    variables: Any,
    totals: tuple[jax.Array, jax.Array],
    x: jax.Array,
    y: jax.Array,
    row: Any,
) -> tuple[jax.Array, jax.Array]:
    outputs = _outputs(workload, resident, variables, x, row)
    if resident:
        y = jax.lax.dynamic_slice_in_dim(y, row, workload.batch_size)
    loss, metric = loss_and_metric(workload, outputs, y)
    return totals[0] + loss, totals[1] + metric


def throughput_section(
    report: Report, workloads: Sequence[Workload], *, rounds: int, with_keras: bool
) -> None:
    """Adds the section."""
    report.section("`evaluate` and `predict`: examples per second")
    for workload in workloads:
        runners: dict[str, Any] = {
            OWN: FlaxfitFit(workload),
            "jitted loop fed by NumPy": HandWritten(workload, resident=False),
            "jitted loop, data on the device": HandWritten(workload, resident=True),
        }
        if with_keras:
            runners["Keras"] = KerasFit(workload)
        for what in ("evaluate", "predict"):
            calls = {name: getattr(r, what) for name, r in runners.items()}
            _check_equal(what, {name: call() for name, call in calls.items()})
            _add_table(report, workload, what, calls, rounds)


def _add_table(
    report: Report,
    workload: Workload,
    what: str,
    calls: dict[str, Callable[[], Any]],
    rounds: int,
) -> None:
    repeats = workload.epochs
    seconds = race({n: partial(_repeat, c, repeats) for n, c in calls.items()}, rounds)
    report.say(f"**`{what}`, {workload.title}**: {len(workload.x)} examples a call\n")
    rows = [
        (
            name,
            number(repeats * len(workload.x) / statistics.median(times)),
            number(ratio(times, seconds[OWN])),
            spread(times, seconds[OWN]),
        )
        for name, times in seconds.items()
    ]
    report.table(_HEADER, rows)
    report.say()


def _repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def _check_equal(what: str, results: dict[str, Any]) -> None:
    """Refuses to compare those who return something else.

    Raises:
      RuntimeError: results lie apart.
    """
    for name, found in results.items():
        if not np.allclose(found, results[OWN], rtol=1e-2, atol=1e-2):
            raise RuntimeError(f"{what} of {OWN} and of {name} return other values.")
