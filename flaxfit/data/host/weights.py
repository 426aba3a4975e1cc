"""Combines sample weights and class weights into one float32 array per batch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxfit._core.arrays import append_axes
from flaxfit._core.errors import DataError
from flaxfit._core.tree_specs import describe
from flaxfit._core.types import Batch, HostArray, PyTree
from flaxfit._core.validation import integer, number
from flaxfit.data.host.arrays import named_leaves


def with_weights(batch: Batch, rows: int | None = None) -> Batch:
    """Returns the batch with `float32[rows, ...]` weights, all 1 if it has none.

    `rows` is needed if the arrays differ in length. Weights on a device stay there.

    Raises:
      DataError: the shape of the weights is not the leading part of that of every
        target.
    """
    if batch.weights is None:
        rows = len(jax.tree.leaves(batch)[0]) if rows is None else rows
        return batch.replace(weights=np.ones(rows, np.float32))
    if not isinstance(batch.weights, np.ndarray | jax.Array):
        raise DataError(
            f"weights are a {type(batch.weights).__name__}: give one array of shape "
            "[rows] or [rows, ...], which applies to every output."
        )
    weights = batch.weights.astype(np.float32, copy=False)
    for name, target in named_leaves(Batch((), batch.targets, None)):
        if weights.shape != target.shape[: weights.ndim]:
            raise DataError(
                f"weights have shape {weights.shape}, {name} has {target.shape}: "
                "weights need one number per row, or one per element of the targets' "
                "leading axes. Write weights.reshape(len(weights)) for one per row."
            )
    return batch.replace(weights=weights)


def apply_mask(
    batch: Batch, real: PyTree, weigh: Callable[[Batch], Batch] | None = None
) -> Batch:
    """Returns the batch with weight 0 for the padding of its targets.

    Args:
      batch: host arrays; `weights` may be None.
      real: `PaddedBatch.real` of the targets.
      weigh: batch -> batch with weights by its targets. It receives real targets only:
        a real value replaces each value of padding.

    Raises:
      DataError: targets are not all padded in the same places.
    """
    masks = jax.tree.leaves(real)
    mask = next((mask for mask in masks if mask.ndim == 2), None)
    if mask is None:
        return batch if weigh is None else weigh(batch)
    if not all(np.array_equal(mask, other) for other in masks):
        raise DataError(
            "the targets are not all padded in the same places, but one array of "
            "weights applies to all of them. Pad all of them alike, "
            "pad_to={...}, or leave padding out of the loss by a label, "
            'Loss("softmax_cross_entropy_with_integer_labels", ignore_label=-1) and '
            "pad_value=-1."
        )
    if weigh is not None:
        shown = jax.tree.map(partial(_without_padding, mask=mask), batch.targets)
        batch = weigh(batch.replace(targets=shown)).replace(targets=batch.targets)
    weights = mask.astype(np.float32)
    if batch.weights is not None:
        given = np.asarray(batch.weights, np.float32)
        if not given.ndim or given.shape[:2] != mask.shape[: given.ndim]:
            return batch  # a later check refuses these weights
        if given.ndim == 1:
            given = given[:, None]
        weights = np.where(append_axes(mask, given.ndim), given, np.float32(0))
    return batch.replace(weights=weights)


def _without_padding(target: Any, mask: HostArray) -> HostArray:
    """Returns the target with padding replaced by one of its real values."""
    target = np.asarray(target)
    places = np.argwhere(mask)
    if not len(places):
        return target
    return np.where(append_axes(mask, target.ndim), target, target[tuple(places[0])])


class ClassWeighting:
    """Weights every example by the class of its target.

    The first targets decide whether all targets are one-hot rows or classes, as a later
    batch of classes can look one-hot by chance.

    Args:
      class_weight: class -> weight; missing classes have weight 1.

    Raises:
      ValueError: a key is not a class, or a value is not a weight.
    """

    def __init__(self, class_weight: Mapping[Any, float]) -> None:
        self._classes, self._values = _read_class_weight(class_weight)
        self._one_hot: bool | None = None

    def __call__(self, batch: Batch) -> Batch:
        """Returns the batch with `float32[rows, ...]` weights.

        Args:
          batch: a batch of arrays with one target, of classes `[rows, ...]` or one-hot
            rows `[rows, ..., classes]`. A target on a device is read back.

        Raises:
          ValueError: the batch has weights other than 1, not exactly one target, or a
            target without classes.
        """
        if batch.weights is not None and np.any(np.asarray(batch.weights) != 1):
            raise ValueError(
                "both class_weight and sample weights are given. Multiply them into "
                "one: sample_weight=sample_weight * np.array([class_weight[c] for c in "
                "y])."
            )
        targets = jax.tree.leaves(batch.targets)
        if len(targets) != 1:
            raise ValueError(
                f"class_weight needs exactly one target, but there are {len(targets)}. "
                "Give the weights per example instead: fit(x, y, "
                "sample_weight=weights)."
            )
        labels = self._labels(np.asarray(targets[0]))
        at = np.minimum(np.searchsorted(self._classes, labels), len(self._classes) - 1)
        weights = np.where(self._classes[at] == labels, self._values[at], np.float32(1))
        return batch.replace(weights=weights)

    def _labels(self, target: HostArray) -> HostArray:
        """Returns the class of every example as integers `[rows, ...]`."""
        if target.ndim > 1 and target.shape[-1] == 1:
            target = target[..., 0]
        elif target.ndim > 1:
            if self._one_hot is None:
                self._one_hot = bool(_one_hot_rows(target).all())
                if not self._one_hot:
                    _refuse_several_labels(target)
            if self._one_hot:
                one_hot = _one_hot_rows(target)
                if not one_hot.all():
                    row = int(np.argwhere(~one_hot)[0][0])
                    raise ValueError(
                        "class_weight expects one-hot targets, as in the first batch, "
                        f"but row {row} of {describe(target)} is not one-hot. Leave "
                        "class_weight out, and let the data yield (x, y, weights)."
                    )
                return np.asarray(target.argmax(axis=-1))
        labels = target.astype(np.int64)
        if np.any(labels != target):
            raise ValueError(
                f"class_weight needs classes, but the targets are {target.dtype} "
                f"values such as {target[labels != target][0]}. Give the weights per "
                "example instead: fit(x, y, sample_weight=weights)."
            )
        return labels


def _read_class_weight(class_weight: Any) -> tuple[HostArray, HostArray]:
    """Returns sorted classes `int64[n]` and their weights `float32[n]`."""
    if not isinstance(class_weight, Mapping) or not class_weight:
        raise ValueError(
            f"class_weight={class_weight!r}: expected a dict from class to weight, "
            "e.g. class_weight={0: 1.0, 1: 5.0}."
        )
    for key, value in class_weight.items():
        whole = isinstance(key, float | np.floating) and key.is_integer()
        line = "class_weight={0: 1.0, 1: 5.0}"
        integer("class_weight key", int(key) if whole else key, least=None, write=line)
        number(f"class_weight[{key}]", value)
    pairs = sorted((int(key), float(value)) for key, value in class_weight.items())
    classes, values = zip(*pairs, strict=True)
    return np.array(classes, np.int64), np.array(values, np.float32)


def _refuse_several_labels(target: HostArray) -> None:
    """Raises ValueError for targets `[rows, ..., n]` that may not be classes."""
    floating = jnp.issubdtype(target.dtype, np.inexact)
    # 0 and 1 are classes in an image, but may be several labels per row in `[rows, n]`.
    binary = target.ndim == 2 and target.min() >= 0 and target.max() <= 1
    if not floating and not binary:
        return
    advice = (
        "For class probabilities write sample_weight=weights[y.argmax(-1)], for "
        "classes y.astype('int32'), for several labels of one row "
        if floating
        else "If a row has several labels, or a class of 0 or 1 at every place, write "
    )
    raise ValueError(
        f"class_weight needs one class per example, but the targets are "
        f"{describe(target)} and not all rows are one-hot. {advice}"
        "sample_weight=np.where(y == 1, 5.0, 1.0)."
    )


def _one_hot_rows(target: HostArray) -> HostArray:
    """Returns which rows of `[..., classes]` have a single 1 among 0s, `bool[...]`."""
    binary = ((target == 0) | (target == 1)).all(axis=-1)
    ones: HostArray = binary & ((target == 1).sum(axis=-1) == 1)
    return ones
