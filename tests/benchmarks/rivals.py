"""Hand-written training loops: same loss, metric, Adam and shuffle as `fit` has."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from workloads import LEARNING_RATE, Workload

_DROPOUT_SEED = 1


class Rival(Protocol):
    """Someone who trains."""

    def train(self, epochs: int, *, shuffle: bool = True) -> tuple[float, float]:
        """Trains on; returns the mean loss and metric of the last epoch."""


def loss_and_metric(
    workload: Workload, outputs: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the means over a batch."""
    if workload.metric == "mae":
        loss = optax.squared_error(outputs, targets).mean()
        return loss, jnp.abs(outputs - targets).mean()
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    return losses.mean(), (outputs.argmax(axis=-1) == targets).mean()


def _order(rng: np.random.Generator, workload: Workload, shuffle: bool) -> np.ndarray:
    """Returns the rows of every step of an epoch, `int32[steps, batch]`."""
    rows = len(workload.x)
    order = rng.permutation(rows) if shuffle else np.arange(rows)
    return order.astype("int32").reshape(workload.steps, workload.batch_size)


class GuideState(train_state.TrainState):
    """The state of Flax's guide to BatchNorm."""

    batch_stats: Any


class GuideLoop:
    """(a) The loop of Flax's guide to BatchNorm, with `float(loss)` every step."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._rng = np.random.default_rng(0)
        variables = jax.tree.map(jnp.array, workload.variables)
        self._state = GuideState.create(
            apply_fn=workload.module.apply,
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            tx=optax.adam(LEARNING_RATE),
        )
        self._train_step = jax.jit(partial(_guide_step, workload))

    def train(self, epochs: int, *, shuffle: bool = True) -> tuple[float, float]:
        """Trains on; returns the mean loss and metric of the last epoch."""
        x, y = self._workload.x, self._workload.y
        for _ in range(epochs):
            losses, values = [], []
            for rows in _order(self._rng, self._workload, shuffle):
                self._state, metrics = self._train_step(self._state, x[rows], y[rows])
                losses.append(float(metrics["loss"]))
                values.append(metrics["metric"])
            result = float(np.mean(losses)), float(np.mean(jax.device_get(values)))
        return result


def _guide_step(
    workload: Workload, state: GuideState, x: jax.Array, y: jax.Array
) -> tuple[GuideState, dict[str, jax.Array]]:
    key = jax.random.fold_in(jax.random.key(_DROPOUT_SEED), state.step)

    def loss_of(params: Any) -> Any:
        outputs, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            mutable=["batch_stats"],
            rngs={"dropout": key},
            **workload.flag(True),
        )
        loss, metric = loss_and_metric(workload, outputs, y)
        return loss, (metric, updates.get("batch_stats", {}))

    (loss, (metric, stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(
        state.params
    )
    state = state.apply_gradients(grads=grads, batch_stats=stats)
    return state, {"loss": loss, "metric": metric}


class Carry(NamedTuple):
    """What a step of the tuned loops takes and gives back, all of it donated."""

    params: Any
    collections: Any
    opt_state: Any
    totals: tuple[jax.Array, jax.Array]
    done: jax.Array  # steps of this epoch
    count: jax.Array  # steps of all epochs


Step = Callable[[Carry, jax.Array, jax.Array], Carry]


def make_step(workload: Workload) -> Step:
    """Returns the step of the tuned loops, a pure function of carry, x and y."""
    tx = optax.adam(LEARNING_RATE)

    def step(carry: Carry, x: jax.Array, y: jax.Array) -> Carry:
        key = jax.random.fold_in(jax.random.key(_DROPOUT_SEED), carry.count)

        def loss_of(params: Any) -> Any:
            outputs, collections = workload.module.apply(
                {"params": params, **carry.collections},
                x,
                mutable=nn.DenyList(["params"]),
                rngs={"dropout": key},
                **workload.flag(True),
            )
            loss, metric = loss_and_metric(workload, outputs, y)
            return loss, (metric, collections)

        (loss, (metric, collections)), grads = jax.value_and_grad(
            loss_of, has_aux=True
        )(carry.params)
        updates, opt_state = tx.update(grads, carry.opt_state, carry.params)
        return Carry(
            optax.apply_updates(carry.params, updates),
            collections,
            opt_state,
            (carry.totals[0] + loss, carry.totals[1] + metric),
            carry.done + 1,
            carry.count + 1,
        )

    return step


def init_carry(workload: Workload) -> Carry:
    """Returns the carry before the first step."""
    variables = jax.tree.map(jnp.array, workload.variables)
    params = variables.pop("params")
    opt_state = jax.jit(optax.adam(LEARNING_RATE).init)(params)
    return Carry(params, variables, opt_state, *_fresh(), jnp.zeros((), "int32"))


def _fresh() -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Returns totals and a count of steps for a new epoch, in buffers of their own."""
    return jax.device_put(((np.float32(0), np.float32(0)), np.int32(0)))


class TunedLoop:
    """What the tuned loops share: a carry, and one read at an epoch's end.

    Args:
      workload: what is trained.
      run_epoch: `(carry, order) -> carry`, the loop itself.
    """

    def __init__(
        self, workload: Workload, run_epoch: Callable[[Carry, np.ndarray], Carry]
    ) -> None:
        self._workload = workload
        self._run_epoch = run_epoch
        self._carry = init_carry(workload)
        self._rng = np.random.default_rng(0)

    @property
    def variables(self) -> dict[str, Any]:
        """What `module.apply` takes."""
        return {"params": self._carry.params, **self._carry.collections}

    def train(self, epochs: int, *, shuffle: bool = True) -> tuple[float, float]:
        """Trains on; returns the mean loss and metric of the last epoch."""
        steps = self._workload.steps
        for _ in range(epochs):
            totals, done = _fresh()
            carry = self._carry._replace(totals=totals, done=done)
            order = _order(self._rng, self._workload, shuffle)
            self._carry = self._run_epoch(carry, order)
            loss, metric = jax.device_get(self._carry.totals)
        return float(loss) / steps, float(metric) / steps


def resident_loop(workload: Workload) -> TunedLoop:
    """(b) The best loop: donated, data and order on the device, one read an epoch."""
    step = make_step(workload)
    x, y = jax.device_put((workload.x, workload.y))

    @partial(jax.jit, donate_argnums=0)
    def gathering_step(
        carry: Carry, x: jax.Array, y: jax.Array, order: jax.Array
    ) -> Carry:
        rows = _take(order, carry.done)
        return step(carry, _take(x, rows), _take(y, rows))

    def run_epoch(carry: Carry, order: np.ndarray) -> Carry:
        on_device = jax.device_put(order)
        for _ in range(len(order)):
            carry = gathering_step(carry, x, y, on_device)
        return carry

    return TunedLoop(workload, run_epoch)


def _take(array: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns rows that are known to be there: `array[rows]` makes sure each time."""
    return array.at[rows].get(mode="clip", wrap_negative_indices=False)


def numpy_loop(workload: Workload) -> TunedLoop:
    """(b') A jit loop fed by NumPy: donated, one read an epoch."""
    step = jax.jit(make_step(workload), donate_argnums=0)
    x, y = workload.x, workload.y

    def run_epoch(carry: Carry, order: np.ndarray) -> Carry:
        for rows in order:
            carry = step(carry, x[rows], y[rows])
        return carry

    return TunedLoop(workload, run_epoch)


def scan_loop(workload: Workload) -> TunedLoop:
    """(e) A whole epoch in one program: `lax.scan` over the order of the rows."""
    step = make_step(workload)
    x, y = jax.device_put((workload.x, workload.y))

    @partial(jax.jit, donate_argnums=0)
    def epoch(carry: Carry, x: jax.Array, y: jax.Array, order: jax.Array) -> Carry:
        def body(carry: Carry, rows: jax.Array) -> tuple[Carry, None]:
            return step(carry, _take(x, rows), _take(y, rows)), None

        return jax.lax.scan(body, carry, order)[0]

    def run_epoch(carry: Carry, order: np.ndarray) -> Carry:
        return epoch(carry, x, y, order)

    return TunedLoop(workload, run_epoch)
