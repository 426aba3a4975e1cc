"""Finds the checkpoint to resume from and reports settings that changed since."""

import os
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxfit import checkpoint
from flaxfit._core.errors import CheckpointError
from flaxfit._runs import checkpoint_manager

# What decides which examples are in which batch.
_ORDER = ("batch_size", "examples", "shuffle", "steps_per_epoch")
_WORDS = (
    ("examples", "the number of examples"),
    ("validation_examples", "the number of validation examples"),
)
_EXPLAINED = (
    ("batch_size", "the batches are of the new size from here on"),
    ("examples", "the epochs go over the new data from here on"),
    ("shuffle", "it holds from here on"),
    ("steps_per_epoch", "the epochs are of the new length from here on"),
    ("learning_rate", "the new one holds from here on"),
    ("seed", "the order of the data follows the new one, dropout and the like the old"),
)


class Origin(NamedTuple):
    """Where a fit begins.

    Attributes:
      run: names the run, whatever process goes on with it.
      first_step: the trainer's steps before the run.
      first_epoch: the epoch the run began at.
      step: the trainer's steps up to where it goes on.
      epoch: the epoch it goes on in.
      batch: the batches of that epoch that were trained on.
      saved: what it goes on from, None at the very beginning.
    """

    run: str
    first_step: int
    first_epoch: int
    step: int
    epoch: int
    batch: int
    saved: checkpoint.Checkpoint | None

    @property
    def loop(self) -> Mapping[str, Any]:
        """What the checkpoint says of the training; empty at the beginning."""
        return {} if self.saved is None else self.saved.meta["loop"]

    @classmethod
    def begin(cls, step: int, epoch: int) -> "Origin":
        """Returns the beginning of a run."""
        return cls(uuid.uuid4().hex[:12], step, epoch, step, epoch, 0, None)

    @classmethod
    def of(cls, saved: checkpoint.Checkpoint) -> "Origin":
        """Returns where a checkpoint was written.

        Raises:
          CheckpointError: it does not say.
        """
        loop = saved.meta["loop"]
        try:
            return cls(
                run=str(loop["run"]),
                first_step=int(loop["first_step"]),
                first_epoch=int(loop["first_epoch"]),
                step=int(loop["step"]),
                epoch=int(loop["epoch"]),
                batch=int(loop["batch"]),
                saved=saved,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{saved.path!r} does not say where its training stood ({error!r})."
            ) from error


def as_resume(resume: Any, run_dir: Any) -> str:
    """Checks `resume`.

    Raises:
      ValueError: it is nothing of what is known, or needs a `run_dir`.
    """
    if isinstance(resume, os.PathLike):
        return os.fspath(resume)
    if not isinstance(resume, str) or not resume:
        raise ValueError(
            f'resume={resume!r}: write "auto", "must", "never", or the path of a '
            "checkpoint."
        )
    if resume in ("must", "never") and run_dir is None:
        raise ValueError(
            f'resume={resume!r} needs a run_dir: fit(..., run_dir="runs/a", '
            f"resume={resume!r})."
        )
    return resume


def find(
    run_dir: Path | None, resume: str
) -> tuple[checkpoint.Checkpoint | None, bool]:
    """Returns the checkpoint to go on from, None to begin anew.

    Args:
      run_dir: the run's folder, locked; None for none.
      resume: `"auto"`, `"must"`, `"never"`, or the path of a checkpoint or of the
        folder of a run.

    Returns:
      It, and whether what is in the folder belongs to another run.

    Raises:
      CheckpointError: there is none where there must be, or it cannot be read.
    """
    found, foreign = None, False
    if resume not in ("auto", "must", "never"):
        found = _at(Path(resume))
        if run_dir is not None:
            foreign = Path(found.path).resolve().parent != run_dir.resolve()
            if not foreign:
                _refuse_newer(run_dir, found)
    elif resume == "never":
        foreign = True
    elif run_dir is not None:
        found = checkpoint_manager.newest(run_dir)
        if found is None and resume == "must":
            raise CheckpointError(
                f'resume="must": there is no checkpoint in {os.fspath(run_dir)!r}. '
                'Write resume="auto" to begin where there is none.'
            )
    _agree(found)
    return found, foreign


def _at(path: Path) -> checkpoint.Checkpoint:
    found = checkpoint_manager.newest(path) if path.is_dir() else checkpoint.load(path)
    if found is None or checkpoint_manager.resumable_step(found.meta) is None:
        raise CheckpointError(
            f"{os.fspath(path)!r} holds no training to go on with. Expected a "
            "checkpoint of fit(run_dir=...) or ModelCheckpoint with the whole state. "
            "To begin with its weights write trainer = Trainer.load(path, model)."
        )
    return found


def set_aside(run_dir: Path) -> None:
    """Moves what is in a run's folder into one below it, and says so."""
    if jax.process_index() == 0 and (aside := checkpoint_manager.set_aside(run_dir)):
        warnings.warn(
            f"What was in {os.fspath(run_dir)!r} is now in {os.fspath(aside)!r}.",
            UserWarning,
            stacklevel=3,
        )


def _refuse_newer(run_dir: Path, found: checkpoint.Checkpoint) -> None:
    latest = checkpoint_manager.newest(run_dir)
    step = Origin.of(found).step
    if latest is not None and Origin.of(latest).step > step:
        raise CheckpointError(
            f"{found.path!r} is of step {step}, and {latest.path!r} in the same folder "
            "goes further: both would be one run. Give another run_dir to branch off, "
            "or move the newer checkpoints away."
        )


def _agree(found: checkpoint.Checkpoint | None) -> None:
    """Sees to it that all processes go on from the same step."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    step = -1 if found is None else Origin.of(found).step
    steps = np.asarray(multihost_utils.process_allgather(np.int32(step))).ravel()
    if len(set(steps.tolist())) > 1:
        raise CheckpointError(
            f"The processes found checkpoints of different steps: {steps.tolist()}. "
            "They must see the same folder: give a run_dir on a shared disk."
        )


def refuse_to_overwrite(origin: Origin, step: int) -> None:
    """Sees to it that a checkpoint does not replace a training of another kind.

    Args:
      origin: where the run stands.
      step: the step of a trainer that did not come out of this run.

    Raises:
      ValueError: the trainer has learnt something that is not part of the run.
    """
    if origin.saved is None or step in (0, origin.first_step):
        return
    raise ValueError(
        f"This trainer was trained for {step} steps that are not part of the run at "
        f"step {origin.step} in {origin.saved.path!r}, which would replace them. Make "
        'a new Trainer to go on with the run, or give resume="never" or another '
        "run_dir to go on with this one."
    )


def differences(
    origin: Origin,
    config: Mapping[str, Any],
    fit: Mapping[str, Any],
    *,
    say: Callable[[str], None],
) -> None:
    """Tells what of a run is not as it was.

    Args:
      origin: where it goes on.
      config: the trainer's arguments, as a file holds them.
      fit: what decides about the data, as a file holds it.
      say: shows a line; what changes the data is a warning.

    Raises:
      CheckpointError: within a pass over the data, its order would be another one.
    """
    if origin.saved is None:
        return
    meta, explained = origin.saved.meta, dict(_EXPLAINED)
    changed = {
        name: (old.get(name), value)
        for old, new in ((meta["config"], config), (origin.loop["fit"], fit))
        for name, value in new.items()
        if name in old and old[name] != value
    }
    texts = {
        name: f"{dict(_WORDS).get(name, name)} was {old}, is {new}"
        for name, (old, new) in changed.items()
    }
    reordered = [name for name in (*_ORDER, "seed") if name in changed]
    if reordered and _within_a_pass(origin):
        raise CheckpointError(
            f"{origin.saved.path!r} stands in the middle of an epoch (epoch "
            f"{origin.epoch + 1}, batch {origin.batch}), and since then "
            f"{'; '.join(texts[n] for n in reordered)}: examples would be trained on "
            "twice or never. Set it back until the epoch is over, go on from an "
            f"earlier checkpoint with resume=path, or begin anew with "
            f'resume="never".'
        )
    for name, text in texts.items():
        line = f"{text}: {explained[name]}" if name in explained else text
        if name in reordered:
            warnings.warn(f"Since the checkpoint {line}.", UserWarning, stacklevel=3)
        else:
            say(f"changed: {line}")


def _within_a_pass(origin: Origin) -> bool:
    fit = origin.loop["fit"]
    steps, length = fit.get("steps_per_epoch"), fit.get("num_batches")
    if steps is None or length is None:
        return origin.batch > 0
    done = (origin.epoch - origin.first_epoch) * steps + origin.batch
    return bool(done % length)


def is_over(
    origin: Origin, epochs: int, settings: Sequence[Mapping[str, Any]]
) -> str | None:
    """Returns why there is nothing left to train, else None.

    Args:
      origin: where the run stands.
      epochs: the epoch to end at.
      settings: of the callbacks; where one is gone or was given something else, a
        callback's stop is not the last word.
    """
    if origin.saved is None:
        return None
    reason = origin.loop.get("stop_reason")
    before = origin.loop.get("settings") or []
    if reason and all(entry in settings for entry in before):
        return f"it was stopped after step {origin.step}: {reason}"
    if origin.epoch >= epochs:
        return f"epoch {origin.epoch} of {epochs} is done, step {origin.step}"
    return None
