"""The named metrics: a table with the function and the direction of each metric."""

import dataclasses
import functools
import re
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from flaxfit._core.arrays import append_axes
from flaxfit._core.errors import UsageError, did_you_mean
from flaxfit._core.tree_specs import describe, holds_integers
from flaxfit._core.types import Accumulator, Array, Average
from flaxfit.losses.catalog import absolute_error, squared_error
from flaxfit.losses.loss import Loss, decision_threshold, full_precision
from flaxfit.losses.objective import check_weights
from flaxfit.metrics.accumulators import (
    FunctionOfMean,
    Measure,
    RocCurve,
    binary_ratio,
    class_ratio,
)

Update: TypeAlias = Callable[[Array, Array, Array], Accumulator]
"""`(outputs, targets, weights) -> Accumulator`, for one output."""

TargetKind: TypeAlias = Literal["label", "one_hot", "binary"]
"""A target is the number of a class, a one-hot vector, or 0 or 1."""


class Given(NamedTuple):
    """What a named metric is built from.

    Attributes:
      name: its name as given, for messages.
      loss: the loss of the same output, None if it has none.
      outputs: the shape and dtype of the output.
      targets: the shape and dtype of its targets.
    """

    name: str
    loss: Loss | None
    outputs: Any
    targets: Any


class MetricSpec(NamedTuple):
    """All facts about a named metric: how to build it, and which values are better."""

    build: Callable[[Given], Update]
    direction: Literal["min", "max"]


def named_update(given: Given) -> Update:
    """Returns the metric of a name or alias, for one output.

    Raises:
      UsageError: the name is unknown, or the metric does not fit the loss or shapes.
    """
    spec = find_metric(given.name)
    if spec is None:
        names = (*METRICS, *ALIASES, "top_5_accuracy")
        raise UsageError(
            f"There is no metric {given.name!r}."
            f"{did_you_mean(given.name.lower(), names)}",
            f"Names: {', '.join(METRICS)}, top_5_accuracy (any number); short: "
            f"{', '.join(ALIASES)}",
            "one of them, a function (outputs, targets) -> float[batch], or a metric "
            "of clu or metrax",
        )
    return spec.build(given)


def find_metric(name: str) -> MetricSpec | None:
    """Returns the facts about a metric by name (in any case) or alias, if known."""
    known = ALIASES.get(name.lower(), name.lower())
    top = _TOP_K.fullmatch(known)
    if top:
        return MetricSpec(functools.partial(_top_k, int(top[1])), "max")
    return METRICS.get(known)


def weighted_mean(values: Array, weights: Array, name: str) -> Average:
    """Returns the mean of a metric's values, one per example or element."""
    check_weights(values.shape, weights.shape, f"the metric {name!r}")
    return Average.of(values, weights)


def _mean_of(name: str, fn: Callable[[Array, Array], Array]) -> Update:
    def update(outputs: Array, targets: Array, weights: Array) -> Average:
        values = fn(full_precision(outputs), full_precision(targets))
        return weighted_mean(values, weights, name)

    return update


def _accuracy(given: Given) -> Update:
    if given.loss is not None and given.loss.kind in ("regression", "vector"):
        raise UsageError(
            f"{given.name!r} needs decisions, but the loss {given.loss.name} compares "
            "numbers",
            write="metrics=['mae'], or 'binary_accuracy' for targets of 0 and 1",
        )
    kind = _target_kind(given)
    if kind == "binary":
        return _binary_accuracy(given)
    return _mean_of(given.name, lambda o, t: jnp.argmax(o, axis=-1) == _labels(t, kind))


def _binary_accuracy(given: Given) -> Update:
    threshold = _threshold(given)
    return _mean_of(given.name, lambda o, t: (o > threshold) == (t > 0.5))


def _top_k(k: int, given: Given) -> Update:
    kind = _target_kind(given)
    if kind == "binary" or k > given.outputs.shape[-1]:
        raise UsageError(
            f"{given.name!r} does not fit outputs {describe(given.outputs)}",
            f"It needs at least {k} classes",
            "metrics=['accuracy']",
        )

    def correct(outputs: Array, targets: Array) -> Array:
        labels = _labels(targets, kind)
        best = jax.lax.top_k(outputs, k)[1]
        return jnp.any(best == labels[..., None].astype(best.dtype), axis=-1)

    return _mean_of(given.name, correct)


def _elementwise(fn: Callable[[Array, Array], Array], given: Given) -> Update:
    _check_equal_shapes(given)
    return _mean_of(given.name, fn)


def _root_squared(given: Given) -> Update:
    mean: Any = _elementwise(squared_error, given)
    return lambda o, t, w: FunctionOfMean(mean(o, t, w), jnp.sqrt)


def _perplexity(given: Given) -> Update:
    loss, shape = given.loss, given.outputs.shape
    entropy = loss is not None and loss.num_classes(shape) is not None
    if loss is None or not entropy or loss.chance_loss(shape) is None:
        raise UsageError(
            f"{given.name!r} is the exponential of a softmax cross-entropy, but the "
            f"output has {f'the loss {loss.name}' if loss else 'no loss'}",
            write="Trainer(model, loss='softmax_cross_entropy_with_integer_labels')",
        )
    # Smoothing is for training; perplexity measures the probability of the labels.
    plain = dataclasses.replace(loss, label_smoothing=0.0)
    mean: Any = _mean_of(given.name, plain.values)
    return lambda o, t, w: FunctionOfMean(mean(o, t, w), jnp.exp)


def _ratio(measure: Measure, given: Given) -> Update:
    kind = _target_kind(given)
    if kind == "binary":
        threshold = _threshold(given)

        def binary(outputs: Array, targets: Array, weights: Array) -> Accumulator:
            spread = _spread(weights, targets, given.name)
            return binary_ratio(measure, outputs > threshold, targets > 0.5, spread)

        return binary

    def per_class(outputs: Array, targets: Array, weights: Array) -> Accumulator:
        labels = _labels(targets, kind).astype(jnp.int32)
        best = jnp.argmax(outputs, axis=-1)
        spread = _spread(weights, labels, given.name)
        return class_ratio(measure, best, labels, spread, outputs.shape[-1])

    return per_class


def _auc(given: Given) -> Update:
    kind = _target_kind(given)
    if kind != "binary" and given.outputs.shape[-1] != 2:
        raise UsageError(
            f"{given.name!r} is for two classes, not for outputs "
            f"{describe(given.outputs)}",
            write="metrics=['accuracy', 'f1'], or a custom function",
        )

    def update(outputs: Array, targets: Array, weights: Array) -> Accumulator:
        scores = full_precision(outputs)
        if kind != "binary":
            scores = scores[..., 1] - scores[..., 0]
        if kind == "one_hot":
            targets = targets[..., 1]
        spread = _spread(weights, targets, given.name)
        return RocCurve.of(scores, targets > 0.5, spread)

    return update


METRICS: MappingProxyType[str, MetricSpec] = MappingProxyType(
    {
        "accuracy": MetricSpec(_accuracy, "max"),
        "auc": MetricSpec(_auc, "max"),
        "binary_accuracy": MetricSpec(_binary_accuracy, "max"),
        "f1": MetricSpec(functools.partial(_ratio, "f1"), "max"),
        "mean_absolute_error": MetricSpec(
            functools.partial(_elementwise, absolute_error), "min"
        ),
        "mean_squared_error": MetricSpec(
            functools.partial(_elementwise, squared_error), "min"
        ),
        "perplexity": MetricSpec(_perplexity, "min"),
        "precision": MetricSpec(functools.partial(_ratio, "precision"), "max"),
        "recall": MetricSpec(functools.partial(_ratio, "recall"), "max"),
        "root_mean_squared_error": MetricSpec(_root_squared, "min"),
    }
)

ALIASES = MappingProxyType(
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


def _target_kind(given: Given) -> TargetKind:
    """Returns the kind of the targets, by the shapes and the kind of the loss."""
    shape, labels = tuple(given.outputs.shape), tuple(given.targets.shape)
    kind = given.loss.kind if given.loss is not None else "custom"
    integers = holds_integers(given.targets)
    if integers and shape[1:] and labels == shape[:-1] and shape[-1] > 1:
        return "label"
    _check_equal_shapes(given)
    if kind == "distribution":
        return "one_hot"
    if kind != "custom" or integers or len(shape) == 1 or shape[-1] == 1:
        return "binary"
    raise UsageError(
        f"Targets {describe(given.targets)} may be one-hot or several labels each, and "
        f"{given.name!r} needs to know which",
        write="loss='softmax_cross_entropy' or 'sigmoid_binary_cross_entropy', the "
        "metric 'binary_accuracy', or a function (outputs, targets) -> float[batch]",
    )


def _labels(targets: Array, kind: TargetKind) -> Array:
    """Returns the class number of every target."""
    return targets if kind == "label" else jnp.argmax(targets, axis=-1)


def _threshold(given: Given) -> float:
    _check_equal_shapes(given)
    return decision_threshold(given.loss, given.name)


def _check_equal_shapes(given: Given) -> None:
    outputs, targets = given.outputs, given.targets
    if tuple(outputs.shape) != tuple(targets.shape):
        raise UsageError(
            f"{given.name!r} does not fit outputs {describe(outputs)} and targets "
            f"{describe(targets)}: it needs equal shapes"
            f"{', or labels' if 'accuracy' in given.name else ''}",
            write="a function (outputs, targets) -> float[batch]",
        )


def _spread(weights: Array, targets: Array, name: str) -> Array:
    """Returns the weights in the shape of the targets."""
    check_weights(targets.shape, weights.shape, f"the metric {name!r}")
    return jnp.broadcast_to(append_axes(weights, targets.ndim), targets.shape)
