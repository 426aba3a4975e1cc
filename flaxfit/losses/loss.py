"""One loss of one output: its values per example and its weights.

Knows nothing of several outputs, of data or of the reduction to one number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from flaxfit._core.arrays import append_axes
from flaxfit._core.types import Array, PyTree
from flaxfit._core.validation import fraction, integer
from flaxfit.losses.catalog import Kind, LossFn, function_name, known_name, look_up

_INTEGER_CROSS_ENTROPY = "softmax_cross_entropy_with_integer_labels"
_SMOOTHED = frozenset(
    {_INTEGER_CROSS_ENTROPY, "softmax_cross_entropy", "sigmoid_binary_cross_entropy"}
)
_OF_LOGITS = _SMOOTHED | {
    "poly_loss_cross_entropy",
    "safe_softmax_cross_entropy",
    "sigmoid_focal_loss",
}
_CHANCE_LOG_CLASSES = frozenset(
    {_INTEGER_CROSS_ENTROPY, "softmax_cross_entropy", "safe_softmax_cross_entropy"}
)


@dataclass(frozen=True, init=False)
class Loss:
    """The loss of one output.

    Outputs are logits: every loss with `softmax` or `sigmoid` in its name applies
    it itself, so the model must not (there is no `from_logits`). The
    `kl_divergence` family takes log-probabilities.

    Attributes:
      fn: `(outputs, targets) -> float[batch, ...]`, one value per example or
        element; the loss is their weighted mean.
      label_smoothing: this much of every label is spread over all classes.
      ignore_label: targets equal to it count nothing.
      threshold: a raw output above it is a positive decision; None where outputs
        are no such decisions, or nothing says what they are.
      name: shown in the first line of `fit`.

    Example:
      >>> Loss("sparse_categorical_crossentropy", ignore_label=-100).name
      'softmax_cross_entropy_with_integer_labels'
    """

    fn: LossFn
    label_smoothing: float
    ignore_label: int | None
    threshold: float | None
    name: str
    kind: Kind = field(init=False, repr=False)

    def __init__(
        self,
        fn: LossFn | str,
        *,
        label_smoothing: float = 0.0,
        ignore_label: int | None = None,
        threshold: float | Literal["auto"] | None = "auto",
        name: str | None = None,
    ) -> None:
        """Makes a loss from a function or a name.

        Args:
          fn: a function `(outputs, targets) -> float[batch, ...]` (per example, as
            optax's), or the name of one in `optax.losses`, or Keras's name for it.
          label_smoothing: in `[0, 1)`; for softmax cross-entropy and
            `sigmoid_binary_cross_entropy`.
          ignore_label: the integer that marks targets to leave out, often -100.
          threshold: "auto" is 0 for losses of logits and scores, 0.5 for
            regression, None for softmax. For a function of your own it is None too:
            metrics that decide, such as accuracy, then ask for it.
          name: "auto" by default: the function's own.

        Raises:
          ValueError: for an unknown name, or one that is no loss of
            `(outputs, targets)`; for a label smoothing out of range or on a
            loss that has no labels to smooth.
          TypeError: for what is neither function nor name, and for a function whose
            arguments are named as Keras's, `(y_true, y_pred)`.
        """
        known, function, kind = look_up(fn)
        _check_smoothing(label_smoothing, known)
        if ignore_label is not None:
            line = "Loss(..., ignore_label=-100)"
            ignore_label = integer("ignore_label", ignore_label, least=None, write=line)
        values = {
            "fn": function,
            "label_smoothing": float(label_smoothing),
            "ignore_label": ignore_label,
            "threshold": _threshold(kind) if threshold == "auto" else threshold,
            "name": name or known or function_name(function),
            "kind": kind,
        }
        for attribute, value in values.items():
            object.__setattr__(self, attribute, value)

    @property
    def integer_targets(self) -> bool:
        """Whether a target is the number of a class."""
        return self.kind == "integer"

    @property
    def of_logits(self) -> bool:
        """Whether it applies a softmax or sigmoid, so that outputs must be logits."""
        return known_name(self.fn) in _OF_LOGITS

    def num_classes(self, outputs_shape: Sequence[int]) -> int | None:
        """Returns how many classes outputs of this shape tell apart, if any."""
        if self.kind in ("integer", "distribution"):
            return outputs_shape[-1]
        return None

    def chance_loss(self, outputs_shape: Sequence[int]) -> float | None:
        """Returns the loss of a model that knows nothing, where that is known."""
        known = known_name(self.fn)
        if known in _CHANCE_LOG_CLASSES:
            return math.log(outputs_shape[-1])
        return math.log(2) if known == "sigmoid_binary_cross_entropy" else None

    def weights(self, targets: PyTree, weights: Array) -> Array:
        """Returns `weights` with 0 for targets that are ignored.

        Args:
          targets: `int[batch, ...]`; anything if there is no `ignore_label`.
          weights: `float32[batch]` up to `float32[batch, ...]`.

        Returns:
          `weights` itself, or in the targets' shape if there is an `ignore_label`.
        """
        if self.ignore_label is None:
            return weights
        spread = append_axes(weights, targets.ndim)
        return jnp.where(_ignored(targets, self.ignore_label), 0.0, spread)

    def values(self, outputs: PyTree, targets: PyTree) -> Array:
        """Returns the loss of every example or element, not yet weighted.

        Args:
          outputs: `float[batch, ...]`; less than 32 bits are raised to float32.
          targets: what the loss takes.
        """
        outputs, targets = full_precision(outputs), full_precision(targets)
        if self.ignore_label is not None:
            # A gradient of NaN stays NaN at weight 0, so the label is replaced.
            hidden = _ignored(targets, self.ignore_label)
            targets = jnp.where(hidden, jnp.zeros_like(targets), targets)
        if self.kind == "custom":
            return self.fn(outputs, targets)
        if self.kind == "integer":
            targets = targets.astype(jnp.int32) if targets.dtype == bool else targets
        else:
            targets = targets.astype(jnp.result_type(outputs, targets))
        if self.label_smoothing:
            return self._smoothed(outputs, targets)
        return self.fn(outputs, targets)

    def _smoothed(self, outputs: Array, targets: Array) -> Array:
        if self.kind == "binary":
            kept = 1.0 - self.label_smoothing
            return self.fn(outputs, kept * targets + 0.5 * self.label_smoothing)
        if self.kind == "integer":
            targets = jax.nn.one_hot(targets, outputs.shape[-1], dtype=outputs.dtype)
        smooth = optax.losses.smooth_labels(targets, self.label_smoothing)
        return optax.losses.softmax_cross_entropy(outputs, smooth)


def decision_threshold(loss: Loss | None, metric: str) -> float:
    """Returns what a raw output must exceed to be a positive decision.

    Args:
      loss: the loss of the output, None if it has none.
      metric: who asks.

    Raises:
      ValueError: the loss does not say it.
    """
    if loss is not None and loss.threshold is not None:
        return loss.threshold
    if loss is None:
        problem = "an output without a loss has none"
        line = "metrics={'name': lambda outputs, targets: (outputs > 0) == targets}"
    elif loss.kind == "custom":
        problem = f"what the outputs mean to the loss {loss.name} is not known"
        line = (
            f"loss=Loss({'f' if loss.name == '<lambda>' else loss.name}, "
            "threshold=0.0) if they are logits, threshold=0.5 if probabilities"
        )
    else:
        problem = f"the loss {loss.name} has none"
        line = (
            f"metrics=['accuracy'], or loss=Loss({loss.name!r}, threshold=0.0) if "
            "a raw output above 0 is a yes"
        )
    raise ValueError(
        f"{metric!r} needs a threshold on the outputs, and {problem}; write {line}."
    )


def full_precision(tree: PyTree) -> PyTree:
    """Returns `tree` with floats of less than 32 bits raised to float32."""

    def raise_(x: Any) -> Any:
        small = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
        return x.astype(jnp.float32) if small else x

    return jax.tree.map(raise_, tree)


def _ignored(targets: Array, label: int) -> Array:
    if jnp.issubdtype(targets.dtype, jnp.integer):
        limits = jnp.iinfo(targets.dtype)
        if not limits.min <= label <= limits.max:
            return jnp.zeros(targets.shape, bool)
    return targets == label


def _check_smoothing(amount: float, known: str | None) -> None:
    line = "label_smoothing=0.1"
    amount = fraction("label_smoothing", amount, within="[0, 1)", write=line)
    if amount and known not in _SMOOTHED:
        raise ValueError(
            f"label_smoothing is for {', '.join(sorted(_SMOOTHED))}, not for "
            f"{known or 'a function of your own'}; smooth the labels in the function: "
            "optax.losses.smooth_labels(labels, 0.1)."
        )


def _threshold(kind: Kind) -> float | None:
    if kind in ("binary", "margin"):
        return 0.0
    return 0.5 if kind == "regression" else None
