"""Whole runs against hand-written Flax loops, and what must hold for every run."""

import copy
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from helpers.data import labeled

import flaxfit
from flaxfit import LambdaCallback, Trainer

RNG = np.random.default_rng(1)
X, LABELS = labeled(64)
VALUES = RNG.normal(size=(64, 1)).astype(np.float32)


class GuideMLP(nn.Module):
    """The model of Flax's BatchNorm guide."""

    outputs: int
    normalize: bool = True

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(4)(x)
        if self.normalize:
            x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(self.outputs)(nn.relu(x))


class GuideState(train_state.TrainState):
    batch_stats: Any


def hand_written(model, variables, tx, x, y, *, epochs, batch_size):
    """The guide's loop; returns its variables and the loss of every epoch."""
    state = GuideState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        tx=tx,
    )

    @jax.jit
    def train_step(state, x, y):
        def loss_fn(params):
            outputs, updates = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                x,
                train=True,
                mutable=["batch_stats"],
            )
            if y.dtype == jnp.int32:
                losses = optax.softmax_cross_entropy_with_integer_labels(outputs, y)
            else:
                losses = optax.squared_error(outputs, y)
            return losses.mean(), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        state = state.apply_gradients(grads=grads)
        return state.replace(batch_stats=updates.get("batch_stats", {})), loss

    means = []
    for _ in range(epochs):
        losses = []
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            state, loss = train_step(state, x[rows], y[rows])
            losses.append(float(loss))
        means.append(np.mean(losses))
    return {"params": state.params, "batch_stats": state.batch_stats}, means


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("targets", [VALUES, LABELS], ids=["regression", "classes"])
def test_fit_equals_the_hand_written_loop_of_the_guide(normalize, targets):
    model = GuideMLP(3 if targets is LABELS else 1, normalize)
    variables = model.init(jax.random.key(7), X[:16], train=False)
    tx = optax.sgd(0.05, momentum=0.9)
    expected, losses = hand_written(
        model, variables, tx, X, targets, epochs=3, batch_size=16
    )
    trainer = Trainer(model, optimizer=tx, variables=variables)
    history = trainer.fit(
        X, targets, batch_size=16, epochs=3, shuffle=False, verbose=0
    ).history
    np.testing.assert_allclose(history["loss"], losses, rtol=0, atol=1e-6)
    for name, tree in trainer.variables.items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
            tree,
            expected[name],
        )


def test_adam_equals_the_hand_written_loop_where_no_gradient_is_noise():
    model = GuideMLP(3, normalize=False)
    variables = model.init(jax.random.key(7), X[:16], train=False)
    expected, losses = hand_written(
        model, variables, optax.adam(1e-3), X, LABELS, epochs=3, batch_size=16
    )
    trainer = Trainer(model, variables=variables)
    history = trainer.fit(X, LABELS, batch_size=16, epochs=3, shuffle=False, verbose=0)
    np.testing.assert_allclose(history.history["loss"], losses, rtol=0, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
        trainer.variables["params"],
        expected["params"],
    )


@pytest.fixture(scope="module")
def fitted():
    """A trainer after a fit with ragged tails, validation and metrics."""
    trainer = Trainer(GuideMLP(3), metrics=["accuracy", "top_2_accuracy"])
    history = trainer.fit(
        X[:50],
        LABELS[:50],
        batch_size=16,
        epochs=2,
        validation_data=(X[50:], LABELS[50:]),
        verbose=0,
    )
    return trainer, history


def test_one_compile_per_phase_and_none_for_a_second_fit(fitted):
    trainer, _ = fitted
    trainer.evaluate(X[:33], LABELS[:33])
    trainer.predict(X[:21])
    # Rows are rounded up to 52, so that data of nearly the same size compiles nothing.
    trainer.fit(X[:64], LABELS[:64], batch_size=16, validation_split=0.2, verbose=0)
    assert trainer.compiles == {"train": 1, "eval": 1, "predict": 1}


def test_compiles_counts_what_jax_compiled(fitted, compiled):
    """The counter against jax's own events."""
    trainer, _ = fitted
    trainer.evaluate(X, LABELS)
    compiled.clear()
    trainer.fit(X[:49], LABELS[:49], batch_size=16, verbose=0)
    trainer.evaluate(X[:37], LABELS[:37])
    assert compiled == []
    trainer.evaluate(X[:37], LABELS[:37], batch_size=9)
    assert len(compiled) >= 1  # the listener does hear compiles


@pytest.mark.parametrize("batch_size", [1, 7, 63, 64, 65])
def test_evaluate_does_not_depend_on_batch_size_and_changes_nothing(batch_size):
    model = GuideMLP(3)
    trainer = Trainer(model, metrics=["accuracy"], seed=1)
    trainer.fit(X, LABELS, batch_size=16, verbose=0)
    before = jax.device_get(trainer.variables)
    values = trainer.evaluate(X, LABELS, batch_size=batch_size)
    outputs = model.apply(trainer.variables, X, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, LABELS)
    np.testing.assert_allclose(values["loss"], losses.mean(), rtol=2e-6)
    assert values["accuracy"] == np.mean(np.argmax(outputs, -1) == LABELS)
    jax.tree.map(np.testing.assert_array_equal, trainer.variables, before)


def test_predict_keeps_order_and_nesting_and_streams(fitted):
    trainer, _ = fitted
    expected = GuideMLP(3).apply(trainer.variables, X[:37], train=False)
    np.testing.assert_allclose(trainer.predict(X[:37]), expected, atol=1e-6)
    batches = [(X[i : i + 16], LABELS[i : i + 16]) for i in (0, 16, 32)]
    batches[2] = (X[32:37], LABELS[32:37])
    np.testing.assert_allclose(trainer.predict(batches), expected, atol=1e-6)
    first = trainer.predict(iter(batches), steps=1)
    np.testing.assert_allclose(first, expected[:16], atol=1e-6)
    np.testing.assert_allclose(trainer.predict_on_batch(X[:3]), expected[:3], atol=1e-6)


def test_predict_holds_one_batch_of_outputs_on_the_device(fitted):
    trainer, _ = fitted
    state = trainer._store.peek()
    own = {id(leaf) for leaf in jax.tree.leaves(state)}
    alive = []

    def batches():
        for _ in range(6):
            live = [a for a in jax.live_arrays() if a.shape == (16, 3)]
            alive.append(len([a for a in live if id(a) not in own]))
            yield X[:16]

    before = len([a for a in jax.live_arrays() if a.shape == (16, 3)])
    assert trainer.predict(batches).shape == (96, 3)
    assert max(alive) - before <= 1


def test_history_is_keras_dict_in_order(fitted):
    trainer, history = fitted
    assert list(history.history) == [
        "loss",
        "accuracy",
        "top_2_accuracy",
        "val_loss",
        "val_accuracy",
        "val_top_2_accuracy",
        "learning_rate",
    ]
    values = [v for column in history.history.values() for v in column]
    assert all(type(value) is float for value in values)
    assert (history.epoch, history.val_epoch) == ([0, 1], [0, 1])
    assert history.trainer is trainer
    assert history.params == {"epochs": 2, "steps": 4, "verbose": 0}


def test_validation_entries_know_their_epoch():
    trainer = Trainer(nn.Dense(3))
    history = trainer.fit(
        X, LABELS, epochs=5, validation_split=0.25, validation_freq=2, verbose=0
    )
    assert (history.epoch, history.val_epoch) == ([0, 1, 2, 3, 4], [1, 3])
    assert len(history.history["val_loss"]) == 2
    history = trainer.fit(
        X, LABELS, epochs=3, validation_split=0.25, validation_freq=[1, 3], verbose=0
    )
    assert history.val_epoch == [0, 2]


def test_epochs_is_where_training_ends():
    trainer = Trainer(nn.Dense(3))
    history = trainer.fit(X, LABELS, epochs=5, initial_epoch=3, verbose=0)
    assert (history.epoch, trainer.step) == ([3, 4], 4)
    assert trainer.fit(X, LABELS, epochs=2, initial_epoch=2, verbose=0).history == {}


def test_loss_is_a_mean_over_examples_whatever_the_batch_and_weights():
    weights = np.linspace(0.1, 2, 64).astype(np.float32)
    trainer = Trainer(nn.Dense(1), metrics=["mae"])
    trainer.fit(X, VALUES, verbose=0)
    outputs = nn.Dense(1).apply(trainer.variables, X)
    expected = np.average((outputs - VALUES)[:, 0] ** 2, weights=weights)
    for factor in (1, 10):
        values = trainer.evaluate(
            X, VALUES, batch_size=24, sample_weight=factor * weights
        )
        np.testing.assert_allclose(values["loss"], expected, rtol=1e-5)
    error = np.average(np.abs(outputs - VALUES)[:, 0], weights=weights)
    np.testing.assert_allclose(values["mae"], error, rtol=1e-5)


def test_class_weight_equals_sample_weight():
    class_weight = {0: 2.0, 2: 0.5}
    per_example = np.choose(LABELS, [2.0, 1.0, 0.5]).astype(np.float32)
    results = []
    for weighted in ({"class_weight": class_weight}, {"sample_weight": per_example}):
        trainer = Trainer(nn.Dense(3))
        trainer.fit(X, LABELS, epochs=2, verbose=0, **weighted)
        results.append(trainer.variables)
    jax.tree.map(np.testing.assert_array_equal, *results)


class Recorder(nn.Module):
    """Keeps the first feature of the last batch it was trained on."""

    @nn.compact
    def __call__(self, x, train: bool):
        seen = self.variable("record", "seen", jnp.zeros, x.shape[:1])
        if train:
            seen.value = x[:, 0]
        return nn.Dense(1)(x)


def test_shuffle_differs_by_epoch_and_fit_and_follows_the_seed():
    def orders(seed, **options):
        trainer = Trainer(Recorder(), seed=seed)
        seen = []

        def note(loop):
            seen.append(tuple(loop.state.collections["record"]["seen"].tolist()))

        for _ in range(2):
            trainer.fit(
                X,
                VALUES,
                batch_size=64,
                epochs=2,
                verbose=0,
                callbacks=LambdaCallback(on_epoch_end=note),
                **options,
            )
        return seen

    first = orders(seed=0)
    assert len(set(first)) == 4  # two epochs of two fits
    assert all(sorted(order) == sorted(X[:, 0].tolist()) for order in first)
    assert orders(seed=0) == first
    assert not set(orders(seed=1)) & set(first)
    assert set(orders(seed=0, shuffle=False)) == {tuple(X[:, 0].tolist())}


def test_steps_per_epoch_goes_on_through_the_data_and_starts_anew():
    counted = []

    def batches():
        for start in range(0, 64, 16):
            counted.append(start)
            yield X[start : start + 16], LABELS[start : start + 16]

    trainer = Trainer(nn.Dense(3))
    history = trainer.fit(batches, epochs=4, steps_per_epoch=3, verbose=0)
    assert trainer.step == 12
    assert counted == [0, 16, 32, 48] * 3
    assert history.epoch == [0, 1, 2, 3]


def test_a_generator_function_gives_the_same_batches_every_epoch():
    def batches():
        for start in range(0, 64, 8):
            yield X[start : start + 8], LABELS[start : start + 8]

    by_function, by_arrays = Trainer(nn.Dense(3)), Trainer(nn.Dense(3))
    first = by_function.fit(batches, epochs=3, validation_data=batches, verbose=0)
    second = by_arrays.fit(
        X,
        LABELS,
        batch_size=8,
        epochs=3,
        shuffle=False,
        validation_data=(X, LABELS),
        verbose=0,
    )
    assert first.history == second.history
    jax.tree.map(
        np.testing.assert_array_equal, by_function.variables, by_arrays.variables
    )


def test_a_batch_whose_weights_are_all_0_changes_no_parameter():
    trainer = Trainer(nn.Dense(3), optimizer="sgd", learning_rate=1.0)
    trainer.fit(X, LABELS, verbose=0)
    before = jax.device_get(trainer.variables)
    weights = np.zeros(64, np.float32)
    weights[0] = 1e-3

    def after_first(loop):
        if loop.batch == 1:
            seen.append(jax.device_get(loop.state.params))

    seen = []
    trainer.fit(
        X,
        LABELS,
        batch_size=16,
        shuffle=False,
        sample_weight=weights,
        verbose=0,
        callbacks=LambdaCallback(on_train_batch_end=after_first),
    )
    after = jax.device_get(trainer.variables)
    assert not np.array_equal(before["params"]["kernel"], seen[0]["kernel"])
    np.testing.assert_array_equal(after["params"]["kernel"], seen[0]["kernel"])


def test_on_batch_methods_agree_with_the_whole():
    trainer = Trainer(nn.Dense(3), metrics=["accuracy"])
    tested = trainer.test_on_batch(X[:10], LABELS[:10])
    assert tested == trainer.evaluate(X[:10], LABELS[:10], batch_size=10)
    trained = trainer.train_on_batch(X[:10], LABELS[:10])
    np.testing.assert_allclose(trained["loss"], tested["loss"], rtol=1e-6)
    assert trainer.step == 1


def test_values_come_by_name_whatever_keras_returns():
    trainer = Trainer(nn.Dense(3))
    assert list(trainer.evaluate(X, LABELS, return_dict=True)) == ["loss"]
    for method in (trainer.evaluate, trainer.train_on_batch, trainer.test_on_batch):
        with pytest.raises(ValueError, match="always returned by name"):
            method(X, LABELS, return_dict=False)


def test_own_loop_with_init_and_train_step():
    trainer = Trainer(GuideMLP(3), optimizer="sgd", learning_rate=0.1)
    batch = (X[:16], LABELS[:16])
    state = first = trainer.init(batch)
    for _ in range(3):
        state, logs = trainer.train_step(state, batch)
    assert int(state.step) == 3
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    donated, _ = jax.jit(trainer.train_step)(first, batch)  # composes with jit
    assert int(donated.step) == 1
    assert list(logs) == ["loss"]

    fitted = Trainer(GuideMLP(3), optimizer="sgd", learning_rate=0.1)
    history = fitted.fit(*batch, batch_size=16, epochs=3, shuffle=False, verbose=0)
    np.testing.assert_allclose(
        float(logs["loss"].compute()), history.history["loss"][-1], rtol=1e-6
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        state.params,
        fitted.state.params,
    )


def test_a_training_step_of_ones_own():
    def make_train_step(task):
        plain = flaxfit.make_train_step(task)

        def train_step(state, batch):
            noisy = batch.replace(inputs=(batch.inputs[0] * 0,))
            return plain(state, noisy)

        return train_step

    trainer = Trainer(
        nn.Dense(3), optimizer="sgd", learning_rate=0.1, make_train_step=make_train_step
    )
    start = trainer.init((X, LABELS)).params
    trainer.fit(X, LABELS, verbose=0)
    end = trainer.state.params
    np.testing.assert_array_equal(start["kernel"], end["kernel"])  # no input, no change
    assert np.any(start["bias"] != end["bias"])


def test_what_is_read_from_the_trainer_survives_the_next_fit():
    trainer = Trainer(nn.Dense(3))
    trainer.fit(X, LABELS, verbose=0)
    state, variables = trainer.state, trainer.variables
    copied = jax.device_get(variables)
    trainer.fit(X, LABELS, verbose=0)
    jax.tree.map(np.testing.assert_array_equal, variables, copied)
    assert int(state.step) == 2


def test_an_assigned_state_is_copied_and_trained_on():
    trainer = Trainer(nn.Dense(3))
    trainer.fit(X, LABELS, verbose=0)
    kernel = np.ones((5, 3), np.float32)
    params = {"kernel": kernel, "bias": jnp.zeros(3)}
    state = trainer.state.replace(params=params)
    trainer.state = state
    trainer.fit(X, LABELS, verbose=0)
    assert not params["bias"].is_deleted()
    np.testing.assert_array_equal(kernel, 1)
    assert not np.array_equal(trainer.state.params["kernel"], kernel)


def test_save_and_load_go_on_as_if_nothing_had_happened(tmp_path):
    def make():
        return Trainer(
            GuideMLP(3), optimizer="adamw", learning_rate=0.01, metrics=["accuracy"]
        )

    straight, stopped = make(), make()
    for trainer in (straight, stopped):
        trainer.fit(X, LABELS, epochs=2, batch_size=16, verbose=0)
    stopped.save(tmp_path / "deep" / "run.msgpack")
    loaded = Trainer.load(tmp_path / "deep" / "run.msgpack", GuideMLP(3))
    assert loaded.evaluate(X, LABELS) == straight.evaluate(X, LABELS)
    histories = [
        t.fit(X, LABELS, epochs=2, batch_size=16, verbose=0).history
        for t in (straight, loaded)
    ]
    assert histories[0] == histories[1]
    jax.tree.map(np.testing.assert_array_equal, straight.variables, loaded.variables)
    assert loaded.compiles["train"] == 1


def test_schedule_free_evaluates_its_averaged_parameters():
    trainer = Trainer(nn.Dense(3), optimizer="schedule_free_sgd", learning_rate=0.5)
    trainer.fit(X, LABELS, epochs=3, batch_size=16, verbose=0)
    outputs = nn.Dense(3).apply(trainer.variables, X)
    np.testing.assert_allclose(trainer.predict(X), outputs, atol=1e-5)
    state = trainer.state
    assert not np.allclose(
        state.params["kernel"], trainer.variables["params"]["kernel"]
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        "lbfgs",
        "polyak_sgd",
        optax.chain(optax.adam(0.01), optax.contrib.reduce_on_plateau(patience=1)),
        "sam",
    ],
    ids=["lbfgs", "polyak", "plateau", "sam"],
)
def test_optimizers_that_need_more_than_gradients(optimizer):
    if optimizer == "sam":
        optimizer = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), sync_period=2)
    trainer = Trainer(nn.Dense(1), optimizer=optimizer)
    history = trainer.fit(X, VALUES, epochs=5, batch_size=64, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]


def test_learning_rate_as_a_function_of_total_steps_is_in_the_history():
    trainer = Trainer(
        nn.Dense(3),
        learning_rate=lambda total_steps: optax.linear_schedule(0.1, 0.0, total_steps),
    )
    history = trainer.fit(X, LABELS, batch_size=16, epochs=2, verbose=0).history
    # 8 steps: the rate of the last one of an epoch is 0.1 * (1 - step / 8).
    np.testing.assert_allclose(history["learning_rate"], [0.0625, 0.0125], rtol=1e-5)


def test_a_scalar_loss_compiles_the_tail_and_says_so(capsys):
    def loss(outputs, targets):
        return jnp.mean((outputs - targets) ** 2)

    trainer = Trainer(nn.Dense(1), loss=loss)
    history = trainer.fit(X[:50], VALUES[:50], batch_size=16, shuffle=False, verbose=2)
    assert "a second program is compiled for it" in capsys.readouterr().out
    assert trainer.compiles["train"] == 2
    assert np.isfinite(history.history["loss"][0])
    outputs = nn.Dense(1).apply(trainer.variables, X[:50])
    value = trainer.evaluate(X[:50], VALUES[:50], batch_size=16)["loss"]
    np.testing.assert_allclose(value, np.mean((outputs - VALUES[:50]) ** 2), rtol=1e-5)


def test_check_reports_without_training():
    class Idle(nn.Module):
        @nn.compact
        def __call__(self, x):
            unused = self.param("unused", nn.initializers.ones, (3,))
            del unused
            return nn.Dense(3)(x)

    trainer = Trainer(Idle(), metrics=["accuracy"])
    report = trainer.check(X, LABELS, batch_size=16)
    assert report.zero_gradients == ("unused",)
    assert report.chance_loss == pytest.approx(np.log(3))
    outputs = Idle().apply(
        {"params": trainer.init((X[:16], LABELS[:16])).params}, X[:16]
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, LABELS[:16])
    assert report.initial_loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert report.flops > 2 * 16 * 5 * 3
    assert report.step_bytes > 0
    assert report.compiles == {"train": 1, "eval": 1, "predict": 1}
    text = str(report)
    for words in ("0..2 in the first batch", "float32[16,3]", "guessing gives 1.0986"):
        assert words in text
    assert trainer.step == 0
    with pytest.raises(ValueError, match="has seen no data"):
        trainer.state


@pytest.mark.parametrize(
    ("loss", "squash", "y", "warning"),
    [
        ("auto", nn.softmax, LABELS, "without the last softmax"),
        ("bce", nn.sigmoid, np.eye(3)[LABELS], "without the last sigmoid"),
        ("auto", jnp.zeros_like, LABELS, None),
        ("auto", nn.log_softmax, LABELS, None),
        ("mse", nn.sigmoid, np.eye(3)[LABELS], None),
    ],
)
def test_check_tells_probabilities_from_logits(loss, squash, y, warning):
    class Squashed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return squash(nn.Dense(3)(x))

    report = Trainer(Squashed(), loss=loss).check(X, y)
    assert ("warning" in report.rows) == (warning is not None)
    if warning:
        assert warning in report.rows["warning"]


def test_an_ensemble_trains_with_the_batch_on_the_second_axis():
    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.stack([nn.Dense(1)(x)[:, 0] for _ in range(3)])

    def of_ensemble(outputs, targets):
        return jnp.square(outputs - targets[None, :]).mean(0)

    trainer = Trainer(Ensemble(), loss=of_ensemble, metrics=[of_ensemble])
    trainer.fit(X, VALUES[:, 0], batch_size=48, verbose=0)
    outputs = np.asarray(Ensemble().apply(trainer.variables, X))
    values = trainer.evaluate(X, VALUES[:, 0], batch_size=48)
    expected = np.mean((outputs - VALUES[:, 0]) ** 2)
    np.testing.assert_allclose(list(values.values()), [expected] * 2, rtol=1e-5)


def test_summary_and_repr(fitted):
    trainer, _ = fitted
    assert "BatchNorm" in trainer.summary()
    assert repr(trainer).startswith("Trainer(GuideMLP, step ")
    fresh = Trainer(nn.Dense(3))
    assert repr(fresh) == "Trainer(Dense, untrained)"
    assert "Dense" in repr(fresh.summary(X[:2]))
    with pytest.raises(ValueError, match="has seen no data"):
        Trainer(nn.Dense(3)).summary()


def test_predict_before_any_targets_then_fit():
    trainer = Trainer(nn.Dense(3))
    before = trainer.predict(X)
    expected = nn.Dense(3).apply(nn.Dense(3).init(jax.random.key(0), X), X)
    np.testing.assert_allclose(before, expected, atol=1e-6)
    trainer.fit(X, LABELS, verbose=0)
    assert trainer.step == 2
    with pytest.raises(flaxfit.CheckpointError):
        Trainer.load(__file__, nn.Dense(3))


def test_models_of_other_libraries_as_two_functions():
    def init(rng, inputs):
        return {"w": jax.random.normal(rng, (inputs[0].shape[1], 3))}, {}

    def apply(params, collections, inputs, *, train, rngs):
        return inputs[0] @ params["w"], collections, {}

    trainer = Trainer(flaxfit.Model(init, apply), optimizer="sgd", learning_rate=0.1)
    history = trainer.fit(X, LABELS, epochs=3, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert trainer.predict(X).shape == (64, 3)


class Layers(nn.Module):
    """Sows what has a batch axis, what has none, and what only looks like it."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(4)(x)
        self.sow("intermediates", "hidden", h)
        self.sow("intermediates", "mean", h.mean(axis=0))
        self.sow("intermediates", "stack", jnp.stack([h, 2 * h]))
        return nn.Dense(3)(h)


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_intermediates_without_a_batch_axis_are_stacked(rows):
    trainer = Trainer(Layers())
    sown = trainer.predict_intermediates(X[:rows], batch_size=4)
    _, expected = Layers().apply(trainer.variables, X[:rows], mutable="intermediates")
    (hidden,) = expected["intermediates"]["hidden"]
    np.testing.assert_allclose(sown["hidden"][0], hidden, atol=1e-6)
    batches = -(-rows // 4)
    assert sown["mean"][0].shape == (batches, 4)
    assert sown["stack"][0].shape[:2] == (batches, 2)


def test_outputs_whose_first_axis_is_not_the_batch_are_refused():
    class TimeMajor(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.swapaxes(nn.Dense(3)(x), 0, 1)

    x = np.zeros((64, 32, 5), np.float32)
    with pytest.raises(ValueError, match=r"the model returns float32\[32,32,3\]"):
        Trainer(TimeMajor()).predict(x, batch_size=32)


def test_compiles_counts_those_of_replaced_programs_and_of_the_own_loop():
    trainer = Trainer(
        nn.Dense(3),
        learning_rate=lambda total_steps: optax.linear_schedule(0.1, 0.0, total_steps),
    )
    trainer.predict(X)
    for epochs in (1, 2):
        trainer.fit(X, LABELS, epochs=epochs, validation_data=(X, LABELS), verbose=0)
    # Another length is another schedule; evaluation and prediction do not care.
    assert trainer.compiles == {"train": 2, "eval": 1, "predict": 1}
    own = Trainer(nn.Dense(3))
    own.train_step(own.init((X, LABELS)), (X, LABELS))
    assert own.compiles["train"] == 1


def test_a_trainer_can_be_copied_and_its_history_pickled(fitted):
    trainer, history = fitted
    copied = copy.deepcopy(trainer)
    assert copied.evaluate(X, LABELS) == trainer.evaluate(X, LABELS)
    again = pickle.loads(pickle.dumps(history))
    assert (again.history, again.trainer) == (history.history, None)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda t, data: t.check(data), "would use up its first batch"),
        (lambda t, data: t.compile(data), "would use up its first batch"),
        (lambda t, data: t.fit(data, epochs=2, verbose=0), "ends after one pass"),
        (
            lambda t, data: t.fit(X, LABELS, epochs=2, validation_data=data, verbose=0),
            "ends after one pass",
        ),
        (lambda t, data: t.predict_on_batch(data), "takes one batch"),
    ],
)
@pytest.mark.parametrize("trained", [False, True])
def test_an_iterator_that_is_refused_is_left_as_it_was(call, match, trained):
    trainer = Trainer(nn.Dense(3))
    if trained:  # then single examples are looked for
        trainer.fit(X, LABELS, verbose=0)
    data = iter([(X, LABELS), (X, LABELS)])
    with pytest.raises(ValueError, match=match):
        call(trainer, data)
    assert len(list(data)) == 2


def test_a_fit_that_fails_at_the_door_leaves_the_batch_size():
    trainer = Trainer(nn.Dense(3))
    trainer.fit(X, LABELS, batch_size=8, verbose=0)
    bad = X[:5] * np.nan, LABELS[:5]
    with pytest.raises(flaxfit.DataError, match="nan"):
        trainer.fit(X, LABELS, batch_size=16, validation_data=bad, verbose=0)
    trainer.predict(X)
    shapes = [s for s in trainer._programs.resolved.programs.predict.signatures]
    assert trainer._data.schema.batch_size == 8 and len(shapes) == 1


def test_a_loader_that_fills_one_buffer_again_trains_on_its_own_batches():
    """Steps still under way read a batch after the loader has gone on."""

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(6):
                x = nn.relu(nn.Dense(512)(x))
            return nn.Dense(2)(x)

    rng = np.random.default_rng(0)
    data = [
        (
            scale * rng.normal(size=(256, 512)).astype(np.float32),
            rng.integers(0, 2, 256),
        )
        for scale in range(1, 9)
    ]
    # Aligned to 64 bytes, where jax on a CPU takes the memory for its own.
    memory = np.empty(256 * 512 * 4 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    buffer = memory[start : start + 256 * 512 * 4].view(np.float32).reshape(256, 512)

    def reusing():
        for x, y in data:
            buffer[:] = x
            yield buffer, y

    losses = [
        Trainer(Deep(), learning_rate=1e-4).fit(batches, verbose=0).history["loss"]
        for batches in (data, reusing)
    ]
    assert losses[0] == losses[1]


def test_a_batch_larger_than_the_data_counts_no_row_twice():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
            self.sow("metrics", "size", jnp.mean(x**2))
            return nn.Dense(3)(x)

    x, y = X[:40], LABELS[:40]
    runs = []
    for size in (40, 64):
        trainer = Trainer(Net())
        history = trainer.fit(
            x, y, batch_size=size, shuffle=False, verbose=0, validation_data=(x, y)
        )
        values = [trainer.evaluate(x, y, batch_size=n) for n in (size, size + 1)]
        assert values[0] == values[1]
        runs.append((history.history, trainer.variables, values))
        compiles = dict(trainer.compiles)
        # What the programs were compiled for stays, also for fewer rows.
        trainer.evaluate(x[:7], y[:7])
        trainer.predict(x[:7])
        trainer.fit(x, y, batch_size=size, validation_data=(x[:7], y[:7]), verbose=0)
        assert trainer.compiles == {**compiles, "predict": 1}
    jax.tree.map(np.testing.assert_array_equal, *runs)


class Optional(nn.Module):
    """A model with an input that may be left out."""

    @nn.compact
    def __call__(self, tokens, segments=None):
        x = nn.Dense(3)(tokens)
        return x if segments is None else x + nn.Dense(3)(segments)


def test_keys_of_a_dict_batch_that_go_nowhere_are_shown(capsys):
    whole = {"tokens": X, "label": LABELS, "id": np.arange(64)}
    stream = [{name: rows[:32] for name, rows in whole.items()}]
    for data, options in (
        (whole, {}),
        (whole, {"validation_split": 0.5}),
        (stream, {}),
    ):
        Trainer(Optional()).fit(data, **options, verbose=2)
        assert "unused: id\n" in capsys.readouterr().out
    assert "unused" in Trainer(Optional()).check(whole).rows
    Trainer(Optional()).fit({"tokens": X}, LABELS, verbose=2)
    assert "unused" not in capsys.readouterr().out


def test_targets_of_another_kind_if_the_loss_is_the_same():
    bits = (LABELS[:, None] > 1).astype(np.int32)
    trainer = Trainer(nn.Dense(1), loss="bce", metrics=["accuracy"])
    history = trainer.fit(
        X, bits.astype(np.float32), validation_data=(X, bits), verbose=0
    ).history
    expected = trainer.evaluate(X, bits.astype(np.float32))
    assert [history["val_loss"][0], history["val_accuracy"][0]] == [*expected.values()]


def test_integers_where_the_model_was_built_on_numbers():
    pixels = RNG.integers(0, 255, (64, 5)).astype(np.uint8)
    trainer = Trainer(nn.Dense(3))
    trainer.fit(X, LABELS, verbose=0)
    outputs = nn.Dense(3).apply(trainer.variables, pixels)
    np.testing.assert_allclose(trainer.predict(pixels), outputs, rtol=1e-5, atol=1e-4)
    assert trainer.compiles["predict"] == 1


def test_a_constant_rate_that_depends_on_the_length_is_never_stale(tmp_path):
    def rate(total_steps):
        return 1.0 / total_steps

    def make():
        return Trainer(nn.Dense(1), optimizer="sgd", learning_rate=rate)

    def fit(trainer, epochs):
        history = trainer.fit(X, VALUES, batch_size=32, epochs=epochs, verbose=0)
        return history.history["learning_rate"][-1]

    trainer = make()
    trainer.evaluate(X, VALUES)
    assert fit(trainer, 5) == pytest.approx(1 / 10)
    assert fit(trainer, 5) == pytest.approx(1 / 20)
    trainer.save(tmp_path / "run.msgpack")
    loaded = Trainer.load(tmp_path / "run.msgpack", nn.Dense(1), learning_rate=rate)
    assert fit(loaded, 5) == pytest.approx(1 / 30)


def test_a_warm_up_can_be_loaded_and_predicted_with(tmp_path):
    def rate(total_steps):
        return optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, total_steps)

    trainer = Trainer(nn.Dense(1), learning_rate=rate)
    trainer.predict(X)
    trainer.fit(X, VALUES, batch_size=8, epochs=3, verbose=0)
    trainer.save(tmp_path / "run.msgpack")
    loaded = Trainer.load(tmp_path / "run.msgpack", nn.Dense(1), learning_rate=rate)
    assert loaded.evaluate(X, VALUES) == trainer.evaluate(X, VALUES)


def test_an_iterator_that_is_too_short_for_the_steps_of_evaluate():
    trainer = Trainer(nn.Dense(3))
    with pytest.raises(flaxfit.DataError):
        trainer.evaluate(iter([(X, LABELS)] * 3), steps=5)


def test_an_error_in_validation_data_says_so():
    with pytest.raises(TypeError) as caught:
        Trainer(nn.Dense(3)).fit(X, LABELS, validation_data=object(), verbose=0)
    assert "in validation_data" in caught.value.__notes__


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_in_a_later_validation_names_the_validation_data(prefetch):
    passes = []

    def batches():
        passes.append(1)
        return iter([(X, LABELS)]) if len(passes) == 1 else (X, LABELS)

    trainer = Trainer(nn.Dense(3), prefetch=prefetch)
    with pytest.raises(
        TypeError, match=r"given to validation_data.*validation_data=\("
    ):
        trainer.fit(X, LABELS, validation_data=batches, epochs=3, verbose=0)


def test_a_call_inside_of_a_fit_does_not_replace_what_it_trains():
    trainer = Trainer(nn.Dense(3))

    def evaluate(loop):
        with pytest.raises(ValueError, match="for which this trainer was built"):
            trainer.evaluate(X[:, :2], LABELS, verbose=0)

    expected = Trainer(nn.Dense(3)).fit(X, LABELS, batch_size=64, verbose=0)
    history = trainer.fit(
        X,
        LABELS,
        batch_size=64,
        callbacks=LambdaCallback(on_train_begin=evaluate),
        verbose=0,
    )
    assert history.history == expected.history
