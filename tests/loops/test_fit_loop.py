"""Nothing lost, nothing read: errors, Ctrl-C and host reads in the loops."""

import os
import signal
import threading
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.asserts import count_reads
from helpers.data import labeled
from helpers.models import Net

import flaxfit._loops.fit_loop
from flaxfit import LambdaCallback, Trainer

X, Y = labeled(64)


def straight(steps):
    """The state after so many steps with nothing in the way."""
    trainer = Trainer(Net(dropout=0))
    state = trainer.init((X[:8], Y[:8]))
    for step in range(steps):
        rows = slice(8 * step % 64, 8 * step % 64 + 8)
        state, _ = trainer.train_step(state, (X[rows], Y[rows]))
    return state


def assert_holds(trainer, steps):
    """The trainer holds the state of `steps` steps, and works."""
    assert trainer.step == steps
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        trainer.variables["params"],
        straight(steps).params,
    )
    trainer.evaluate(X, Y, batch_size=8)
    trainer.predict(X[:8])
    trainer.fit(X, Y, batch_size=8, epochs=1, verbose=0)
    assert trainer.step == steps + 8


def batches(fail_at=None, error=None):
    def make():
        for step in range(8):
            if step == fail_at:
                raise error
            yield X[8 * step : 8 * step + 8], Y[8 * step : 8 * step + 8]

    return make


def test_a_loader_that_raises_reaches_the_caller_and_loses_nothing():
    trainer = Trainer(Net(dropout=0))
    with pytest.raises(OSError, match="disk gone") as caught:
        trainer.fit(batches(3, OSError("disk gone")), epochs=1, verbose=0)
    assert any("batch 3 of pass 0" in note for note in caught.value.__notes__)
    assert_holds(trainer, 3)


def test_a_loader_that_raises_at_once_leaves_a_trained_model():
    trainer = Trainer(Net(dropout=0))
    trainer.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    with pytest.raises(OSError, match="disk gone"):
        trainer.fit(batches(0, OSError("disk gone")), epochs=1, verbose=0)
    assert_holds(trainer, 8)


def test_a_wrong_batch_in_the_middle_loses_nothing():
    def make():
        yield from [(X[:8], Y[:8]), (X[8:16], Y[8:16])]
        yield X[:8, :2], Y[:8]

    trainer = Trainer(Net(dropout=0))
    with pytest.raises(ValueError, match="batch 2"):
        trainer.fit(make, epochs=1, verbose=0)
    assert_holds(trainer, 2)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_batch_begin"])
def test_a_callback_that_raises_is_named_and_loses_nothing(hook):
    def fail(loop):
        if loop.batch == 3:
            raise RuntimeError("mine")

    trainer, ended = Trainer(Net(dropout=0)), []
    with pytest.raises(RuntimeError, match="mine") as caught:
        trainer.fit(
            X,
            Y,
            batch_size=8,
            shuffle=False,
            verbose=0,
            callbacks=[
                LambdaCallback(**{hook: fail}),
                LambdaCallback(on_train_end=lambda loop: ended.append(loop.step)),
            ],
        )
    assert caught.value.__notes__ == [f"raised by the callback LambdaCallback.{hook}"]
    assert ended == [3]
    assert_holds(trainer, 3)


def test_errors_in_on_train_end_do_not_hide_the_first():
    def fail(loop):
        raise RuntimeError("second")

    def first(loop):
        raise RuntimeError("first")

    trainer = Trainer(Net(dropout=0))
    with pytest.raises(RuntimeError, match="first") as caught:
        trainer.fit(
            X,
            Y,
            batch_size=8,
            verbose=0,
            callbacks=LambdaCallback(on_epoch_end=first, on_train_end=fail),
        )
    assert any("second" in note for note in caught.value.__notes__)
    with pytest.raises(RuntimeError, match="second"):
        trainer.fit(X, Y, verbose=0, callbacks=LambdaCallback(on_train_end=fail))


def test_ctrl_c_returns_the_history_of_what_was_done():
    def press(loop):
        if (loop.epoch, loop.batch) == (1, 3):
            os.kill(os.getpid(), signal.SIGINT)

    trainer, before = Trainer(Net(dropout=0)), signal.getsignal(signal.SIGINT)
    history = trainer.fit(
        X,
        Y,
        batch_size=8,
        shuffle=False,
        epochs=5,
        verbose=0,
        callbacks=LambdaCallback(on_train_batch_end=press),
    )
    assert history.epoch == [0]
    assert history.stop_reason == "interrupted by Ctrl-C"
    assert signal.getsignal(signal.SIGINT) is before
    assert_holds(trainer, 11)


def test_ctrl_c_during_validation():
    trainer = Trainer(Net(dropout=0))
    history = trainer.fit(
        X,
        Y,
        batch_size=8,
        shuffle=False,
        epochs=3,
        validation_data=(X, Y),
        verbose=0,
        callbacks=LambdaCallback(
            on_test_begin=lambda loop: os.kill(os.getpid(), signal.SIGINT)
        ),
    )
    assert history.history == {}
    assert_holds(trainer, 8)


def test_a_second_ctrl_c_raises_and_still_loses_nothing():
    def press(loop):
        if loop.batch == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    trainer = Trainer(Net(dropout=0))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(
            X,
            Y,
            batch_size=8,
            shuffle=False,
            verbose=0,
            callbacks=LambdaCallback(on_train_batch_end=press),
        )
    assert_holds(trainer, 3)


def test_a_keyboard_interrupt_out_of_the_data_ends_like_ctrl_c():
    trainer = Trainer(Net(dropout=0))
    history = trainer.fit(batches(3, KeyboardInterrupt()), epochs=2, verbose=0)
    assert history.stop_reason == "interrupted"
    assert_holds(trainer, 3)


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_ctrl_c_in_evaluate_and_predict_raises_and_loses_nothing(method):
    trainer = Trainer(Net(dropout=0))
    trainer.fit(X, Y, batch_size=8, shuffle=False, verbose=0)

    def data():
        for step in range(8):
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield X[:8], Y[:8]

    with pytest.raises(KeyboardInterrupt):
        getattr(trainer, method)(data, verbose=0)
    assert_holds(trainer, 8)


def test_ctrl_c_at_random_moments():
    """A short campaign; the handler's flag is what makes it survive."""
    trainer = Trainer(Net(dropout=0))
    trainer.fit(X, Y, batch_size=8, verbose=0)
    rng, returned = np.random.default_rng(0), 0
    for _ in range(60):
        press = threading.Timer(
            rng.uniform(0, 0.03), os.kill, (os.getpid(), signal.SIGINT)
        )
        before = trainer.step
        try:
            press.start()
            history = trainer.fit(X, Y, batch_size=8, epochs=10_000, verbose=0)
            assert history.stop_reason == "interrupted by Ctrl-C"
            assert trainer.step - before >= 8 * len(history.epoch)
            returned += 1
        except KeyboardInterrupt:
            assert trainer.step == before  # it came before `fit` had begun
        finally:
            press.join()
        state = trainer.state
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        assert int(state.step) == trainer.step
    assert returned > 40
    trainer.fit(X, Y, batch_size=8, verbose=0)


def test_fit_off_the_main_thread_touches_no_handler():
    trainer, seen = Trainer(Net(dropout=0)), []
    before = signal.getsignal(signal.SIGINT)

    def run():
        trainer.fit(
            X,
            Y,
            verbose=0,
            callbacks=LambdaCallback(
                on_epoch_end=lambda loop: seen.append(signal.getsignal(signal.SIGINT))
            ),
        )

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_model_that_fails_on_the_host_loses_nothing():
    """A host callback fails after dispatch; such steps donate nothing."""
    calls = []

    def check(x):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("host failure")
        return x

    class Calling(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3)(x)
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return x + jax.lax.stop_gradient(
                jax.pure_callback(check, shape, jax.lax.stop_gradient(x)) * 0
            )

    trainer = Trainer(Calling())
    with pytest.raises(Exception, match="host failure"):
        trainer.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    assert trainer.step == 2
    assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(trainer.variables))
    trainer.fit(X, Y, batch_size=16, verbose=0)
    assert trainer.step == 6


def test_the_step_loop_reads_nothing(monkeypatch):
    trainer = Trainer(Net(dropout=0), metrics=["accuracy"])
    trainer.fit(X, Y, batch_size=8, validation_split=0.5, verbose=0)
    reads = count_reads(monkeypatch)
    counts = []
    for batch_size in (32, 1):
        reads.clear()
        trainer.fit(
            X,
            Y,
            batch_size=batch_size,
            epochs=3,
            validation_split=0.5,
            verbose=0,
            callbacks=LambdaCallback(on_train_batch_end=lambda loop: None),
        )
        counts.append(reads.count("get"))
        assert set(reads) <= {"get", "__array__", "__int__", "__float__"}
    # One for an epoch, one for its validation, and the step number at the start: as
    # many with 32 steps in an epoch as with one.
    assert counts == [3 * 2 + 1, 3 * 2 + 1]


def test_batches_on_a_device_are_not_read_back(monkeypatch):
    trainer = Trainer(Net(dropout=0), metrics=["accuracy"])

    def batches(count):
        def make():
            for step in range(count):
                rows = slice(8 * step % 64, 8 * step % 64 + 8)
                yield jnp.asarray(X[rows]), jnp.asarray(Y[rows])

        return make

    trainer.fit(batches(2), validation_data=batches(2), verbose=0)
    reads = count_reads(monkeypatch)
    counts = []
    for count in (2, 8):
        reads.clear()
        trainer.fit(batches(count), validation_data=batches(count), verbose=0)
        counts.append(sorted(reads))
    # The first batch is read, whose values are checked, and then no other.
    assert counts[0] == counts[1]
    assert trainer.compiles == {"train": 1, "eval": 1, "predict": 0}


def test_the_display_reads_at_most_ten_times_a_second(monkeypatch):
    reads = []
    original = flaxfit._loops.fit_loop.read
    monkeypatch.setattr(
        flaxfit._loops.fit_loop,
        "read",
        lambda tree: (reads.append(time.perf_counter()), original(tree))[1],
    )
    trainer = Trainer(Net(dropout=0))
    started = time.perf_counter()
    trainer.fit(X, Y, batch_size=8, epochs=200, verbose=0)
    assert len(reads) == 200

    reads.clear()
    started = time.perf_counter()
    trainer.fit(X, Y, batch_size=1, epochs=5, steps_per_epoch=400, verbose=1)
    seconds = time.perf_counter() - started
    assert len(reads) <= 5 + 10 * seconds + 5


def test_logs_in_a_batch_hook_are_read_only_when_asked_for(monkeypatch):
    trainer, means = Trainer(Net(dropout=0)), []
    trainer.fit(
        X,
        Y,
        batch_size=8,
        verbose=0,
        shuffle=False,
        callbacks=LambdaCallback(
            on_train_batch_end=lambda loop: means.append(loop.logs["loss"])
        ),
    )
    assert len(means) == 8
    assert means[-1] == pytest.approx(trainer_loss(), rel=1e-6)


def trainer_loss():
    trainer = Trainer(Net(dropout=0))
    return trainer.fit(X, Y, batch_size=8, shuffle=False, verbose=0).history["loss"][0]


def test_a_callback_can_stop_and_the_epoch_closes_properly():
    trainer = Trainer(Net(dropout=0))
    history = trainer.fit(
        X,
        Y,
        batch_size=8,
        epochs=5,
        validation_data=(X, Y),
        verbose=0,
        callbacks=LambdaCallback(
            on_train_batch_end=lambda loop: loop.step == 11 and loop.stop("enough")
        ),
    )
    assert (trainer.step, history.epoch, history.stop_reason) == (11, [0, 1], "enough")
    assert len(history.history["val_loss"]) == 2


def test_an_epoch_that_was_stopped_is_not_taken_for_a_whole_one(tmp_path):
    stop = LambdaCallback(on_train_batch_end=lambda loop: loop.stop("enough"))
    lengths = []
    keep = LambdaCallback(
        on_train_end=lambda loop: lengths.append(loop.steps_per_epoch)
    )
    batches = lambda: iter([(X[:8], Y[:8])] * 3)  # noqa: E731
    for callbacks in ([stop, keep], [keep]):
        Trainer(Net(dropout=0)).fit(batches, callbacks=callbacks, verbose=0)
    assert lengths == [None, 3]


def test_a_callback_may_assign_the_state_and_add_logs():
    def reset(loop):
        zeros = jax.tree.map(np.zeros_like, loop.state.params)
        loop.state = loop.state.replace(params=zeros)
        loop.logs["mine"] = 7.0

    trainer = Trainer(nn.Dense(3))
    history = trainer.fit(
        X, Y, epochs=2, verbose=0, callbacks=LambdaCallback(on_epoch_end=reset)
    )
    assert history.history["mine"] == [7.0, 7.0]
    np.testing.assert_array_equal(trainer.variables["params"]["kernel"], 0)


def test_a_state_a_callback_keeps_stays_alive():
    kept = []
    trainer = Trainer(Net(dropout=0))
    trainer.fit(
        X,
        Y,
        batch_size=8,
        epochs=2,
        verbose=0,
        callbacks=LambdaCallback(
            on_train_batch_end=lambda loop: kept.append(loop.state),
            on_epoch_end=lambda loop: kept.append(trainer.state),
        ),
    )
    assert [int(state.step) for state in kept] == [*range(1, 9), 8, *range(9, 17), 16]


@pytest.mark.parametrize("devices", [1, 8])
def test_a_loader_may_use_the_model_it_feeds(devices):
    """It runs in another thread, while steps consume the state."""
    trainer = Trainer(Net(dropout=0), devices=devices)
    seen = []

    def make():
        for step in range(8):
            seen.append(trainer.predict(X[:8], verbose=0).sum())
            yield X[8 * step : 8 * step + 8], Y[8 * step : 8 * step + 8]

    trainer.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    trainer.fit(make, epochs=2, verbose=0)
    assert trainer.step == 24
    assert np.isfinite(seen).all()
