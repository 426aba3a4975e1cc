"""Resolves settings and one batch to a model, losses, metrics and programs."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxfit._core.errors import DataError, DetectionError
from flaxfit._core.tree_specs import differences, forms_of, listed, shapes_of
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
from flaxfit.data.host.checks import check_tokens
from flaxfit.losses.objective import check_targets, resolve_objective
from flaxfit.metrics.resolve import resolve_metrics
from flaxfit.optimizers.resolve import resolve_optimizer

# Stands for a length that is not known, where nothing is trained: schedules of
# warm-up and decay take none that is short.
_UNKNOWN_LENGTH = 1_000_000


@dataclass(frozen=True)
class Settings:
    """What the user told the trainer, names not yet resolved; see `Trainer`."""

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


class ResolvedTask(NamedTuple):
    """A trainer's parts, made once from the first batch it sees.

    Attributes:
      adapted: the model and what was detected about it.
      task: what the steps are built from.
      programs: the compiled steps.
      placement: the devices they run on.
      template: the shapes of the state.
      variables: the variables to start from, sown ones left out.
      outputs: the shapes of the model's outputs.
      example: the shapes of the batch all this was made from.
      logs: the shapes of the logs of a training step.
      eval_logs: those of an evaluation step; a model may sow other values there.
      total_steps: what the optimizer was resolved for, None if that is not known.
      complete: whether there is a loss; without targets one can only predict.
      scaled: whether pictures among the inputs are scaled on the device.
    """

    adapted: Adapted
    task: Task
    programs: Programs
    placement: Placement
    template: TrainState
    variables: Mapping[str, PyTree]
    outputs: PyTree
    example: Batch
    logs: PyTree
    eval_logs: PyTree
    total_steps: int | None
    complete: bool
    scaled: bool

    def empty(self) -> EpochAccumulators:
        """Returns an empty accumulator for training."""
        return empty_accumulators(self.logs, self.placement)

    def empty_eval(self) -> EpochAccumulators:
        """Returns an empty accumulator for evaluation."""
        return empty_accumulators(self.eval_logs, self.placement)

    def history_names(self, *, validated: bool) -> list[str]:
        """Returns the names the History of a fit will have, in its order."""
        names = list(self.task.order(self.logs))
        evaluated = list(self.task.order(self.eval_logs)) if validated else []
        rate = self.task.optimizer.learning_rate(self.template.opt_state)
        return [
            *names,
            *(f"val_{name}" for name in evaluated),
            *(["learning_rate"] if rate is not None else []),
        ]

    def check_values(self, batch: Batch) -> None:
        """Checks the values of inputs and targets on the host.

        Raises:
          DataError: tokens or labels out of range, NaN in targets, or weights where
            the loss takes none.
        """
        check_tokens(batch, self.adapted.detected.vocabularies)
        objective = self.task.objective
        if batch.targets is not None:
            check_targets(objective, self.outputs, batch.targets, batch.weights)
        if not objective.scalar_loss or batch.weights is None:
            return
        if np.any(batch.weights != 1):
            raise DataError(
                f"The loss {objective.name} returns one number for a whole batch, so "
                f"its examples cannot be weighted. Return one value per example, "
                f"float[batch], or leave sample_weight and class_weight out."
            )


def resolve(
    model: Any,
    family: ModelFamily,
    settings: Settings,
    placement: Placement,
    example: Batch,
    total_steps: int | None,
    known: Adapted | None = None,
    complete: bool = True,
) -> ResolvedTask:
    """Detects, resolves and wires everything for batches like `example`.

    Nothing is compiled: all of it is abstract traces.

    Args:
      model: what the user gave the trainer.
      family: its library's functions.
      settings: what the user said.
      placement: the devices to run on.
      example: one batch, arrays or shapes.
      total_steps: the length of the training if it is known.
      known: what was detected before, to be kept.
      complete: False to do without targets and so without training.

    Raises:
      DetectionError: the train flag or the loss cannot be found out.
      ValueError: names, shapes or options that do not fit.
    """
    example = shapes_of(example)
    key = jax.eval_shape(lambda: jax.random.key(settings.seed))
    scaled = settings.scale_images is True
    seen = jax.eval_shape(scale_images, example.inputs) if scaled else example.inputs
    with noted(seen):
        adapted = known or family.adapt(model, seen, settings.overrides)
        if scaled and not known:
            adapted = with_scaled_images(adapted)
        outputs = trace_outputs(adapted, key, example.inputs)
    rows = example.weights.shape[0]
    objective = resolve_objective(
        settings.loss, settings.loss_weights, outputs, example.targets, rows
    )
    task = Task(
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
    init = traced_once(make_init(task))
    template = jax.eval_shape(init, key, example.inputs, {})
    variables = {
        name: tree
        for name, tree in settings.variables.items()
        if name not in adapted.detected.sown  # `module.init` returns these as well
    }
    _check_variables(variables, template)
    steps = Steps(
        init=init,
        train=traced_once(settings.make_train_step(task)),
        evaluate=traced_once(make_eval_step(task)),
        predict=make_predict_step(task),
        intermediates=make_predict_step(task, sown="intermediates"),
        gradient=make_gradient(task),
    )
    index = jax.ShapeDtypeStruct((), np.int32)
    if complete:
        traced = preflight(steps.train, template, example)
        evaluated = preflight(steps.evaluate, template, example, index)
    else:
        predicted = preflight(steps.predict, template, example.inputs, index)
        traced = evaluated = predicted._replace(logs={})
    programs = compile_programs(
        steps,
        placement,
        calls_host=traced.calls_host,
        convolves=traced.convolves,
        nonfinite=settings.nonfinite,
    )
    return ResolvedTask(
        adapted=adapted,
        task=task,
        programs=programs,
        placement=placement,
        template=template,
        variables=variables,
        outputs=outputs,
        example=example.replace(inputs=seen),
        logs=traced.logs,
        eval_logs=evaluated.logs,
        total_steps=total_steps,
        complete=complete,
        scaled=scaled,
    )


def trace_outputs(adapted: Adapted, key: Any, inputs: Inputs) -> PyTree:
    """Returns the shapes of the model's outputs for `inputs`."""

    def outputs(key: Any, inputs: Inputs) -> PyTree:
        params, collections = adapted.model.init(key, inputs)
        rngs = dict.fromkeys(adapted.detected.rngs, key)
        apply = adapted.model.apply
        return apply(params, collections, inputs, train=True, rngs=rngs)[0]

    return jax.eval_shape(outputs, key, inputs)


@contextlib.contextmanager
def noted(inputs: Inputs) -> Iterator[None]:
    """Says on what a model was traced when it raises an error of its own."""
    try:
        yield
    except DetectionError:
        raise
    except Exception as error:
        error.add_note(f"while tracing the model on {listed(forms_of(inputs))}")
        raise


def _check_variables(variables: Mapping[str, PyTree], template: TrainState) -> None:
    made = {"params": template.params, **template.collections}
    if variables and not made.keys() & variables.keys():
        raise ValueError(
            f"Trainer(variables=...) has the entries {', '.join(variables)}; it takes "
            f"the collections {', '.join(made)}. Write variables={{'params': params}}."
        )
    lines = []
    for name, tree in variables.items():
        if name in made:
            lines += differences(
                made[name], tree, where=name, wanted_is="the model has"
            )
        else:
            lines.append(f"  {name}: the model has {', '.join(made)}")
    if lines:
        raise ValueError(
            "Trainer(variables=...) does not fit the model:\n" + "\n".join(lines)
        )
