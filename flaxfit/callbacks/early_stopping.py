"""Ends the training when a logged value no longer improves."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from flaxfit._core.types import TrainState
from flaxfit._core.validation import choice, integer, number
from flaxfit.callbacks.base import Callback, LoopState
from flaxfit.callbacks.monitor import MODES, Monitor


class _Best(NamedTuple):
    value: float | None = None
    epoch: int | None = None
    state: TrainState | None = None


class EarlyStopping(Callback):
    """Stops training when `monitor` has not improved for `patience` epochs.

    NaN is never an improvement. At the end, the trainer gets back the whole state of
    the best epoch, optimizer included, even if all epochs were trained or a loss was
    not finite. After an error or Ctrl-C it keeps the last finished step instead.

    Args:
      monitor: the log to watch, e.g. `"val_loss"`; `fit` must produce this log.
      min_delta: an improvement must be larger than this, in the log's unit.
      patience: stop after this many epochs in a row without improvement; 0 and 1 both
        stop at the first. Epochs without this log are not counted.
      mode: `"min"`, `"max"`, or `"auto"` for the metric's own direction.
      baseline: only values that also beat this one reset the count of `patience`.
      restore_best_weights: whether the best epoch's state is restored.
      start_from_epoch: the first epoch to watch, from 0.

    Example:
      >>> from flaxfit import EarlyStopping
      >>> EarlyStopping("val_accuracy", patience=3).mode
      'auto'

    Attributes:
      stopped_epoch: the epoch, from 0, that ended the fit; None if it was not stopped.
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
        integer("patience", patience, least=0)
        self.monitor = monitor
        self.min_delta = abs(number("min_delta", min_delta, signed=True))
        self.patience = patience
        self.mode = mode
        self.baseline = (
            None if baseline is None else number("baseline", baseline, signed=True)
        )
        self.restore_best_weights = restore_best_weights
        self.start_from_epoch = integer("start_from_epoch", start_from_epoch, least=0)
        self._reset()

    def _reset(self) -> None:
        self.stopped_epoch: int | None = None
        self._best = _Best()
        self._waited = 0
        self._monitor: Monitor | None = None

    @property
    def best(self) -> float | None:
        """The best value so far, None before the first."""
        return self._best.value

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the best value, from 0; None before the first."""
        return self._best.epoch

    def on_train_begin(self, loop: LoopState) -> None:
        """Checks `monitor` and `mode` against the logs of this fit.

        Raises:
          ValueError: there is no such log, or its direction is unknown.
        """
        self._reset()
        self._monitor = Monitor(
            "EarlyStopping", self.monitor, self.mode, loop.log_names
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value, its epoch and state, and the count of `patience`."""
        return {
            "best": self.best,
            "best_epoch": self.best_epoch,
            "stopped_epoch": self.stopped_epoch,
            "waited": self._waited,
            "best_state": self._best.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`."""
        best_state = state["best_state"] if self.restore_best_weights else None
        self._best = _Best(state["best"], state["best_epoch"], best_state)
        self.stopped_epoch, self._waited = state["stopped_epoch"], state["waited"]

    def on_epoch_end(self, loop: LoopState) -> None:
        """Compares the epoch's value with the best; ignores epochs without this log."""
        if loop.epoch < self.start_from_epoch or self.monitor not in loop.logs:
            return
        value = float(loop.logs[self.monitor])
        assert self._monitor is not None
        if self._monitor.is_better(value, self.best, min_delta=self.min_delta):
            state = loop.state if self.restore_best_weights else None
            self._best = _Best(value, loop.epoch, state)
            if self._monitor.is_better(value, self.baseline, min_delta=self.min_delta):
                self._waited = 0
                return
        self._waited += 1
        if self._waited >= max(self.patience, 1):
            self.stopped_epoch = loop.epoch
            best = "none" if self.best is None else f"{self.best:.4g}"
            what = "improved"
            if self.best is not None and not self._monitor.is_better(
                self.best, self.baseline
            ):
                what = f"beaten the baseline {self.baseline:.4g}"
            loop.stop(
                f"{self.monitor} has not {what} for {self._waited} epoch"
                f"{'s' if self._waited > 1 else ''} (best {best})"
            )

    def on_train_end(self, loop: LoopState) -> None:
        """Restores the best epoch's state."""
        best = self._best
        keep_last = loop.outcome.failure == "interrupted"
        if best.state is not None and best.epoch != loop.epoch and not keep_last:
            loop.state = best.state
        if loop.outcome.failure is None:  # after a failure, a resumed fit needs it
            self._best = best._replace(state=None)
