"""Saves the state during training: every epoch, at intervals, or only the best."""

import math
import os
import re
import string
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from flaxfit import checkpoint
from flaxfit._core.errors import CheckpointError, UsageError, did_you_mean
from flaxfit._core.validation import choice, interval, optional_integer
from flaxfit.callbacks.base import Callback, LoopState
from flaxfit.callbacks.monitor import MODES, Monitor
from flaxfit.checkpoint import disk

_PLACES = ("epoch", "batch", "step")


class ModelCheckpoint(Callback):
    """Writes checkpoints, with Keras's arguments.

    A file holds the whole training: `fit(resume=path)` continues from it exactly, and
    `Trainer.load(path, model)` returns the trainer. Files are written in the
    background, one after the other, each completely or not at all. A file that cannot
    be written gives a warning, and training continues. A state that is not finite is
    never written.

    Args:
      filepath: the file. May contain `{epoch}` (from 1), `{batch}` (of the epoch),
        `{step}` and the names of logs, as in
        `"run/{epoch:02d}-{val_loss:.3f}.msgpack"`.
      monitor: the log that decides which file is the best; only for `save_best_only`.
      verbose: 1 prints a line for each file.
      save_best_only: whether a file is written only when `monitor` has improved. The
        best value so far is part of every checkpoint. A trainer that was trained
        before compares with the best value in the files that match `filepath`.
      save_weights_only: whether only parameters and collections are written.
      mode: `"min"`, `"max"`, or `"auto"` for the metric's own direction.
      save_freq: `"epoch"`, a number of steps, or a time such as `"5m"`. Within an
        epoch the values are means of the epoch so far, and reading them waits for the
        device.
      initial_value_threshold: the value that the first file has to improve on.
      keep: how many of the newest files are kept; None for all. An older one is deleted
        only when the newer one is safe on the disk.
      background: whether training continues while a file is written, once the state is
        copied to the host.

    Attributes:
      best: the best value so far, None before the first.

    Raises:
      ValueError: an invalid argument.

    Example:
      >>> from flaxfit import ModelCheckpoint
      >>> ModelCheckpoint("best.msgpack", "val_accuracy", save_best_only=True).mode
      'auto'
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: Literal["auto", "min", "max"] = "auto",
        save_freq: int | str = "epoch",
        initial_value_threshold: float | None = None,
        *,
        keep: int | None = None,
        background: bool = True,
    ) -> None:
        choice("mode", mode, MODES)
        keep = optional_integer("keep", keep)
        self.filepath = os.fspath(filepath)
        self.monitor = monitor
        self.verbose = verbose
        self.save_best_only = save_best_only
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.save_freq = save_freq
        self.initial_value_threshold = initial_value_threshold
        self.keep = keep
        self.background = background
        self.best: float | None = None
        self._written: list[str] = []
        if not self._by_epoch:
            interval("save_freq", save_freq)
        if not _names_in(self.filepath) and keep is not None:
            root, extension = os.path.splitext(self.filepath)
            numbered = f"{root}-{{epoch:03d}}{extension}"
            raise UsageError(
                f"Got keep={keep} for a filepath that names only one file",
                "Expected a filepath with a number in it",
                f"filepath={numbered!r}",
            )

    @property
    def _by_epoch(self) -> bool:
        return self.save_freq == "epoch"

    @property
    def every_steps(self) -> int | None:  # type: ignore[override]
        """The steps between two files, None if it saves by epoch or by time."""
        return None if self._by_epoch else interval("save_freq", self.save_freq)[0]

    @property
    def every_seconds(self) -> float | None:  # type: ignore[override]
        """The seconds between two files, infinite if it saves by epoch."""
        return math.inf if self._by_epoch else interval("save_freq", self.save_freq)[1]

    def on_train_begin(self, loop: LoopState) -> None:
        """Checks the names in `filepath`, the monitored log and the folder.

        Raises:
          ValueError: a log that this fit will not have.
          CheckpointError: the folder or the state cannot be written.
        """
        for name in _names_in(self.filepath) - {*_PLACES, *loop.log_names}:
            known = [*_PLACES, *loop.log_names]
            raise UsageError(
                f"ModelCheckpoint({self.filepath!r}): there is no log {name!r}."
                f"{did_you_mean(name, known)}",
                f"The filepath may contain {', '.join(known)}",
            )
        if self.save_best_only:
            monitor = self._monitor(loop)
            if self.best is None:
                self.best = self.initial_value_threshold
                if self.best is None and loop.step > 0:
                    self.best = self._best_of_file(monitor)
        checkpoint.check_writable(loop.state)
        if "{" not in os.path.dirname(self.filepath):
            disk.probe(Path(self.filepath).absolute().parent)

    def on_train_batch_end(self, loop: LoopState) -> None:
        """Saves when `save_freq` steps or seconds have passed."""
        if not self._by_epoch:
            self._consider(loop)

    def on_epoch_end(self, loop: LoopState) -> None:
        """Saves every epoch."""
        if self._by_epoch:
            self._consider(loop)

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value, the name of its log, and the paths of the files."""
        return {
            "best": self.best,
            "best_of": self.monitor,
            "written": list(self._written),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`."""
        self.best, self._written = state["best"], list(state["written"])

    def _consider(self, loop: LoopState) -> None:
        before, after = self.best, self.best
        if self.save_best_only:
            if self.monitor not in loop.logs:
                return  # no validation after this epoch
            after = float(loop.logs[self.monitor])
            if not self._monitor(loop).is_better(after, before):
                return
        path = self._path(loop)
        self.best = after
        self._written = [p for p in self._written if p != path] + [path]
        if self.verbose:
            print(f"saving {path} in epoch {loop.epoch + 1}, step {loop.step}")
        loop.save(
            path,
            weights_only=self.save_weights_only,
            background=self.background,
            saved=self._prune,
            failed=partial(self._forget, path, before),
        )

    def _path(self, loop: LoopState) -> str:
        # Reading the logs waits for the device, so they are read only if needed.
        logs = loop.logs if _names_in(self.filepath) - set(_PLACES) else {}
        places = {"epoch": loop.epoch + 1, "batch": loop.batch, "step": loop.step}
        try:
            return self.filepath.format(**{**logs, **places})
        except KeyError as error:
            raise UsageError(
                f"ModelCheckpoint({self.filepath!r}): there is no log {error} at step "
                f"{loop.step}, only {', '.join(logs)}"
            ) from error

    def _prune(self) -> None:
        """Deletes older files; called when the newest one is safe."""
        if self.keep is not None:
            for path in self._written[: -self.keep]:
                disk.remove(Path(path))
            self._written = self._written[-self.keep :]

    def _forget(self, path: str, best: float | None, error: Exception) -> None:
        """Takes back the record of a file that could not be written."""
        del error
        self.best = best
        if not os.path.exists(path):
            self._written = [p for p in self._written if p != path]

    def _monitor(self, loop: LoopState) -> Monitor:
        return Monitor("ModelCheckpoint", self.monitor, self.mode, loop.log_names)

    def _best_of_file(self, monitor: Monitor) -> float | None:
        """Returns the best value in the files that match `filepath`."""
        pattern = re.sub(r"\{[^}]*\}", "*", os.path.basename(self.filepath))
        found = []
        for path in Path(os.path.dirname(self.filepath) or ".").glob(pattern):
            try:
                states = checkpoint.read_meta(path)["loop"]["callbacks"]
            except (CheckpointError, KeyError, TypeError):
                continue
            found += [
                entry["state"]["best"]
                for entry in states
                if entry["kind"] == type(self).__name__
                and entry["state"]["best_of"] == self.monitor
                and entry["state"]["best"] is not None
            ]
        best: float | None = None
        for value in found:
            best = value if monitor.is_better(value, best) else best
        return best


def _names_in(filepath: str) -> set[str]:
    try:
        fields = [name for _, name, *_ in string.Formatter().parse(filepath)]
    except ValueError as error:
        raise UsageError(
            f"filepath={filepath!r} is not a format string: {error}",
            write='filepath="run/{epoch:02d}-{val_loss:.3f}.msgpack"',
        ) from error
    return {re.split(r"[.\[]", name)[0] for name in fields if name is not None}
