"""Everything one `fit` needs to run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from flaxfit._core.types import Logs, PyTree, TrainState
from flaxfit._loops.feeder import Feed
from flaxfit._loops.interrupt import Interrupt
from flaxfit._programs.compile import EpochAccumulators, Program
from flaxfit._reporting.display import Display
from flaxfit._runs.saver import Saver
from flaxfit.callbacks.base import CallbackList, LoopState
from flaxfit.data.sources.position import Position

Evaluate: TypeAlias = Callable[[TrainState], dict[str, Any] | None]


@dataclass(frozen=True)
class FitPlan:
    """What one `fit` is to do.

    Attributes:
      epochs: `range(initial_epoch, epochs)`.
      train: the train program.
      running: an empty accumulator.
      open_feed: position -> where the batches come from.
      steps_per_call: steps of one call of the program, None to go by the clock.
      order: sorts logs into History's order.
      learning_rate: reads the current rate from an optimizer state, or None.
      validate: evaluates a state, or None without validation data.
      validates_at: whether to validate after an epoch.
      callbacks: whom to call.
      display: where the progress goes.
      interrupt: tells of Ctrl-C and SIGTERM.
      saver: writes the checkpoints that callbacks ask for.
      as_state: makes a state of what a snapshot or a file holds.
      nonfinite: what happens at a loss that is not finite; see `Trainer`.
      first_epoch: the epoch at which the data began.
      batch: the batches of the first epoch that were trained on in an earlier process.
      resume: called when all callbacks have begun.
      roll_back: returns state, epoch and accumulators of the last good checkpoint;
        None where there are none.
    """

    epochs: range
    train: Program
    running: EpochAccumulators
    open_feed: Callable[[Position], Feed]
    steps_per_call: int | None
    order: Callable[[Logs], Logs]
    learning_rate: Callable[[PyTree], Any]
    validate: Evaluate | None
    validates_at: Callable[[int], bool]
    callbacks: CallbackList
    display: Display
    interrupt: Interrupt
    saver: Saver
    as_state: Callable[[Any], TrainState]
    nonfinite: str
    first_epoch: int
    batch: int = 0
    resume: Callable[[LoopState], None] = lambda loop: None
    roll_back: Callable[[], tuple[TrainState, int, EpochAccumulators | None]] | None = (
        None
    )
