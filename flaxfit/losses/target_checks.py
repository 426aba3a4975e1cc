"""Checks whether the targets of one output fit its loss: shapes, then values.

`where` names the output in errors.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from flaxfit._core.arrays import append_axes
from flaxfit._core.errors import DataError, UsageError
from flaxfit._core.tree_specs import add_row, describe, is_array
from flaxfit._core.types import PyTree
from flaxfit.losses.loss import Loss
from flaxfit.losses.shape_advice import advise

_RANGES = MappingProxyType({"binary": (0, 1), "margin": (-1, 1)})


def refuse_pairs(
    function: Callable[..., Any], given: PyTree, values: Any, returned: str
) -> None:
    """Refuses values that grow with the batch along more than one axis.

    (batch, 1) against (batch,) broadcasts to (batch, batch) silently. `values` are the
    results of a custom `function` for `given`, outputs and targets. Only shapes count.
    """
    if len(values.shape) < 2:
        return
    try:
        grown = jax.eval_shape(function, *add_row(given, values.shape[0]))
    except Exception:  # It works for one batch size only, so there is nothing to check.
        return
    if grown.shape[1:] != values.shape[1:]:
        raise UsageError(
            f"{returned}: it compares every output with every target of the batch",
            "Give both the same shape, and return one value per example",
            "y[:, None] or outputs[:, 0]",
        )


def check_shapes(loss: Loss, outputs: PyTree, targets: PyTree, where: str) -> None:
    """Checks shape and dtype of one output and its targets by the kind of the loss.

    Raises:
      UsageError: they do not fit, with the line to write.
    """
    if loss.kind == "custom":
        return
    for name, tree in (("outputs", outputs), ("targets", targets)):
        if not is_array(tree):
            given = "None" if tree is None else describe(tree)
            raise UsageError(
                f"The loss {loss.name}{where} takes one array of {name}, not {given}",
                write="one loss per output, loss={'name': ...} or a list, or a "
                "function that takes them all",
            )
    if advice := advise(loss.kind, outputs, targets):
        raise UsageError(
            f"The loss {loss.name}{where} does not fit outputs {describe(outputs)} "
            f"and targets {describe(targets)}",
            *advice,
        )


def check_values(
    loss: Loss, outputs: Any, targets: Any, where: str, weights: Any = None
) -> None:
    """Checks the values of targets on the host; only the shape of `outputs` is used.

    Raises:
      DataError: values out of range, NaN, or a one-hot row without a class.
    """
    targets = np.asarray(targets)
    if targets.size == 0:
        return
    if loss.integer_targets:
        _check_labels(loss, outputs.shape[-1], targets, where)
        return
    # NaN propagates through min and max, so two cheap passes find everything.
    low, high = targets.min(), targets.max()
    if np.isnan(low):
        row = _first_row(np.isnan(targets))
        raise DataError(
            f"The targets{where} hold NaN at row {row}",
            "Drop these rows, or give them a number as target and sample_weight 0",
        )
    if loss.kind in _RANGES:
        _check_range(loss, targets, (low, high), where)
    if loss.spec.takes_one_hot:
        _check_distribution(loss, targets, where, weights)


def _check_labels(loss: Loss, classes: int, targets: Any, where: str) -> None:
    if 0 <= targets.min() and targets.max() < classes:
        return
    bad = (targets < 0) | (targets >= classes)
    bad &= targets != loss.ignore_label
    if not bad.any():
        return
    value = targets[bad][0]
    kept = targets[targets != loss.ignore_label]
    if kept.min() >= 1 and kept.max() == classes:
        expected, write = f"Labels 1..{classes} start at 1", "y - 1"
    elif value < 0 or value == 255:
        line = f"loss=Loss({loss.name!r}, ignore_label={value})"
        expected, write = "", f"{line} if {value} marks targets to leave out"
    else:
        expected = f"Give the model {kept.max() + 1} outputs, or correct the labels"
        write = ""
    raise DataError(
        f"The targets{where} hold {value} at row {_first_row(bad)}; {classes} outputs "
        f"allow 0..{classes - 1}",
        expected,
        write,
    )


def _check_distribution(loss: Loss, targets: Any, where: str, weights: Any) -> None:
    """Refuses one_hot's rows for labels out of range, whose loss would be 0."""
    negative = (targets < 0).any(axis=-1)
    empty = targets.sum(axis=-1) == 0
    if weights is not None and np.ndim(weights) <= empty.ndim:
        empty &= append_axes(np.asarray(weights), empty.ndim) != 0
    bad = negative | empty
    if not bad.any():
        return
    held = "a negative number" if negative.any() else "only zeros"
    raise DataError(
        f"The targets{where} hold {held} at row {_first_row(bad)}; {loss.name} takes "
        "one-hot rows or probabilities of classes",
        "one_hot returns such a row for a label out of range: pass the labels "
        "themselves, y.astype('int32'), or give sample_weight 0 to rows to leave out",
    )


def _check_range(
    loss: Loss, targets: Any, extremes: tuple[Any, Any], where: str
) -> None:
    low, high = _RANGES[loss.kind]
    margin = loss.kind == "margin"
    if not margin and low <= extremes[0] and extremes[1] <= high:
        return
    outside = (targets < low) | (targets > high)
    bad = (targets != low) & (targets != high) if margin else outside
    bad &= targets != loss.ignore_label
    if not bad.any():
        return
    if margin:
        write = "2 * y - 1 for labels 0 and 1"
    elif np.isin(targets, (-1, 1)).all():
        write = "(y + 1) / 2 for labels -1 and 1"
    else:
        image = targets.min() >= 0 and 2 < targets.max() <= 255
        first = "y / 255 for images" if image else "y == positive for two other labels"
        write = f"{first}, or loss='mse' for numbers to be predicted"
    raise DataError(
        f"The targets{where} hold {targets[bad][0]} at row {_first_row(bad)}; "
        f"{loss.name} takes {'-1 and 1' if margin else '0 to 1'}",
        write=write,
    )


def _first_row(bad: Any) -> int:
    return int(np.argwhere(bad)[0][0]) if bad.ndim else 0
