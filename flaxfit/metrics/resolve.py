"""Resolves requested metrics to streaming accumulators.

Named metrics are in `_named_metrics`, clu's and metrax's in `_foreign_metrics`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from flaxfit._core.errors import did_you_mean
from flaxfit._core.tree_specs import describe, shapes_of
from flaxfit._core.types import Accumulator, Array, PyTree
from flaxfit.losses.catalog import check_argument_order, function_name
from flaxfit.losses.loss import full_precision
from flaxfit.losses.matching import Path, children, main_output, pick, pick_targets
from flaxfit.losses.objective import Objective, path_name
from flaxfit.losses.target_checks import is_array, pairs_rows
from flaxfit.metrics.builtin import Update, named_update, weighted_mean
from flaxfit.metrics.clu_adapter import (
    adapt_metric,
    is_collection,
    is_foreign,
    members,
    snake_case,
)

MetricFn: TypeAlias = Callable[[PyTree, PyTree, Array], Accumulator]
"""`(outputs, targets, weights) -> Accumulator` of one batch, pure and traceable."""

_MIN = ("loss", "error", "perplexity", "mae", "mse", "rmse")
_MAX = ("accuracy", "acc", "precision", "recall", "f1", "f1_score", "auc")
_TAKEN = ("loss", "learning_rate")


class _Asked(NamedTuple):
    """One metric that was asked for; `name` and `path` where they were given."""

    metric: Any
    name: str | None = None
    path: Path | None = None


def resolve_metrics(
    metrics: Any, objective: Objective, outputs: PyTree, targets: PyTree, rows: int
) -> dict[str, MetricFn]:
    """Makes a function of a batch of every metric asked for.

    A name or an object of clu's interface applies to every output with a loss, and is
    logged as `"<output>_<metric>"` if there are several. A function gets the whole
    outputs and targets. Weights, and labels a loss ignores, count in all of them.

    Args:
      metrics: None; or a name, a function `(outputs, targets) -> float[batch, ...]`, a
        class with clu's interface; or a list of these; or a dict of these, whose keys
        are the outputs' names or else the names to log.
      objective: the losses: thresholds, labels to ignore.
      outputs: the shapes and dtypes of what the model returns.
      targets: the shapes and dtypes of the targets.
      rows: the number of examples in the batch they are of.

    Returns:
      By the name to log, in the order asked for.

    Raises:
      ValueError: an unknown name, an output that is not there, shapes that do not fit,
        a function that returns one number for a batch, a metric that grows.
      TypeError: what is no metric at all, a function that takes `(targets, outputs)`.
    """
    resolved: dict[str, MetricFn] = {}
    taken = (*_TAKEN, *objective.log_names)
    for asked in _asked(metrics, outputs):
        for name, fn in _resolve(asked, objective, outputs, targets):
            if name in resolved or name in taken or name.startswith("val_"):
                raise ValueError(
                    f"The name {name!r} is taken in the logs; name the metric: "
                    "metrics={'my_name': ...}."
                )
            _check(name, fn, outputs, targets, rows)
            resolved[name] = fn
    return resolved


def metric_direction(name: str) -> str | None:
    """Returns whether less or more is better: `"min"`, `"max"`, None if unknown.

    Example:
      >>> metric_direction("val_head_accuracy"), metric_direction("val_loss")
      ('max', 'min')
    """
    for direction, endings in (("min", _MIN), ("max", _MAX)):
        if any(name == e or name.endswith(f"_{e}") for e in endings):
            return direction
    return None


def _asked(metrics: Any, outputs: PyTree) -> Iterator[_Asked]:
    if metrics is None:
        return
    if isinstance(metrics, list | tuple):
        yield from (one for m in metrics for one in _asked(m, outputs))
    elif isinstance(metrics, Mapping):
        entries = children(outputs)
        known = [key for key in metrics if key in entries]
        strangers = [key for key in metrics if key not in entries]
        if known and strangers:
            near = did_you_mean(str(strangers[0]), [str(e) for e in entries])
            raise ValueError(
                f"metrics has the outputs {known} and also {strangers}, which are "
                f"none.{near} The outputs are {list(entries)}; put metrics under them "
                "or give a dict of log names only."
            )
        for key, value in metrics.items():
            if known:
                several = value if isinstance(value, list | tuple) else [value]
                yield from (_Asked(m, path=(key,)) for m in several if m is not None)
            else:
                yield _Asked(value, name=key)
    else:
        yield _Asked(metrics)


def _resolve(
    asked: _Asked, objective: Objective, outputs: PyTree, targets: PyTree
) -> Iterator[tuple[str, MetricFn]]:
    metric = asked.metric
    if is_foreign(metric) and is_collection(metric):
        for key, member in members(metric).items():
            name = key if asked.name is None else f"{asked.name}_{key}"
            one = asked._replace(metric=member, name=name)
            yield from _resolve(one, objective, outputs, targets)
        return
    _check_kind(metric)
    name = asked.name or _default_name(metric)
    if not isinstance(metric, str) and not is_foreign(metric):
        line = "metrics={{'{name}': lambda outputs, targets: {call}}}"
        check_argument_order(metric, "metric", line)
        path = asked.path or ()
        prefixed = name if not path else f"{path_name(path)}_{name}"
        yield prefixed, _function_metric(metric, name, path, objective)
        return
    paths = _paths(asked, name, objective, outputs, targets)
    for path in paths:
        several = len(paths) > 1 or asked.path is not None
        prefixed = f"{path_name(path)}_{name}" if several else name
        chosen = pick(outputs, path), pick_targets(targets, path)
        _check_arrays(prefixed, *chosen)
        if isinstance(metric, str):
            update = named_update(metric, objective.loss_around(path), *chosen)
        else:
            update = adapt_metric(metric, prefixed, objective.loss_at(path))
        yield prefixed, _at(path, objective, update)


def _paths(
    asked: _Asked, name: str, objective: Objective, outputs: PyTree, targets: PyTree
) -> list[Path]:
    """Returns where the outputs are that a metric of one output applies to."""
    if asked.path is not None:
        roots = [asked.path]
    else:
        roots = [term.path for term in objective.terms] or [()]
    paths = []
    for root in roots:
        below = main_output(pick(outputs, root), pick_targets(targets, root))
        if below is None:
            whole = pick(outputs, root)
            keys = list(children(whole))
            line = f"metrics={{{keys[0]!r}: {name!r}}}, or " if keys else ""
            raise ValueError(
                f"The metric {name!r} takes one output, and the model returns "
                f"{keys or type(whole).__name__}; write {line}a function "
                "(outputs, targets) -> float[batch]."
            )
        paths.append((*root, *below))
    return paths


def _at(path: Path, objective: Objective, update: Update) -> MetricFn:
    def metric(outputs: PyTree, targets: PyTree, weights: Array) -> Accumulator:
        spread = objective.objective_weights(path, targets, weights)
        return update(pick(outputs, path), pick_targets(targets, path), spread)

    return metric


def _function_metric(
    function: Callable[[PyTree, PyTree], Array],
    name: str,
    path: Path,
    objective: Objective,
) -> MetricFn:
    # One loss says which targets do not count, wherever its output is.
    counted = objective.terms[0].path if objective.single and not path else path

    def metric(outputs: PyTree, targets: PyTree, weights: Array) -> Accumulator:
        chosen = pick(outputs, path), pick_targets(targets, path)
        values = function(*full_precision(chosen))
        if not is_array(values) or not values.shape:
            raise ValueError(
                f"The metric {name!r} returned {_text(values)}; return one value per "
                "example, float[batch], so that it can be weighted: no mean over axis "
                "0."
            )
        rows = weights.shape[0]
        if values.shape[0] != rows or jnp.iscomplexobj(values):
            raise ValueError(
                f"The metric {name!r} returned {_text(values)} for a batch of {rows}; "
                "return one real value per example, float[batch]."
            )
        if pairs_rows(function, full_precision(chosen), values):
            raise ValueError(
                f"The metric {name!r} returned {_text(values)}: it compares every "
                "output with every target of the batch. Give both one shape, e.g. "
                "targets[:, None] or outputs[:, 0]."
            )
        spread = objective.objective_weights(counted, targets, weights)
        # A value per sequence cannot leave single tokens out; the function may.
        fits = spread.ndim <= values.ndim
        what = f"the metric {name!r}"
        return weighted_mean(values, spread if fits else weights, what)

    return metric


def _check_kind(metric: Any) -> None:
    if not (isinstance(metric, str) or is_foreign(metric) or callable(metric)):
        raise TypeError(
            f"A metric is a name, a function (outputs, targets) -> float[batch] or a "
            f"class with clu's interface, not {type(metric).__name__}; write "
            "metrics=['accuracy']."
        )


def _default_name(metric: Any) -> str:
    if isinstance(metric, str):
        return metric.lower()
    if is_foreign(metric):
        owner = metric if isinstance(metric, type) else type(metric)
        return snake_case(owner.__name__)
    name = function_name(metric)
    if name == "<lambda>":
        raise ValueError(
            "A lambda has no name to log; write metrics={'my_name': lambda ...}."
        )
    return name


def _check_arrays(name: str, outputs: PyTree, targets: PyTree) -> None:
    if targets is None:
        raise ValueError(
            f"The metric {name!r} needs targets, and the data has none; pass (x, y), "
            "or drop it from metrics."
        )
    if not is_array(targets) or not is_array(outputs):
        raise ValueError(
            f"The metric {name!r} takes one array of outputs and of targets, not "
            f"{describe(outputs)} and {describe(targets)}; write metrics={{'output "
            "name': ...} or a function of both."
        )


def _check(
    name: str, fn: MetricFn, outputs: PyTree, targets: PyTree, rows: int
) -> None:
    """Traces a metric abstractly, so that what is wrong is wrong before step 1."""

    shapes = shapes_of((outputs, targets))
    weights = jax.ShapeDtypeStruct((rows,), jnp.float32)
    try:
        jax.eval_shape(fn, *shapes, weights)
    except Exception as err:
        err.add_note(
            f"while tracing the metric {name!r} with outputs {describe(outputs)} and "
            f"targets {describe(targets)}"
        )
        raise


def _text(values: Any) -> str:
    return describe(values) if is_array(values) else type(values).__name__
