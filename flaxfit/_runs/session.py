"""One fit in a run directory: opens, compares, resumes and saves it."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from flaxfit._core import validation
from flaxfit._core.errors import CheckpointError
from flaxfit._core.types import TrainState
from flaxfit._programs.compile import EpochAccumulators
from flaxfit._reporting.display import Display
from flaxfit._runs import checkpoint_manager
from flaxfit._runs.recorder import RunRecorder
from flaxfit._runs.resume import (
    Origin,
    as_resume,
    differences,
    find,
    is_over,
    refuse_to_overwrite,
    set_aside,
)
from flaxfit._runs.saver import BackgroundWriter, Saver, restore_running, unpack
from flaxfit.callbacks.base import Callback, CallbackList, LoopState
from flaxfit.data.sources.base import Source
from flaxfit.data.sources.position import Bookmarks, Position


class Run:
    """What `fit(run_dir=..., save_every=..., resume=..., monitor=...)` asks for.

    Args:
      run_dir: the folder, None for none: then only callbacks save.
      save_every: see `Trainer.fit`.
      resume: see `Trainer.fit`.
      monitor: see `Trainer.fit`.
      display: where it says what it found.

    Attributes:
      origin: where the fit begins; known once `opened`.
      config: the trainer's arguments, as a file holds them; known after `compare`.
      saver: writes what callbacks ask for.
      bookmarks: of the data; known after `compare`.

    Raises:
      ValueError: arguments that cannot be.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | None,
        save_every: int | str | None,
        resume: str | os.PathLike[str],
        monitor: str | None,
        display: Display,
    ) -> None:
        for name, value in (("save_every", save_every), ("monitor", monitor)):
            if value is not None and run_dir is None:
                raise ValueError(
                    f"{name}={value!r} is about a run_dir, and there is none. Write "
                    f'fit(..., run_dir="runs/a", {name}={value!r}).'
                )
        validation.interval("save_every", save_every)
        self._resume = as_resume(resume, run_dir)
        self._folder = None if run_dir is None else Path(run_dir)
        self._display = display
        self._writer = BackgroundWriter()
        self._recorder: RunRecorder | None = None
        # Of several processes, the first one writes.
        self._leads = jax.process_index() == 0
        if self._folder is not None and self._leads:
            self._recorder = RunRecorder(
                self._folder, self._writer, save_every, monitor
            )
        self._meta: dict[str, Any] = {}
        self._over: str | None = None
        # Whether what is in the folder belongs to another run.
        self._foreign = False
        self.origin = Origin.begin(0, 0)
        self.saver = Saver(self._writer, self._describe)
        self.bookmarks: Bookmarks | None = None

    @property
    def name(self) -> str:
        """Names the run, whatever process goes on with it."""
        return self.origin.run

    @property
    def config(self) -> Mapping[str, Any]:
        """The trainer's arguments, as a file holds them."""
        config: Mapping[str, Any] = self._meta.get("config", {})
        return config

    def check_policy(self, nonfinite: str) -> None:
        """Raises ValueError where there is nothing to go back to."""
        if nonfinite == "rollback" and self._folder is None:
            raise ValueError(
                'nonfinite="rollback" goes back to the last checkpoint of a run_dir, '
                'and there is none. Write fit(..., run_dir="runs/a").'
            )

    @contextlib.contextmanager
    def opened(self, step: int, epoch: int) -> Iterator[Origin]:
        """Holds the folder, and finds out where the fit begins.

        Args:
          step: the trainer's steps so far.
          epoch: the epoch a new run begins at.

        Raises:
          CheckpointError: the folder cannot be used, or holds no whole checkpoint.
        """
        with contextlib.ExitStack() as stack:
            if self._folder is not None and self._leads:
                stack.enter_context(checkpoint_manager.opened(self._folder))
            found, self._foreign = find(self._folder, self._resume)
            self.origin = (
                Origin.begin(step, epoch) if found is None else Origin.of(found)
            )
            yield self.origin

    def take_folder(self) -> None:
        """Moves what is of another run out of the way; called once all is checked."""
        if self._foreign and self._folder is not None:
            set_aside(self._folder)

    def refuse_to_overwrite(self, step: int) -> None:
        """See `resume.refuse_to_overwrite`."""
        refuse_to_overwrite(self.origin, step)

    def compare(
        self,
        meta: dict[str, Any],
        source: Source,
        data: Mapping[str, Any],
        hooks: Sequence[Callback],
        epochs: int,
        total_steps: int | None,
    ) -> None:
        """Tells what is not as it was; see `resume.differences`.

        Args:
          meta: what a file says of the trainer.
          source: the data.
          data: what a file says of it.
          hooks: the user's callbacks.
          epochs: the epoch to end at.
          total_steps: the step at which training will end, None if unknown.
        """
        origin, settings = self.origin, CallbackList(hooks).settings()
        self._meta = meta | {
            "loop": {
                "run": origin.run,
                "first_step": origin.first_step,
                "first_epoch": origin.first_epoch,
                "epochs": epochs,
                "total_steps": total_steps,
                "fit": dict(data),
                "settings": settings,
            }
        }
        bookmark = origin.loop.get("bookmark")
        self.bookmarks = Bookmarks(source, bookmark)
        if origin.saved is None:
            return
        differences(origin, meta["config"], data, say=self._display.say)
        if settings != origin.loop.get("settings"):
            self._display.say("changed: the callbacks, or what they were given")
        before = origin.loop.get("epochs")
        if before != epochs:
            self._display.say(f"changed: epochs was {before}, is {epochs}")
        self._over = is_over(origin, epochs, settings)
        if not (source.seeks or bookmark or self._over) and origin.batch:
            self._display.say(
                f"the {data['kind']} cannot be entered in the middle: what was trained "
                "on is read once more, and left out"
            )

    def with_recorder(self, hooks: Sequence[Callback]) -> list[Callback]:
        """Returns the callbacks, the one that keeps the folder last."""
        return [*hooks, *([] if self._recorder is None else [self._recorder])]

    def makes_other_schedule(self, total_steps: int | None) -> bool:
        """Whether the learning rate was made for a training of another length."""
        return self.origin.loop.get("total_steps") != total_steps

    def resume(
        self,
        loop: LoopState,
        *,
        callbacks: CallbackList,
        running: EpochAccumulators,
        as_state: Callable[[Any], TrainState],
    ) -> None:
        """Gives loop and callbacks back what they had; called when all have begun.

        Args:
          loop: the loop.
          callbacks: all of them.
          running: an empty accumulator.
          as_state: makes a state of what lay in a file.
        """
        origin, saved, said = self.origin, self.origin.saved, origin_text(self.origin)
        event: dict[str, Any] = {"event": "start", "step": origin.step}
        if saved is not None:
            event = {"event": "resume", "step": origin.step, "from": saved.path}
            told, trees = origin.loop, saved.extra.get("callbacks", {})
            loop.history.load_state_dict(told["history"])
            loop.steps_per_epoch = loop.steps_per_epoch or told["steps_per_epoch"]
            for note in callbacks.load_states(
                unpack(told["callbacks"], trees, as_state)
            ):
                self._display.say(f"changed: {note}")
            loop.batch = origin.batch
            if "running" in saved.extra:
                loop.running = restore_running(saved.extra["running"], running)
                if loop.running is None:
                    warnings.warn(
                        f"The metrics are not those of {saved.path!r}: the means of "
                        f"epoch {origin.epoch + 1} begin at batch {origin.batch}.",
                        UserWarning,
                        stacklevel=2,
                    )
            if self._over is not None:
                loop.epoch = max(origin.epoch - 1, 0)
                loop.stop_reason = told.get("stop_reason")
                said = f"{said}; nothing left to train: {self._over}"
            self._display.say(said)
            # The file's arrays would stay in memory for as long as the fit.
            self.origin = origin._replace(saved=saved._replace(state={}, extra={}))
        if self._recorder is not None:
            self._recorder.begin(loop, event)

    def roll_back(
        self, running: EpochAccumulators, as_state: Callable[[Any], TrainState]
    ) -> Callable[[], tuple[TrainState, int, EpochAccumulators | None]] | None:
        """Returns what reads the folder's last good checkpoint; None without a folder.

        Args:
          running: an empty accumulator.
          as_state: makes a state of what lay in a file.
        """
        folder = self._folder
        if folder is None:
            return None

        def read() -> tuple[TrainState, int, EpochAccumulators | None]:
            self._writer.flush()
            found = checkpoint_manager.newest(folder)
            if found is None:
                raise CheckpointError(
                    f"There is no checkpoint in {os.fspath(folder)!r} to go back to."
                )
            merged = restore_running(found.extra.get("running"), running)
            return as_state(found.state), Origin.of(found).epoch, merged

        return read

    def close(self) -> None:
        """Waits until everything is written."""
        self._writer.close()

    def _describe(self, epoch: int, batch: int) -> dict[str, Any]:
        loop = dict(self._meta["loop"])
        if self.bookmarks is not None:
            position = Position(epoch - self.origin.first_epoch, batch)
            loop["bookmark"] = self.bookmarks.at(position)
        return self._meta | {"loop": loop}


def origin_text(origin: Origin) -> str:
    """Returns where a fit goes on, in words."""
    if origin.saved is None:
        return ""
    steps = origin.loop.get("steps_per_epoch")
    of = f" of {steps}" if steps else ""
    where = f", batch {origin.batch}{of}" if origin.batch else ""
    return (
        f"resumed {origin.saved.path} at step {origin.step} "
        f"(epoch {origin.epoch + 1}{where})"
    )


def describe_data(
    source: Source, validation: Source | None, *, shuffle: bool, steps: int | None
) -> dict[str, Any]:
    """Returns what decides which examples are in which batch, in plain values."""
    return {
        "kind": source.kind,
        "batch_size": source.batch_size,
        "examples": source.num_examples,
        "num_batches": source.num_batches,
        "shuffle": bool(shuffle),
        "steps_per_epoch": steps,
        "validation_examples": validation and validation.num_examples,
    }
