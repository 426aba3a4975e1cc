"""Whole fits: nothing that makes them fast changes a bit, a count or a hook."""

import os
import signal
import threading
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.asserts import count_reads, moved, same

from flaxfit import Callback, LambdaCallback, Trainer
from flaxfit._core.types import Batch
from flaxfit._loops.feeder import Execution
from flaxfit._programs.chunks import DeviceDataset, Stack
from flaxfit._programs.compile import Program
from flaxfit.data.sources.array_source import ArraySource

RNG = np.random.default_rng(0)
X = RNG.integers(0, 255, (70, 5)).astype(np.uint8)
Y = RNG.integers(0, 3, 70).astype(np.int32)
W = RNG.uniform(0, 2, 70).astype(np.float32)
SIZE = 16  # 5 batches, the last of 6 rows


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(8)(x.astype(jnp.float32) / 255)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.3, deterministic=not train)(nn.relu(x))
        return nn.Dense(3)(x)


def threads():
    return [t for t in threading.enumerate() if t.name == "flaxfit"]


@pytest.fixture(scope="module")
def run():
    """Fits from the same state, each time with another execution: `run(**execution)`.

    One trainer, so that only what an execution needs of its own is compiled.
    """
    trainer = Trainer(Net(), metrics=["accuracy"])
    start = trainer.init((X[:SIZE], Y[:SIZE]))

    def fit(*, data=(X, Y, W), execution=None, **arguments):
        trainer._execution = Execution(**(execution or {}))
        trainer.state = start
        given = {
            "batch_size": SIZE,
            "epochs": 3,
            "validation_data": (X[:23], Y[:23]),
            "verbose": 0,
            **arguments,
        }
        if given["batch_size"] is None:
            del given["batch_size"]
        history = trainer.fit(data, **given)
        assert threads() == []
        return moved(trainer.state), history.history

    fit.trainer, fit.start = trainer, start
    return fit


@pytest.fixture(scope="module")
def references(run):
    """The results of steps taken one by one, by `steps_per_epoch`."""
    return {
        steps: run(execution={"steps_per_call": 1}, steps_per_epoch=steps)
        for steps in (None, 7)
    }


def test_arguments_say_how_to_run():
    trainer = Trainer(nn.Dense(1), steps_per_call=7, device_data=0.5, prefetch=3)
    assert trainer._execution == Execution(7, 0.5, 3)
    assert Trainer(nn.Dense(1))._execution == Execution(None, 0.25, 2)
    assert Trainer(nn.Dense(1), steps_per_call="auto", device_data=0)._execution == (
        Execution(None, 0.0, 2)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps_per_call": 0}, r'steps_per_call=0\. .*at least 1\. Write .*="auto"'),
        ({"steps_per_call": "fast"}, r"steps_per_call='fast'\. .*=\"auto\""),
        ({"steps_per_call": True}, "steps_per_call=True"),
        ({"prefetch": -1}, r"prefetch=-1\. Expected a whole number of at least 0\."),
        ({"prefetch": None}, "prefetch=None"),
        (
            {"device_data": 1.5},
            r"device_data=1\.5\. .*\[0, 1\]\. Write device_data=0\.5, a share of",
        ),
        ({"device_data": -0.1}, r"device_data=-0\.1"),
        ({"device_data": True}, "device_data=True"),
        ({"device_data": float("nan")}, "device_data=nan"),
    ],
)
def test_wrong_ways_to_run(arguments, message):
    with pytest.raises(ValueError, match=message):
        Trainer(nn.Dense(1), **arguments)


# ----------------------------------------------------------- the same to the last bit

EXECUTIONS = [
    {},
    {"steps_per_call": 7},
    {"device_data": 0},
    {"device_data": 0, "steps_per_call": 1},
    {"device_data": 0, "steps_per_call": 7},
    {"device_data": 0, "prefetch": 0},
    {"device_data": 0, "prefetch": 1},
    {"device_data": 0, "prefetch": 5},
]


@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
def test_no_bit_depends_on_how_it_runs(execution, run, references):
    """BatchNorm, Dropout, a ragged tail, weights, and 7 steps of passes of 5."""
    for steps, (expected, expected_history) in references.items():
        state, history = run(execution=execution, steps_per_epoch=steps)
        same(state, expected)
        assert history == expected_history
        assert int(state[3]) == 3 * (steps or 5)
        assert len(history["val_loss"]) == 3


def test_a_stop_in_the_middle_is_at_the_same_bits(run):
    def stop(loop):
        if loop.step == 8:
            loop.stop("enough")

    results = [
        run(
            execution=execution,
            callbacks=LambdaCallback(on_train_batch_end=stop, every_steps=every),
        )
        for execution, every in (({}, 4), ({"device_data": 0}, 1), ({}, 2))
    ]
    assert int(results[0][0][3]) == 8
    for state, history in results[1:]:
        same(state, results[0][0])
        assert history == results[0][1]


def order_of(rows, shuffle=True):
    data = Batch((X[:rows],), Y[:rows], W[:rows])
    return ArraySource(data, SIZE, shuffle=shuffle, seed=(0, 0)).order


def by_hand(trainer, order, epochs):
    state = trainer.init((X[:SIZE], Y[:SIZE]))
    for epoch in range(epochs):
        total = None
        for coded in order(epoch):
            rows = np.where(coded < 0, ~coded, coded)
            weights = np.where(coded < 0, 0, W[rows]).astype(np.float32)
            state, logs = trainer.train_step(state, (X[rows], Y[rows], weights))
            total = logs["loss"] if total is None else total.merge(logs["loss"])
    return state, float(total.compute())


@pytest.mark.parametrize("shuffle", [True, False])
def test_fit_is_the_public_step_over_the_same_order(shuffle, run):
    state, history = run(shuffle=shuffle)
    expected, loss = by_hand(run.trainer, order_of(70, shuffle), 3)
    same(state, moved(expected))
    assert history["loss"][-1] == loss


def test_fit_is_a_plain_loop_of_optax_over_the_same_order():
    model = nn.Dense(3)
    x = X.astype(np.float32) / 255
    params = model.init(jax.random.key(0), x[:SIZE])["params"]
    tx = optax.sgd(0.1, momentum=0.9)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, x, y, w):
        def loss_fn(params):
            losses = optax.softmax_cross_entropy_with_integer_labels(
                model.apply({"params": params}, x), y
            )
            return jnp.sum(w * losses) / jnp.sum(w)

        updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for epoch in range(3):
        for coded in order_of(70)(epoch):
            rows = np.where(coded < 0, ~coded, coded)
            weights = np.where(coded < 0, 0, W[rows]).astype(np.float32)
            params, opt_state = step(params, opt_state, x[rows], Y[rows], weights)
    trainer = Trainer(model, optimizer=tx)
    trainer.fit(x, Y, sample_weight=W, batch_size=SIZE, epochs=3, verbose=0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
        trainer.state.params,
        params,
    )


def test_a_loader_of_the_same_batches_gives_the_same_bits(run):
    rows = np.arange(64).reshape(4, SIZE)
    whole = run(data=(X[:64], Y[:64], W[:64]), shuffle=False)

    def loader():
        for chosen in rows:
            yield X[chosen], Y[chosen], W[chosen]

    for execution in ({}, {"prefetch": 0}, {"steps_per_call": 3}):
        streamed = run(data=loader, execution=execution, batch_size=None)
        same(streamed[0], whole[0])
        assert streamed[1] == whole[1]

    def on_device():
        for batch in loader():
            yield tuple(map(jnp.asarray, batch))

    streamed = run(data=on_device, batch_size=None)
    same(streamed[0], whole[0])
    assert streamed[1] == whole[1]


@pytest.mark.parametrize("device_data", [0.25, 0])
def test_validation_kept_on_the_device_or_sent_again(device_data, run, references):
    """Three validations, by an iterable too, are those of the arrays."""
    validation = [(X[:16], Y[:16]), (X[16:23], Y[16:23])]
    state, history = run(
        execution={"device_data": device_data}, validation_data=validation
    )
    expected, expected_history = references[None]
    same(state, expected)
    np.testing.assert_allclose(
        history["val_loss"], expected_history["val_loss"], rtol=1e-6
    )
    assert history["loss"] == expected_history["loss"]


class Two(nn.Module):
    @nn.compact
    def __call__(self, left, right):
        return nn.Dense(3)(left / 255) + nn.Dense(3)(right)


def test_dicts_of_several_inputs_are_the_same_to_the_last_bit():
    data = {"left": X, "right": X[:, :2].astype(np.float32), "label": Y}
    results, trainer = [], Trainer(Two())
    trainer.evaluate(data)
    start = trainer.state
    for execution in ({}, {"device_data": 0}, {"device_data": 0, "prefetch": 0}):
        trainer._execution = Execution(**execution)
        trainer.state = start
        history = trainer.fit(data, batch_size=SIZE, epochs=2, verbose=0)
        results.append((moved(trainer.state), history.history))
    for state, history in results[1:]:
        same(state, results[0][0])
        assert history == results[0][1]
    signature = trainer._builder.resolved.programs.train.signatures[-1]
    assert signature[2].inputs["left"].dtype == np.uint8


@pytest.mark.parametrize("kind", [DeviceDataset, Stack, Batch])
def test_bytes_stay_bytes_on_the_device(kind, run):
    execution = {
        DeviceDataset: {},
        Stack: {"device_data": 0},
        Batch: {"device_data": 0, "prefetch": 0},
    }[kind]
    calls = []
    program = run.trainer._builder.resolved.programs.train
    original = Program.__call__

    def noted(self, *args):
        if self is program:
            calls.append(args[2])
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "__call__", noted)
        run(execution=execution, epochs=1)
    assert calls
    for segment in calls:
        assert type(segment) is kind
        batch = {"DeviceDataset": "data", "Stack": "batches"}.get(kind.__name__)
        inputs = (getattr(segment, batch) if batch else segment).inputs
        assert [leaf.dtype for leaf in inputs] == [np.uint8]
        assert all(isinstance(leaf, jax.Array) for leaf in inputs)


# ---------------------------------------------------------------- calls and hooks


@pytest.fixture
def calls(monkeypatch):
    """Notes the steps of every call of the train program."""
    noted = []
    original = Program.__call__

    def counted(self, *args):
        if self.name == "train step":
            noted.append(args[-1])
        return original(self, *args)

    monkeypatch.setattr(Program, "__call__", counted)
    return noted


MANY = {"execution": {"steps_per_call": 7}, "epochs": 2, "validation_data": None}


class Quiet(Callback):
    def on_train_begin(self, loop): ...
    def on_epoch_begin(self, loop): ...
    def on_epoch_end(self, loop): ...
    def on_train_end(self, loop): ...


class Loop(Callback):
    """Leaves it to the loop when to be called."""

    every_steps = None

    def on_train_batch_begin(self, loop): ...
    def on_train_batch_end(self, loop): ...


class Each(Callback):
    every_steps = 2

    def on_train_batch_end(self, loop): ...


@pytest.mark.parametrize(
    ("callbacks", "expected"),
    [
        ([], [5, 5]),
        ([Quiet()], [5, 5]),
        ([Loop()], [5, 5]),
        ([Quiet(), Loop(), Each()], [2, 2, 1, 1, 2, 2]),
    ],
)
def test_only_batch_hooks_shorten_the_calls(callbacks, expected, run, calls):
    run(**MANY, callbacks=callbacks)
    assert calls == expected


def test_calls_are_as_long_as_asked_and_end_with_a_pass_of_data(run, calls):
    run(**MANY)
    assert calls == [5, 5]
    calls.clear()
    run(**{**MANY, "epochs": 1}, steps_per_epoch=12)
    assert calls == [5, 5, 2]
    calls.clear()
    run(execution={"steps_per_call": 3}, epochs=1, steps_per_epoch=7)
    assert calls == [3, 2, 2]
    calls.clear()
    run(execution={"steps_per_call": 3}, epochs=2, validation_data=None)
    assert calls == [3, 2, 3, 2]


def watch(seen, every):
    def note(which):
        def hook(loop):
            assert int(loop.state.step) == loop.step
            seen.append((which, loop.step, loop.batch))

        return hook

    return LambdaCallback(
        every_steps=every,
        on_train_batch_begin=note("begin"),
        on_train_batch_end=note("end"),
    )


def test_hooks_see_every_step(run, calls):
    seen = []
    run(**MANY, callbacks=watch(seen, 1))
    expected = []
    for step in range(10):
        expected += [("begin", step, step % 5), ("end", step + 1, step % 5 + 1)]
    assert seen == expected
    assert calls == [1] * 10


def test_hooks_see_the_steps_that_are_multiples(run, calls):
    seen = []
    run(**MANY, callbacks=watch(seen, 3))
    # Counted over the whole training, not anew in each epoch.
    assert seen == [
        ("begin", 0, 0),
        ("end", 3, 3),
        ("begin", 3, 3),
        ("end", 6, 1),
        ("begin", 6, 1),
        ("end", 9, 4),
        ("begin", 9, 4),
    ]
    assert calls == [3, 2, 1, 3, 1]


def test_a_second_fit_goes_on_counting(run, calls):
    seen = []
    run(**{**MANY, "epochs": 1})
    calls.clear()
    run.trainer.fit(
        X, Y, batch_size=SIZE, verbose=0, callbacks=watch(seen, 3), sample_weight=W
    )
    assert seen == [("end", 6, 1), ("begin", 6, 1), ("end", 9, 4), ("begin", 9, 4)]
    assert calls == [1, 3, 1]


def test_hooks_of_different_intervals_each_see_their_own(run, calls):
    by_two, by_three, by_call = [], [], []
    run(
        **{**MANY, "epochs": 1},
        steps_per_epoch=8,
        callbacks=[watch(by_two, 2), watch(by_three, 3), watch(by_call, None)],
    )

    def steps(seen, which):
        return [step for name, step, _ in seen if name == which]

    assert steps(by_two, "end") == [2, 4, 6, 8]
    assert steps(by_two, "begin") == [0, 2, 4, 6]
    assert steps(by_three, "end") == [3, 6]
    assert steps(by_three, "begin") == [0, 3, 6]
    # A segment ends with the pass, after step 5.
    assert steps(by_call, "end") == [2, 3, 4, 5, 6, 8]
    assert steps(by_call, "begin") == [0, 2, 3, 4, 5, 6]
    assert calls == [2, 1, 1, 1, 1, 2]


def test_logs_in_a_hook_are_the_means_so_far(run):
    losses = {}
    for every in (1, 5):
        seen = losses.setdefault(every, {})

        def note(loop, seen=seen):
            seen[loop.step] = loop.logs["loss"]

        _, history = run(
            **MANY, callbacks=LambdaCallback(every_steps=every, on_train_batch_end=note)
        )
        assert [seen[5], seen[10]] == history["loss"]
    assert losses[5] == {step: losses[1][step] for step in (5, 10)}


@pytest.mark.parametrize("every", [0, -1, True, 1.5, "2", [1]])
def test_intervals_that_are_none(every, run):
    before = run.trainer.step
    callback = LambdaCallback(every_steps=every, on_train_batch_end=lambda loop: None)
    with pytest.raises(
        ValueError, match=r"LambdaCallback\.every_steps=.*a whole number of at least 1"
    ):
        run.trainer.fit(X, Y, batch_size=SIZE, callbacks=callback, verbose=0)
    assert run.trainer.step == before


def test_the_host_reads_once_an_epoch_whatever_the_calls(run, monkeypatch):
    for execution in EXECUTIONS[:4]:
        run(execution=execution)
    reads = count_reads(monkeypatch)
    counts = []
    for execution in EXECUTIONS[:4]:
        run.trainer._execution = Execution(**execution)
        reads.clear()
        run.trainer.fit(
            X,
            Y,
            sample_weight=W,
            batch_size=SIZE,
            epochs=4,
            validation_data=(X[:23], Y[:23]),
            verbose=0,
            callbacks=watch_nothing(),
        )
        counts.append(reads.count("get"))
    # One for an epoch, one for its validation, and the step number at the start.
    assert counts == [2 * 4 + 1] * 4


def watch_nothing():
    return LambdaCallback(on_train_batch_end=lambda loop: None)


# ------------------------------------------------------------------- broken off


def press(loop):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_ctrl_c_ends_the_wait_for_a_slow_loader(prefetch, run):
    gate = threading.Event()

    def slow():
        yield X[:SIZE], Y[:SIZE], W[:SIZE]
        for _ in range(1000):
            gate.wait(0.2)
            yield X[:SIZE], Y[:SIZE], W[:SIZE]

    timer = threading.Timer(0.3, press, [None])
    timer.start()
    began = time.perf_counter()
    _, history = run(
        data=slow,
        batch_size=None,
        epochs=1,
        execution={"prefetch": prefetch, "steps_per_call": 1},
    )
    timer.join()
    assert time.perf_counter() - began < 5
    assert history == {}
    assert 1 <= run.trainer.step < 20


@pytest.mark.parametrize("execution", [{}, {"device_data": 0}])
def test_ctrl_c_leaves_no_thread_and_a_state_that_goes_on(execution, run):
    state, history = run(
        execution=execution,
        epochs=1000,
        callbacks=LambdaCallback(
            on_epoch_end=lambda loop: loop.epoch == 2 and press(loop)
        ),
    )
    assert len(history["loss"]) == 3
    assert int(state[3]) == 15


def interrupted_fits(trainer, number, **arguments):
    """Presses Ctrl-C at random moments; returns how many fits ended by it."""
    rng, returned = np.random.default_rng(0), 0
    given = {"batch_size": 8, "verbose": 0, **arguments}
    trainer.fit(X[:64], Y[:64], **given)
    for _ in range(number):
        timer = threading.Timer(rng.uniform(0, 0.04), press, [None])
        before = trainer.step
        try:
            timer.start()
            history = trainer.fit(X[:64], Y[:64], epochs=100_000, **given)
            assert history.stop_reason == "interrupted by Ctrl-C"
            assert trainer.step - before >= 8 * len(history.epoch)
            returned += 1
        except KeyboardInterrupt:
            assert trainer.step == before  # it came before `fit` had begun
        finally:
            timer.join()
        state = trainer.state
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))
        assert int(state.step) == trainer.step
        assert threads() == []
    trainer.fit(X[:64], Y[:64], **given)
    found = trainer.evaluate(X[:64], Y[:64])
    assert np.isfinite(found["loss"])
    return returned


CAMPAIGNS = [
    (1, {}),
    (1, {"device_data": 0}),
    (8, {}),
    (8, {"device_data": 0, "steps_per_call": 2}),
]


@pytest.mark.parametrize(("devices", "execution"), [CAMPAIGNS[1], CAMPAIGNS[2]])
def test_fits_interrupted_at_random_moments(devices, execution):
    trainer = Trainer(nn.Dense(3), optimizer="sgd", devices=devices, **execution)
    assert interrupted_fits(trainer, 30) > 20
    assert trainer.compiles["train"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "execution"), CAMPAIGNS)
@pytest.mark.parametrize("validated", [False, True])
def test_two_hundred_fits_interrupted_at_random_moments(devices, execution, validated):
    trainer = Trainer(Net(), optimizer="sgd", devices=devices, **execution)
    arguments = {"validation_data": (X[:23], Y[:23])} if validated else {}
    assert interrupted_fits(trainer, 200, **arguments) > 150
    assert trainer.compiles["train"] == 1
