"""Finds the checkpoint to resume from and reports settings that changed since."""

import os
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxfit import checkpoint
from flaxfit._core.errors import CheckpointError, UsageError
from flaxfit._runs import checkpoint_manager

_POSITION = ("first_step", "first_epoch", "step", "epoch", "batch")
# The settings that determine which examples are in which batch.
_ORDER = ("batch_size", "examples", "shuffle", "steps_per_epoch")
_WORDS = MappingProxyType(
    {
        "examples": "the number of examples",
        "validation_examples": "the number of validation examples",
    }
)
_EXPLAINED = MappingProxyType(
    {
        "batch_size": "batches have the new size from here on",
        "examples": "epochs use the new data from here on",
        "shuffle": "it applies from here on",
        "steps_per_epoch": "epochs have the new length from here on",
        "learning_rate": "the new one applies from here on",
        "seed": "the data order follows the new one, dropout and the like the old one",
    }
)


class ResumePoint(NamedTuple):
    """The point at which a fit starts.

    Attributes:
      run: identifies the run across processes.
      first_step: the trainer's steps before the run.
      first_epoch: the epoch at which the run started.
      step: the trainer's steps so far.
      epoch: the epoch to train next.
      batch: how many batches of that epoch were trained on already.
      saved: the checkpoint to resume from, None for a new run.
      foreign: whether files in the run directory belong to another run.
    """

    run: str
    first_step: int
    first_epoch: int
    step: int
    epoch: int
    batch: int = 0
    saved: checkpoint.Checkpoint | None = None
    foreign: bool = False

    @property
    def loop(self) -> Mapping[str, Any]:
        """The loop's entry in the checkpoint; empty for a new run."""
        return {} if self.saved is None else self.saved.meta["loop"]

    @classmethod
    def of(cls, saved: checkpoint.Checkpoint) -> "ResumePoint":
        """Returns the point at which a checkpoint was written.

        Raises:
          CheckpointError: the file does not record it.
        """
        loop = saved.meta["loop"]
        try:
            numbers: dict[str, Any] = {name: int(loop[name]) for name in _POSITION}
            return cls(run=str(loop["run"]), saved=saved, **numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{saved.path!r} does not record how far it was trained ({error!r})."
            ) from error

    def describe(self) -> str:
        """Describes where a fit resumes; empty for a new run."""
        if self.saved is None:
            return ""
        steps = self.loop.get("steps_per_epoch")
        of = f" of {steps}" if steps else ""
        where = f", batch {self.batch}{of}" if self.batch else ""
        return (
            f"resumed {self.saved.path} at step {self.step} "
            f"(epoch {self.epoch + 1}{where})"
        )


def find_resume_point(
    run_dir: Path | None, resume: str, *, step: int, epoch: int, belongs_to: str | None
) -> ResumePoint:
    """Finds the point at which a fit starts.

    Args:
      run_dir: the run directory, locked; None if there is none.
      resume: `"auto"`, `"must"`, `"never"`, or the path of a checkpoint or of another
        run directory.
      step: the trainer's steps so far.
      epoch: the epoch at which a new run starts.
      belongs_to: the run that trained the trainer's state, None if no run did.

    Raises:
      CheckpointError: a checkpoint is required but missing, cannot be read, or is older
        than another one in the run directory.
      ValueError: the trainer has other training, which the run would replace.
    """
    found, foreign = None, resume == "never"
    if resume not in ("auto", "must", "never"):
        found = _load(Path(resume))
        if run_dir is not None:
            foreign = Path(found.path).resolve().parent != run_dir.resolve()
            if not foreign:
                _refuse_older(run_dir, found)
    elif run_dir is not None and not foreign:
        found = checkpoint_manager.newest(run_dir)
        if found is None and resume == "must":
            raise CheckpointError(
                f'resume="must": there is no checkpoint in {os.fspath(run_dir)!r}. '
                'Write resume="auto" to start a new run in this case.'
            )
    _check_processes_agree(found)
    if found is None:
        run = uuid.uuid4().hex[:12]
        return ResumePoint(run, step, epoch, step, epoch, foreign=foreign)
    origin = ResumePoint.of(found)._replace(foreign=foreign)
    if belongs_to != origin.run and step not in (0, origin.first_step):
        raise UsageError(
            f"This trainer was trained for {step} steps that are not part of the run "
            f"in {found.path!r} (step {origin.step}), which would replace them",
            "Make a new Trainer to resume the run, or keep this one and write "
            'resume="never" or another run_dir',
        )
    return origin


def _load(path: Path) -> checkpoint.Checkpoint:
    found = checkpoint_manager.newest(path) if path.is_dir() else checkpoint.load(path)
    if found is None or checkpoint_manager.resumable_step(found.meta) is None:
        raise CheckpointError(
            f"{os.fspath(path)!r} holds no training to resume",
            "Expected a checkpoint of the whole state, by fit(run_dir=...) or "
            "ModelCheckpoint",
            "trainer = Trainer.load(path, model) to start with its weights",
        )
    return found


def _refuse_older(run_dir: Path, found: checkpoint.Checkpoint) -> None:
    latest = checkpoint_manager.newest(run_dir)
    step = ResumePoint.of(found).step
    if latest is not None and ResumePoint.of(latest).step > step:
        raise CheckpointError(
            f"{found.path!r} is of step {step}, but {latest.path!r} in the same folder "
            "is newer: the run would hold both. Give another run_dir to branch off, "
            "or move the newer checkpoints away."
        )


def _check_processes_agree(found: checkpoint.Checkpoint | None) -> None:
    """Checks that all processes resume from the same step."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    step = -1 if found is None else ResumePoint.of(found).step
    steps = np.asarray(multihost_utils.process_allgather(np.int32(step))).ravel()
    if len(set(steps.tolist())) > 1:
        raise CheckpointError(
            f"The processes found checkpoints of different steps: {steps.tolist()}. "
            "They must see the same folder: give a run_dir on a shared disk."
        )


def report_changes(
    origin: ResumePoint,
    config: Mapping[str, Any],
    fit: Mapping[str, Any],
    *,
    say: Callable[[str], None],
) -> None:
    """Reports the settings that changed since the checkpoint was written.

    Args:
      origin: where the fit resumes.
      config: the trainer's arguments, as they are stored in a file.
      fit: the settings of the data, as they are stored in a file.
      say: shows a line of text; changes of the data's order are warnings instead.

    Raises:
      CheckpointError: the order of the data would change within a pass.
    """
    assert origin.saved is not None
    changed = {
        name: (old.get(name), value)
        for old, new in (
            (origin.saved.meta["config"], config),
            (origin.loop["fit"], fit),
        )
        for name, value in new.items()
        if name in old and old[name] != value
    }
    texts = {
        name: f"{_WORDS.get(name, name)} was {old}, is {new}"
        for name, (old, new) in changed.items()
    }
    reordered = [name for name in (*_ORDER, "seed") if name in changed]
    if reordered and _is_within_a_pass(origin):
        raise CheckpointError(
            f"{origin.saved.path!r} was written in the middle of an epoch (epoch "
            f"{origin.epoch + 1}, batch {origin.batch}), but since then "
            f"{'; '.join(texts[n] for n in reordered)}: examples would be trained on "
            "twice or never. Undo the change until the epoch is over, resume from an "
            f'earlier checkpoint with resume=path, or start over with resume="never".'
        )
    for name, text in texts.items():
        line = f"{text}: {_EXPLAINED[name]}" if name in _EXPLAINED else text
        if name in reordered:
            warnings.warn(f"Since the checkpoint {line}.", UserWarning, stacklevel=3)
        else:
            say(f"changed: {line}")


def _is_within_a_pass(origin: ResumePoint) -> bool:
    fit = origin.loop["fit"]
    steps, length = fit.get("steps_per_epoch"), fit.get("num_batches")
    if steps is None or length is None:
        return origin.batch > 0
    done = (origin.epoch - origin.first_epoch) * steps + origin.batch
    return bool(done % length)


def why_finished(
    origin: ResumePoint, epochs: int, settings: Sequence[Mapping[str, Any]]
) -> str | None:
    """Returns why there is nothing left to train, else None.

    Args:
      origin: where the fit resumes.
      epochs: the epoch at which the fit ends.
      settings: the settings of the callbacks. If a callback was removed or its
        arguments changed, an earlier stop by a callback no longer counts.
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
