"""Compares values of a monitored log: direction, and whether it improved."""

import math
from collections.abc import Sequence

from flaxfit._core.errors import did_you_mean
from flaxfit.metrics.resolve import metric_direction

MODES = ("auto", "min", "max")


class Monitor:
    """One log that is to become better.

    Args:
      owner: who watches, for messages.
      name: the log, e.g. `"val_loss"`.
      mode: `"min"`, `"max"`, or `"auto"` to go by the metric.
      log_names: the logs there will be.

    Raises:
      ValueError: there is no such log, or its direction is unknown.
    """

    def __init__(
        self, owner: str, name: str, mode: str, log_names: Sequence[str]
    ) -> None:
        if name not in log_names:
            hint = (
                " Give fit validation_data= or validation_split=."
                if name.startswith("val_")
                and not any(n.startswith("val_") for n in log_names)
                else did_you_mean(name, log_names)
            )
            raise ValueError(
                f"{owner}(monitor={name!r}): this fit will log "
                f"{', '.join(log_names)}.{hint}"
            )
        found = metric_direction(name) if mode == "auto" else mode
        if found is None:
            raise ValueError(
                f"{owner}(monitor={name!r}): whether it is better low or high is not "
                f"known. {_advice(owner, name)}"
            )
        self.name = name
        self._sign = 1.0 if found == "min" else -1.0

    def is_better(
        self, value: float, than: float | None, *, min_delta: float = 0.0
    ) -> bool:
        """Whether `value` improves on `than`, or on nothing; NaN never does."""
        if math.isnan(value):
            return False
        return than is None or self._sign * (than - value) > min_delta


def _advice(owner: str, name: str) -> str:
    if owner == "fit":
        return (
            "Leave monitor out, and add callbacks=[ModelCheckpoint(path, "
            f'monitor={name!r}, mode="max", save_best_only=True)].'
        )
    return 'Write mode="min" or mode="max".'
