"""Checks whether targets fit a loss: shapes first, then values on the host.

Knows one output and its targets only; `where` is how an error names them.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxfit._core.arrays import append_axes
from flaxfit._core.errors import DataError
from flaxfit._core.tree_specs import add_row, describe
from flaxfit._core.types import PyTree
from flaxfit.losses.catalog import Kind
from flaxfit.losses.loss import Loss

_ELEMENTWISE: frozenset[Kind] = frozenset({"binary", "margin", "regression"})
_RANGES = MappingProxyType({"binary": (0, 1), "margin": (-1, 1)})
_CROSS_ENTROPIES = frozenset(
    {
        "softmax_cross_entropy",
        "safe_softmax_cross_entropy",
        "poly_loss_cross_entropy",
    }
)


def is_array(tree: PyTree) -> bool:
    """Returns whether `tree` is one array, or the shape of one."""
    return hasattr(tree, "shape") and hasattr(tree, "dtype")


def is_integer(x: Any) -> bool:
    """Returns whether `x` holds integers; bool counts as one."""
    return jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool


def pairs_rows(function: Callable[..., Any], given: PyTree, values: Any) -> bool:
    """Returns whether values grow with the batch along more than one axis.

    (batch, 1) against (batch,) broadcasts to (batch, batch) without a word.

    Args:
      function: the user's own, `(outputs, targets) -> float[batch, ...]`.
      given: outputs and targets, only their shapes and dtypes count.
      values: what the function returned for them, or its shape.
    """
    if len(values.shape) < 2:
        return False
    try:
        grown = jax.eval_shape(function, *add_row(given, values.shape[0]))
    except Exception:  # Written for one batch size: then there is nothing to tell.
        return False
    return bool(grown.shape[1:] != values.shape[1:])


def check_shapes(loss: Loss, outputs: PyTree, targets: PyTree, where: str) -> None:
    """Checks outputs against targets by what the loss is known to take.

    Args:
      loss: the loss; nothing is known of a function of the user's own.
      outputs: the shape and dtype of one output.
      targets: the same of its targets.
      where: `""`, or the name of the output.

    Raises:
      ValueError: they do not fit, with the line to write.
    """
    if loss.kind == "custom":
        return
    for name, tree in (("outputs", outputs), ("targets", targets)):
        if not is_array(tree):
            given = "None" if tree is None else describe(tree)
            raise ValueError(
                f"The loss {loss.name}{where} takes one array of {name}, not {given}. "
                "Give one loss per output (loss={'name': ...} or a list), or a "
                "function that takes them all."
            )
    if loss.kind == "integer":
        hint = _integer_hint(outputs, targets)
    else:
        hint = _same_shape_hint(loss, outputs, targets)
    if hint:
        raise ValueError(
            f"The loss {loss.name}{where} does not fit outputs {describe(outputs)} "
            f"and targets {describe(targets)}: {hint}"
        )


def _integer_hint(outputs: Any, targets: Any) -> str:
    shape, labels = tuple(outputs.shape), tuple(targets.shape)
    if len(shape) < 2 or shape[-1] == 1:
        return (
            "with one output there are no classes to tell apart; write "
            "loss='sigmoid_binary_cross_entropy', or give the model more outputs."
        )
    if labels == (*shape[:-1], 1):
        squeeze = "y[:, 0]" if len(labels) == 2 else "y.squeeze(-1)"
        return f"labels have one axis too many; write {squeeze}."
    if labels == shape:
        return (
            "labels look one-hot; write loss='softmax_cross_entropy', or "
            "y.argmax(-1) for integer labels."
        )
    if labels != shape[:-1]:
        return f"integer labels of shape {list(shape[:-1])} are expected."
    if not is_integer(targets):
        return "labels must be integers; write y.astype('int32')."
    return ""


def _same_shape_hint(loss: Loss, outputs: Any, targets: Any) -> str:
    shape, labels = tuple(outputs.shape), tuple(targets.shape)
    if labels == shape:
        if jnp.issubdtype(targets.dtype, jnp.complexfloating) and not (
            jnp.issubdtype(outputs.dtype, jnp.complexfloating)
        ):
            return "complex targets need complex outputs; write y.real or np.abs(y)."
        return ""
    if is_integer(targets) and labels == shape[:-1] and shape[-1] > 1:
        return (
            "one integer label per example; write "
            "loss='softmax_cross_entropy_with_integer_labels'."
        )
    if shape == (*labels, 1):
        expand = "y[:, None]" if len(labels) == 1 else "y[..., None]"
        return f"write {expand}, or let the model return outputs.squeeze(-1)."
    if labels == (*shape, 1):
        squeeze = "y[:, 0]" if len(labels) == 2 else "y.squeeze(-1)"
        return f"write {squeeze}."
    kind = "element by element" if loss.kind in _ELEMENTWISE else "vector by vector"
    return f"they are compared {kind} and must have equal shapes."


def check_values(
    loss: Loss, outputs: Any, targets: Any, where: str, weights: Any = None
) -> None:
    """Checks the values of targets on the host.

    Args:
      loss: the loss.
      outputs: anything with the `shape` of the output.
      targets: an array, on the host or a device.
      where: `""`, or the name of the output.
      weights: `float[batch, ...]`, or None where all count alike.

    Raises:
      DataError: labels out of range, NaN in targets, or no class in a one-hot row.
    """
    targets = np.asarray(targets)
    if targets.size == 0:
        return
    if loss.integer_targets:
        _check_labels(loss, outputs.shape[-1], targets, where)
        return
    # NaN comes through min and max, so two cheap passes see everything.
    low, high = targets.min(), targets.max()
    if np.isnan(low):
        row = _first_row(np.isnan(targets))
        raise DataError(
            f"The targets{where} hold NaN at row {row}; drop such rows, or give them "
            "sample_weight 0 and a number."
        )
    if loss.kind in _RANGES:
        _check_range(loss, targets, (low, high), where)
    if loss.name in _CROSS_ENTROPIES:
        _check_distribution(loss, targets, where, weights)


def _check_labels(loss: Loss, classes: int, targets: Any, where: str) -> None:
    def allowed(labels: Any) -> Any:
        return (labels >= 0) & (labels < classes) | (labels == loss.ignore_label)

    if 0 <= targets.min() and targets.max() < classes:
        return
    bad = ~allowed(targets)
    if not bad.any():
        return
    value = targets[bad][0]
    kept = targets[targets != loss.ignore_label]
    if kept.min() >= 1 and kept.max() == classes:
        advice = f"Labels 1..{classes} start at 1: write y - 1."
    elif value < 0 or value == 255:
        advice = (
            f"If {value} marks targets to leave out, write "
            f"loss=Loss({loss.name!r}, ignore_label={value})."
        )
    else:
        advice = f"Give the model {kept.max() + 1} outputs, or correct the labels."
    raise DataError(
        f"The targets{where} hold {value} at row {_first_row(bad)}; {classes} outputs "
        f"allow 0..{classes - 1}. {advice}"
    )


def _check_distribution(loss: Loss, targets: Any, where: str, weights: Any) -> None:
    """Refuses what one_hot makes of a label out of range: it has loss 0, silently."""
    negative = (targets < 0).any(axis=-1)
    empty = targets.sum(axis=-1) == 0
    if weights is not None and empty.any():
        if np.ndim(weights) <= empty.ndim:
            empty &= append_axes(np.asarray(weights), empty.ndim) != 0
    bad = negative | empty
    if not bad.any():
        return
    row = _first_row(bad)
    what = "a negative number" if negative.any() else "nothing but 0"
    raise DataError(
        f"The targets{where} hold {what} at row {row}; {loss.name} takes one-hot rows "
        "or probabilities of classes. one_hot of a label out of range is such a row: "
        "pass the labels themselves, y.astype('int32'), or give rows that do not count "
        "sample_weight 0."
    )


def _check_range(
    loss: Loss, targets: Any, extremes: tuple[Any, Any], where: str
) -> None:
    low, high = _RANGES[loss.kind]
    inside = (targets >= low) & (targets <= high)
    if loss.kind == "margin":
        inside = (targets == low) | (targets == high)
        fits = bool((inside | (targets == loss.ignore_label)).all())
    else:
        fits = bool(low <= extremes[0] and extremes[1] <= high)
        fits = fits or bool((inside | (targets == loss.ignore_label)).all())
    if fits:
        return
    bad = ~(inside | (targets == loss.ignore_label))
    value = targets[bad][0]
    if loss.kind == "margin":
        expected, advice = "-1 and 1", "for labels 0 and 1 write 2 * y - 1."
    elif np.isin(targets, (-1, 1)).all():
        expected, advice = "0 to 1", "for labels -1 and 1 write (y + 1) / 2."
    elif targets.min() >= 0 and targets.max() <= 255 and targets.max() > 2:
        expected, advice = "0 to 1", "for images write y / 255"
        advice += ", for numbers to be predicted loss='mse'."
    else:
        expected, advice = "0 to 1", "for two other labels write y == positive"
        advice += ", for numbers to be predicted loss='mse'."
    raise DataError(
        f"The targets{where} hold {value} at row {_first_row(bad)}; {loss.name} takes "
        f"{expected}: {advice}"
    )


def _first_row(bad: Any) -> int:
    return int(np.argwhere(bad)[0][0]) if bad.ndim else 0
