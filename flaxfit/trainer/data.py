"""How one trainer reads data, and what it remembers of the data it has seen."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from flaxfit._core.errors import DataError
from flaxfit._core.types import Batch
from flaxfit._programs.placement import has_rows
from flaxfit._programs.program_cache import ProgramCache
from flaxfit.checkpoint import Checkpoint
from flaxfit.data.binding.binding import Binding, Whole
from flaxfit.data.datasets.columns import Columns
from flaxfit.data.datasets.example_dataset import ExampleSet
from flaxfit.data.datasets.stream import Stream
from flaxfit.data.host.checks import check_lengths, check_sized
from flaxfit.data.open import DEFAULT_BATCH_SIZE, as_inputs_source, as_source, as_whole
from flaxfit.data.sources.base import Source
from flaxfit.trainer.check import listed_classes
from flaxfit.trainer.state import StateKeeper


class Reader:
    """Makes sources of data, those after the first like the first.

    Args:
      builder: checks the data, and is told what it holds.
      keeper: knows whether anything was learnt.
      given: how a raw batch is read, as far as the user has said.

    Attributes:
      batch_size: the rows of a batch where nothing is said.
      class_names: of the data that was learnt from; empty where it had none.
    """

    def __init__(
        self, builder: ProgramCache, keeper: StateKeeper, given: Binding
    ) -> None:
        self.batch_size = DEFAULT_BATCH_SIZE
        self.class_names: tuple[str, ...] = ()
        self._builder = builder
        self._keeper = keeper
        self._binding = given

    @property
    def binding(self) -> Binding:
        """How data is read: tables like those that were learnt from, if any were."""
        if self._keeper.has_learned:
            return self._binding
        return replace(self._binding, columns=None)

    @property
    def columns(self) -> Columns | None:
        """The columns of the table that was read last, None if it was none."""
        return self._binding.columns

    def read_like(self, saved: Checkpoint) -> Binding:
        """Reads data as the trainer of a checkpoint did; returns how."""
        columns = Columns.from_plain(saved.meta.get("columns"))
        self._binding = replace(self._binding, columns=columns)
        self.class_names = tuple(saved.meta.get("class_names", ()))
        return self._binding

    def learn(self, source: Source | Whole, *, allow_rebuild: bool) -> None:
        """Takes over what the data says of itself, before anything is built of it.

        Args:
          source: the data.
          allow_rebuild: whether it may replace what was known; else it has to agree.

        Raises:
          DataError: its classes are not those the trainer was trained on.
        """
        if not allow_rebuild:
            self.refuse_other_classes(source)
            return
        self._builder.learn(source.facts.pictures)
        self.class_names = source.facts.class_names or self.class_names
        self._binding = replace(self._binding, columns=source.facts.columns)

    def refuse_other_classes(self, source: Source | Whole) -> None:
        """Refuses data whose labels mean something else than before.

        Raises:
          DataError: its classes are not those the trainer was trained on.
        """
        names, known = source.facts.class_names, self.class_names
        if names and known and names != known:
            raise DataError(
                f"The data has the classes {listed_classes(names)}, and this trainer "
                f"was trained on {listed_classes(known)}: a label would be another "
                "class. Give data with the same classes in the same order, or make a "
                "new Trainer."
            )

    def source(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        what: str,
        batch_size: int | None = None,
        default_batch_size: int | None = None,
        steps: int | None = None,
        divided: bool = False,
        refuse: Callable[[Any], None] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> Source:
        """Returns a source of what is evaluated or looked at; see `as_source`.

        Args:
          x: the data.
          y: targets, for arrays.
          sample_weight: weights, for arrays.
          what: what the data was given to, for messages.
          batch_size: rows of a batch.
          default_batch_size: those where nothing is said, None for the last fit's.
          steps: how many batches are asked for.
          divided: whether batches are divided among the devices.
          refuse: see `as_source`.
          data_dir: where datasets by name lie.
        """
        return as_source(
            x,
            y,
            sample_weight,
            # What a fit is validated on is read like what it trains on.
            binding=self._binding if what == "validation_data" else self.binding,
            batch_size=batch_size,
            default_batch_size=default_batch_size or self.batch_size,
            multiple_of=self._devices if divided else 1,
            steps=steps,
            check=self._builder.check_values,
            refuse=refuse,
            data_dir=data_dir,
            what=what,
        )

    def inputs(
        self,
        x: Any,
        *,
        what: str,
        batch_size: int | None = None,
        steps: int | None = None,
        refuse: Callable[[Any], None] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> Source:
        """Returns a source of inputs; see `source` and `as_inputs_source`."""
        return as_inputs_source(
            x,
            binding=self.binding,
            batch_size=batch_size,
            default_batch_size=self.batch_size,
            multiple_of=self._devices,
            steps=steps,
            check=self._builder.check_values,
            refuse=refuse,
            data_dir=data_dir,
            what=what,
        )

    def one_batch(
        self,
        x: Any,
        y: Any,
        sample_weight: Any,
        class_weight: Mapping[int, float] | None,
        *,
        what: str,
    ) -> Whole:
        """Returns one batch of any size; see `as_whole`."""
        return as_whole(
            x,
            y,
            sample_weight,
            binding=self.binding,
            class_weight=class_weight,
            what=what,
        )

    def raw_batch(self, raw: Any) -> Batch:
        """Returns the batch of one's own loop, of arrays on the device or traced.

        Raises:
          TypeError: it holds something else than arrays.
          DataError: arrays of different lengths.
        """
        batch = raw if isinstance(raw, Batch) else self._binding.split(raw)
        for leaf in jax.tree.leaves(batch):
            if not hasattr(leaf, "dtype"):
                raise TypeError(
                    f"The batch holds a {type(leaf).__name__} in place of an array; "
                    f"write trainer.init((x, y)) with NumPy or jax arrays."
                )
        if isinstance(raw, Batch) and batch.weights is not None and not has_rows(batch):
            # A batch of graphs: only what is no input has rows.
            check_sized(batch, batch.weights.shape[0])
            return batch
        rows = check_lengths(batch)
        if batch.weights is None:
            batch = batch.replace(weights=np.ones(rows, np.float32))
        return batch

    @property
    def _devices(self) -> int:
        return len(self._builder.placement.devices)


def refuse_one_shot(
    data: ExampleSet | Stream, *, what: str, epochs: int, steps: int | None
) -> None:
    """Refuses an iterator where more than one pass is to be made.

    Raises:
      DataError: it runs dry after the first.
    """
    if data.one_shot and steps is None and epochs > 1:
        name = "steps_per_epoch" if what == "fit" else "validation_steps"
        raise DataError(
            f"{what} got an iterator, which runs dry after one pass, for "
            f"{epochs} epochs. Give something that can be iterated again, e.g. a "
            f"list of batches, or the function that makes it: make_batches and not "
            f"make_batches(); or say how many batches an epoch takes: {name}=100."
        )


def refuse_to_use_up(data: ExampleSet | Stream, *, what: str) -> None:
    """Refuses an iterator where the batch that is looked at is wanted again.

    Raises:
      DataError: it would lose it.
    """
    if data.one_shot:
        raise DataError(
            f"{what} got an iterator, and would use up its first batch. Write "
            f"trainer.{what}(x, y) with that batch, or give the function that "
            "makes the iterator."
        )


def refuse_to_go_back(data: ExampleSet | Stream) -> None:
    """Refuses an iterator where batches are to be read again.

    Raises:
      DataError: it cannot go back.
    """
    if data.one_shot:
        raise DataError(
            'nonfinite="rollback" reads the data again from a bad batch on, and fit '
            "got an iterator, which cannot go back. Give the function that makes it, "
            'make_batches and not make_batches(), or write Trainer(nonfinite="skip").'
        )
