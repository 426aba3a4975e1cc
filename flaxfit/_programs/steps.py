"""Makes the pure init, train, eval and predict steps. Nothing is jitted here."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from flaxfit._core.arrays import strongly_typed
from flaxfit._core.errors import UsageError
from flaxfit._core.tree_specs import add_row
from flaxfit._core.types import (
    Array,
    Average,
    Batch,
    Inputs,
    Logs,
    Model,
    PyTree,
    Sum,
    TrainState,
)
from flaxfit._models.base import stream_rngs
from flaxfit._programs.sow import mean_of_losses, means_of_metrics, read_sown
from flaxfit.losses.objective import Objective
from flaxfit.metrics.resolve import MetricFn
from flaxfit.optimizers.resolve import Optimizer

InitStep: TypeAlias = Callable[[Array, Inputs, Mapping[str, PyTree]], TrainState]
TrainStep: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Logs]]
EvalStep: TypeAlias = Callable[[TrainState, Batch, Array], Logs]
PredictStep: TypeAlias = Callable[[TrainState, Inputs, Array], PyTree]

_SOWN = "/sown"  # no output has such a name
_EVALUATION_STREAM = "evaluation"
_OVERWRITE = "_overwrite_with_gradient"  # flax.linen.fp8_ops: state set by its gradient


class Task(NamedTuple):
    """The model, losses, metrics and optimizer that the steps are built from.

    Attributes:
      model: the pure functions of the model.
      objective: the losses of the model's outputs.
      metrics: log name -> metric, in the order given.
      optimizer: the optax transformation, and functions that read its state.
      rngs: the names of the RNG streams to supply in training.
      eval_rngs: the names of those to supply in evaluation and prediction.
    """

    model: Model
    objective: Objective
    metrics: Mapping[str, MetricFn]
    optimizer: Optimizer
    rngs: tuple[str, ...]
    eval_rngs: tuple[str, ...]

    def order(self, logs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `logs` in the order of History; jit returns them sorted by name."""
        first = ("loss", *self.objective.log_names, *self.metrics)
        names = dict.fromkeys([n for n in first if n in logs] + sorted(logs))
        return {name: logs[name] for name in names}


def make_init(task: Task) -> InitStep:
    """Returns `(rng, inputs, variables) -> TrainState` at step 0.

    Parameters equal those of `module.init(rng, *inputs)` up to the last bit, which XLA
    may round differently in another program; the same trainer always gets the same
    parameters. `variables`, e.g. `{"params": ...}`, replace whole collections.
    """

    def init(rng: Array, inputs: Inputs, variables: Mapping[str, PyTree]) -> TrainState:
        params, collections = task.model.init(rng, inputs)
        made = jax.tree.map(
            strongly_typed, {"params": params, **collections, **variables}
        )
        params = made.pop("params")
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            collections=made,
            opt_state=jax.tree.map(strongly_typed, task.optimizer.tx.init(params)),
            rng=rng,
        )

    return init


def make_train_step(task: Task) -> TrainStep:
    """Returns `(state, batch) -> (state, logs)`: one update of the training state.

    The logs are accumulators of this batch alone: `logs["loss"].compute()`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Logs]:
        rngs = stream_rngs(state.rng, task.rngs, state.step)
        overwrite = state.collections.get(_OVERWRITE, {})

        def loss_fn(variables: tuple[PyTree, PyTree]) -> tuple[Array, Any]:
            params, replaced = variables
            collections = _with_overwrite(state.collections, replaced)
            outputs, collections, sown = task.model.apply(
                params, collections, batch.inputs, train=True, rngs=rngs
            )
            value, logs = _measure(task, state, batch, outputs, sown, train=True)
            return value, (collections, logs)

        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (value, aux), (grads, replaced) = gradient((state.params, overwrite))
        collections, logs = aux

        def value_fn(params: PyTree) -> Array:
            return loss_fn((params, overwrite))[0]

        params, opt_state = _update(task.optimizer, state, value, grads, value_fn)
        collections = _with_overwrite(collections, replaced)
        new_state = state.replace(
            step=state.step + 1,
            params=_like(params, state.params),
            collections=_like(collections, state.collections),
            opt_state=_like(opt_state, state.opt_state),
        )
        return new_state, logs

    return train_step


def make_eval_step(task: Task) -> EvalStep:
    """Returns `(state, batch, index) -> logs`; the state is only read.

    `index`, `int32[]`, is the number of the batch: random numbers in evaluation depend
    only on it and on `state.rng`.
    """

    def eval_step(state: TrainState, batch: Batch, index: Array) -> Logs:
        outputs, sown = _forward(task, state, batch.inputs, index)
        return _measure(task, state, batch, outputs, sown, train=False)[1]

    return eval_step


def make_predict_step(task: Task, sown: str | None = None) -> PredictStep:
    """Returns `(state, inputs, index) -> outputs`.

    With `sown`, the name of a collection, the step returns that collection instead.
    """

    def predict_step(state: TrainState, inputs: Inputs, index: Array) -> PyTree:
        outputs, written = _forward(task, state, inputs, index)
        return outputs if sown is None else written.get(sown, {})

    return predict_step


def make_gradient(task: Task) -> Callable[[TrainState, Batch], tuple[Array, PyTree]]:
    """Returns `(state, batch) -> (loss, gradients)`, as in the next train step."""

    def gradient(state: TrainState, batch: Batch) -> tuple[Array, PyTree]:
        rngs = stream_rngs(state.rng, task.rngs, state.step)

        def loss_fn(params: PyTree) -> Array:
            outputs, _, sown = task.model.apply(
                params, state.collections, batch.inputs, train=True, rngs=rngs
            )
            return _measure(task, state, batch, outputs, sown, train=True)[0]

        return jax.value_and_grad(loss_fn)(state.params)

    return gradient


def _with_overwrite(collections: dict[str, PyTree], value: PyTree) -> dict[str, PyTree]:
    return {**collections, _OVERWRITE: value} if value else dict(collections)


def _forward(
    task: Task, state: TrainState, inputs: Inputs, index: Array
) -> tuple[PyTree, dict[str, PyTree]]:
    rng = stream_rngs(state.rng, (_EVALUATION_STREAM,))[_EVALUATION_STREAM]
    params = task.optimizer.evaluation_params(state.opt_state, state.params)
    outputs, unused, sown = task.model.apply(
        params,
        state.collections,
        inputs,
        train=False,
        rngs=stream_rngs(rng, task.eval_rngs, index),
    )
    del unused  # evaluation never updates collections
    return outputs, sown


def _update(
    optimizer: Optimizer,
    state: TrainState,
    value: Array,
    grads: PyTree,
    value_fn: Callable[[PyTree], Array],
) -> tuple[PyTree, PyTree]:
    def steepest(grads: PyTree) -> PyTree:
        # jax.grad of a real loss is the conjugate of the direction of ascent.
        return jax.tree.map(jnp.conj, grads)

    grads = steepest(grads)
    updates, opt_state = optimizer.tx.update(
        grads,
        state.opt_state,
        state.params,
        value=value,
        grad=grads,
        value_fn=value_fn,
        grad_fn=lambda params, unused: steepest(jax.grad(value_fn)(params)),
    )
    return optax.apply_updates(state.params, updates), opt_state


def _measure(
    task: Task,
    state: TrainState,
    batch: Batch,
    outputs: PyTree,
    sown: dict[str, PyTree],
    *,
    train: bool,
) -> tuple[Array, Logs]:
    """Returns the loss and the logs of a batch."""
    grown = partial(_sown_of_one_row_more, task, state, batch, train=train)
    weights = jnp.asarray(batch.weights)
    losses = task.objective.term_averages(outputs, batch.targets, batch.weights)
    scales = task.objective.scales
    scaled = {n: m.replace(total=scales[n] * m.total) for n, m in losses.items()}
    sown_mean = mean_of_losses(read_sown(sown, "losses", len(weights), grown), weights)
    if sown_mean is not None:
        scaled[_SOWN] = sown_mean
    if not scaled and train:
        raise UsageError(
            "There is no loss to train on: loss=None, and the model sows no losses",
            write='Trainer(model, loss="...") or self.sow("losses", "name", value)',
        )
    logs: Logs = {}
    if scaled:
        one = next(iter(scaled.values()))
        logs["loss"] = one if len(scaled) == 1 else Sum(scaled)
    if not task.objective.single:
        logs |= {f"{name}_loss": mean for name, mean in losses.items()}
    for name, metric in task.metrics.items():
        logs[name] = metric(outputs, batch.targets, batch.weights)
    metrics = read_sown(sown, "metrics", len(weights), grown)
    return _batch_value(scaled), logs | means_of_metrics(metrics, weights, logs)


def _batch_value(terms: Mapping[str, Average]) -> Array:
    # A batch whose weights are all 0 has loss 0 and gradient 0, not NaN.
    means = [t.total / jnp.where(t.count == 0, 1.0, t.count) for t in terms.values()]
    return sum(means, start=jnp.zeros((), jnp.float32))


def _sown_of_one_row_more(
    task: Task, state: TrainState, batch: Batch, *, train: bool
) -> dict[str, PyTree]:
    def sown(inputs: Inputs) -> dict[str, PyTree]:
        streams = task.rngs if train else task.eval_rngs
        rngs = stream_rngs(jax.random.key(0), streams)
        return task.model.apply(
            state.params, state.collections, inputs, train=train, rngs=rngs
        )[2]

    rows = jnp.shape(batch.weights)[0]
    return jax.eval_shape(sown, add_row(batch.inputs, rows))


def _like(new: PyTree, old: PyTree) -> PyTree:
    # The state keeps its dtypes, whatever precision a step computes in. With other
    # dtypes, the next step would be compiled again.
    return jax.tree.map(lambda n, o: strongly_typed(n, o.dtype), new, old)
