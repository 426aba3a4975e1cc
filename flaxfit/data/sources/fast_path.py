"""A fast path for raw batches of the same structure as the first.

A batch with the nesting, dtypes and row shapes of the first one needs no binding and
few checks: its arrays are taken from the same places.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxfit._core.errors import DataError
from flaxfit._core.types import Batch
from flaxfit.data.host.arrays import as_dtype, native


class BatchTemplate(NamedTuple):
    """Converts raw batches of the same form as the one this was learned from.

    Attributes:
      nesting: the nesting of the raw batch.
      kinds: number of axes, shape of a row and dtype of every raw array.
      parts: for every array of the batch, the index of its raw array and the dtype to
        convert it to.
      batch: the nesting of the batch without weights.
    """

    nesting: Any
    kinds: tuple[tuple[int, tuple[int, ...], np.dtype[Any]], ...]
    parts: tuple[tuple[int, np.dtype[Any]], ...]
    batch: Any

    def make(self, raw: Any) -> Batch | None:
        """Returns the batch, with weights of 1; it may share the memory of `raw`.

        None if the raw batch has another form or is invalid.
        """
        leaves, nesting = jax.tree.flatten(raw)
        if nesting != self.nesting:
            return None
        rows = None
        for leaf, (axes, row, dtype) in zip(leaves, self.kinds, strict=True):
            if type(leaf) is not np.ndarray or leaf.dtype != dtype:
                return None
            if leaf.ndim != axes or leaf.shape[1:] != row:
                return None
            rows = rows or len(leaf)
            if not rows or len(leaf) != rows:
                return None
        try:
            converted = [as_dtype("", leaves[place], to) for place, to in self.parts]
        except DataError:
            return None
        batch: Batch = jax.tree.unflatten(self.batch, converted)
        return Batch(batch.inputs, batch.targets, np.ones(rows, np.float32))


def learn(raw: Any, read: Callable[[Any], Batch]) -> BatchTemplate | None:
    """Learns from a raw batch how to read others of the same form.

    Args:
      raw: a batch that passed all checks.
      read: raw batch -> `Batch`, by structure and names only.

    Returns:
      The template; None if `read` does more than rearrange NumPy arrays, or if there
      are weights, whose values must be checked in every batch.
    """
    leaves, nesting = jax.tree.flatten(raw)
    if not all(type(leaf) is np.ndarray and leaf.ndim for leaf in leaves):
        return None
    given = read(raw)
    arranged, batch = jax.tree.flatten(given)
    places = {id(leaf): place for place, leaf in enumerate(leaves)}
    if len(places) < len(leaves):
        return None  # one array in two places; the next batch may have two arrays
    if given.weights is not None or any(id(leaf) not in places for leaf in arranged):
        return None
    return BatchTemplate(
        nesting,
        tuple((leaf.ndim, leaf.shape[1:], leaf.dtype) for leaf in leaves),
        tuple((places[id(leaf)], native(leaf.dtype)) for leaf in arranged),
        batch,
    )
