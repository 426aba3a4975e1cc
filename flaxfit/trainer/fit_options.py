"""The arguments of `fit`; those of data are checked where the data is opened."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flaxfit._core.errors import UsageError
from flaxfit._core.validation import boolean, integer, is_integer, optional_integer
from flaxfit._runs.resume import ResumePoint
from flaxfit._runs.session import RunOptions
from flaxfit.callbacks.base import Callback, as_callbacks
from flaxfit.data.sources.base import BatchSource


@dataclass(frozen=True)
class ValidationOptions:
    """The `validation_...` arguments of `Trainer.fit`.

    Attributes:
      happens_at: epoch, counted from 0 -> whether to validate after it.
    """

    data: Any
    split: float
    batch_size: int | None
    steps: int | None
    happens_at: Callable[[int], bool]

    @classmethod
    def checked(cls, given: Mapping[str, Any]) -> "ValidationOptions":
        """Returns the options from the arguments of `fit` by name."""
        if given["validation_split"] and given["validation_data"] is not None:
            raise UsageError(
                "fit got both validation_split and validation_data; give one of them"
            )
        return cls(
            data=given["validation_data"],
            split=given["validation_split"],
            batch_size=given["validation_batch_size"],
            steps=optional_integer("validation_steps", given["validation_steps"]),
            happens_at=_epoch_filter(given["validation_freq"]),
        )


@dataclass(frozen=True)
class FitOptions:
    """The arguments of `Trainer.fit`; most have the same name.

    Attributes:
      steps: `steps_per_epoch`, None if an epoch is one pass over the data.
      validation: the arguments about validation.
      run: the arguments about the run directory.
    """

    epochs: int
    initial_epoch: int
    batch_size: int | None
    shuffle: bool
    class_weight: Mapping[int, float] | None
    steps: int | None
    validation: ValidationOptions
    callbacks: Sequence[Callback]
    run: RunOptions
    verbose: int | str

    @classmethod
    def checked(cls, given: Mapping[str, Any], nonfinite: str) -> "FitOptions":
        """Returns the options from the arguments of `fit` by name.

        Raises:
          ValueError: a value is wrong, or two arguments exclude each other.
        """
        run = {n: given[n] for n in ("run_dir", "save_every", "resume", "monitor")}
        return cls(
            epochs=integer("epochs", given["epochs"]),
            initial_epoch=integer("initial_epoch", given["initial_epoch"], least=0),
            batch_size=given["batch_size"],
            shuffle=boolean("shuffle", given["shuffle"]),
            class_weight=given["class_weight"],
            steps=optional_integer("steps_per_epoch", given["steps_per_epoch"]),
            validation=ValidationOptions.checked(given),
            callbacks=as_callbacks(given["callbacks"]),
            run=RunOptions.checked(**run, nonfinite=nonfinite),
            verbose=given["verbose"],
        )

    def epochs_from(self, origin: ResumePoint) -> range:
        """Returns the epochs of the whole run, including those before a resumption."""
        return range(origin.first_epoch, max(self.epochs, origin.first_epoch))

    def total_steps(self, source: BatchSource, origin: ResumePoint) -> int | None:
        """Returns the step at which training will end, None if unknown."""
        steps = self.steps or source.num_batches
        return steps and origin.first_step + len(self.epochs_from(origin)) * steps


def _epoch_filter(frequency: int | Iterable[int]) -> Callable[[int], bool]:
    """Returns epoch (from 0) -> whether to validate after it; see `validation_freq`."""
    if isinstance(frequency, Iterable) and not (
        isinstance(frequency, str) or is_integer(frequency)
    ):
        after = frozenset(integer("validation_freq", epoch) for epoch in frequency)
        return lambda epoch: epoch + 1 in after
    every = integer("validation_freq", frequency)
    return lambda epoch: (epoch + 1) % every == 0
