"""A callback that writes a run's checkpoints, history and log."""

import json
import math
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flaxfit._core import validation
from flaxfit._runs import checkpoint_manager
from flaxfit._runs.saver import BackgroundWriter
from flaxfit.callbacks.base import Callback, LoopState
from flaxfit.callbacks.monitor import Monitor
from flaxfit.checkpoint import disk


class RunRecorder(Callback):
    """Writes the files of a run directory. It is called after all other callbacks.

    Args:
      folder: the run directory, locked by this process.
      writer: writes the files in order.
      save_every: steps or time between checkpoints within an epoch.
      monitor: the log that decides which epoch is the best; None for `val_loss`, or
        `loss` without a validation.
    """

    def __init__(
        self,
        folder: Path,
        writer: BackgroundWriter,
        save_every: int | str | None,
        monitor: str | None,
    ) -> None:
        self.folder = folder
        self._writer = writer
        steps, self.every_seconds = validation.interval("save_every", save_every)
        self.every_steps = steps
        if save_every is None:
            self.every_seconds = math.inf  # never within an epoch
        self._asked = monitor
        self._saves_steps = save_every is not None
        self._monitor: Monitor | None = None
        self._began = False
        self.best: float | None = None

    def on_train_begin(self, loop: LoopState) -> None:
        """Finds the monitored log."""
        default = "val_loss" if "val_loss" in loop.log_names else "loss"
        name = self._asked or default
        if name in loop.log_names or self._asked:
            self._monitor = Monitor("fit", name, "auto", loop.log_names)

    def begin(self, loop: LoopState, event: Mapping[str, Any]) -> None:
        """Logs the start or resumption; called after `load_state_dict`.

        A new run is saved at once, so that there is a checkpoint to roll back to.
        """
        if not (self.folder / checkpoint_manager.BEST).exists():
            self.best = None
        self._log(event)
        if event["event"] == "start":
            self._save(loop, background=False)

    def on_train_batch_end(self, loop: LoopState) -> None:
        """Saves within an epoch."""
        if self._saves_steps:
            self._save(loop)

    def on_epoch_end(self, loop: LoopState) -> None:
        """Saves the epoch, and saves it as the best one too if it is."""
        monitor = self._monitor
        if monitor is not None and monitor.name in loop.logs:
            value, before = float(loop.logs[monitor.name]), self.best
            if monitor.is_better(value, before):
                self.best = value
                loop.save(
                    self.folder / checkpoint_manager.BEST,
                    failed=partial(self._restore_best, before),
                )
        self._save(loop, history=True)
        self._log({"event": "epoch", "epoch": loop.epoch + 1, **_place(loop)})

    def on_train_end(self, loop: LoopState) -> None:
        """Saves the position at which an error or a signal ended the training."""
        # An epoch is not saved as finished before all callbacks have seen its end.
        is_closing = loop.epoch_is_over and loop.running is not None
        if loop.outcome.failure == "interrupted" and not is_closing:
            self._save(loop)
        reason = {"reason": loop.stop_reason} if loop.stop_reason else {}
        self._log({"event": "end", **_place(loop), **reason})

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the best value."""
        self.best = state["best"]

    def _save(
        self, loop: LoopState, *, history: bool = False, background: bool = True
    ) -> None:
        # `saved` reads the history later, when all callbacks have added to it.
        loop.save(
            checkpoint_manager.step_file(self.folder, loop.step),
            background=background,
            saved=lambda: self._saved(loop.history.state_dict() if history else None),
        )

    def _saved(self, history: dict[str, Any] | None) -> None:
        checkpoint_manager.prune(self.folder)
        if history is not None:
            text = json.dumps(history, indent=1).encode()
            path = self.folder / checkpoint_manager.HISTORY

            disk.replace_file(path, lambda file: file.write(text))

    def _restore_best(self, best: float | None, error: Exception) -> None:
        del error
        self.best = best

    def _log(self, event: Mapping[str, Any]) -> None:
        line = json.dumps({"time": time.strftime("%FT%T%z"), **event}) + "\n"
        path = self.folder / checkpoint_manager.LOG
        self._writer.submit(
            lambda: disk.append(path, line.encode()),
            f"Writing {os.fspath(path)!r}",
        )


def _place(loop: LoopState) -> dict[str, Any]:
    return {"step": loop.step, "logs": dict(loop.logs)}
