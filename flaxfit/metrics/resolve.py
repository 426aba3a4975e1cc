"""Resolves requested metrics to streaming accumulators.

Named metrics are in `builtin`, metrics of clu and metrax in `clu_adapter`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from flaxfit._core.errors import UsageError, UsageTypeError, did_you_mean
from flaxfit._core.keras_hints import check_argument_order, function_name
from flaxfit._core.tree_specs import describe, is_array, shapes_of
from flaxfit._core.types import Accumulator, Array, PyTree
from flaxfit.losses.loss import full_precision
from flaxfit.losses.matching import (
    OutputPath,
    children,
    main_output,
    pick,
    pick_targets,
)
from flaxfit.losses.objective import Objective, path_name
from flaxfit.losses.target_checks import refuse_pairs
from flaxfit.metrics.builtin import (
    Given,
    Update,
    find_metric,
    named_update,
    weighted_mean,
)
from flaxfit.metrics.clu_adapter import (
    adapt_metric,
    is_collection,
    is_foreign,
    members,
    snake_case,
)

MetricFn: TypeAlias = Callable[[PyTree, PyTree, Array], Accumulator]
"""`(outputs, targets, weights) -> Accumulator` of one batch, pure and traceable."""

_RESERVED = ("loss", "learning_rate")


class _Request(NamedTuple):
    """One requested metric; `name` and `path` are None if they were not given."""

    metric: Any
    name: str | None = None
    path: OutputPath | None = None


def resolve_metrics(
    metrics: Any, objective: Objective, outputs: PyTree, targets: PyTree, rows: int
) -> dict[str, MetricFn]:
    """Makes a function of a batch for every requested metric.

    A name or an object with clu's interface applies to every output with a loss, and
    is logged as `"<output>_<metric>"` if there are several. A function gets all
    outputs and targets. All metrics respect weights and the labels a loss ignores.

    Args:
      metrics: None; a name, a function `(outputs, targets) -> float[batch, ...]` or a
        class with clu's interface; a list of these; or a dict of these, whose keys are
        either all names of outputs, or all names to log.
      objective: the losses, which give thresholds and labels to ignore.
      outputs: the shapes and dtypes of the model's outputs, for `rows` examples.
      targets: the shapes and dtypes of the targets.
      rows: the number of examples.

    Returns:
      Log name -> metric, in the order requested.

    Raises:
      ValueError: an unknown name or output, shapes that do not fit, a function that
        returns one number for a batch, a metric that grows when it is merged.
      TypeError: not a metric, or a function that takes `(targets, outputs)`.
    """
    resolved: dict[str, MetricFn] = {}
    taken = (*_RESERVED, *objective.log_names)
    for request in _requests(metrics, outputs):
        for name, fn in _resolve(request, objective, outputs, targets):
            if name in resolved or name in taken or name.startswith("val_"):
                given = f"The name {name!r} is taken in the logs"
                raise UsageError(given, write="metrics={'my_name': ...}")
            _check(name, fn, outputs, targets, rows)
            resolved[name] = fn
    return resolved


def metric_direction(name: str) -> str | None:
    """Returns whether lower (`"min"`) or higher (`"max"`) is better, None if unknown.

    The name of an output or `val_` may come before the metric's name.

    Example:
      >>> metric_direction("val_head_accuracy"), metric_direction("val_loss")
      ('max', 'min')
    """
    parts = name.split("_")
    endings = ["_".join(parts[i:]) for i in range(len(parts))]
    for spec in filter(None, map(find_metric, endings)):
        return spec.direction
    # Custom functions often have such names, e.g. "pixel_error".
    return "min" if parts[-1] in ("loss", "error") else None


def _requests(metrics: Any, outputs: PyTree) -> Iterator[_Request]:
    if metrics is None:
        return
    if isinstance(metrics, list | tuple):
        yield from (one for m in metrics for one in _requests(m, outputs))
    elif isinstance(metrics, Mapping):
        entries = children(outputs)
        known = [key for key in metrics if key in entries]
        strangers = [key for key in metrics if key not in entries]
        if known and strangers:
            near = did_you_mean(str(strangers[0]), [str(e) for e in entries])
            raise UsageError(
                f"metrics has the keys {known}, which are outputs, and {strangers}, "
                f"which are not.{near}",
                f"Use only outputs as keys, {list(entries)}, or only names to log",
            )
        for key, value in metrics.items():
            if known:
                several = value if isinstance(value, list | tuple) else [value]
                yield from (_Request(m, path=(key,)) for m in several if m is not None)
            else:
                yield _Request(value, name=key)
    else:
        yield _Request(metrics)


def _resolve(
    request: _Request, objective: Objective, outputs: PyTree, targets: PyTree
) -> Iterator[tuple[str, MetricFn]]:
    metric = request.metric
    if is_collection(metric):
        for key, member in members(metric).items():
            name = key if request.name is None else f"{request.name}_{key}"
            one = request._replace(metric=member, name=name)
            yield from _resolve(one, objective, outputs, targets)
        return
    _check_kind(metric)
    name = request.name or _default_name(metric)
    if not isinstance(metric, str) and not is_foreign(metric):
        line = "metrics={{'{name}': lambda outputs, targets: {call}}}"
        check_argument_order(metric, "metric", line)
        path = request.path or ()
        prefixed = name if not path else f"{path_name(path)}_{name}"
        yield prefixed, _function_metric(metric, name, path, objective)
        return
    paths = _paths(request, name, objective, outputs, targets)
    for path in paths:
        several = len(paths) > 1 or request.path is not None
        prefixed = f"{path_name(path)}_{name}" if several else name
        chosen = pick(outputs, path), pick_targets(targets, path)
        _check_arrays(prefixed, *chosen)
        if isinstance(metric, str):
            update = named_update(Given(metric, objective.loss_around(path), *chosen))
        else:
            update = adapt_metric(metric, prefixed, objective.loss_at(path))
        yield prefixed, _at(path, objective, update)


def _paths(
    request: _Request, name: str, objective: Objective, outputs: PyTree, targets: PyTree
) -> list[OutputPath]:
    """Returns the paths of the outputs that a metric of one output applies to."""
    if request.path is not None:
        roots = [request.path]
    else:
        roots = [term.path for term in objective.terms] or [()]
    paths = []
    for root in roots:
        below = main_output(pick(outputs, root), pick_targets(targets, root))
        if below is None:
            whole = pick(outputs, root)
            keys = list(children(whole))
            line = f"metrics={{{keys[0]!r}: {name!r}}}, or " if keys else ""
            raise UsageError(
                f"The metric {name!r} takes one output, and the model returns "
                f"{keys or type(whole).__name__}",
                write=f"{line}a function (outputs, targets) -> float[batch]",
            )
        paths.append((*root, *below))
    return paths


def _at(path: OutputPath, objective: Objective, update: Update) -> MetricFn:
    def metric(outputs: PyTree, targets: PyTree, weights: Array) -> Accumulator:
        spread = objective.objective_weights(path, targets, weights)
        return update(pick(outputs, path), pick_targets(targets, path), spread)

    return metric


def _function_metric(
    function: Callable[[PyTree, PyTree], Array],
    name: str,
    path: OutputPath,
    objective: Objective,
) -> MetricFn:
    # A single loss decides which targets count, whichever output it belongs to.
    counted = objective.terms[0].path if objective.single and not path else path

    def metric(outputs: PyTree, targets: PyTree, weights: Array) -> Accumulator:
        chosen = full_precision((pick(outputs, path), pick_targets(targets, path)))
        values = function(*chosen)
        _check_values(name, function, chosen, values, weights.shape[0])
        spread = objective.objective_weights(counted, targets, weights)
        # With one value per sequence, the function itself has to leave out tokens.
        fits = spread.ndim <= values.ndim
        return weighted_mean(values, spread if fits else weights, name)

    return metric


def _check_values(
    name: str, function: Callable[..., Any], given: PyTree, values: Any, rows: int
) -> None:
    returned = f"The metric {name!r} returned {describe(values)}"
    if not is_array(values) or not values.shape:
        raise UsageError(
            returned,
            "Return one value per example, float[batch], so that it can be weighted: "
            "no mean over axis 0",
        )
    if values.shape[0] != rows or jnp.iscomplexobj(values):
        raise UsageError(
            f"{returned} for a batch of {rows}",
            "Return one real value per example, float[batch]",
        )
    refuse_pairs(function, given, values, returned)


def _check_kind(metric: Any) -> None:
    if not (isinstance(metric, str) or is_foreign(metric) or callable(metric)):
        raise UsageTypeError(
            f"A metric is a name, a function (outputs, targets) -> float[batch] or a "
            f"class with clu's interface, not {type(metric).__name__}",
            write="metrics=['accuracy']",
        )


def _default_name(metric: Any) -> str:
    if isinstance(metric, str):
        return metric.lower()
    if is_foreign(metric):
        owner = metric if isinstance(metric, type) else type(metric)
        return snake_case(owner.__name__)
    name = function_name(metric)
    if name == "<lambda>":
        line = "metrics={'my_name': lambda ...}"
        raise UsageError("A lambda has no name to log", write=line)
    return name


def _check_arrays(name: str, outputs: PyTree, targets: PyTree) -> None:
    if targets is None:
        raise UsageError(
            f"The metric {name!r} needs targets, and the data has none",
            "Pass (x, y), or remove the metric",
        )
    if not is_array(targets) or not is_array(outputs):
        raise UsageError(
            f"The metric {name!r} takes one array of outputs and of targets, not "
            f"{describe(outputs)} and {describe(targets)}",
            write="metrics={'output name': ...} or a function of both",
        )


def _check(
    name: str, fn: MetricFn, outputs: PyTree, targets: PyTree, rows: int
) -> None:
    """Traces a metric abstractly, so that errors appear before the first step."""
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
