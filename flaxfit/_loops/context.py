"""Everything that one `fit` needs while it runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from flaxfit._core.state_store import TrainStateStore
from flaxfit._core.types import TrainState
from flaxfit._loops.feeder import Execution, Feed, open_feed
from flaxfit._loops.interrupt import Interrupt
from flaxfit._programs.resolve import ResolvedTask
from flaxfit._reporting.display import Display
from flaxfit._runs.session import RunSession
from flaxfit.callbacks.base import CallbackList, LoopState
from flaxfit.data.sources.base import BatchSource
from flaxfit.data.sources.position import Position

Evaluate: TypeAlias = Callable[[TrainState], dict[str, Any] | None]


@dataclass(frozen=True)
class FitData:
    """The data of one fit.

    Attributes:
      source: the training data.
      steps: batches of an epoch, from repeated passes; None for one pass.
      epochs: the epochs to train, from the one at which this fit starts or resumes.
      validate: evaluates a state, or returns None if interrupted; None without
        validation data.
      validates_at: whether to validate after an epoch, counted from 0.
    """

    source: BatchSource
    steps: int | None
    epochs: range
    validate: Evaluate | None
    validates_at: Callable[[int], bool]


@dataclass(frozen=True)
class FitContext:
    """Everything that one `fit` needs while it runs.

    Attributes:
      resolved: the compiled programs and what they were built from.
      data: the data, and how often it is read.
      execution: how steps are grouped and data is fed.
      session: resumes the run and saves its checkpoints.
      store: the state.
      loop: the mutable part, which callbacks see.
      display: shows the progress.
      interrupt: whether Ctrl-C or SIGTERM came.
      nonfinite: how non-finite losses are handled; see `Trainer`.
      sizes: the shapes of the chunks that were trained on.
    """

    resolved: ResolvedTask
    data: FitData
    execution: Execution
    session: RunSession
    store: TrainStateStore
    loop: LoopState
    display: Display
    interrupt: Interrupt
    nonfinite: str
    sizes: set[tuple[tuple[int, ...], ...]] = field(default_factory=set)

    @property
    def callbacks(self) -> CallbackList:
        """The user's callbacks, and the one that writes the run directory."""
        return self.session.callbacks

    @property
    def ending(self) -> bool:
        """Whether a callback or a signal has asked to end the fit."""
        return self.loop.stopped or self.interrupt.requested

    def open_feed(self, epoch: int, batch: int) -> Feed:
        """Returns the training data from batch `batch` of epoch `epoch` on."""
        origin = self.session.origin
        position = Position(epoch - origin.first_epoch, batch)
        end = max(self.data.epochs.stop, origin.first_epoch)
        return open_feed(
            self.resolved,
            self.execution,
            self.data.source,
            epochs=end - epoch,
            steps=self.data.steps,
            position=position,
            bookmarks=self.session.bookmarks,
            stopped=lambda: self.interrupt.requested,
        )
