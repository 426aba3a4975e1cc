"""Stopping when a logged value no longer improves."""

import math
from typing import Literal

from flaxfit._errors import did_you_mean
from flaxfit._types import TrainState
from flaxfit.callbacks.base import Callback, LoopState
from flaxfit.metrics import metric_direction


class EarlyStopping(Callback):
    """Stops training when `monitor` has not improved for `patience` epochs.

    A NaN counts as no improvement. The state of the best epoch comes back at the
    end, also when training ends by itself: optimizer, statistics and parameters.
    After an error or Ctrl-C the trainer keeps the last finished step.

    Args:
      monitor: the log to watch, e.g. `"val_loss"`; must be one `fit` will have.
      min_delta: how much better counts as an improvement, in the log's unit.
      patience: validated epochs without improvement after which it stops; 0 and 1
        both stop at the first.
      mode: `"min"`, `"max"`, or `"auto"` to go by the metric.
      baseline: an improvement must beat this value as well.
      restore_best_weights: whether the best epoch's state comes back.
      start_from_epoch: epochs to wait before watching.

    Example:
      >>> from flaxfit import EarlyStopping
      >>> EarlyStopping("val_accuracy", patience=3).mode
      'auto'

    Attributes:
      best: the best value so far, None before the first.
      best_epoch: the epoch it was seen in.
      stopped_epoch: the epoch that stopped, None if none did.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        *,
        min_delta: float = 0.0,
        patience: int = 0,
        mode: Literal["auto", "min", "max"] = "auto",
        baseline: float | None = None,
        restore_best_weights: bool = True,
        start_from_epoch: int = 0,
    ) -> None:
        if mode not in ("auto", "min", "max"):
            raise ValueError(f"mode={mode!r}: write 'min', 'max' or 'auto'.")
        if patience < 0:
            raise ValueError(f"patience={patience}: write a number of epochs >= 0.")
        self.monitor = monitor
        self.min_delta = abs(min_delta)
        self.patience = patience
        self.mode = mode
        self.baseline = baseline
        self.restore_best_weights = restore_best_weights
        self.start_from_epoch = start_from_epoch
        self._reset()

    def _reset(self) -> None:
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.stopped_epoch: int | None = None
        self._best_state: TrainState | None = None
        self._waited = 0
        self._sign = 1.0

    def on_train_begin(self, loop: LoopState) -> None:
        """Checks `monitor` and `mode` against what this fit will log.

        Raises:
          ValueError: there is no such log, or its direction is unknown.
        """
        self._reset()
        if self.monitor not in loop.log_names:
            hint = (
                " Give fit validation_data= or validation_split=."
                if self.monitor.startswith("val_")
                and not any(n.startswith("val_") for n in loop.log_names)
                else did_you_mean(self.monitor, loop.log_names)
            )
            raise ValueError(
                f"EarlyStopping(monitor={self.monitor!r}): this fit will log "
                f"{', '.join(loop.log_names)}.{hint}"
            )
        mode = metric_direction(self.monitor) if self.mode == "auto" else self.mode
        if mode is None:
            raise ValueError(
                f"EarlyStopping(monitor={self.monitor!r}): whether it is better low or "
                f'high is not known. Write mode="min" or mode="max".'
            )
        self._sign = 1.0 if mode == "min" else -1.0

    def on_epoch_end(self, loop: LoopState) -> None:
        """Compares the epoch's value; an epoch without a validation is passed over."""
        if loop.epoch < self.start_from_epoch or self.monitor not in loop.logs:
            return
        value = float(loop.logs[self.monitor])
        if self._is_better(value, self.best):
            self.best, self.best_epoch = value, loop.epoch
            if self.restore_best_weights:
                self._best_state = loop.state
            if self._is_better(value, self.baseline):
                self._waited = 0
                return
        self._waited += 1
        if self._waited >= max(self.patience, 1):
            self.stopped_epoch = loop.epoch
            best = "none" if self.best is None else f"{self.best:.4g}"
            loop.stop(
                f"{self.monitor} has not improved for {self._waited} epoch"
                f"{'s' if self._waited > 1 else ''} (best {best})"
            )

    def on_train_end(self, loop: LoopState) -> None:
        """Puts the best epoch's state back."""
        best = self._best_state
        if best is not None and self.best_epoch != loop.epoch and not loop.broken_off:
            loop.state = best
        self._best_state = None

    def _is_better(self, value: float, than: float | None) -> bool:
        if math.isnan(value):
            return False
        return than is None or self._sign * (than - value) > self.min_delta
