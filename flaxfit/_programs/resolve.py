"""Resolves settings and one batch into a model, losses, metrics and programs."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxfit._core.errors import DetectionError, UsageError
from flaxfit._core.tree_specs import diff, difference_lines, listed, shapes_of, specs_of
from flaxfit._core.types import Batch, Inputs, PyTree, TrainState
from flaxfit._models.base import Adapted, ModelFamily, Overrides
from flaxfit._models.image_scaling import scale_images, with_scaled_images
from flaxfit._programs.compile import (
    EpochAccumulators,
    Programs,
    Steps,
    compile_programs,
    empty_accumulators,
    preflight,
    traced_once,
)
from flaxfit._programs.placement import Placement
from flaxfit._programs.steps import (
    Task,
    TrainStep,
    make_eval_step,
    make_gradient,
    make_init,
    make_predict_step,
)
from flaxfit.losses.objective import resolve_objective
from flaxfit.metrics.resolve import resolve_metrics
from flaxfit.optimizers.resolve import resolve_optimizer

# The number of training steps assumed if it is unknown. It is large because schedules
# with warm-up and decay raise for small ones.
_UNKNOWN_LENGTH = 1_000_000


@dataclass(frozen=True)
class Settings:
    """The arguments of `Trainer`, with names not yet resolved."""

    loss: Any
    loss_weights: Any
    optimizer: Any
    learning_rate: Any
    metrics: Any
    overrides: Overrides
    optimizer_options: Mapping[str, Any]
    variables: Mapping[str, PyTree]
    seed: int
    make_train_step: Callable[[Task], TrainStep]
    nonfinite: str
    scale_images: bool | str


class LogShapes(NamedTuple):
    """The shapes of the logs of a train step and of an eval step.

    They may differ: a model may sow different values in evaluation.
    """

    train: PyTree
    evaluation: PyTree


class ResolvedTask(NamedTuple):
    """Everything that a trainer resolves from an example batch.

    Attributes:
      adapted: the model and what was detected about it.
      task: the parts that the steps are built from.
      programs: the programs of the steps, compiled at their first calls.
      placement: the devices that the programs run on.
      template: the shapes of the state.
      variables: the user's variables to start from, without sown collections.
      outputs: the shapes of the model's outputs.
      example: the shapes of the example batch, with images scaled if `scaled`.
      logs: the shapes of the logs.
      total_steps: the number of steps the optimizer was resolved for, None if unknown.
      complete: whether the loss was resolved; if not, only prediction is possible.
      scaled: whether image inputs are scaled on the device.
    """

    adapted: Adapted
    task: Task
    programs: Programs
    placement: Placement
    template: TrainState
    variables: Mapping[str, PyTree]
    outputs: PyTree
    example: Batch
    logs: LogShapes
    total_steps: int | None
    complete: bool
    scaled: bool

    def empty(self) -> EpochAccumulators:
        """Returns an empty accumulator for training."""
        return empty_accumulators(self.logs.train, self.placement)

    def empty_eval(self) -> EpochAccumulators:
        """Returns an empty accumulator for evaluation."""
        return empty_accumulators(self.logs.evaluation, self.placement)

    def history_names(self, *, validated: bool) -> list[str]:
        """Returns the names that the History of a fit will have, in order."""
        names = list(self.task.order(self.logs.train))
        if validated:
            names += [f"val_{name}" for name in self.task.order(self.logs.evaluation)]
        if self.task.optimizer.learning_rate(self.template.opt_state) is not None:
            names.append("learning_rate")
        return names


def resolve(
    family: ModelFamily,
    settings: Settings,
    placement: Placement,
    example: Batch,
    total_steps: int | None,
    known: Adapted | None = None,
    complete: bool = True,
) -> ResolvedTask:
    """Detects and resolves everything for batches like `example`.

    Nothing is compiled; the model is only traced. `known` is an earlier detection to
    use again. Unless `complete`, no targets are needed, and the result can only
    predict.

    Raises:
      DetectionError: the train flag or the loss cannot be detected.
      ValueError: a name, a shape or an option is wrong.
    """
    example = shapes_of(example)
    key = jax.eval_shape(lambda: jax.random.key(settings.seed))
    scaled = settings.scale_images is True
    seen = jax.eval_shape(scale_images, example.inputs) if scaled else example.inputs
    with noted(seen):
        adapted = known or family.adapt(seen, settings.overrides)
        if scaled and not known:
            adapted = with_scaled_images(adapted)
        outputs = trace_outputs(adapted, example.inputs)
    task = _make_task(adapted, settings, outputs, example, total_steps)
    steps = _make_steps(task, settings)
    template = jax.eval_shape(steps.init, key, example.inputs, {})
    variables = _starting_variables(settings, adapted, template)
    index = jax.ShapeDtypeStruct((), np.int32)
    if complete:
        traced = preflight(steps.train, template, example)
        logs = LogShapes(
            traced.logs, preflight(steps.evaluate, template, example, index).logs
        )
    else:
        traced = preflight(steps.predict, template, example.inputs, index)
        logs = LogShapes({}, {})
    return ResolvedTask(
        adapted=adapted,
        task=task,
        programs=compile_programs(
            steps, placement, traced, nonfinite=settings.nonfinite
        ),
        placement=placement,
        template=template,
        variables=variables,
        outputs=outputs,
        example=example.replace(inputs=seen),
        logs=logs,
        total_steps=total_steps,
        complete=complete,
        scaled=scaled,
    )


def _make_task(
    adapted: Adapted,
    settings: Settings,
    outputs: PyTree,
    example: Batch,
    total_steps: int | None,
) -> Task:
    rows = example.weights.shape[0]
    objective = resolve_objective(
        settings.loss, settings.loss_weights, outputs, example.targets, rows
    )
    return Task(
        model=adapted.model,
        objective=objective,
        metrics=resolve_metrics(
            settings.metrics, objective, outputs, example.targets, rows
        ),
        optimizer=resolve_optimizer(
            settings.optimizer,
            settings.learning_rate,
            total_steps or _UNKNOWN_LENGTH,
            **settings.optimizer_options,
        ),
        rngs=adapted.detected.rngs,
        eval_rngs=adapted.detected.eval_rngs,
    )


def _make_steps(task: Task, settings: Settings) -> Steps:
    # `preflight` traces the first three steps, and programs trace them again; they
    # share one trace, since tracing a large model takes seconds.
    return Steps(
        init=traced_once(make_init(task)),
        train=traced_once(settings.make_train_step(task)),
        evaluate=traced_once(make_eval_step(task)),
        predict=make_predict_step(task),
        intermediates=make_predict_step(task, sown="intermediates"),
        gradient=make_gradient(task),
    )


def trace_outputs(adapted: Adapted, inputs: Inputs) -> PyTree:
    """Returns the shapes of the model's outputs for `inputs`."""

    def outputs(key: Any, inputs: Inputs) -> PyTree:
        params, collections = adapted.model.init(key, inputs)
        rngs = dict.fromkeys(adapted.detected.rngs, key)
        apply = adapted.model.apply
        return apply(params, collections, inputs, train=True, rngs=rngs)[0]

    return jax.eval_shape(outputs, jax.eval_shape(jax.random.key, 0), inputs)


@contextlib.contextmanager
def noted(inputs: Inputs) -> Iterator[None]:
    """Adds a note with the traced inputs to an error that the model raises."""
    try:
        yield
    except DetectionError:
        raise
    except Exception as error:
        error.add_note(f"while tracing the model on {listed(specs_of(inputs))}")
        raise


def _starting_variables(
    settings: Settings, adapted: Adapted, template: TrainState
) -> dict[str, PyTree]:
    """Returns the user's variables after a check against those of the model."""
    made = {"params": template.params, **template.collections}
    variables = {
        name: tree
        for name, tree in settings.variables.items()
        if name not in adapted.detected.sown  # `module.init` returns sown ones as well
    }
    if variables and not made.keys() & variables.keys():
        raise UsageError(
            f"Trainer(variables=...) has the entries {', '.join(variables)}",
            f"It takes the collections {', '.join(made)}",
            "variables={'params': params}",
        )
    lines = []
    for name, tree in variables.items():
        if name in made:
            line = f"  {name}/{{path}}: the model has {{wanted}}, given {{given}}"
            found = diff(specs_of(made[name]), specs_of(tree))
            lines += difference_lines(found, line)
        else:
            lines.append(f"  {name}: the model has only {', '.join(made)}")
    if lines:
        raise UsageError(
            "Trainer(variables=...) does not fit the model:\n" + "\n".join(lines)
        )
    return variables
