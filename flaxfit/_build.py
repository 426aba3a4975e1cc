"""Settings and one batch -> everything resolved: model, losses, metrics, programs."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxfit._compile import (
    Preflight,
    Programs,
    Running,
    compile_programs,
    empty_running,
    preflight,
)
from flaxfit._errors import DataError, DetectionError
from flaxfit._models.base import Adapted, ModelFamily, Overrides
from flaxfit._objective import check_targets, resolve_objective
from flaxfit._steps import (
    Task,
    TrainStep,
    make_eval_step,
    make_gradient,
    make_init,
    make_predict_step,
)
from flaxfit._types import Batch, Inputs, PyTree, TrainState
from flaxfit.data.checks import check_tokens
from flaxfit.metrics import resolve_metrics
from flaxfit.optimizers import (
    UNKNOWN_TOTAL_STEPS,
    needs_total_steps,
    resolve_optimizer,
)

NO_DATA_YET = (
    "This trainer has seen no data yet, so it has no state: call fit, evaluate or "
    "predict first, or make one with state = trainer.init(batch)."
)


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


class Built(NamedTuple):
    """A trainer's parts, made once from the first batch it sees.

    Attributes:
      adapted: the model and what was detected about it.
      task: what the steps are built from.
      programs: the compiled steps.
      template: the shapes of the state.
      variables: the variables to start from, sown ones left out.
      outputs: the shapes of the model's outputs.
      example: the shapes of the batch all this was made from.
      logs: the shapes of the logs of a step.
      total_steps: what the optimizer was resolved for, None if that is not known.
      complete: whether there is a loss; without targets one can only predict.
    """

    adapted: Adapted
    task: Task
    programs: Programs
    template: TrainState
    variables: Mapping[str, PyTree]
    outputs: PyTree
    example: Batch
    logs: PyTree
    total_steps: int | None
    complete: bool

    def empty(self) -> Running:
        """Returns an empty accumulator."""
        return empty_running(self.logs)

    def history_names(self, *, validated: bool) -> list[str]:
        """Returns the names the History of a fit will have, in its order."""
        names = list(self.task.order(self.logs))
        rate = jax.eval_shape(
            self.task.optimizer.learning_rate, self.template.opt_state
        )
        return [
            *names,
            *(f"val_{name}" for name in names if validated),
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
        weighted = batch.weights is not None and np.any(batch.weights != 1)
        if objective.scalar_loss and weighted:
            raise DataError(
                f"The loss {objective.name} returns one number for a whole batch, so "
                f"its examples cannot be weighted. Return one value per example, "
                f"float[batch], or leave sample_weight and class_weight out."
            )


def build(
    model: Any,
    family: ModelFamily,
    settings: Settings,
    example: Batch,
    total_steps: int | None,
    known: Adapted | None = None,
    complete: bool = True,
) -> Built:
    """Detects, resolves and wires everything for batches like `example`.

    Nothing is compiled: all of it is abstract traces.

    Args:
      model: what the user gave the trainer.
      family: its library's functions.
      settings: what the user said.
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
    with _noted(example.inputs):
        adapted = known or family.adapt(model, example.inputs, settings.overrides)
        outputs = _trace_outputs(adapted, key, example.inputs)
    objective = resolve_objective(
        settings.loss, settings.loss_weights, outputs, example.targets
    )
    task = Task(
        model=adapted.model,
        objective=objective,
        metrics=resolve_metrics(settings.metrics, objective, outputs, example.targets),
        optimizer=resolve_optimizer(
            settings.optimizer,
            settings.learning_rate,
            total_steps or 1,
            **settings.optimizer_options,
        ),
        rngs=adapted.detected.rngs,
    )
    init, train_step = make_init(task), settings.make_train_step(task)
    template = jax.eval_shape(init, key, example.inputs, {})
    variables = {
        name: tree
        for name, tree in settings.variables.items()
        if name not in adapted.detected.sown  # `module.init` returns these as well
    }
    _check_variables(variables, template)
    traced = (
        preflight(train_step, template, example) if complete else Preflight({}, False)
    )
    programs = compile_programs(
        init=init,
        train_step=train_step,
        eval_step=make_eval_step(task),
        predict_step=make_predict_step(task),
        intermediates_step=make_predict_step(task, sown="intermediates"),
        gradient=make_gradient(task),
        calls_host=traced.calls_host,
    )
    return Built(
        adapted=adapted,
        task=task,
        programs=programs,
        template=template,
        variables=variables,
        outputs=outputs,
        example=example,
        logs=traced.logs,
        total_steps=total_steps,
        complete=complete,
    )


def check_batch(
    built: Built, settings: Settings, batch: Batch, *, inputs_only: bool = False
) -> None:
    """Checks that a batch is like the one everything was built from.

    Args:
      built: the trainer's parts.
      settings: what they were built with.
      batch: arrays or shapes; rows and the lengths of axes may differ.
      inputs_only: whether targets do not matter.

    Raises:
      DataError: other inputs or targets, by name, dtype or number of axes.
      ValueError: targets that do not fit the outputs.
      Exception: whatever the model raises for inputs of these shapes.
    """
    batch = shapes_of(batch)
    checked = ["inputs"] if inputs_only else ["inputs", "targets"]
    for name in checked:
        before, after = (
            _forms(getattr(built.example, name)),
            _forms(getattr(batch, name)),
        )
        if {p: f[:2] for p, f in before.items()} != {
            p: f[:2] for p, f in after.items()
        }:
            raise DataError(
                f"Got {name} {_listed(after)}; this trainer was built for "
                f"{_listed(before)}. {_reshaping(name, before, after)}Give it such "
                f"{name}, or make a new Trainer."
            )
    with _noted(batch.inputs):
        outputs = _trace_outputs(built.adapted, built.template.rng, batch.inputs)
        fitting = jax.eval_shape(
            built.task.model.init, built.template.rng, batch.inputs
        )[0]
    if _forms(fitting) != _forms(built.template.params):
        raise DataError(
            f"Got inputs {_listed(_forms(batch.inputs))}, which need other "
            f"parameters than {_listed(_forms(built.example.inputs))} did, for which "
            f"this trainer was built. Give it such inputs, or make a new Trainer."
        )
    if "targets" in checked:
        objective = resolve_objective(
            settings.loss, settings.loss_weights, outputs, batch.targets
        )
        if objective.name != built.task.objective.name:
            raise DataError(
                f"Got targets {_listed(_forms(batch.targets))}, for which the "
                f"loss would be {objective.name}; this trainer was built with "
                f"{built.task.objective.name}. Name it: Trainer(model, loss=...)."
            )


def check_outputs(built: Built, inputs: Inputs) -> None:
    """Checks that outputs can be joined along their first axis, the batch.

    Raises:
      ValueError: an output has another first axis.
    """
    inputs = shapes_of(inputs)
    rows = jax.tree.leaves(inputs)[0].shape[0]
    outputs = _trace_outputs(built.adapted, built.template.rng, inputs)
    for output in jax.tree.leaves(outputs):
        if output.shape[:1] != (rows,):
            raise ValueError(
                f"predict joins outputs along their first axis, the batch, and for "
                f"inputs {_listed(_forms(inputs))} the model returns "
                f"{describe_array(output)}. For one example write x[None]; else let "
                f"the model return [batch, ...] arrays, or call it yourself: "
                f"module.apply(trainer.variables, x)."
            )


@contextlib.contextmanager
def _noted(inputs: Inputs) -> Iterator[None]:
    """Says on what a model was traced when it raises an error of its own."""
    try:
        yield
    except DetectionError:
        raise
    except Exception as error:
        error.add_note(f"while tracing the model on {_listed(_forms(inputs))}")
        raise


class Builder:
    """Owns the parts of one trainer, and makes them when the first data comes."""

    def __init__(self, model: Any, family: ModelFamily, settings: Settings) -> None:
        self._model = model
        self._family = family
        self._settings = settings
        self._built: Built | None = None
        # The forms of batches that were found to fit: looking again takes traces.
        self._fitting: set[Hashable] = set()

    @property
    def seed(self) -> int:
        """The trainer's seed."""
        return self._settings.seed

    @property
    def built(self) -> Built:
        """The parts.

        Raises:
          ValueError: there was no data yet to make them from.
        """
        if self._built is None:
            raise ValueError(NO_DATA_YET)
        return self._built

    @property
    def compiles(self) -> dict[str, int]:
        """The number of traces of each phase."""
        if self._built is None:
            return dict.fromkeys(("train", "eval", "predict"), 0)
        programs = self._built.programs
        return {
            "train": programs.train.traces,
            "eval": programs.evaluate.traces,
            "predict": programs.predict.traces,
        }

    def build(
        self, example: Batch, total_steps: int | None = None, *, afresh: bool = False
    ) -> Built:
        """Returns the parts, made anew only where they have to be.

        Args:
          example: a batch like those to come.
          total_steps: the step at which training will end, None if unknown.
          afresh: whether a batch of another form may replace what was built before,
            as nothing was learnt yet.

        Raises:
          ValueError: see `build` and `check_batch`.
        """
        built = self._built
        known = None
        if built is not None and self._fits(example, afresh, not built.complete):
            known = built.adapted
            scheduled = needs_total_steps(self._settings.learning_rate)
            same = not scheduled or total_steps in (None, built.total_steps)
            if built.complete and same:
                return built
        self._install(
            build(
                self._model,
                self._family,
                self._settings,
                example,
                total_steps,
                known=known,
            )
        )
        return self.built

    def require_total_steps(self, total_steps: int | None) -> None:
        """Checks that the length of the training is known where it has to be.

        Raises:
          ValueError: it is not, and the learning rate is a function of it.
        """
        if total_steps is None and needs_total_steps(self._settings.learning_rate):
            raise ValueError(UNKNOWN_TOTAL_STEPS)

    def build_for_inputs(self, example: Batch, *, afresh: bool = False) -> Built:
        """Returns the parts; without a loss if there never were targets."""
        if self._built is None or not self._fits(example, afresh, True):
            settings = replace(self._settings, loss=None, metrics=None)
            self._install(
                build(
                    self._model, self._family, settings, example, None, complete=False
                )
            )
        return self.built

    def _install(self, built: Built) -> None:
        self._built = built
        self._fitting.clear()

    def _fits(self, batch: Batch, afresh: bool, inputs_only: bool) -> bool:
        """Returns whether a batch fits what was built; raises unless `afresh`."""
        form = (inputs_only, *_form_of(batch))
        if form in self._fitting:
            return True
        try:
            check_batch(self.built, self._settings, batch, inputs_only=inputs_only)
        except Exception:
            if not afresh:
                raise
            return False
        self._fitting.add(form)
        return True

    def fresh_state(self, example: Batch) -> TrainState:
        """Returns a new state at step 0."""
        rng = jax.random.key(self._settings.seed)
        state: TrainState = self.built.programs.init(
            rng, example.inputs, self.built.variables
        )
        return state

    def check_values(self, batch: Batch) -> None:
        """Checks values on the host; see `Built.check_values`."""
        self.built.check_values(batch)


def _form_of(batch: Batch) -> tuple[Hashable, ...]:
    leaves, structure = jax.tree.flatten((batch.inputs, batch.targets))
    return structure, tuple((x.shape, x.dtype) for x in leaves)


class _Form(NamedTuple):
    kind: str
    ndim: int
    text: str


def _forms(tree: PyTree) -> dict[str, _Form]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path): _Form(
            "number" if jnp.issubdtype(x.dtype, jnp.inexact) else "integer",
            len(x.shape),
            describe_array(x),
        )
        for path, x in leaves
    }


def _reshaping(
    name: str, before: Mapping[str, _Form], after: Mapping[str, _Form]
) -> str:
    """Returns the line to write where one axis too many or too few may be all."""
    if not after:
        return "Pass (x, y). "
    more = {f.ndim - before[path].ndim for path, f in after.items() if path in before}
    lines = {("inputs", -1): "For one example write x[None]. "}
    lines |= {("targets", -1): "Write y[:, None]. ", ("targets", 1): "Write y[:, 0]. "}
    return lines.get((name, more.pop()), "") if len(more) == 1 else ""


def _listed(forms: Mapping[str, _Form]) -> str:
    return ", ".join(f"{path} {f.text}".strip() for path, f in forms.items()) or "none"


def _trace_outputs(adapted: Adapted, key: Any, inputs: Inputs) -> PyTree:
    def outputs(key: Any, inputs: Inputs) -> PyTree:
        params, collections = adapted.model.init(key, inputs)
        rngs = dict.fromkeys(adapted.detected.rngs, key)
        return adapted.model.apply(params, collections, inputs, train=True, rngs=rngs)[
            0
        ]

    return jax.eval_shape(outputs, key, inputs)


def _check_variables(variables: Mapping[str, PyTree], template: TrainState) -> None:
    made = {"params": template.params, **template.collections}
    if variables and not made.keys() & variables.keys():
        raise ValueError(
            f"Trainer(variables=...) has the entries {', '.join(variables)}; it takes "
            f"the collections {', '.join(made)}. Write variables={{'params': params}}."
        )
    lines = []
    for name, tree in variables.items():
        if name not in made:
            lines.append(f"  {name}: the model has {', '.join(made)}")
            continue
        given, wanted = _forms(jax.tree.map(_shape_of, tree)), _forms(made[name])
        for path in sorted(given.keys() | wanted.keys()):
            one, other = given.get(path), wanted.get(path)
            if one is None or other is None or one.text != other.text:
                has = "absent" if other is None else other.text
                got = "absent" if one is None else one.text
                lines.append(f"  {name}{path}: the model has {has}, given {got}")
    if lines:
        raise ValueError(
            "Trainer(variables=...) does not fit the model:\n" + "\n".join(lines[:20])
        )


def describe_array(x: Any) -> str:
    """Returns e.g. `"float32[32, 784]"`."""
    return f"{x.dtype}{list(x.shape)}"


def shapes_of(tree: PyTree) -> PyTree:
    """Returns the shapes and dtypes jax would give the arrays of `tree`."""
    return jax.tree.map(_shape_of, tree)


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    if not hasattr(x, "dtype"):
        x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
