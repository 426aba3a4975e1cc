"""One fit in a run directory: finds where it starts, resumes it and saves it."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax

from flaxfit._core import validation
from flaxfit._core.errors import CheckpointError, UsageError
from flaxfit._core.types import PyTree, TrainState
from flaxfit._programs.compile import EpochAccumulators
from flaxfit._reporting.display import Display
from flaxfit._runs import checkpoint_manager
from flaxfit._runs.recorder import RunRecorder
from flaxfit._runs.resume import (
    ResumePoint,
    find_resume_point,
    report_changes,
    why_finished,
)
from flaxfit._runs.saver import (
    BackgroundWriter,
    pack,
    restore_running,
    submit_saves,
    unpack,
)
from flaxfit.callbacks.base import Callback, CallbackList, LoopState, Outcome
from flaxfit.data.sources.base import BatchSource
from flaxfit.data.sources.position import IteratorCheckpoints, Position


@dataclass(frozen=True)
class RunOptions:
    """The arguments of `Trainer.fit` about the run directory, checked.

    Attributes:
      folder: `run_dir`; None if there is none, so that only callbacks save. For the
        others see `Trainer.fit`.
    """

    folder: Path | None
    save_every: int | str | None
    resume: str
    monitor: str | None

    @classmethod
    def checked(
        cls, run_dir: Any, save_every: Any, resume: Any, monitor: Any, nonfinite: str
    ) -> "RunOptions":
        """Returns the options.

        Raises:
          ValueError: a wrong value, or a value that requires the missing `run_dir`.
        """
        validation.interval("save_every", save_every)
        if isinstance(resume, os.PathLike):
            resume = os.fspath(resume)
        if not isinstance(resume, str) or not resume:
            raise UsageError(
                f"Got resume={resume!r}",
                'Expected "auto", "must", "never", or the path of a checkpoint',
                'resume="auto"',
            )
        required = {
            f"save_every={save_every!r}": save_every is not None,
            f"monitor={monitor!r}": monitor is not None,
            f"resume={resume!r}": resume in ("must", "never"),
            f"nonfinite={nonfinite!r}": nonfinite == "rollback",
        }
        for text, is_given in required.items():
            if is_given and run_dir is None:
                argument = "" if text.startswith("nonfinite") else f", {text}"
                raise UsageError(
                    f"{text} requires a run_dir",
                    write=f'fit(..., run_dir="runs/a"{argument})',
                )
        folder = None if run_dir is None else Path(run_dir)
        return cls(folder, save_every, resume, monitor)


@dataclass(frozen=True)
class RunRecord:
    """The description of a fit in its checkpoints, besides its progress.

    Attributes:
      trainer: the trainer's metadata.
      data: the settings of the data; see `describe_data`.
      epochs: the epoch at which the fit ends.
      total_steps: the step at which training will end, None if unknown.
    """

    trainer: Mapping[str, Any]
    data: Mapping[str, Any]
    epochs: int
    total_steps: int | None


@contextlib.contextmanager
def locked_run(
    options: RunOptions, step: int, epoch: int, belongs_to: str | None
) -> Iterator[ResumePoint]:
    """Locks the run directory, and finds where the fit starts.

    For arguments and errors see `find_resume_point`. A directory that cannot be used
    raises CheckpointError too.
    """
    with contextlib.ExitStack() as stack:
        if options.folder is not None and _leads():
            stack.enter_context(checkpoint_manager.opened(options.folder))
        yield find_resume_point(
            options.folder,
            options.resume,
            step=step,
            epoch=epoch,
            belongs_to=belongs_to,
        )


class RunSession:
    """Resumes and saves one fit.

    Creating a session only reports what changed since the checkpoint, which may raise.
    Entering it moves another run's files out of the way, so the caller first does
    everything that can fail. Leaving it waits until the session's files are written.

    Args:
      options: the run directory, and how often to save.
      origin: where the fit starts.
      record: the description of the fit for its checkpoints.
      callbacks: the user's callbacks.
      source: the training data.
      as_state: makes a state from the arrays of a snapshot or a file.
      empty: the accumulators that an epoch starts with.
      display: shows the messages.

    Attributes:
      origin: where the fit starts.
      callbacks: the user's callbacks, then the one that writes the run directory.
      bookmarks: saved iterator states, for data that cannot start at a given batch.

    Raises:
      CheckpointError: the order of the data would change within a pass.
    """

    def __init__(
        self,
        options: RunOptions,
        origin: ResumePoint,
        record: RunRecord,
        callbacks: Sequence[Callback],
        source: BatchSource,
        *,
        as_state: Callable[[Any], TrainState],
        empty: EpochAccumulators,
        display: Display,
    ) -> None:
        settings = CallbackList(callbacks).settings()
        self.origin = origin
        self.as_state = as_state
        self.bookmarks = IteratorCheckpoints(source, origin.loop.get("bookmark"))
        self._folder = options.folder
        self._empty = empty
        self._display = display
        self._finished = why_finished(origin, record.epochs, settings)
        if origin.saved is not None:
            self._report_changes(record, settings, source)
        self._meta = {
            **record.trainer,
            "loop": {
                "run": origin.run,
                "first_step": origin.first_step,
                "first_epoch": origin.first_epoch,
                "epochs": record.epochs,
                "total_steps": record.total_steps,
                "fit": dict(record.data),
                "settings": settings,
            },
        }
        self._writer = BackgroundWriter()
        self._recorder: RunRecorder | None = None
        if options.folder is not None and _leads():
            self._recorder = RunRecorder(
                options.folder, self._writer, options.save_every, options.monitor
            )
        # The recorder is last, so that its checkpoints include the others' changes.
        recorder = [] if self._recorder is None else [self._recorder]
        self.callbacks = CallbackList([*callbacks, *recorder])

    def __enter__(self) -> Self:
        if self.origin.foreign and self._folder is not None and _leads():
            checkpoint_manager.set_aside(self._folder)
        return self

    def __exit__(self, *unused: object) -> None:
        self._writer.close()

    def resume(self, loop: LoopState) -> None:
        """Restores the loop and the callbacks; called after `on_train_begin`."""
        origin, saved, text = self.origin, self.origin.saved, self.origin.describe()
        event: dict[str, Any] = {"event": "start", "step": origin.step}
        if saved is not None:
            event = {"event": "resume", "step": origin.step, "from": saved.path}
            loop.history.load_state_dict(origin.loop["history"])
            if loop.steps_per_epoch is None:
                loop.steps_per_epoch = origin.loop["steps_per_epoch"]
            trees = saved.extra.get("callbacks", {})
            states = unpack(origin.loop["callbacks"], trees, self.as_state)
            for note in self.callbacks.load_states(states):
                self._display.say(f"changed: {note}")
            loop.batch = origin.batch
            if "running" in saved.extra:
                loop.running = restore_running(saved.extra["running"], self._empty)
                if loop.running is None:
                    warnings.warn(
                        f"The metrics differ from those in {saved.path!r}: the means "
                        f"of epoch {origin.epoch + 1} start at batch {origin.batch}.",
                        UserWarning,
                        stacklevel=2,
                    )
            if self._finished is not None:
                loop.epoch = max(origin.epoch - 1, 0)
                loop.outcome = Outcome(origin.loop.get("stop_reason"))
                text = f"{text}; nothing left to train: {self._finished}"
            self._display.say(text)
            # Everything was copied; keeping the file's arrays would double the memory.
            saved.state.clear()
            saved.extra.clear()
        if self._recorder is not None:
            self._recorder.begin(loop, event)

    def save(self, loop: LoopState, state: TrainState) -> None:
        """Writes the checkpoints that callbacks have requested."""
        requests = loop.take_saves()
        if _leads():
            submit_saves(self._writer, requests, state, *self._content(loop))

    def _content(self, loop: LoopState) -> tuple[dict[str, Any], dict[str, PyTree]]:
        """Returns a checkpoint without its state: the plain values and other arrays."""
        trees: dict[str, PyTree] = {}
        states = pack(self.callbacks.states(), trees)
        extra: dict[str, PyTree] = {"callbacks": trees} if trees else {}
        epoch = loop.epoch + 1 if loop.epoch_is_over else loop.epoch
        batch = 0
        if loop.running is not None:  # it is None between epochs
            batch = loop.batch
            extra["running"] = dict(enumerate(jax.tree.leaves(loop.running)))
        position = Position(epoch - self.origin.first_epoch, batch)
        progress = {
            "bookmark": self.bookmarks.at(position),
            "step": loop.step,
            "epoch": epoch,
            "batch": batch,
            "steps_per_epoch": loop.steps_per_epoch,
            "stop_reason": None if loop.outcome.failure else loop.stop_reason,
            "callbacks": states,
            "history": loop.history.state_dict(),
        }
        return self._meta | {"loop": self._meta["loop"] | progress}, extra

    def last_checkpoint(
        self,
    ) -> tuple[TrainState, int, EpochAccumulators | None] | None:
        """Returns state, epoch and accumulators of the run's newest checkpoint.

        Returns None without a run directory.

        Raises:
          CheckpointError: there is no checkpoint that can be read.
        """
        if self._folder is None:
            return None
        self._writer.flush()
        found = checkpoint_manager.newest(self._folder)
        if found is None:
            raise CheckpointError(
                f"There is no checkpoint in {os.fspath(self._folder)!r} to roll back "
                "to."
            )
        running = restore_running(found.extra.get("running"), self._empty)
        return self.as_state(found.state), ResumePoint.of(found).epoch, running

    def _report_changes(
        self, record: RunRecord, settings: list[dict[str, Any]], source: BatchSource
    ) -> None:
        origin, say = self.origin, self._display.say
        report_changes(origin, record.trainer["config"], record.data, say=say)
        if settings != origin.loop.get("settings"):
            say("changed: the callbacks, or their arguments")
        before = origin.loop.get("epochs")
        if before != record.epochs:
            say(f"changed: epochs was {before}, is {record.epochs}")
        seeks = source.seeks or origin.loop.get("bookmark") or self._finished
        if origin.batch and not seeks:
            say(
                f"the {record.data['kind']} cannot start in the middle of an epoch: "
                "the batches already trained on are read again and skipped"
            )


def describe_data(
    source: BatchSource,
    validation: BatchSource | None,
    *,
    shuffle: bool,
    steps: int | None,
) -> dict[str, Any]:
    """Returns the settings that decide which examples are in which batch."""
    return {
        "kind": source.kind,
        "batch_size": source.batch_size,
        "examples": source.num_examples,
        "num_batches": source.num_batches,
        "shuffle": shuffle,
        "steps_per_epoch": steps,
        "validation_examples": validation and validation.num_examples,
    }


def _leads() -> bool:
    """Whether this process writes the files."""
    return jax.process_index() == 0
