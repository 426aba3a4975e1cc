"""Stops training when a logged value no longer improves."""

from collections.abc import Mapping
from typing import Any, Literal

from flaxfit._core.types import TrainState
from flaxfit._core.validation import choice
from flaxfit.callbacks.base import Callback, LoopState
from flaxfit.callbacks.monitor import MODES, Monitor


class EarlyStopping(Callback):
    """Stops training when `monitor` has not improved for `patience` epochs.

    A NaN counts as no improvement. The state of the best epoch comes back at the
    end, also when training ends by itself: optimizer, statistics and parameters.
    After an error or Ctrl-C the trainer keeps the last finished step; after a loss that
    is not finite the best state comes back.

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
        choice("mode", mode, MODES)
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
        self._watched: Monitor | None = None

    def on_train_begin(self, loop: LoopState) -> None:
        """Checks `monitor` and `mode` against what this fit will log.

        Raises:
          ValueError: there is no such log, or its direction is unknown.
        """
        self._reset()
        self._watched = Monitor(
            "EarlyStopping", self.monitor, self.mode, loop.log_names
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value, its epoch and state, and how long it is ago."""
        return {
            "best": self.best,
            "best_epoch": self.best_epoch,
            "stopped_epoch": self.stopped_epoch,
            "waited": self._waited,
            "best_state": self._best_state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with what `state_dict` returned."""
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.stopped_epoch, self._waited = state["stopped_epoch"], state["waited"]
        if self.restore_best_weights:
            self._best_state = state["best_state"]

    def on_epoch_end(self, loop: LoopState) -> None:
        """Compares the epoch's value; an epoch without a validation is passed over."""
        if loop.epoch < self.start_from_epoch or self.monitor not in loop.logs:
            return
        value = float(loop.logs[self.monitor])
        assert self._watched is not None
        if self._watched.is_better(value, self.best, min_delta=self.min_delta):
            self.best, self.best_epoch = value, loop.epoch
            if self.restore_best_weights:
                self._best_state = loop.state
            if self._watched.is_better(value, self.baseline, min_delta=self.min_delta):
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
        kept = loop.broken_off and not loop.nonfinite
        if best is not None and self.best_epoch != loop.epoch and not kept:
            loop.state = best
        if not loop.broken_off:  # else it belongs to what is saved, to go on from
            self._best_state = None
