"""The named metrics and how each reads outputs and targets."""

import dataclasses
import functools
import re
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from flaxfit._core.arrays import append_axes
from flaxfit._core.errors import did_you_mean
from flaxfit._core.tree_specs import describe
from flaxfit._core.types import Accumulator, Array, Average
from flaxfit.losses.catalog import absolute_error, squared_error
from flaxfit.losses.loss import Loss, decision_threshold, full_precision
from flaxfit.losses.objective import check_weights
from flaxfit.losses.target_checks import is_integer
from flaxfit.metrics.accumulators import (
    ExpMean,
    RocCurve,
    RootMean,
    binary_ratio,
    class_ratio,
)

Update: TypeAlias = Callable[[Array, Array, Array], Accumulator]
"""`(outputs, targets, weights) -> Accumulator`, of one output."""

Reading: TypeAlias = Literal["label", "one_hot", "binary"]
"""A target is the number of a class, a one-hot vector, or yes or no."""

_ALIASES = MappingProxyType(
    {
        "acc": "accuracy",
        "categorical_accuracy": "accuracy",
        "sparse_categorical_accuracy": "accuracy",
        "f1_score": "f1",
        "mae": "mean_absolute_error",
        "mse": "mean_squared_error",
        "rmse": "root_mean_squared_error",
    }
)
_TOP_K = re.compile(r"top_([1-9]\d*)_accuracy")


def named_update(name: str, loss: Loss | None, outputs: Any, targets: Any) -> Update:
    """Returns the metric of a name for one output.

    Args:
      name: its name, also in Keras's short form.
      loss: the loss of the same output: its threshold, its labels.
      outputs: the shape and dtype of the output.
      targets: the shape and dtype of its targets.

    Raises:
      ValueError: an unknown name, or one that does not go with the loss or shapes.
    """
    lowered = name.lower()
    known = _ALIASES.get(lowered, lowered)
    top = _TOP_K.fullmatch(known)
    if top:
        return _top_k(int(top[1]), name, loss, outputs, targets)
    if known not in _BUILDERS:
        near = did_you_mean(lowered, (*_BUILDERS, *_ALIASES, "top_5_accuracy"))
        raise ValueError(
            f"There is no metric {name!r}.{near} Names: {', '.join(_BUILDERS)}, "
            f"top_5_accuracy (any number); short: {', '.join(_ALIASES)}. Or pass a "
            "function (outputs, targets) -> float[batch], or a metric of clu or metrax."
        )
    return _BUILDERS[known](name, loss, outputs, targets)


def weighted_mean(values: Array, weights: Array, what: str) -> Average:
    """Returns the mean of values, one per example or element.

    Raises:
      ValueError: weights have an axis that the values have not.
    """
    check_weights(values.shape, weights.shape, what)
    return Average.of(values, weights)


def _mean_of(name: str, fn: Callable[[Array, Array], Array]) -> Update:
    def update(outputs: Array, targets: Array, weights: Array) -> Average:
        values = fn(full_precision(outputs), full_precision(targets))
        return weighted_mean(values, weights, f"the metric {name!r}")

    return update


def _accuracy(name: str, loss: Loss | None, outputs: Any, targets: Any) -> Update:
    if loss is not None and loss.kind in ("regression", "vector"):
        raise ValueError(
            f"{name!r} needs decisions, but the loss {loss.name} compares numbers; "
            "write metrics=['mae'], or 'binary_accuracy' for targets of 0 and 1."
        )
    reading = _read(name, loss, outputs, targets)
    if reading == "binary":
        return _binary_accuracy(name, loss, outputs, targets)

    def correct(outputs: Array, targets: Array) -> Array:
        labels = targets if reading == "label" else jnp.argmax(targets, axis=-1)
        return jnp.argmax(outputs, axis=-1) == labels

    return _mean_of(name, correct)


def _binary_accuracy(
    name: str, loss: Loss | None, outputs: Any, targets: Any
) -> Update:
    threshold = _threshold(name, loss, outputs, targets)
    return _mean_of(name, lambda o, t: (o > threshold) == (t > 0.5))


def _top_k(k: int, name: str, loss: Loss | None, outputs: Any, targets: Any) -> Update:
    reading = _read(name, loss, outputs, targets)
    if reading == "binary" or k > outputs.shape[-1]:
        raise ValueError(
            f"{name!r} does not go with outputs {describe(outputs)}: it needs at least "
            f"{k} classes; write metrics=['accuracy']."
        )

    def correct(outputs: Array, targets: Array) -> Array:
        labels = targets if reading == "label" else jnp.argmax(targets, axis=-1)
        best = jax.lax.top_k(outputs, k)[1]
        return jnp.any(best == labels[..., None].astype(best.dtype), axis=-1)

    return _mean_of(name, correct)


def _absolute(name: str, loss: Loss | None, outputs: Any, targets: Any) -> Update:
    del loss
    _check_equal_shapes(name, outputs, targets)
    return _mean_of(name, absolute_error)


def _squared(name: str, loss: Loss | None, outputs: Any, targets: Any) -> Update:
    del loss
    _check_equal_shapes(name, outputs, targets)
    return _mean_of(name, squared_error)


def _root_squared(name: str, loss: Loss | None, outputs: Any, targets: Any) -> Update:
    mean: Any = _squared(name, loss, outputs, targets)
    return lambda o, t, w: RootMean(mean(o, t, w))


def _perplexity(name: str, loss: Loss | None, outputs: Any, targets: Any) -> Update:
    entropy = loss is not None and loss.num_classes(outputs.shape) is not None
    if loss is None or not entropy or loss.chance_loss(outputs.shape) is None:
        raise ValueError(
            f"{name!r} is the exponential of a softmax cross-entropy, not of "
            f"{loss.name if loss else 'no loss'}; write Trainer(model, "
            "loss='softmax_cross_entropy_with_integer_labels')."
        )
    # Smoothing changes what is trained, not how well the next token is guessed.
    plain = dataclasses.replace(loss, label_smoothing=0.0)
    mean: Any = _mean_of(name, plain.values)
    return lambda o, t, w: ExpMean(mean(o, t, w))


def _ratio(
    measure: Literal["precision", "recall", "f1"],
    name: str,
    loss: Loss | None,
    outputs: Any,
    targets: Any,
) -> Update:
    reading = _read(name, loss, outputs, targets)
    if reading == "binary":
        threshold = _threshold(name, loss, outputs, targets)

        def binary(outputs: Array, targets: Array, weights: Array) -> Accumulator:
            spread = _spread(weights, targets, name)
            return binary_ratio(measure, outputs > threshold, targets > 0.5, spread)

        return binary

    def per_class(outputs: Array, targets: Array, weights: Array) -> Accumulator:
        labels = targets if reading == "label" else jnp.argmax(targets, axis=-1)
        labels = labels.astype(jnp.int32)
        best = jnp.argmax(outputs, axis=-1)
        spread = _spread(weights, labels, name)
        return class_ratio(measure, best, labels, spread, outputs.shape[-1])

    return per_class


def _auc(name: str, loss: Loss | None, outputs: Any, targets: Any) -> Update:
    reading = _read(name, loss, outputs, targets)
    if reading != "binary" and outputs.shape[-1] != 2:
        raise ValueError(
            f"{name!r} is for two classes, not for outputs {describe(outputs)}; write "
            "metrics=['accuracy', 'f1'], or a function of your own."
        )

    def update(outputs: Array, targets: Array, weights: Array) -> Accumulator:
        scores = full_precision(outputs)
        if reading != "binary":
            scores = scores[..., 1] - scores[..., 0]
        if reading == "one_hot":
            targets = targets[..., 1]
        return RocCurve.of(scores, targets > 0.5, _spread(weights, targets, name))

    return update


_BUILDERS: MappingProxyType[str, Callable[[str, Loss | None, Any, Any], Update]] = (
    MappingProxyType(
        {
            "accuracy": _accuracy,
            "auc": _auc,
            "binary_accuracy": _binary_accuracy,
            "f1": functools.partial(_ratio, "f1"),
            "mean_absolute_error": _absolute,
            "mean_squared_error": _squared,
            "perplexity": _perplexity,
            "precision": functools.partial(_ratio, "precision"),
            "recall": functools.partial(_ratio, "recall"),
            "root_mean_squared_error": _root_squared,
        }
    )
)


def _read(name: str, loss: Loss | None, outputs: Any, targets: Any) -> Reading:
    """Returns what a target is, by shapes and by what the loss takes."""
    shape, labels = tuple(outputs.shape), tuple(targets.shape)
    kind = loss.kind if loss is not None else "custom"
    if is_integer(targets) and shape[1:] and labels == shape[:-1] and shape[-1] > 1:
        return "label"
    _check_equal_shapes(name, outputs, targets)
    if kind == "distribution":
        return "one_hot"
    one_output = len(shape) == 1 or shape[-1] == 1
    if kind != "custom" or is_integer(targets) or one_output:
        return "binary"
    raise ValueError(
        f"{name!r} cannot tell whether targets {describe(targets)} are one-hot or "
        "several labels each: write loss='softmax_cross_entropy' or "
        "'sigmoid_binary_cross_entropy', 'binary_accuracy', or a function "
        "(outputs, targets) -> float[batch]."
    )


def _threshold(name: str, loss: Loss | None, outputs: Any, targets: Any) -> float:
    _check_equal_shapes(name, outputs, targets)
    return decision_threshold(loss, name)


def _check_equal_shapes(name: str, outputs: Any, targets: Any) -> None:
    if tuple(outputs.shape) != tuple(targets.shape):
        raise ValueError(
            f"{name!r} does not go with outputs {describe(outputs)} and targets "
            f"{describe(targets)}: it needs equal shapes"
            f"{', or labels' if 'accuracy' in name else ''}; write a function "
            "(outputs, targets) -> float[batch] instead."
        )


def _spread(weights: Array, targets: Array, name: str) -> Array:
    check_weights(targets.shape, weights.shape, f"the metric {name!r}")
    return jnp.broadcast_to(append_axes(weights, targets.ndim), targets.shape)
