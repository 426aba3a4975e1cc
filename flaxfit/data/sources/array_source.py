"""A source of batches from arrays in memory or in memory-mapped files."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from flaxfit._core import validation
from flaxfit._core.arrays import empty_array
from flaxfit._core.types import Batch, HostArray
from flaxfit.data.datasets.shuffling import batches_of_pass, order_of_pass, rows_of
from flaxfit.data.datasets.stream import NO_INFO, DatasetInfo
from flaxfit.data.host.arrays import named_leaves, narrow
from flaxfit.data.host.weights import with_weights


class ArraySource:
    """Batches cut out of whole arrays, in order or by a seeded permutation.

    Args:
      data: all examples, host arrays `[examples, ...]` of equal length; every example
        has weight 1 if `weights` is None.
      batch_size: rows of every batch. If larger than the number of examples, the rows
        that pad the batch count in batch statistics: cap it for training.
      shuffle: whether each pass has a new order.
      seed: determines the orders, together with the number of the pass.
      info: metadata of the data.

    Attributes:
      in_memory: whether no array is mapped from a file.
      nbytes: the bytes of all examples, before arrays mapped from a file are narrowed.

    Batches are copies: a callback may write into the arrays while steps in flight still
    read the batches. Only later batches then have the new values.
    """

    kind = "arrays"
    one_shot = False
    seeks = True
    reuses_buffers = False
    shapes = 1
    bookmark = None

    def __init__(
        self,
        data: Batch,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: Sequence[int] = (0,),
        info: DatasetInfo = NO_INFO,
    ) -> None:
        self._data = with_weights(data)
        self.num_examples: int = len(self._data.weights)
        self.num_batches: int = math.ceil(self.num_examples / batch_size)
        self.batch_size = batch_size
        leaves, self._structure = jax.tree.flatten(self._data)
        self._leaves: list[HostArray] = leaves
        self.nbytes: int = sum(leaf.nbytes for leaf in leaves)
        self.in_memory = not any(isinstance(leaf, np.memmap) for leaf in leaves)
        self.shuffle = shuffle
        self._seed = tuple(seed)
        self.pad = True
        self.info = info

    @property
    def example(self) -> Batch:
        """The first rows as a batch, not shuffled."""
        rows = np.arange(min(self.num_examples, self.batch_size))
        return self._cut(batches_of_pass(rows, self.batch_size)[0])

    def check(self, check_values: Callable[[Batch], None]) -> None:
        """Checks the values of all examples."""
        check_values(self._data)

    def batches(
        self, pass_index: int, start: int = 0, bookmark: Any = None
    ) -> Iterator[Batch]:
        """Yields the batches of one pass; `pass_index` determines their order."""
        del bookmark
        for coded in self.order(pass_index)[start:]:
            yield self._cut(coded)

    def order(self, pass_index: int) -> HostArray:
        """Returns the rows of the batches of one pass, see `batches_of_pass`."""
        order = order_of_pass(
            self.num_examples, pass_index, shuffle=self.shuffle, seed=self._seed
        )
        return batches_of_pass(order, self.batch_size)

    @property
    def counted(self) -> HostArray | None:
        """Which examples have a weight above 0, `bool[examples]`; None if all have."""
        weights = self._data.weights
        counted = (weights != 0).reshape(len(weights), -1).any(axis=1)
        return None if counted.all() else counted

    def padded(self, rows: int) -> Batch:
        """Returns a copy of all examples in arrays `[rows, ...]`; the rest is unset."""

        def copy(leaf: HostArray) -> HostArray:
            wide = empty_array((rows, *leaf.shape[1:]), leaf.dtype)
            wide[: len(leaf)] = leaf
            return wide

        data: Batch = jax.tree.map(copy, self._data)
        return data

    def stack(
        self, first: int, count: int, capacity: int, *, own: bool
    ) -> tuple[Batch, tuple[int, ...]]:
        """Returns several adjacent batches of the unshuffled examples, stacked.

        Args:
          first: the number of the first batch.
          count: the number of batches.
          capacity: the length of the arrays; values beyond `count` are unset.
          own: whether the result must be a copy.

        Returns:
          Arrays `[capacity, batch, ...]`, and the number of real rows of each batch.
        """
        start, stop = first * self.batch_size, (first + count) * self.batch_size
        real = min(stop, self.num_examples) - start
        added = np.arange(stop - start - real) % self.num_examples
        whole = not own and count == capacity and not len(added)

        def copy(leaf: HostArray) -> HostArray:
            shape = (capacity, self.batch_size, *leaf.shape[1:])
            if whole and leaf.flags.c_contiguous:
                return leaf[start:stop].reshape(shape)
            stacked = empty_array(shape, leaf.dtype)
            rows = stacked.reshape(-1, *leaf.shape[1:])
            rows[:real] = leaf[start : start + real]
            rows[real : real + len(added)] = leaf[added]
            return stacked

        batches: Batch = jax.tree.map(copy, self._data)
        weights = batches.weights
        if len(added):
            weights.reshape(-1, *weights.shape[2:])[real : real + len(added)] = 0.0
        ends = np.minimum((np.arange(count) + 1) * self.batch_size, real)
        examples = np.diff(ends, prepend=0)
        return batches, tuple(examples.tolist())

    def _cut(self, coded: HostArray) -> Batch:
        """Returns the batch of these rows."""
        rows, real = rows_of(coded)
        if not self.pad:
            rows = rows[:real]
        leaves = [_rows(leaf, rows, self.shuffle) for leaf in self._leaves]
        cut: Batch = jax.tree.unflatten(self._structure, leaves)
        if not self.in_memory:
            cut = narrow(cut)
        cut.weights[real:] = 0.0
        return cut


def split_validation(data: Batch, fraction: float) -> tuple[Batch, Batch]:
    """Splits off the last `fraction` of the examples, before any shuffling.

    Returns `(train, validation)`, views of `data`; see `train_rows`.
    """
    train = train_rows(len(jax.tree.leaves(data)[0]), fraction)
    warn_if_sorted(
        data,
        "Shuffle first: order = np.random.default_rng(0).permutation(len(x)); "
        "fit(x[order], y[order], validation_split=...)",
    )
    return (
        jax.tree.map(lambda leaf: leaf[:train], data),
        jax.tree.map(lambda leaf: leaf[train:], data),
    )


def train_rows(total: int, fraction: float) -> int:
    """Returns how many of `total` examples are for training, the same as in Keras.

    Raises:
      ValueError: `fraction` is out of range or leaves one side empty.
    """
    line = "validation_split=0.1, or validation_data=(x_val, y_val)"
    fraction = validation.fraction(
        "validation_split", fraction, within="(0, 1)", write=line
    )
    train = math.floor(total * (1 - fraction))
    if not 0 < train < total:
        raise ValueError(
            f"validation_split={fraction!r} of {total} examples leaves {train} to "
            f"train on and {total - train} to validate on: both need at least one. "
            "Pass more examples, another fraction, or validation_data=(x_val, y_val)."
        )
    return train


def warn_if_sorted(data: Batch, advice: str) -> None:
    """Warns if the targets are classes in sorted order.

    `advice` says how to shuffle the data.
    """
    for name, leaf in named_leaves(Batch((), data.targets, None)):
        labels = leaf.reshape(-1) if leaf.size == len(leaf) else leaf
        if labels.ndim > 1 or labels.dtype.kind not in "iub":
            continue
        # Compared, not subtracted: unsigned labels would wrap around.
        ascending = bool(np.all(labels[1:] >= labels[:-1]))
        descending = bool(np.all(labels[1:] <= labels[:-1]))
        if ascending != descending:
            warnings.warn(
                f"validation_split takes the last examples, and {name} is sorted: "
                f"training and validation see different classes. {advice}",
                UserWarning,
                stacklevel=3,
            )
            return


def _rows(leaf: HostArray, rows: HostArray, shuffled: bool) -> HostArray:
    """Returns a copy of these rows."""
    leaf = np.asarray(leaf)
    first, last = int(rows[0]), int(rows[-1])
    if not shuffled and last - first == len(rows) - 1:
        return leaf[first : last + 1].copy()
    # take() copies long rows twice as fast as indexing does, but would first copy all
    # of an array that is not contiguous.
    if leaf.ndim == 1 or not leaf.flags.c_contiguous:
        return leaf[rows]
    return leaf.take(rows, axis=0)
