"""Makes the state of a trainer: initialized, resumed or restored from a file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxfit import checkpoint
from flaxfit._core.errors import CheckpointCorruptError, CheckpointError
from flaxfit._core.state_store import TrainStateStore
from flaxfit._core.tree_specs import shapes_of
from flaxfit._core.types import Batch, TrainState
from flaxfit._programs.program_cache import ProgramCache
from flaxfit._programs.resolve import ResolvedTask
from flaxfit._runs.checkpoint_manager import newest
from flaxfit._runs.resume import ResumePoint
from flaxfit.checkpoint import Checkpoint, RestoreReport
from flaxfit.optimizers.transforms import with_rates_of


class RestoreRequest(NamedTuple):
    """A file's state that will become the trainer's; see `Trainer.restore`.

    With `new_rate`, the trainer was given another learning rate than the file's.
    """

    saved: Checkpoint
    new_rate: bool
    strict: bool
    params_only: bool
    rename: Mapping[str, str | None] | None

    @property
    def weights_only(self) -> bool:
        """Whether the optimizer starts over."""
        return self.params_only or "opt_state" not in self.saved.state

    @property
    def step(self) -> int:
        """The step the trainer will have."""
        return 0 if self.weights_only else int(self.saved.state["step"])


def ensure_state(
    store: TrainStateStore, programs: ProgramCache, example: Batch
) -> None:
    """Stores a new state for batches like `example`, unless the stored one was trained.

    A state in the store is moved to the devices that are used now.
    """
    placement, template = programs.placement, programs.resolved.template
    with store.lock:
        if not store.empty:
            state = store.peek()
            if state.step.devices() != set(placement.devices):
                store.put(placement.put(state), fresh=not store.has_trained)
        if store.has_trained:
            return
        # Until something was trained, data of other shapes makes a new state.
        if store.empty or shapes_of(store.peek()) != template:
            store.put(programs.fresh_state(example), fresh=True)


def resumed_state(
    programs: ProgramCache, origin: ResumePoint, config: Mapping[str, Any]
) -> TrainState | None:
    """Returns the state of the checkpoint that a fit resumes, None for a new run.

    `config` has the trainer's current arguments, in the form in which files hold them.

    Raises:
      CheckpointError: the state does not fit the model.
    """
    if origin.saved is None:
        return None
    state = as_state(programs.resolved, origin.saved.state, where=origin.saved.path)
    before = origin.saved.meta.get("config", {}).get("learning_rate")
    if before != config.get("learning_rate") and not programs.plans_ahead:
        state = with_new_rate(programs.resolved, state)
    return state


def restored_state(
    programs: ProgramCache, request: RestoreRequest, current: TrainState | None
) -> tuple[TrainState, RestoreReport]:
    """Returns the state of a file, on the devices and in its own buffers.

    Parts that are not taken from the file are taken from the `current` state.

    Raises:
      CheckpointError: the file's state does not fit the model.
    """
    resolved, saved = programs.resolved, request.saved
    weights = request.weights_only
    if weights or not request.strict or request.rename:
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), resolved.example)
        fresh = programs.fresh_state(zeros)
        current = current or fresh
        if weights:
            current = fresh.replace(
                params=current.params, collections=current.collections
            )
    state, report = _read_state(
        resolved,
        saved.state,
        saved.path,
        strict=request.strict,
        rename=request.rename,
        parts=("params", "collections") if weights else None,
        current=current,
    )
    if weights:
        opt_state = resolved.task.optimizer.tx.init(state.params)
        state = resolved.placement.put(state.replace(opt_state=opt_state))
    # A constant rate is part of the state and would override the new one.
    elif request.new_rate and not programs.plans_ahead:
        state = with_new_rate(resolved, state)
    elif current is not None:
        state = resolved.placement.put(state)
    return state, report


def as_state(
    resolved: ResolvedTask, raw_state: Mapping[str, Any], where: str = ""
) -> TrainState:
    """Returns the state of a snapshot or a file.

    Raises:
      CheckpointError: the state does not fit the model.
    """
    return _read_state(resolved, raw_state, where)[0]


def with_new_rate(resolved: ResolvedTask, state: TrainState) -> TrainState:
    """Returns the state with the learning rate of the task's optimizer."""
    fresh = resolved.task.optimizer.tx.init(state.params)
    return state.replace(opt_state=with_rates_of(state.opt_state, fresh))


def _read_state(
    resolved: ResolvedTask,
    raw_state: Mapping[str, Any],
    where: str = "",
    **options: Any,
) -> tuple[TrainState, RestoreReport]:
    try:
        state, report = checkpoint.restore(
            raw_state, resolved.template, put=resolved.placement.put_host, **options
        )
    except CheckpointError as error:
        if where:
            error.add_note(f"while reading {where!r}")
        raise
    return resolved.placement.put_keys(state), report


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint, or the newest one of a run directory.

    Raises:
      CheckpointError: there is no checkpoint, or it cannot be read.
    """
    if not os.path.isdir(path):
        return checkpoint.load(path)
    if (found := newest(Path(path))) is None:
        raise CheckpointError(
            f"{os.fspath(path)!r} is a folder without a checkpoint; give the file of a "
            "checkpoint, or a run directory."
        )
    return found


def open_variables(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint, or the variables in a file written by Flax itself.

    Raises:
      CheckpointError: the file is neither.
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
