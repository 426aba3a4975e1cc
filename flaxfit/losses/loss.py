"""The loss of one output: its values per example and its weights.

Knows nothing of several outputs, of data or of the reduction to one number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from flaxfit._core.arrays import append_axes
from flaxfit._core.errors import UsageError
from flaxfit._core.keras_hints import function_name
from flaxfit._core.types import Array, PyTree
from flaxfit._core.validation import fraction, integer
from flaxfit.losses.catalog import LOSSES, Kind, LossFn, LossSpec, look_up


@dataclass(frozen=True, init=False)
class Loss:
    """The loss of one output.

    Outputs are logits: a loss with `softmax` or `sigmoid` in its name applies that
    function itself, so the model must not (there is no `from_logits`). The
    `kl_divergence` family takes log-probabilities.

    Args:
      fn: a function `(outputs, targets) -> float[batch, ...]`, one value per example
        or element; the name of a function in `optax.losses`; or Keras's name of one.
        The loss is the weighted mean of the values.
      label_smoothing: the fraction of every label, in `[0, 1)`, to spread over all
        classes; for softmax cross-entropy and `sigmoid_binary_cross_entropy`.
      ignore_label: the integer, often -100, that marks targets to give weight 0.
      threshold: a raw output above it is a positive decision. `"auto"` is 0 for binary
        logits and scores of -1 and 1, 0.5 for regression, and else None: metrics that
        need a threshold, such as accuracy with a custom function, then ask for it.
      name: shown in the first lines of `fit`; the function's name by default.

    All arguments are attributes; a name becomes a function, and `"auto"` a value.

    Raises:
      ValueError: an unknown name; a label smoothing that is out of range, or given
        for a loss without labels to smooth.
      TypeError: neither a function nor a name; or a function whose arguments are
        named as in Keras, `(y_true, y_pred)`.

    Example:
      >>> Loss("sparse_categorical_crossentropy", ignore_label=-100).name
      'softmax_cross_entropy_with_integer_labels'
    """

    fn: LossFn
    label_smoothing: float
    ignore_label: int | None
    threshold: float | None
    name: str
    spec: LossSpec = field(init=False, repr=False)

    def __init__(
        self,
        fn: LossFn | str,
        *,
        label_smoothing: float = 0.0,
        ignore_label: int | None = None,
        threshold: float | Literal["auto"] | None = "auto",
        name: str | None = None,
    ) -> None:
        known, spec = look_up(fn)
        _check_smoothing(label_smoothing, known, spec)
        if ignore_label is not None:
            line = "Loss(..., ignore_label=-100)"
            ignore_label = integer("ignore_label", ignore_label, least=None, write=line)
        vars(self).update(  # a frozen dataclass refuses `self.fn = …`
            fn=spec.fn,
            label_smoothing=float(label_smoothing),
            ignore_label=ignore_label,
            threshold=_threshold(spec.kind) if threshold == "auto" else threshold,
            name=name or known or function_name(spec.fn),
            spec=spec,
        )

    @property
    def kind(self) -> Kind:
        """What outputs and targets mean to the loss."""
        return self.spec.kind

    @property
    def integer_targets(self) -> bool:
        """Whether a target is the number of a class."""
        return self.kind == "integer"

    def num_classes(self, outputs_shape: Sequence[int]) -> int | None:
        """Returns the number of classes for outputs of this shape, None if none."""
        classes = self.kind in ("integer", "distribution")
        return outputs_shape[-1] if classes else None

    def chance_loss(self, outputs_shape: Sequence[int]) -> float | None:
        """Returns the loss of a model that guesses, None if it is not known."""
        chance = self.spec.chance
        return None if chance is None else chance(outputs_shape[-1])

    def weights(self, targets: PyTree, weights: Array) -> Array:
        """Returns `weights` with 0 for ignored targets.

        Without an `ignore_label` this is `weights` itself, `float32[batch]` up to
        `float32[batch, ...]`; with one, it has the shape of `targets`.
        """
        if self.ignore_label is None:
            return weights
        spread = append_axes(weights, targets.ndim)
        return jnp.where(_ignored(targets, self.ignore_label), 0.0, spread)

    def values(self, outputs: PyTree, targets: PyTree) -> Array:
        """Returns the loss of every example or element, not yet weighted.

        Outputs and targets of floats with fewer than 32 bits are converted to float32.
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
        fn = self.fn
        if self.kind == "integer":
            targets = jax.nn.one_hot(targets, outputs.shape[-1], dtype=outputs.dtype)
            fn = optax.losses.softmax_cross_entropy
        return fn(outputs, optax.losses.smooth_labels(targets, self.label_smoothing))


def decision_threshold(loss: Loss | None, metric: str) -> float:
    """Returns the threshold above which a raw output is a positive decision.

    Raises:
      UsageError: the output's loss has no threshold, or there is no loss.
    """
    if loss is not None and loss.threshold is not None:
        return loss.threshold
    if loss is None:
        problem = "an output without a loss has none"
        line = "metrics={'name': lambda outputs, targets: (outputs > 0) == targets}"
    elif loss.kind == "custom":
        problem = f"the custom loss {loss.name} does not define one"
        called = "f" if loss.name == "<lambda>" else loss.name
        line = f"loss=Loss({called}, threshold=0.0) if they are logits, "
        line += "threshold=0.5 if probabilities"
    else:
        problem = f"the loss {loss.name} has none"
        line = f"metrics=['accuracy'], or loss=Loss({loss.name!r}, threshold=0.0)"
    raise UsageError(
        f"{metric!r} needs a threshold on the outputs, and {problem}", write=line
    )


def full_precision(tree: PyTree) -> PyTree:
    """Returns `tree` with floats of fewer than 32 bits converted to float32."""

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


def _check_smoothing(amount: float, known: str | None, spec: LossSpec) -> None:
    line = "label_smoothing=0.1"
    if fraction("label_smoothing", amount, within="[0, 1)", write=line):
        if not spec.smoothable:
            smoothable = ", ".join(n for n, one in LOSSES.items() if one.smoothable)
            raise UsageError(
                f"label_smoothing is for {smoothable}, not for "
                f"{known or 'a custom function'}",
                "Smooth the labels in a function",
                "optax.losses.smooth_labels(labels, 0.1)",
            )


def _threshold(kind: Kind) -> float | None:
    if kind in ("binary", "margin"):
        return 0.0
    return 0.5 if kind == "regression" else None
