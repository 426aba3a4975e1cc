"""Adapts metrics with clu's interface: clu's, metrax's and custom ones.

Metrics are recognized by their methods; none of these libraries is imported.
"""

import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flaxfit._core.arrays import append_axes, strongly_typed
from flaxfit._core.errors import UsageError
from flaxfit._core.tree_specs import form_of, holds_integers
from flaxfit._core.types import Accumulator, Array
from flaxfit.losses.loss import Loss, decision_threshold, full_precision
from flaxfit.metrics.builtin import Update

_RAW = ("logits", "outputs", "values", "value")
_LABELS = ("labels", "targets")
_WEIGHTS = ("sample_weights", "sample_weight", "weights")
_MASKS = ("mask",)
_KNOWN = frozenset((*_RAW, "predictions", *_LABELS, *_WEIGHTS, *_MASKS, "loss"))


def is_foreign(metric: Any) -> bool:
    """Returns whether `metric` has clu's interface."""
    if is_collection(metric):
        return True
    methods = ("from_model_output", "merge", "compute")
    return all(callable(getattr(metric, name, None)) for name in methods)


def is_collection(metric: Any) -> bool:
    """Returns whether `metric` is a collection of metrics, like clu's `Collection`."""
    return callable(getattr(metric, "single_from_model_output", None))


def members(collection: Any) -> dict[str, Any]:
    """Returns the metrics of a collection by name."""
    owner = collection if isinstance(collection, type) else type(collection)
    fields = inspect.get_annotations(owner)
    return {name: metric for name, metric in fields.items() if is_foreign(metric)}


def snake_case(name: str) -> str:
    """Returns `"f_beta_score"` for `"FBetaScore"`, `"rmse"` for `"RMSE"`."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return split.lower()


def adapt_metric(metric: Any, name: str, loss: Loss | None) -> Update:
    """Returns a metric with clu's interface as a function of one batch.

    Its `from_model_output` gets the following arguments, if it has parameters for them:
    - `logits`, `outputs`, `values`: the model's outputs;
    - `predictions`: probabilities for a loss of classes, raw outputs for any other
      loss. An accuracy, which compares them with the labels, gets decisions; a
      metric with a parameter `from_logits` gets the logits of a softmax loss;
    - `labels`, `targets`;
    - `sample_weights`, `weights`: in the targets' shape;
    - `mask`: whether each weight is not 0;
    - `loss`: the loss of every example.

    A metric without parameters for weights or mask never sees a row of weight 0: a
    batch with such rows is merged row by row. It ignores all other weights.

    Args:
      metric: the class, or an instance of it.
      name: its name in the logs.
      loss: the loss of the same output, if it has one.

    Raises:
      UsageError: the metric needs an argument that flaxfit cannot give, or decisions
        although the loss does not determine a threshold.
    """
    parameters = inspect.signature(metric.from_model_output).parameters
    _check_parameters(metric, name, parameters)
    arguments = functools.partial(_arguments, metric, parameters, loss)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def whole(outputs: Array, targets: Array, weights: Array) -> Any:
        given = arguments(outputs, targets, weights)
        return jax.tree.map(strongly_typed, metric.from_model_output(**given))

    weighted = takes_all or any(n in parameters for n in (*_WEIGHTS, *_MASKS))
    update = whole if weighted else _without_rows_of_weight_0(metric, whole)

    def checked(outputs: Array, targets: Array, weights: Array) -> Any:
        batch = jax.eval_shape(whole, outputs, targets, weights)
        _check_merge(batch, name)
        _check_compute(batch, name)
        return update(outputs, targets, weights)

    return checked


def _check_merge(batch: Any, name: str) -> None:
    """Checks that an accumulator keeps its shapes and dtypes when it is merged."""
    problem = UsageError(
        f"The metric {name!r} grows when it is merged, so compiled steps "
        "cannot carry it",
        "Compute the metric from trainer.predict(x) after fit, or keep arrays of fixed "
        "shape in the accumulator",
    )
    try:
        merged = jax.eval_shape(lambda a: a.merge(a), batch)
    except Exception as err:
        raise problem from err
    if form_of(batch) != form_of(merged):
        raise problem


def _check_compute(batch: Any, name: str) -> None:
    """Checks that the value is one number, if `compute` can be traced."""
    try:
        value = jax.eval_shape(lambda a: a.compute(), batch)
    except (jax.errors.JAXTypeError, IndexError):
        return  # It computes on the host, so it cannot be checked in advance.
    except Exception as err:
        raise UsageError(
            f"compute() of the metric {name!r} fails: {err}",
            "Replace the metric, or override compute in a subclass",
        ) from err
    if getattr(value, "shape", None) != ():
        raise UsageError(
            f"compute() of the metric {name!r} returns {value}, not one number",
            "Override compute in a subclass",
            "def compute(self): return super().compute().mean()",
        )


def _check_parameters(metric: Any, name: str, parameters: Mapping[str, Any]) -> None:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    missing = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind not in kinds and p.name not in _KNOWN
    ]
    if missing:
        owner = getattr(metric, "__name__", type(metric).__name__)
        taken = ", ".join(n for n in parameters if n in _KNOWN)
        raise UsageError(
            f"The metric {name!r} needs {', '.join(missing)} in from_model_output",
            f"flaxfit gives {', '.join(sorted(_KNOWN))}; set the rest in a subclass",
            f"class Mine({owner}): from_model_output = classmethod(lambda cls, "
            f"{taken}: {owner}.from_model_output({taken}, {missing[0]}=...))",
        )


def _arguments(
    metric: Any,
    parameters: Mapping[str, Any],
    loss: Loss | None,
    outputs: Array,
    targets: Array,
    weights: Array,
) -> dict[str, Any]:
    outputs = full_precision(outputs)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    # "values" is the first argument of clu.metrics.Average and not for **kwargs.
    open_names = (*_RAW[:2], "predictions", *_LABELS, *_MASKS) if takes_all else ()
    names = {n for n in parameters if n in _KNOWN} | set(open_names)
    given: dict[str, Any] = dict.fromkeys(names & set(_RAW), outputs)
    labels = targets.astype(jnp.int32) if holds_integers(targets) else targets
    given |= dict.fromkeys(names & set(_LABELS), labels)
    given |= dict.fromkeys(names & set(_WEIGHTS), _spread(weights, targets))
    given |= dict.fromkeys(names & set(_MASKS), weights != 0)
    if loss is not None and ("loss" in names or takes_all):
        given["loss"] = loss.values(outputs, targets)
    if "predictions" in names:
        given["predictions"], from_logits = _predictions(
            metric, parameters, loss, outputs, targets
        )
        if from_logits:
            given["from_logits"] = True
    return given


def _spread(weights: Array, targets: Array) -> Array:
    return jnp.broadcast_to(append_axes(weights, targets.ndim), targets.shape)


def _predictions(
    metric: Any,
    parameters: Mapping[str, Any],
    loss: Loss | None,
    outputs: Array,
    targets: Array,
) -> tuple[Array, bool]:
    """Returns the `predictions` for a metric, and whether they are logits."""
    owner = metric if isinstance(metric, type) else type(metric)
    if any("Accuracy" in base.__name__ for base in owner.__mro__):
        return _decisions(owner.__name__, loss, outputs, targets), False
    kind = loss.kind if loss is not None else "custom"
    if kind == "binary" or kind == "margin":
        return jax.nn.sigmoid(outputs), False
    if kind != "integer" and kind != "distribution":
        return outputs, False
    if "from_logits" in parameters:
        return outputs, True
    chances = jax.nn.softmax(outputs)
    of_two_classes = bool({"threshold", "num_thresholds"} & set(parameters))
    if not of_two_classes or outputs.ndim == targets.ndim:
        return chances, False
    if outputs.shape[-1] != 2:
        raise UsageError(
            f"The metric {owner.__name__} is for two classes, not for "
            f"{outputs.shape[-1]}",
            write="metrics=['precision', 'recall', 'f1'], which average over classes",
        )
    return chances[..., 1], False


def _decisions(name: str, loss: Loss | None, outputs: Array, targets: Array) -> Array:
    """Returns decisions, which equal the targets if the model is right."""
    kind = loss.kind if loss is not None else "custom"
    if holds_integers(targets) and outputs.ndim == targets.ndim + 1:
        return jnp.argmax(outputs, axis=-1)
    if kind == "distribution":
        best = jnp.argmax(outputs, axis=-1)
        return jax.nn.one_hot(best, outputs.shape[-1], dtype=targets.dtype)
    if kind == "regression" or kind == "vector":
        return outputs
    low = -1 if kind == "margin" else 0
    decided = outputs > decision_threshold(loss, name)
    return jnp.where(decided, 1, low).astype(targets.dtype)


def _without_rows_of_weight_0(metric: Any, whole: Update) -> Update:
    def update(outputs: Array, targets: Array, weights: Array) -> Accumulator:
        kept = jnp.any(weights.reshape(weights.shape[0], -1) != 0, axis=1)

        def one_by_one() -> Accumulator:
            def single(*row: Array) -> Accumulator:
                return whole(*(x[None] for x in row))

            rows = jax.vmap(single)(outputs, targets, weights)
            return _merge_rows(metric, rows, kept)

        return jax.lax.cond(
            jnp.all(kept), lambda: whole(outputs, targets, weights), one_by_one
        )

    return update


def _merge_rows(metric: Any, rows: Any, kept: Array) -> Any:
    first = jnp.argmax(kept)
    start = jax.tree.map(lambda x: x[first], rows)
    nothing = jax.tree.map(jnp.zeros_like, start)
    if hasattr(metric, "empty"):
        nothing = jax.tree.map(
            lambda e, x: jnp.broadcast_to(jnp.asarray(e, x.dtype), x.shape),
            metric.empty(),
            start,
        )
    start = jax.tree.map(lambda x, e: jnp.where(jnp.any(kept), x, e), start, nothing)

    def merge(merged: Any, row: tuple[Any, Array]) -> tuple[Any, None]:
        values, counts = row
        both = jax.tree.map(strongly_typed, merged.merge(values))
        return jax.tree.map(lambda b, m: jnp.where(counts, b, m), both, merged), None

    others = kept & (jnp.arange(kept.shape[0]) != first)
    return jax.lax.scan(merge, start, (rows, others))[0]
