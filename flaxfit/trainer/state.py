"""Owns the state of one trainer: initialized, restored, assigned or trained."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxfit import checkpoint
from flaxfit._core.errors import CheckpointCorruptError, CheckpointError
from flaxfit._core.tree_specs import shapes_of
from flaxfit._core.types import Batch, StateHolder, TrainState
from flaxfit._loops.host_reads import read
from flaxfit._programs.program_cache import NO_DATA_YET, ProgramCache
from flaxfit._reporting.timing import Clock
from flaxfit._runs.checkpoint_manager import newest
from flaxfit._runs.session import Run
from flaxfit.callbacks.base import own_state
from flaxfit.checkpoint import Checkpoint, RestoreReport
from flaxfit.optimizers.transforms import with_rates_of


class Pending(NamedTuple):
    """A file's state that is to become the trainer's; see `Trainer.restore`."""

    saved: Checkpoint
    new_rate: bool
    strict: bool
    params_only: bool
    rename: Mapping[str, str | None] | None

    @property
    def weights_only(self) -> bool:
        """Whether the optimizer begins anew."""
        return self.params_only or "opt_state" not in self.saved.state

    @property
    def step(self) -> int:
        """The step the trainer will have."""
        return 0 if self.weights_only else int(self.saved.state["step"])


class StateKeeper:
    """Sees to it that there is a state, and that it fits what was built.

    Args:
      builder: makes the parts that the state belongs to.

    Attributes:
      holder: the state itself.
      clocks: of the fits under way.
      pending: what is to be read once the model's inputs are known, or None.
    """

    def __init__(self, builder: ProgramCache) -> None:
        self.holder = StateHolder()
        self.clocks: list[Clock] = []
        self.pending: Pending | None = None
        self._builder = builder

    @property
    def settled(self) -> bool:
        """Whether there is a state that holds more than a fresh one would."""
        return self.holder.settled

    @property
    def has_learned(self) -> bool:
        """Whether there is something learnt, here or in a file, or a fit under way."""
        return self.settled or bool(self.clocks) or self.pending is not None

    @property
    def step(self) -> int:
        """The number of optimizer steps so far."""
        if self.pending is not None:
            return self.pending.step
        if self.holder.empty:
            return 0
        with self.holder.borrow() as state:
            return int(read(state.step))

    def require(self) -> None:
        """Refuses to go on without a state.

        Raises:
          ValueError: there was no data yet to make one for.
        """
        if self.holder.empty:
            raise ValueError(NO_DATA_YET)

    def assign(self, state: TrainState) -> None:
        """Makes a copy of the user's state the current one.

        Raises:
          ValueError: it does not fit the model.
        """
        resolved = self._builder.resolved
        self.holder.put(resolved.placement.put(own_state(state, resolved.template)))
        self.pending = None

    def settle(self, example: Batch) -> None:
        """Sees to it that there is a state for batches like `example`."""
        self.restore_pending()
        placement, template = self._builder.placement, self._builder.resolved.template
        with self.holder.lock:
            if not self.holder.empty:
                state = self.holder.peek()
                if state.step.devices() != set(placement.devices):
                    fresh = not self.holder.settled
                    self.holder.put(placement.put(state), fresh=fresh)
            if self.holder.settled:
                return
            # As long as nothing was learnt, data of other shapes replaces the state.
            if self.holder.empty or shapes_of(self.holder.peek()) != template:
                self.holder.put(self._builder.fresh_state(example), fresh=True)

    def begin(self, example: Batch, run: Run, total_steps: int | None) -> None:
        """Sees to it that the state is the one a fit is to begin with."""
        if run.origin.saved is not None:
            saved = run.origin.saved
            state = self.as_state(saved.state, where=saved.path)
            old = saved.meta.get("config", {}).get("learning_rate")
            now = run.config.get("learning_rate")
            if old != now and not self._builder.plans_ahead:
                state = self._with_new_rate(state)
            self.pending = None
            self.holder.put(state)
        else:
            self.settle(example)
        if self._builder.plans_ahead and run.makes_other_schedule(total_steps):
            # A constant rate lies in the state, made for another length.
            fresh = not self.holder.settled
            state = self._with_new_rate(self.holder.take())
            self.holder.put(state, fresh=fresh)

    def restore_pending(self) -> None:
        """Takes over the file's state that was waiting for the model's inputs."""
        if self.pending is not None:
            self.restore(self.pending)

    def restore(self, pending: Pending) -> RestoreReport:
        """Makes the file's state the current one, or changes nothing.

        Raises:
          CheckpointError: it does not fit the model.
        """
        resolved, saved = self._builder.resolved, pending.saved
        weights = pending.weights_only
        current = self.holder.peek() if not self.holder.empty else None
        if weights or not pending.strict or pending.rename:
            zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), resolved.example)
            fresh = self._builder.fresh_state(zeros)
            current = current or fresh
            if weights:
                current = fresh.replace(
                    params=current.params, collections=current.collections
                )
        state, report = self._read_state(
            saved.state,
            where=saved.path,
            strict=pending.strict,
            rename=pending.rename,
            parts=("params", "collections") if weights else None,
            current=current,
        )
        if weights:
            opt_state = resolved.task.optimizer.tx.init(state.params)
            state = resolved.placement.put(state.replace(opt_state=opt_state))
        # A constant rate lies in the state, and would win over the new one.
        elif pending.new_rate and not self._builder.plans_ahead:
            state = self._with_new_rate(state)
        elif current is not None:
            state = resolved.placement.put(state)  # buffers of its own
        self.holder.put(state)
        self.pending = None
        return report

    def as_state(self, raw_state: Mapping[str, Any], where: str = "") -> TrainState:
        """Returns the state of what a snapshot or a file holds.

        Raises:
          CheckpointError: it does not fit the model.
        """
        return self._read_state(raw_state, where)[0]

    def _read_state(
        self, raw_state: Mapping[str, Any], where: str = "", **options: Any
    ) -> tuple[TrainState, RestoreReport]:
        resolved = self._builder.resolved
        try:
            state, report = checkpoint.restore(
                raw_state, resolved.template, put=resolved.placement.put_host, **options
            )
        except CheckpointError as error:
            if where:
                error.add_note(f"while reading {where!r}")
            raise
        return resolved.placement.put_keys(state), report

    def _with_new_rate(self, state: TrainState) -> TrainState:
        fresh = self._builder.resolved.task.optimizer.tx.init(state.params)
        return state.replace(opt_state=with_rates_of(state.opt_state, fresh))


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint, or the newest one of a run's folder.

    Raises:
      CheckpointError: there is none.
    """
    if not os.path.isdir(path):
        return checkpoint.load(path)
    if (found := newest(Path(path))) is None:
        raise CheckpointError(
            f"{os.fspath(path)!r} is a folder without a checkpoint; give the file that "
            "was saved, or the folder of a run."
        )
    return found


def open_variables(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint, or the variables of a file of plain Flax.

    Raises:
      CheckpointError: it is neither.
    """
    try:
        return open_checkpoint(path)
    except CheckpointCorruptError:
        raise
    except CheckpointError as error:
        if not os.path.isfile(path):
            raise
        try:
            state = checkpoint.load_variables(path)
        except CheckpointError:
            raise error from None
        return Checkpoint(os.fspath(path), {}, state, {})
