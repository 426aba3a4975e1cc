"""Pure builders of the init, train, eval and predict steps. Nothing here is jitted."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from flaxfit._models.base import stream_rngs
from flaxfit._objective import Objective
from flaxfit._types import (
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
from flaxfit.metrics import MetricFn
from flaxfit.optimizers import Optimizer

InitStep: TypeAlias = Callable[[Array, Inputs, Mapping[str, PyTree]], TrainState]
TrainStep: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Logs]]
EvalStep: TypeAlias = Callable[[TrainState, Batch, Array], Logs]
PredictStep: TypeAlias = Callable[[TrainState, Inputs, Array], PyTree]

_EVALUATION_STREAM = "evaluation"
_OVERWRITE = "_overwrite_with_gradient"  # flax.linen.fp8_ops: state set by its gradient


class Task(NamedTuple):
    """Everything the steps are built from, resolved.

    Attributes:
      model: the pure functions of the model.
      objective: the losses over its outputs.
      metrics: log name -> metric, in the order given.
      optimizer: the optax transformation and how to read it.
      rngs: the names of the RNG streams to supply.
    """

    model: Model
    objective: Objective
    metrics: Mapping[str, MetricFn]
    optimizer: Optimizer
    rngs: tuple[str, ...]

    def order(self, logs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `logs` in the order of History; jit hands them out sorted."""
        first = ("loss", *self.objective.log_names, *self.metrics)
        names = dict.fromkeys([n for n in first if n in logs] + sorted(logs))
        return {name: logs[name] for name in names}


def make_init(task: Task) -> InitStep:
    """Returns `(rng, inputs, variables) -> TrainState` at step 0.

    Parameters equal those of `module.init(rng, *inputs)`, but for the collections
    that `variables`, `{"params": ..., "batch_stats": ...}`, brings.
    """

    def init(rng: Array, inputs: Inputs, variables: Mapping[str, PyTree]) -> TrainState:
        params, collections = task.model.init(rng, inputs)
        made = _strong({"params": params, **collections, **variables})
        params = made.pop("params")
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            collections=made,
            opt_state=_strong(task.optimizer.tx.init(params)),
            rng=rng,
        )

    return init


def make_train_step(task: Task) -> TrainStep:
    """Returns `(state, batch) -> (state, logs)`: one update of all that training moves.

    The logs are what this batch adds, as accumulators: `logs["loss"].compute()`.
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
            terms = _loss_terms(task, outputs, batch, sown)
            return _batch_value(terms), (outputs, collections, sown, terms)

        variables = (state.params, overwrite)
        (value, aux), (grads, replaced) = jax.value_and_grad(loss_fn, has_aux=True)(
            variables
        )
        outputs, collections, sown, terms = aux

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
        return new_state, _logs(task, outputs, batch, sown, terms)

    return train_step


def make_eval_step(task: Task) -> EvalStep:
    """Returns `(state, batch, index) -> logs`; it reads the state and changes nothing.

    `index`, `int32[]`, is the batch's number: what the model draws at random in
    evaluation depends on it alone.
    """

    def eval_step(state: TrainState, batch: Batch, index: Array) -> Logs:
        outputs, sown = _forward(task, state, batch.inputs, index)
        terms = _loss_terms(task, outputs, batch, sown)
        return _logs(task, outputs, batch, sown, terms)

    return eval_step


def make_predict_step(task: Task, sown: str | None = None) -> PredictStep:
    """Returns `(state, inputs, index) -> outputs`.

    With `sown`, the name of a collection, it returns that collection instead.
    """

    def predict_step(state: TrainState, inputs: Inputs, index: Array) -> PyTree:
        outputs, written = _forward(task, state, inputs, index)
        return outputs if sown is None else written.get(sown, {})

    return predict_step


def make_gradient(
    task: Task,
) -> Callable[[TrainState, Batch], tuple[Array, PyTree]]:
    """Returns `(state, batch) -> (loss, gradients)`, as a train step would see them."""

    def gradient(state: TrainState, batch: Batch) -> tuple[Array, PyTree]:
        rngs = stream_rngs(state.rng, task.rngs, state.step)

        def loss_fn(params: PyTree) -> Array:
            outputs, _, sown = task.model.apply(
                params, state.collections, batch.inputs, train=True, rngs=rngs
            )
            return _batch_value(_loss_terms(task, outputs, batch, sown))

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
        rngs=stream_rngs(rng, task.rngs, index),
    )
    del unused  # evaluation never writes
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


def _loss_terms(
    task: Task, outputs: PyTree, batch: Batch, sown: dict[str, PyTree]
) -> dict[str, tuple[float, Average]]:
    """Returns name -> (scale, mean) of every addend of the loss."""
    averages = task.objective.term_averages(outputs, batch.targets, batch.weights)
    scales = task.objective.scales
    terms = {name: (scales[name], mean) for name, mean in averages.items()}
    for path, value in _sown_leaves(sown, "losses"):
        terms[f"sown/{path}"] = (1.0, _sown_average(value, batch, jnp.sum))
    if not terms:
        raise ValueError(
            "There is no loss to train on: loss=None and the model sows none. Give "
            'Trainer(model, loss="...") or self.sow("losses", "name", value).'
        )
    return terms


def _batch_value(terms: Mapping[str, tuple[float, Average]]) -> Array:
    # A batch whose weights are all 0 has loss 0 and gradient 0, not NaN.
    value = jnp.zeros((), jnp.float32)
    for scale, mean in terms.values():
        value += scale * mean.total / jnp.where(mean.count == 0, 1.0, mean.count)
    return value


def _logs(
    task: Task,
    outputs: PyTree,
    batch: Batch,
    sown: dict[str, PyTree],
    terms: Mapping[str, tuple[float, Average]],
) -> Logs:
    scaled = {
        name: mean.replace(total=scale * mean.total)
        for name, (scale, mean) in terms.items()
    }
    logs: Logs = {
        "loss": next(iter(scaled.values())) if len(scaled) == 1 else Sum(scaled)
    }
    if not task.objective.single:
        logs |= {f"{n}_loss": m for n, (_, m) in terms.items() if "/" not in n}
    for name, metric in task.metrics.items():
        logs[name] = metric(outputs, batch.targets, batch.weights)
    return logs | _sown_metrics(sown, batch, logs)


def _sown_leaves(sown: dict[str, PyTree], collection: str) -> list[tuple[str, Array]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(sown.get(collection, {}))
    named = []
    for path, leaf in leaves:
        keys = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
        named.append(("/".join(keys), jnp.asarray(leaf)))
    return named


def _sown_metrics(
    sown: dict[str, PyTree], batch: Batch, taken: Mapping[str, Any]
) -> dict[str, Average]:
    by_path: dict[str, Average] = {}
    for path, value in _sown_leaves(sown, "metrics"):
        mean = _sown_average(value, batch, jnp.mean)
        by_path[path] = by_path[path].merge(mean) if path in by_path else mean
    short = [path.rsplit("/", 1)[-1] for path in by_path]
    logs = {}
    for path, name in zip(by_path, short, strict=True):
        # Two layers may sow under one name; then the whole path tells them apart.
        unique = short.count(name) == 1 and name not in taken
        logs[name if unique else path] = by_path[path]
    return logs


def _sown_average(
    value: Array, batch: Batch, reduce: Callable[[Array], Array]
) -> Average:
    """Averages one value per example, or counts any other for all its rows."""
    weights = jnp.asarray(batch.weights)
    rows = weights.reshape(weights.shape[0], -1).mean(axis=1)
    if value.ndim >= 1 and value.shape[0] == rows.shape[0]:
        return Average.of(value, rows)
    count = jnp.sum(rows)
    total = reduce(value).astype(jnp.float32) * count
    return Average(total, count, jnp.zeros(2, jnp.float32))


def _strong(tree: PyTree) -> PyTree:
    # A weakly typed leaf comes back strongly typed, and would compile twice.
    def strong(x: Any) -> Any:
        x = jnp.asarray(x)
        return x if jnp.issubdtype(x.dtype, jax.dtypes.extended) else x.astype(x.dtype)

    return jax.tree.map(strong, tree)


def _like(new: PyTree, old: PyTree) -> PyTree:
    # What is carried keeps its dtype, whatever precision a step computes in.
    def cast(n: Any, o: Any) -> Any:
        return n if jnp.issubdtype(o.dtype, jax.dtypes.extended) else n.astype(o.dtype)

    return jax.tree.map(lambda n, o: cast(jnp.asarray(n), o), new, old)
