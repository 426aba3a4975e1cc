"""How one trainer reads data, and what it remembers about earlier data."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from flaxfit._core.errors import DataError, UsageError, caller
from flaxfit._core.types import Batch
from flaxfit._programs.placement import has_rows
from flaxfit._programs.program_cache import ProgramCache
from flaxfit._runs.resume import ResumePoint
from flaxfit.checkpoint import Checkpoint
from flaxfit.data.binding.binding import Binding, InMemoryData
from flaxfit.data.datasets.columns import Columns
from flaxfit.data.datasets.example_dataset import ExampleSet
from flaxfit.data.datasets.stream import Stream
from flaxfit.data.host.arrays import call_text
from flaxfit.data.host.checks import check_lengths, check_sized
from flaxfit.data.open import (
    DEFAULT_BATCH_SIZE,
    BatchOptions,
    Dataset,
    batch_source,
    open_dataset,
    split_dataset,
)
from flaxfit.data.sources.base import BatchSource
from flaxfit.trainer.check import listed_classes
from flaxfit.trainer.fit_options import FitOptions


@dataclass(frozen=True)
class DataSchema:
    """What a trainer remembers about the data it was trained on.

    Attributes:
      batch_size: the batch size of the last fit, used if none is given.
      class_names: the names of the classes 0, 1, …; empty if there are none.
      columns: the columns of the first table, None if the data was not a table.
    """

    batch_size: int = DEFAULT_BATCH_SIZE
    class_names: tuple[str, ...] = ()
    columns: Columns | None = None


@dataclass(eq=False)
class DataAdapter:
    """Makes the data sources of one trainer; later data is read like the first.

    Attributes:
      programs: the trainer's programs.
      has_learned: whether a state was trained or loaded, or a fit is running.
      given: the binding according to the user's arguments.
      schema: what is remembered about earlier data.
    """

    programs: ProgramCache
    has_learned: Callable[[], bool]
    given: Binding
    schema: DataSchema = DataSchema()

    @property
    def binding(self) -> Binding:
        """How data is read: like the first tables, once something was trained."""
        return self._binding if self.has_learned() else self.given

    @property
    def _binding(self) -> Binding:
        return replace(self.given, columns=self.schema.columns)

    def remember(self, **changes: Any) -> None:
        """Changes fields of the schema."""
        self.schema = replace(self.schema, **changes)

    def read_like(self, saved: Checkpoint) -> Binding:
        """Reads later data like the trainer of a checkpoint; returns the binding."""
        self.remember(
            columns=Columns.from_plain(saved.meta.get("columns")),
            class_names=tuple(saved.meta.get("class_names", ())),
        )
        return self._binding

    def learn(self, source: BatchSource | InMemoryData, *, allow_rebuild: bool) -> None:
        """Remembers what the data says about itself, before programs are built.

        Unless `allow_rebuild`, the data must have the classes that are known already.

        Raises:
          DataError: the data has other classes than the trainer was trained on.
        """
        if not allow_rebuild:
            self.refuse_other_classes(source)
            return
        info = source.info
        self.programs.learn(info.pictures)
        names = info.class_names or self.schema.class_names
        self.remember(class_names=names, columns=info.columns)

    def refuse_other_classes(self, source: BatchSource | InMemoryData) -> None:
        """Refuses data whose labels have another meaning than before.

        Raises:
          DataError: the data has other classes than the trainer was trained on.
        """
        names, known = source.info.class_names, self.schema.class_names
        if names and known and names != known:
            raise DataError(
                f"The data has the classes {listed_classes(names)}, but this trainer "
                f"was trained on {listed_classes(known)}: the same label would be "
                "another class. Give data with the same classes in the same order, or "
                "make a new Trainer."
            )

    def open_training(
        self,
        x: Any,
        y: Any,
        sample_weight: Any,
        options: FitOptions,
        origin: ResumePoint,
    ) -> tuple[BatchSource, Dataset | None]:
        """Returns the training data, and the data that `validation_split` holds out."""
        binding, held_out = self.binding, None
        if origin.saved is not None:
            binding = self.read_like(origin.saved)
        dataset = open_dataset(x, y, sample_weight, batch_size=options.batch_size)
        if options.validation.split:
            dataset, held_out = split_dataset(
                dataset, options.validation.split, binding
            )
        if self.programs.settings.nonfinite == "rollback":
            refuse_to_go_back(dataset)
        epochs = len(options.epochs_from(origin))
        check_passes(dataset, options.steps, "steps_per_epoch", epochs=epochs)
        source = batch_source(
            dataset,
            binding,
            BatchOptions(
                batch_size=options.batch_size,
                shuffle=options.shuffle,
                seed=(self.programs.settings.seed, origin.first_step),
                class_weight=options.class_weight,
                steps=options.steps,
            ),
        )
        if origin.saved is not None:
            self.refuse_other_classes(source)
        return source, held_out

    def source(
        self,
        dataset: Dataset,
        options: BatchOptions,
        *,
        divided: bool = True,
        of_fit: bool = False,
    ) -> BatchSource:
        """Returns a source of data that is not trained on.

        Without a batch size in `options`, that of the last fit is used. `divided` makes
        batches divide evenly among the devices. Validation data `of_fit` is read with
        the columns of the training data, even if nothing was trained yet.
        """
        options = replace(
            options,
            default_batch_size=options.default_batch_size or self.schema.batch_size,
            multiple_of=len(self.programs.placement.devices) if divided else 1,
        )
        return batch_source(dataset, self._binding if of_fit else self.binding, options)

    def raw_batch(self, raw: Any) -> Batch:
        """Returns a batch for a custom loop; its arrays may be on the device or traced.

        Raises:
          TypeError: the batch holds something that is not an array.
          DataError: arrays of different lengths.
        """
        batch = raw if isinstance(raw, Batch) else self._binding.split(raw)
        for leaf in jax.tree.leaves(batch):
            if not hasattr(leaf, "dtype"):
                raise TypeError(
                    f"The batch holds a {type(leaf).__name__} instead of an array; "
                    f"write trainer.init((x, y)) with NumPy or jax arrays."
                )
        if isinstance(raw, Batch) and batch.weights is not None and not has_rows(batch):
            # A batch of graphs: only its targets and weights have rows.
            check_sized(batch, batch.weights.shape[0])
            return batch
        rows = check_lengths(batch)
        if batch.weights is None:
            batch = batch.replace(weights=np.ones(rows, np.float32))
        return batch


def check_passes(
    dataset: Dataset, steps: int | None, argument: str, *, epochs: int = 1
) -> None:
    """Refuses an iterator for several epochs, and endless data.

    With `steps`, the value of the user's argument named `argument`, both are accepted.
    """
    if steps is not None:
        return
    if dataset.one_shot and epochs > 1:
        raise DataError(
            f"{caller()} got an iterator, which ends after one pass, for {epochs} "
            "epochs. Give something that can be iterated again, e.g. a list of "
            "batches, or the function that makes the iterator: make_batches, not "
            f"make_batches(); or give the number of batches per epoch: {argument}=100."
        )
    if dataset.endless:
        raise DataError(
            f"the {dataset.kind} given to {caller()} has no end: write {argument}=100 "
            "for 100 batches, or make the dataset without repeat()."
        )


def refuse_to_use_up(dataset: Dataset) -> None:
    """Refuses an iterator for a call that would only inspect its first batch."""
    if dataset.one_shot:
        raise DataError(
            f"{caller()} got an iterator and would use up its first batch. Write "
            f"trainer.{caller()}(x, y) with that batch, or give the function that "
            "makes the iterator."
        )


def refuse_to_go_back(dataset: Dataset) -> None:
    """Refuses an iterator if batches may have to be read again."""
    if dataset.one_shot:
        raise DataError(
            'nonfinite="rollback" opens the data again after a bad batch, but fit got '
            "an iterator, which cannot go back. Give the function that makes the "
            "iterator, make_batches, not make_batches(), or write "
            'Trainer(nonfinite="skip").'
        )


def refuse_assumed_split(dataset: Dataset) -> None:
    """Refuses a dataset given by name without a split, which only `fit` assumes."""
    info = dataset.info if isinstance(dataset, ExampleSet) else None
    if info is not None and info.assumed_split:
        raise UsageError(info.assumed_split)


def warn_of_order(dataset: Dataset) -> None:
    """Warns if outputs will come in another order than the dataset's."""
    info = dataset.info if isinstance(dataset, Stream) else None
    if info is not None and info.shuffles:
        warnings.warn(
            f"{caller()} got a DataLoader(..., shuffle=True): the outputs come in the "
            "loader's order, not the dataset's. Write DataLoader(..., shuffle=False), "
            f"or give the dataset: {call_text('dataset')}.",
            UserWarning,
            stacklevel=2,
        )
