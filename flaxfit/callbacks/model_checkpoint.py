"""Saves the state during training: every epoch, at intervals, or only the best."""

import math
import os
import re
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from flaxfit import checkpoint
from flaxfit._core.errors import CheckpointError, did_you_mean
from flaxfit._core.validation import choice, interval, optional_integer
from flaxfit.callbacks.base import Callback, LoopState
from flaxfit.callbacks.monitor import MODES, Monitor
from flaxfit.checkpoint import disk

_PLACES = ("epoch", "batch", "step")


class ModelCheckpoint(Callback):
    """Writes checkpoints, with Keras's arguments.

    A file holds the whole training: `fit(resume=path)` goes on from it exactly, and
    `Trainer.load(path, model)` gives the trainer. It is written in the background, one
    after the other, all or nothing. Where a file cannot be written, that is a warning,
    and the training goes on. A state that is not finite is never written.

    Args:
      filepath: the file. May hold `{epoch}` (from 1), `{batch}` (of the epoch),
        `{step}` and the names of logs, as in
        `"run/{epoch:02d}-{val_loss:.3f}.msgpack"`.
      monitor: the log that decides which is the best; only for `save_best_only`.
      verbose: 1 says so when a file is asked for.
      save_best_only: whether a file is written only when `monitor` has improved. The
        best value so far is part of every checkpoint. A trainer that was trained
        before compares with that of the file it would replace.
      save_weights_only: whether only parameters and collections are written.
      mode: `"min"`, `"max"`, or `"auto"` to go by the metric.
      save_freq: `"epoch"`, a number of steps, or a time such as `"5m"`. Within an
        epoch the values are means of the epoch so far, and reading them waits for the
        device.
      initial_value_threshold: what the first value has to improve on.
      keep: how many files stay, the newest ones; None for all. An older one is deleted
        only when the newer one is safe on the disk.
      background: whether training goes on while a file is written, once the state is
        copied to the host.

    Attributes:
      best: the best value so far, None before the first.

    Raises:
      ValueError: an argument that cannot be.

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
        self._by_epoch = save_freq == "epoch"
        self._monitor: Monitor | None = None
        self._written: list[str] = []
        self.every_seconds = math.inf  # never within an epoch
        if not self._by_epoch:
            self.every_steps, self.every_seconds = interval("save_freq", save_freq)
        self._names = _names_in(self.filepath)
        if keep is not None and not self._names:
            raise ValueError(
                f"keep={keep} of one file: give filepath a place to count, for example "
                f"{_numbered(self.filepath)!r}."
            )

    def on_train_begin(self, loop: LoopState) -> None:
        """Checks the names in `filepath`, the monitored log and the folder.

        Raises:
          ValueError: a log that this fit will not have.
          CheckpointError: nothing can be written there.
        """
        for name in self._names - {*_PLACES, *loop.log_names}:
            known = [*_PLACES, *loop.log_names]
            raise ValueError(
                f"ModelCheckpoint({self.filepath!r}): there is no {name!r} to put into "
                f"the name; there are {', '.join(known)}.{did_you_mean(name, known)}"
            )
        if self.save_best_only:
            self._monitor = Monitor(
                "ModelCheckpoint", self.monitor, self.mode, loop.log_names
            )
            if self.best is None:
                self.best = self.initial_value_threshold
                if self.best is None and loop.step > 0:
                    self.best = self._best_of_file()
        checkpoint.check_writable(loop.state)
        if "{" not in os.path.dirname(self.filepath):
            disk.probe(Path(self.filepath).absolute().parent)

    def on_train_batch_end(self, loop: LoopState) -> None:
        """Saves every so many steps or seconds."""
        if not self._by_epoch:
            self._consider(loop)

    def on_epoch_end(self, loop: LoopState) -> None:
        """Saves every epoch."""
        if self._by_epoch:
            self._consider(loop)

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value, and the files that were written."""
        return {
            "best": self.best,
            "best_of": self.monitor,
            "written": list(self._written),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with what `state_dict` returned."""
        self.best, self._written = state["best"], list(state["written"])

    def _consider(self, loop: LoopState) -> None:
        before, after = self.best, self.best
        if self._monitor is not None:
            if self.monitor not in loop.logs:
                return  # no validation this time
            value = float(loop.logs[self.monitor])
            if not self._monitor.is_better(value, before):
                return
            after = value
        path = self._path(loop)
        self.best = after
        self._written = [p for p in self._written if p != path] + [path]
        if self.verbose:
            print(f"saving {path} after epoch {loop.epoch + 1}, step {loop.step}")
        loop.save(
            path,
            weights_only=self.save_weights_only,
            background=self.background,
            saved=self._prune,
            failed=self._forget(path, before),
        )

    def _path(self, loop: LoopState) -> str:
        values = loop.logs if self._names - set(_PLACES) else {}
        try:
            return self.filepath.format(
                **{
                    **values,
                    "epoch": loop.epoch + 1,
                    "batch": loop.batch,
                    "step": loop.step,
                }
            )
        except KeyError as error:
            raise ValueError(
                f"ModelCheckpoint({self.filepath!r}): there is no {error} at step "
                f"{loop.step}, only {', '.join(values)}."
            ) from error

    def _prune(self) -> None:
        """Deletes older files; called when the newest one is safe."""
        if self.keep is not None:
            for path in self._written[: -self.keep]:
                disk.remove(Path(path))
            self._written = self._written[-self.keep :]

    def _forget(self, path: str, best: float | None) -> Callable[[Exception], None]:
        def failed(error: Exception) -> None:
            del error
            self.best = best
            if not os.path.exists(path):
                self._written = [p for p in self._written if p != path]

        return failed

    def _best_of_file(self) -> float | None:
        """Returns the best value of what this callback wrote in an earlier process."""
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
        assert self._monitor is not None
        best: float | None = None
        for value in found:
            best = value if self._monitor.is_better(value, best) else best
        return best


def _names_in(filepath: str) -> set[str]:
    try:
        fields = [name for _, name, *_ in string.Formatter().parse(filepath)]
    except ValueError as error:
        raise ValueError(
            f"filepath={filepath!r} cannot be filled in ({error}); write e.g. "
            '"run/{epoch:02d}-{val_loss:.3f}.msgpack".'
        ) from error
    return {re.split(r"[.\[]", name)[0] for name in fields if name is not None}


def _numbered(filepath: str) -> str:
    root, extension = os.path.splitext(filepath)
    return f"{root}-{{epoch:03d}}{extension}"
