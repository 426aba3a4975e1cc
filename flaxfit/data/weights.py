"""Sample weights and class weights, brought to one float32 array per batch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxfit._errors import DataError
from flaxfit._types import Batch
from flaxfit.data.source import HostArray, named_leaves


def with_weights(batch: Batch) -> Batch:
    """Returns the batch with `float32[rows, ...]` weights, 1 where it has none.

    Args:
      batch: host arrays of equal length; `weights` may be None.

    Raises:
      DataError: weights whose shape is not the leading part of every target's.
    """
    if batch.weights is None:
        rows = len(jax.tree.leaves(batch)[0])
        return batch.replace(weights=np.ones(rows, np.float32))
    if not isinstance(batch.weights, np.ndarray):
        raise DataError(
            f"weights are a {type(batch.weights).__name__}: give one array of shape "
            "[rows] or [rows, ...], it counts for every output."
        )
    weights = batch.weights.astype(np.float32, copy=False)
    for name, target in named_leaves(batch.replace(weights=None)):
        if name.split("/")[0] != "y":
            continue
        if weights.shape != target.shape[: weights.ndim]:
            raise DataError(
                f"weights have shape {weights.shape}, {name} has {target.shape}: "
                "weights hold one number per row, or one per element of the "
                "targets' leading axes. Write weights.reshape(len(weights)) for "
                "one per row."
            )
    return batch.replace(weights=weights)


def with_class_weight(batch: Batch, class_weight: Mapping[Any, float]) -> Batch:
    """Returns the batch with every example weighted by the class of its target.

    Args:
      batch: host arrays; one target: integers `[rows, ...]`, or one-hot or class
        probabilities `[rows, ..., classes]`, of which the largest counts.
      class_weight: class to weight; a class that is missing weighs 1.

    Raises:
      ValueError: weights are given twice, there is no or more than one target,
        a key is not a class or a value not a weight.
    """
    classes, values = _read_class_weight(class_weight)
    if batch.weights is not None and np.any(np.asarray(batch.weights) != 1):
        raise ValueError(
            "both class_weight and sample weights are given. Multiply them into one: "
            "sample_weight=sample_weight * np.array([class_weight[c] for c in y])."
        )
    targets = jax.tree.leaves(batch.targets)
    if len(targets) != 1:
        raise ValueError(
            f"class_weight needs exactly one target, there are {len(targets)}. Give "
            "the weights per example instead: fit(x, y, sample_weight=weights)."
        )
    labels = _labels(targets[0])
    at = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
    weights = np.where(classes[at] == labels, values[at], np.float32(1))
    return batch.replace(weights=weights)


def _read_class_weight(class_weight: Any) -> tuple[HostArray, HostArray]:
    """Returns sorted classes `int64[n]` and their weights `float32[n]`."""
    if not isinstance(class_weight, Mapping) or not class_weight:
        raise ValueError(
            f"class_weight={class_weight!r}: expected a dict from class to weight, "
            "e.g. class_weight={0: 1.0, 1: 5.0}."
        )
    for key, value in class_weight.items():
        number = isinstance(key, int | float | np.number) and not isinstance(key, bool)
        if not number or key != int(key):
            raise ValueError(
                f"class_weight has the key {key!r} ({type(key).__name__}): keys are "
                "the integer classes, e.g. class_weight={0: 1.0, 1: 5.0}."
            )
        if not isinstance(value, int | float | np.number) or not (
            0 <= value < float("inf")
        ):
            raise ValueError(
                f"class_weight gives class {key} the weight {value!r}: weights are "
                "finite numbers of at least 0."
            )
    pairs = sorted((int(key), float(value)) for key, value in class_weight.items())
    classes, values = zip(*pairs, strict=True)
    return np.array(classes, np.int64), np.array(values, np.float32)


def _labels(target: HostArray) -> HostArray:
    """Returns the class of every example as integers `[rows, ...]`."""
    floating = jnp.issubdtype(target.dtype, np.floating)
    if target.ndim > 1 and target.shape[-1] == 1:
        target = target[..., 0]
    elif target.ndim > 1 and (floating or _is_one_hot(target)):
        return np.asarray(target.argmax(axis=-1))
    labels = target.astype(np.int64)
    if floating and np.any(labels != target):
        raise ValueError(
            f"class_weight needs classes, but the targets are {target.dtype} values "
            f"such as {target[labels != target][0]}. Give the weights per example "
            "instead: fit(x, y, sample_weight=weights)."
        )
    return labels


def _is_one_hot(target: HostArray) -> bool:
    return bool(
        target.min() >= 0 and target.max() <= 1 and np.all(target.sum(axis=-1) == 1)
    )
