"""The steps as pure functions, against NumPy and a loop by hand; no trainer, no jit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.asserts import same
from helpers.data import labeled
from helpers.models import Net

from flaxfit import Average, Batch, Model, Task, make_train_step
from flaxfit._models.base import stream_rngs
from flaxfit._programs.steps import (
    make_eval_step,
    make_gradient,
    make_init,
    make_predict_step,
)
from flaxfit.losses.loss import Loss
from flaxfit.losses.objective import Objective, Term
from flaxfit.optimizers.resolve import Optimizer

X, Y = labeled(6)
WEIGHTS = np.array([1, 2, 0, 1, 0.5, 0], np.float32)
BATCH = Batch((X,), Y, WEIGHTS)
ONES = BATCH.replace(weights=np.ones(6, np.float32))
KEY = jax.random.key(3)


def linen(module):
    """The two pure functions of a module whose only collections are state or sown."""

    def init(rng, inputs):
        variables = dict(module.init(rng, *inputs, train=False))
        return variables.pop("params"), variables

    def apply(params, collections, inputs, *, train, rngs):
        outputs, written = module.apply(
            {"params": params, **collections},
            *inputs,
            train=train,
            rngs=rngs,
            mutable=True,
        )
        carried = {n: v for n, v in written.items() if n in collections}
        sown = {n: v for n, v in written.items() if n in ("losses", "metrics")}
        return outputs, {**collections, **carried}, sown

    return Model(init, apply)


def matrix(rng, inputs):
    return {"w": 0.1 * jax.random.normal(rng, (inputs[0].shape[1], 3))}, {}


def product(params, collections, inputs, *, train, rngs):
    return inputs[0] @ params["w"], collections, {}


def task_of(model, loss="softmax_cross_entropy_with_integer_labels", **changes):
    optimizer = Optimizer(
        "sgd",
        optax.with_extra_args_support(optax.sgd(0.1)),
        lambda opt_state: None,
        lambda opt_state, params: params,
    )
    given = {
        "model": model,
        "objective": Objective((Term((), Loss(loss), 1.0),)),
        "metrics": {},
        "optimizer": optimizer,
        "rngs": (),
        "eval_rngs": (),
    }
    return Task(**{**given, **changes})


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def values(logs):
    return {name: float(log.compute()) for name, log in logs.items()}


# ---------------------------------------------------------------------- against NumPy


def test_init_is_at_step_0_and_keeps_what_is_given():
    task = task_of(linen(Net()))
    mean = np.full(4, 7.0, np.float32)
    stats = {"BatchNorm_0": {"mean": mean, "var": np.ones(4, np.float32)}}
    state = make_init(task)(KEY, (X,), {"batch_stats": stats})
    assert int(state.step) == 0 and state.rng is KEY
    same(state.params, Net().init(KEY, X, train=False)["params"])
    np.testing.assert_array_equal(
        state.collections["batch_stats"]["BatchNorm_0"]["mean"], mean
    )
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state.params))


def test_a_train_step_is_the_gradient_by_hand():
    task = task_of(Model(matrix, product))
    state = make_init(task)(KEY, (X,), {})
    new, logs = make_train_step(task)(state, BATCH)

    w = np.asarray(state.params["w"])
    chances = softmax(X @ w)
    losses = -np.log(chances[np.arange(6), Y])
    share = WEIGHTS / WEIGHTS.sum()
    gradient = X.T @ (share[:, None] * (chances - np.eye(3)[Y]))
    np.testing.assert_allclose(new.params["w"], w - 0.1 * gradient, rtol=1e-5)
    assert values(logs) == pytest.approx({"loss": share @ losses}, rel=1e-5)
    assert int(new.step) == 1 and new.rng is state.rng
    # The state that was given is as it was.
    np.testing.assert_array_equal(state.params["w"], w)

    loss, grads = make_gradient(task)(state, BATCH)
    assert float(loss) == pytest.approx(share @ losses, rel=1e-5)
    np.testing.assert_allclose(grads["w"], gradient, rtol=1e-4, atol=1e-7)


def test_weights_times_ten_and_rows_of_weight_0_change_nothing():
    task = task_of(Model(matrix, product))
    state = make_init(task)(KEY, (X,), {})
    step = make_train_step(task)
    new, logs = step(state, BATCH)
    kept = WEIGHTS > 0
    for batch in (
        BATCH.replace(weights=10 * WEIGHTS),
        Batch((X[kept],), Y[kept], WEIGHTS[kept]),
    ):
        other, other_logs = step(state, batch)
        np.testing.assert_allclose(other.params["w"], new.params["w"], rtol=1e-5)
        assert values(other_logs) == pytest.approx(values(logs), rel=1e-5)


def test_a_batch_without_weight_moves_nothing():
    task = task_of(Model(matrix, product))
    state = make_init(task)(KEY, (X,), {})
    empty = BATCH.replace(weights=np.zeros(6, np.float32))
    new, logs = make_train_step(task)(state, empty)
    same(new.params, state.params)
    assert float(logs["loss"].count) == 0 and np.isnan(logs["loss"].compute())


def test_several_losses_are_summed_by_their_scales():
    def two(params, collections, inputs, *, train, rngs):
        logits = inputs[0] @ params["w"]
        return {"a": logits, "b": logits[:, 0]}, collections, {}

    terms = (
        Term(("a",), Loss("softmax_cross_entropy_with_integer_labels"), 1.0),
        Term(("b",), Loss("squared_error"), 0.5),
    )
    task = task_of(Model(matrix, two), objective=Objective(terms))
    state = make_init(task)(KEY, (X,), {})
    targets = {"a": Y, "b": X[:, 0]}
    _, logs = make_train_step(task)(state, ONES.replace(targets=targets))

    logits = X @ np.asarray(state.params["w"])
    a = -np.log(softmax(logits)[np.arange(6), Y]).mean()
    b = ((logits[:, 0] - X[:, 0]) ** 2).mean()
    expected = {"loss": a + 0.5 * b, "a_loss": a, "b_loss": b}
    assert values(logs) == pytest.approx(expected, rel=1e-5)
    assert list(task.order(logs)) == ["loss", "a_loss", "b_loss"]


def test_metrics_take_outputs_targets_and_weights():
    def largest(outputs, targets, weights):
        return Average.of(outputs.max(axis=1), weights)

    task = task_of(Model(matrix, product), metrics={"largest": largest})
    state = make_init(task)(KEY, (X,), {})
    logits = (X @ np.asarray(state.params["w"])).max(axis=1)
    expected = WEIGHTS @ logits / WEIGHTS.sum()
    for logs in (
        make_train_step(task)(state, BATCH)[1],
        make_eval_step(task)(state, BATCH, jnp.int32(0)),
    ):
        assert values(logs)["largest"] == pytest.approx(expected, rel=1e-5)


def test_what_is_carried_keeps_its_dtype():
    def grow(rng, inputs):
        return matrix(rng, inputs)[0], {"seen": {"rows": jnp.zeros((), jnp.int16)}}

    def count(params, collections, inputs, *, train, rngs):
        rows = collections["seen"]["rows"] + jnp.float32(len(inputs[0]))
        return inputs[0] @ params["w"], {"seen": {"rows": rows}}, {}

    task = task_of(Model(grow, count))
    state = make_init(task)(KEY, (X,), {})
    new, _ = make_train_step(task)(state, BATCH)
    rows = new.collections["seen"]["rows"]
    assert rows.dtype == jnp.int16 and int(rows) == 6


# ------------------------------------------------------- against a loop by hand in Flax


def test_steps_are_a_hand_written_flax_loop():
    """BatchNorm, Dropout and Adam, to the last bit."""
    module, tx = Net(), optax.adam(1e-2)
    optimizer = task_of(None).optimizer._replace(tx=optax.with_extra_args_support(tx))
    task = task_of(linen(module), optimizer=optimizer, rngs=("dropout",))
    state, step = make_init(task)(KEY, (X,), {}), make_train_step(task)

    variables = module.init(KEY, X, train=False)
    params, stats = variables["params"], variables["batch_stats"]
    opt_state = tx.init(params)
    for number in range(3):
        state, logs = step(state, ONES)

        def loss_fn(params, stats=stats, number=number):
            logits, written = module.apply(
                {"params": params, "batch_stats": stats},
                X,
                train=True,
                rngs=stream_rngs(KEY, ["dropout"], number),
                mutable=["batch_stats"],
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, Y)
            return loss.sum() / 6, written["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        assert float(logs["loss"].compute()) == float(loss)
    same(state.params, params)
    same(state.collections["batch_stats"], stats)
    same(state.opt_state, opt_state)


def test_evaluation_and_prediction_write_nothing():
    class Noisy(nn.Module):
        """Writes statistics in every mode, and draws in every mode."""

        @nn.compact
        def __call__(self, x, train):
            calls = self.variable("state", "calls", jnp.zeros, ())
            calls.value += 1
            noise = jax.random.normal(self.make_rng("noise"), x.shape)
            return nn.Dense(3)(x + noise) + calls.value

    def init(rng, inputs):
        variables = dict(Noisy().init({"params": rng, "noise": rng}, X, train=False))
        return variables.pop("params"), variables

    task = task_of(Model(init, linen(Noisy()).apply), eval_rngs=("noise",))
    state = make_init(task)(KEY, (X,), {})
    predict = make_predict_step(task)
    first, again, other = (predict(state, (X,), jnp.int32(i)) for i in (0, 0, 1))
    same(first, again)
    assert not np.allclose(first, other)
    logs = make_eval_step(task)(state, BATCH, jnp.int32(0))
    losses = -np.log(softmax(np.asarray(first))[np.arange(6), Y])
    expected = WEIGHTS @ losses / WEIGHTS.sum()
    assert values(logs) == pytest.approx({"loss": expected}, rel=1e-5)
    assert float(state.collections["state"]["calls"]) == 1  # that of init


def test_an_optimizer_chooses_the_parameters_to_evaluate_with():
    optimizer = task_of(None).optimizer._replace(
        evaluation_params=lambda opt_state, params: jax.tree.map(jnp.zeros_like, params)
    )
    task = task_of(Model(matrix, product), optimizer=optimizer)
    state = make_init(task)(KEY, (X,), {})
    outputs = make_predict_step(task)(state, (X,), jnp.int32(0))
    np.testing.assert_array_equal(outputs, np.zeros((6, 3)))
    assert np.any(X @ np.asarray(state.params["w"]))


# ------------------------------------------------------------------- sown values


class Sowing(nn.Module):
    """Sows a loss per example, one for the batch, and a metric."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3)(x)
        self.sow("losses", "each", 0.5 * jnp.abs(x[:, 0]))
        self.sow("losses", "once", jnp.float32(2.0))
        self.sow("metrics", "largest", x.max(axis=1))
        return x


def sowing(**changes):
    module = Sowing()

    def init(rng, inputs):
        return module.init(rng, X, train=False)["params"], {}

    return task_of(Model(init, linen(module).apply), **changes)


def test_sown_losses_are_added_and_sown_metrics_logged():
    task = sowing()
    state = make_init(task)(KEY, (X,), {})
    _, logs = make_train_step(task)(state, BATCH)
    dense = state.params["Dense_0"]
    logits = X @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    share = WEIGHTS / WEIGHTS.sum()
    loss = -np.log(softmax(logits)[np.arange(6), Y]) + 0.5 * np.abs(logits[:, 0]) + 2
    expected = {"loss": share @ loss, "largest": share @ logits.max(axis=1)}
    assert values(logs) == pytest.approx(expected, rel=1e-5)


def test_a_model_may_sow_its_only_loss():
    task = sowing(objective=Objective(()))
    state = make_init(task)(KEY, (X,), {})
    new, logs = make_train_step(task)(state, BATCH)
    assert values(logs)["loss"] > 2
    assert not np.array_equal(
        new.params["Dense_0"]["kernel"], state.params["Dense_0"]["kernel"]
    )


def test_training_without_any_loss_is_an_error():
    task = task_of(Model(matrix, product), objective=Objective(()))
    state = make_init(task)(KEY, (X,), {})
    with pytest.raises(ValueError, match="no loss to train on"):
        make_train_step(task)(state, BATCH)
    assert make_eval_step(task)(state, BATCH, jnp.int32(0)) == {}
