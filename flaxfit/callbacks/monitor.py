"""Compares values of a monitored log: direction, and whether it improved."""

import math
from collections.abc import Sequence

from flaxfit._core.errors import UsageError, did_you_mean
from flaxfit.metrics.resolve import metric_direction

MODES = ("auto", "min", "max")


class Monitor:
    """A log whose values are compared.

    Args:
      owner: the callback or method, for messages.
      name: the log, e.g. `"val_loss"`.
      mode: `"min"`, `"max"`, or `"auto"` for the metric's own direction.
      log_names: the logs of this fit.

    Raises:
      ValueError: there is no such log, or its direction is unknown.
    """

    def __init__(
        self, owner: str, name: str, mode: str, log_names: Sequence[str]
    ) -> None:
        if name not in log_names:
            no_validation = name.startswith("val_") and not any(
                log.startswith("val_") for log in log_names
            )
            raise UsageError(
                f"{owner}(monitor={name!r}): this fit has no such log."
                + ("" if no_validation else did_you_mean(name, log_names)),
                f"It will log {', '.join(log_names)}",
                "fit(..., validation_data=(x, y))" if no_validation else "",
            )
        found = metric_direction(name) if mode == "auto" else mode
        if found is None:
            raise UsageError(
                f"{owner}(monitor={name!r}): it is not known whether high or low "
                "values are better",
                write='mode="min" or mode="max"'
                if owner != "fit"
                else f"callbacks=[ModelCheckpoint(path, {name!r}, mode='max', "
                "save_best_only=True)] instead of monitor",
            )
        self.name = name
        self._sign = 1.0 if found == "min" else -1.0

    def is_better(
        self, value: float, than: float | None, *, min_delta: float = 0.0
    ) -> bool:
        """Whether `value` improves on `than`, None for no value; NaN never does."""
        if math.isnan(value):
            return False
        return than is None or self._sign * (than - value) > min_delta
