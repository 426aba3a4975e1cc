"""Callbacks with a hand-made LoopState, and in a real fit."""

import contextlib
import os
import re
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxfit import (
    Callback,
    EarlyStopping,
    LambdaCallback,
    LoopState,
    Trainer,
    TrainState,
)
from flaxfit._core.state_store import TrainStateStore
from flaxfit._reporting.history import History

X = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 32).astype(np.int32)


def make_state(value):
    return TrainState(
        step=jnp.int32(value),
        params={"w": jnp.full(2, float(value))},
        collections={},
        opt_state=(),
        rng=jax.random.key(0),
    )


def run(callback, values, monitor="val_loss"):
    """Drives a callback through epochs with these values; returns the loop."""
    loop = LoopState(
        TrainStateStore(make_state(0)),
        history=History(),
        step=0,
        epoch=0,
        epochs=len(values),
        steps_per_epoch=1,
        log_names=["loss", monitor],
    )
    callback.on_train_begin(loop)
    for loop.epoch, value in enumerate(values):
        loop.state = make_state(loop.epoch)
        loop.set_logs({"loss": 0.0} | ({} if value is None else {monitor: value}))
        callback.on_epoch_end(loop)
        if loop.stopped:
            break
    callback.on_train_end(loop)
    return loop


def weight(loop):
    return float(loop.state.params["w"][0])


@pytest.mark.parametrize(
    ("patience", "values", "stopped", "best"),
    [
        (0, [3, 2, 2.5, 1], 2, 1),
        (1, [3, 2, 2.5, 1], 2, 1),
        (2, [3, 2, 2.5, 1, 1, 1, 0], 5, 3),
        (2, [3, float("nan"), float("nan"), 1], 2, 0),
        (1, [float("nan"), 1, 2], 0, None),
        (2, [3, None, None, 2, None, 3, 4], 6, 3),
        (5, [3, 2, 1], None, 2),
    ],
)
def test_early_stopping_stops_and_restores_the_best(patience, values, stopped, best):
    callback = EarlyStopping(patience=patience)
    loop = run(callback, values)
    assert (callback.stopped_epoch, callback.best_epoch) == (stopped, best)
    assert loop.stopped == (stopped is not None)
    assert weight(loop) == (loop.epoch if best is None else best)


def test_early_stopping_directions():
    assert (
        run(EarlyStopping("val_accuracy"), [0.1, 0.2, 0.3], "val_accuracy").epoch == 2
    )
    assert (
        run(EarlyStopping("val_accuracy"), [0.3, 0.2, 0.1], "val_accuracy").epoch == 1
    )
    assert run(EarlyStopping("gain", mode="max"), [1, 0], "gain").epoch == 1
    assert run(EarlyStopping("gain", mode="min"), [1, 0], "gain").epoch == 1
    with pytest.raises(ValueError, match='mode="min" or mode="max"'):
        run(EarlyStopping("gain"), [1, 0], "gain")


def test_early_stopping_options():
    assert run(EarlyStopping(min_delta=0.5), [3, 2.8, 1]).epoch == 1
    assert run(EarlyStopping(start_from_epoch=2), [1, 2, 3, 4]).epoch == 3
    assert run(EarlyStopping(baseline=1.0, patience=2), [3, 2, 0.5]).epoch == 1
    loop = run(EarlyStopping(restore_best_weights=False), [1, 2])
    assert weight(loop) == 1
    assert "val_loss has not improved for 1 epoch (best 1)" in loop.stop_reason
    with pytest.raises(ValueError, match="mode='down'"):
        EarlyStopping(mode="down")
    with pytest.raises(ValueError, match="patience=-1"):
        EarlyStopping(patience=-1)


def test_early_stopping_starts_afresh_in_a_second_fit():
    callback = EarlyStopping()
    run(callback, [1, 2])
    assert run(callback, [5, 4, 3]).epoch == 2


def test_unknown_logs_are_an_error_before_the_first_step():
    trainer = Trainer(nn.Dense(3))
    with pytest.raises(ValueError, match="Did you mean 'val_loss'"):
        trainer.fit(
            X, Y, validation_split=0.5, verbose=0, callbacks=EarlyStopping("val_los")
        )
    with pytest.raises(ValueError, match="validation_data="):
        trainer.fit(X, Y, verbose=0, callbacks=EarlyStopping())
    assert trainer.compiles["train"] == 0


def test_order_of_hooks():
    calls = []

    class Spy(Callback):
        def __init__(self, name):
            self.name = name

    def hook(name):
        def call(self, loop):
            calls.append((self.name, name))
            if name == "on_epoch_end":
                assert loop.history.epoch[-1] == loop.epoch
                assert list(loop.logs)[-2:] == ["val_loss", "learning_rate"]
            if name == "on_test_end":
                assert "val_loss" in loop.logs

        return call

    hooks = [name for name in vars(Callback) if name.startswith("on_")]
    for name in hooks:
        setattr(Spy, name, hook(name))
    Trainer(nn.Dense(3)).fit(
        X,
        Y,
        batch_size=16,
        epochs=2,
        validation_data=(X, Y),
        verbose=0,
        callbacks=[Spy("a"), Spy("b")],
    )
    epoch = [
        "on_epoch_begin",
        *["on_train_batch_begin", "on_train_batch_end"] * 2,
        "on_test_begin",
        "on_test_end",
        "on_epoch_end",
    ]
    expected = ["on_train_begin", *epoch * 2, "on_train_end"]
    assert calls == [(name, hook) for hook in expected for name in "ab"]


def test_early_stopping_in_a_fit_gives_the_best_model_back():
    trainer, states = Trainer(nn.Dense(3), learning_rate=10.0), []
    stopper = EarlyStopping(patience=2)
    history = trainer.fit(
        X[:16],
        Y[:16],
        epochs=30,
        validation_data=(X[16:], Y[16:]),
        verbose=0,
        callbacks=[
            stopper,
            LambdaCallback(on_epoch_end=lambda loop: states.append(loop.state)),
        ],
    )
    values = history.history["val_loss"]
    assert len(values) == stopper.stopped_epoch + 1 < 30
    assert stopper.best_epoch == int(np.argmin(values))
    assert trainer.evaluate(X[16:], Y[16:])["loss"] == pytest.approx(min(values))
    jax.tree.map(
        np.testing.assert_array_equal,
        trainer.state.params,
        states[stopper.best_epoch].params,
    )


@pytest.mark.parametrize("how", ["error", "interrupt"])
def test_early_stopping_rolls_nothing_back_when_broken_off(how):
    def end(loop):
        if loop.step == 7:
            if how == "error":
                raise RuntimeError("mine")
            os.kill(os.getpid(), signal.SIGINT)

    trainer = Trainer(nn.Dense(3), learning_rate=10.0)
    with pytest.raises(RuntimeError) if how == "error" else contextlib.nullcontext():
        trainer.fit(
            X,
            Y,
            batch_size=16,
            epochs=9,
            validation_data=(X, Y),
            verbose=0,
            callbacks=[
                EarlyStopping(patience=9, mode="max"),
                LambdaCallback(on_train_batch_end=end),
            ],
        )
    assert trainer.step == 7


def test_a_log_that_a_callback_adds_can_be_monitored():
    class Gain(Callback):
        log_names = ("gain",)

        def on_epoch_end(self, loop):
            loop.logs["gain"] = [1.0, 3.0, 2.0][loop.epoch]

    stopper = EarlyStopping("gain", mode="max")
    history = Trainer(nn.Dense(3)).fit(
        X, Y, epochs=3, verbose=0, callbacks=[Gain(), stopper]
    )
    assert (history.history["gain"], stopper.best_epoch) == ([1.0, 3.0, 2.0], 1)


def test_lambda_callback_refuses_unknown_hooks():
    with pytest.raises(TypeError, match="Did you mean 'on_epoch_end'"):
        LambdaCallback(on_epoch_ende=print)
    with pytest.raises(TypeError, match="takes a function"):
        LambdaCallback(on_epoch_end=3)


def test_an_assigned_state_is_checked():
    loop = run(LambdaCallback(), [1])
    with pytest.raises(TypeError, match="must be a TrainState, got dict"):
        loop.state = {}
    wrong = make_state(1).replace(params={"w": jnp.zeros(3), "b": jnp.zeros(1)})
    with pytest.raises(ValueError, match=r"params/b: is missing, given float32\[1\]"):
        loop.state = wrong


def test_early_stopping_checks_its_arguments():
    for arguments, text in (
        ({"baseline": "0.5"}, "baseline='0.5'. Expected a finite number"),
        ({"min_delta": None}, "min_delta=None. Expected a finite number"),
        ({"start_from_epoch": "1"}, "Write start_from_epoch=0"),
    ):
        with pytest.raises(TypeError, match=re.escape(text)):
            EarlyStopping(**arguments)
    assert EarlyStopping(baseline=-1).baseline == -1.0


def test_early_stopping_names_the_baseline_that_was_not_beaten():
    loop = run(EarlyStopping(baseline=0.5, patience=2), [1.2, 1.1, 1.0])
    assert loop.stop_reason == (
        "val_loss has not beaten the baseline 0.5 for 2 epochs (best 1.1)"
    )
