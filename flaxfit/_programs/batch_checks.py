"""Checks that a batch fits the programs that were built for an earlier batch."""

from collections.abc import Mapping
from typing import TypeAlias

import jax

from flaxfit._core.errors import DataError
from flaxfit._core.tree_specs import LeafSpec, listed, shapes_of, specs_of
from flaxfit._core.types import Batch, PyTree
from flaxfit._programs.resolve import ResolvedTask, Settings, noted, trace_outputs
from flaxfit.losses.objective import Objective, resolve_objective
from flaxfit.metrics.resolve import resolve_metrics

_Specs: TypeAlias = Mapping[str, LeafSpec]


def check_batch(
    resolved: ResolvedTask,
    settings: Settings,
    batch: Batch,
    *,
    inputs_only: bool = False,
) -> None:
    """Checks that a batch fits a task that was resolved from another batch.

    Integer inputs are accepted after float inputs: the model is compiled again for
    them. Targets may be integers or floats as long as the loss stays the same and all
    metrics accept them. The number of rows and the lengths of other axes may differ.

    Raises:
      DataError: the inputs or targets have other names, dtypes or numbers of axes, or
        need other parameters or another loss.
      ValueError: the targets do not fit the outputs.
      Exception: any error that the model raises for inputs of these shapes.
    """
    batch, example = shapes_of(batch), resolved.example
    for name in ("inputs",) if inputs_only else ("inputs", "targets"):
        before, after = specs_of(getattr(example, name)), specs_of(getattr(batch, name))
        if not _alike(name, before, after):
            raise _unlike(name, before, after)
    inputs, init = batch.inputs, resolved.task.model.init
    with noted(inputs):
        outputs = trace_outputs(resolved.adapted, inputs)
        params = jax.eval_shape(init, resolved.template.rng, inputs)[0]
    if specs_of(params) != specs_of(resolved.template.params):
        raise DataError(
            f"Got inputs {listed(specs_of(inputs))}, which need other parameters than "
            f"{listed(specs_of(example.inputs))}, for which this trainer was built",
            "Pass inputs of those shapes, or make a new Trainer",
        )
    if not inputs_only:
        objective = _objective_of(resolved, settings, outputs, batch)
        if objective.name != resolved.task.objective.name:
            raise DataError(
                f"Got targets {listed(specs_of(batch.targets))}, for which the loss "
                f"would be {objective.name}; this trainer was built with "
                f"{resolved.task.objective.name}",
                write="Trainer(model, loss=...) to name the loss",
            )


def _alike(name: str, before: _Specs, after: _Specs) -> bool:
    either_kind = name == "targets"
    return before.keys() == after.keys() and all(
        len(spec.shape) == len(before[path].shape)
        and (either_kind or before[path].is_inexact or not spec.is_inexact)
        for path, spec in after.items()
    )


def _unlike(name: str, before: _Specs, after: _Specs) -> DataError:
    return DataError(
        f"Got {name} {listed(after)}; this trainer was built for {listed(before)}",
        f"{_reshaping(name, before, after)}Pass {name} like those, or make a new "
        "Trainer",
    )


def _objective_of(
    resolved: ResolvedTask, settings: Settings, outputs: PyTree, batch: Batch
) -> Objective:
    """Returns the objective for a batch's targets.

    Targets of another kind (integers instead of floats or the reverse) are refused if
    the loss would change, or if the loss or a metric does not accept them.
    """
    before, after = specs_of(resolved.example.targets), specs_of(batch.targets)
    rows = batch.weights.shape[0]
    same_kinds = all(
        spec.is_inexact == before[path].is_inexact for path, spec in after.items()
    )
    try:
        objective = resolve_objective(
            settings.loss, settings.loss_weights, outputs, batch.targets, rows
        )
        if same_kinds:
            return objective
        resolve_metrics(settings.metrics, objective, outputs, batch.targets, rows)
    except ValueError as error:
        if same_kinds:
            raise
        raise _unlike("targets", before, after) from error
    if objective.name != resolved.task.objective.name:
        raise _unlike("targets", before, after)
    return objective


def _reshaping(name: str, before: _Specs, after: _Specs) -> str:
    """Returns the line to write if targets are missing, or one axis is wrong."""
    if not after:
        return "Pass (x, y). "
    more = {
        len(spec.shape) - len(before[path].shape)
        for path, spec in after.items()
        if path in before
    }
    lines = {("inputs", -1): "For one example write x[None]. "}
    lines |= {("targets", -1): "Write y[:, None]. ", ("targets", 1): "Write y[:, 0]. "}
    return lines.get((name, more.pop()), "") if len(more) == 1 else ""
