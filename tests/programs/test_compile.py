"""The programs: one trace for any number of steps, and what runs one by one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.asserts import moved, same
from helpers.data import labeled
from helpers.models import Net

from flaxfit import LambdaCallback, Trainer
from flaxfit._core.types import Average, Batch
from flaxfit._loops.feeder import Execution
from flaxfit._programs.chunks import DeviceDataset, Stack, batch_at
from flaxfit._programs.compile import (
    Program,
    empty_accumulators,
    listening,
    noting,
    preflight,
)
from flaxfit._programs.placement import find_placement

X, Y = labeled(64)
IMAGES = np.random.default_rng(1).normal(size=(64, 8, 8, 1)).astype(np.float32)


# -------------------------------------------------------- the fused program


@pytest.fixture(scope="module")
def resolved():
    """A trainer's parts, a state, and all batches in the three forms."""
    trainer = Trainer(Net(), optimizer="sgd", learning_rate=0.1)
    batches = [
        Batch((X[rows],), Y[rows], np.ones(8, np.float32))
        for rows in np.arange(64).reshape(8, 8)
    ]
    stack = Stack(jax.tree.map(lambda *leaves: np.stack(leaves), *batches))
    data = Batch((X,), Y, np.ones(64, np.float32))
    resident = DeviceDataset(data, np.arange(64, dtype=np.int32).reshape(8, 8))
    state = trainer.init(batches[0])
    return trainer._builder.resolved, state, batches, stack, resident


def steps_of(trainer_built, state, segment, counts):
    """Runs calls of so many steps; returns the last state and what accumulated."""
    running, start = trainer_built.empty(), 0
    state = jax.tree.map(jnp.copy, state)
    for count in counts:
        state, running = trainer_built.programs.train(
            state, running, segment, start, count
        )
        start += count
    return state, running


@pytest.mark.parametrize("form", ["stack", "resident"])
def test_one_trace_for_any_number_of_steps_and_the_same_bits(resolved, form):
    parts, state, batches, stack, resident = resolved
    segment = stack if form == "stack" else resident
    before = parts.programs.train.traces
    results = [
        steps_of(parts, state, segment, counts)
        for counts in ([8], [1] * 8, [3, 5], [1, 2, 3, 2], [7, 1])
    ]
    assert parts.programs.train.traces == before + 1
    for result, running in results:
        assert int(running.index) == 8
        assert int(result.step) == 8
        same(moved(result), moved(results[0][0]))
        same(running.logs, results[0][1].logs)
    # And the same as steps on batches of their own.
    alone, running = jax.tree.map(jnp.copy, state), parts.empty()
    for batch in batches:
        alone, running = parts.programs.train(alone, running, batch, 0, 1)
    same(moved(alone), moved(results[0][0]))
    same(running.logs, results[0][1].logs)
    # And as the public step.
    public = state
    for batch in batches:
        public, logs = parts.programs.step(public, batch)
    same(moved(public), moved(alone))
    assert isinstance(logs["loss"], Average)


def test_the_state_is_donated_and_the_public_step_s_is_not(resolved):
    parts, state, batches, *_ = resolved
    given = jax.tree.map(jnp.copy, state)
    parts.programs.train(given, parts.empty(), batches[0], 0, 1)
    assert given.params["Dense_0"]["kernel"].is_deleted()
    parts.programs.step(state, batches[0])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_evaluation_in_one_call_and_batch_by_batch(resolved):
    parts, state, batches, stack, resident = resolved
    evaluate = parts.programs.evaluate
    by_batch = parts.empty_eval()
    for batch in batches:
        by_batch = evaluate(state, by_batch, batch, 0, 1)
    for segment in (stack, resident):
        at_once = evaluate(state, parts.empty_eval(), segment, 0, 8)
        in_two = evaluate(state, parts.empty_eval(), segment, 0, 3)
        in_two = evaluate(state, in_two, segment, 3, 5)
        same(at_once, in_two)
        same(at_once, by_batch)
    outputs = Net().apply({"params": state.params, **state.collections}, X, train=False)
    logits = jax.nn.log_softmax(outputs)
    expected = -np.mean(np.asarray(logits)[np.arange(64), Y])
    np.testing.assert_allclose(by_batch.logs["loss"].compute(), expected, rtol=1e-6)


def test_prediction_writes_the_batches_asked_for(resolved):
    parts, state, batches, stack, _ = resolved
    assert not parts.programs.one_step_per_call
    predict = parts.programs.predict
    expected = (
        Net()
        .apply({"params": state.params, **state.collections}, X, train=False)
        .reshape(8, 8, 3)
    )
    before = predict.traces
    for start, count in ((0, 8), (2, 3), (7, 1)):
        outputs = predict(state, stack, start, count, start)
        asked = slice(start, start + count)
        assert outputs.shape == (8, 8, 3)
        np.testing.assert_allclose(outputs[asked], expected[asked], atol=1e-6)
        assert not np.any(np.delete(outputs, np.arange(8)[asked], axis=0))
    assert predict.traces == before + 1
    np.testing.assert_allclose(
        predict(state, batches[4], 0, 1, 4), expected[4], atol=1e-6
    )


def test_randomness_of_evaluation_follows_the_batch_s_number():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3)(x)
            return x + jax.random.normal(self.make_rng("noise"), x.shape)

    outputs, trainer = [], Trainer(Noisy())
    x = np.zeros((32, 5), np.float32)
    for execution in (Execution(), Execution(steps_per_call=1)):
        trainer._execution = execution
        outputs.append(trainer.predict(x, batch_size=8))
    trainer._execution = Execution(prefetch=0)
    outputs.append(trainer.predict(iter(x.reshape(4, 8, 5))))
    same(outputs[0], outputs[1])
    same(outputs[0], outputs[2])
    four = outputs[0].reshape(4, 8, 3)
    assert not np.array_equal(four[0], four[1])


# ------------------------------------------------------------- batch_at


def test_batch_at_reads_fill_as_weight_0():
    data = Batch({"a": X[:6]}, Y[:6], np.arange(1, 7, dtype=np.float32))
    data = jax.tree.map(jnp.asarray, data)
    order = jnp.array([[0, 3, 5], [4, ~0, ~3]], jnp.int32)
    resident = DeviceDataset(data, order)
    first, second = batch_at(resident, 0), batch_at(resident, 1)
    same(first, Batch({"a": X[[0, 3, 5]]}, Y[[0, 3, 5]], np.float32([1, 4, 6])))
    same(second, Batch({"a": X[[4, 0, 3]]}, Y[[4, 0, 3]], np.float32([5, 0, 0])))
    wide = data.replace(weights=jnp.ones((6, 2), jnp.float32))
    weights = batch_at(DeviceDataset(wide, order), 1).weights
    same(weights, np.float32([[1, 1], [0, 0], [0, 0]]))
    same(batch_at(first, 0), first)


# --------------------------------------------------- what must run one by one


def conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def own_gradient(x, kernel):
    return x * kernel.sum()


def _forward(x, kernel):
    return own_gradient(x, kernel), (x, kernel)


def _backward(residuals, gradient):
    x, kernel = residuals
    return jax.vjp(conv, x, kernel)[1](gradient)


own_gradient.defvjp(_forward, _backward)


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(1, (3, 3))(x)


class Carrying(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Conv(1, (3, 3))(x), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Carrying, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers()(x, None)[0]


KERNEL = np.ones((3, 3, 1, 1), np.float32)
IN_DISGUISE = {
    "plain": lambda x: conv(x, KERNEL),
    "jit": lambda x: jax.jit(conv)(x, KERNEL),
    "remat": lambda x: jax.checkpoint(conv)(x, KERNEL),
    "cond": lambda x: jax.lax.cond(x.sum() > 0, lambda: conv(x, KERNEL), lambda: x),
    "while": lambda x: jax.lax.while_loop(
        lambda x: x.sum() < 0, lambda x: conv(x, KERNEL), x
    ),
    "scan": lambda x: jax.lax.scan(
        lambda x, _: (conv(x, KERNEL), None), x, None, length=2
    )[0],
    "vmap": lambda x: jax.vmap(lambda one: conv(one[None], KERNEL)[0])(x),
}


@pytest.mark.parametrize("name", IN_DISGUISE)
def test_convolutions_are_found_wherever_they_are(name):
    found = preflight(lambda x: {"loss": IN_DISGUISE[name](x)}, IMAGES[:2])
    assert found.convolves
    assert not found.calls_host
    assert found.logs["loss"].shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
    "module", [Conv(), nn.remat(Conv)(), Scanned(), nn.ConvTranspose(1, (3, 3))]
)
def test_convolutions_of_modules_are_found_in_their_gradient(module):
    params = jax.eval_shape(module.init, jax.random.key(0), IMAGES[:2])

    def step(params, x):
        return None, jax.grad(lambda p: module.apply(p, x).sum())(params)

    assert preflight(step, params, IMAGES[:2]).convolves


def test_convolutions_of_a_gradient_alone_are_found():
    def forward(x):
        return own_gradient(x, jnp.asarray(KERNEL)).sum()

    assert not preflight(lambda x: {"a": forward(x)}, IMAGES[:2]).convolves
    assert preflight(lambda x: {"a": jax.grad(forward)(x)}, IMAGES[:2]).convolves


def prints(x):
    jax.debug.print("{}", x.sum())
    return x


def calls_back(x):
    jax.debug.callback(lambda value: None, x.sum())
    return x


def pure(x):
    return jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def io(x):
    from jax.experimental import io_callback

    return io_callback(lambda a: a, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@pytest.mark.parametrize("function", [prints, calls_back, pure, io])
@pytest.mark.parametrize("inside", ["plain", "scan", "remat"])
def test_calls_of_the_host_are_found(function, inside):
    wrapped = {
        "plain": function,
        "scan": lambda x: jax.lax.scan(
            lambda x, _: (function(x), None), x, None, length=2
        )[0],
        "remat": jax.checkpoint(function),
    }[inside]
    found = preflight(lambda x: {"loss": wrapped(x)}, X[:2])
    assert found.calls_host
    assert not found.convolves


def test_a_dense_step_is_neither():
    found = preflight(lambda x: {"loss": jnp.tanh(x @ x.T)}, X[:2])
    assert not found.convolves
    assert not found.calls_host


class Digits(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3)(x.reshape(len(x), -1))


class Debugged(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(x)
        jax.debug.callback(lambda value: None, x.sum())
        return x


@pytest.mark.parametrize(
    ("model", "x", "single"),
    [(Digits(), IMAGES, True), (Debugged(), X, True), (Net(), X, False)],
)
def test_which_models_run_one_by_one(model, x, single):
    trainer = Trainer(model)
    for parts in (
        trainer._builder.build(Batch((x,), Y, np.ones(64, np.float32))),
        Trainer(model)._builder.build_for_inputs(
            Batch((x,), None, np.ones(64, np.float32))
        ),
    ):
        assert parts.programs.one_step_per_call == single
    assert trainer.compiles == {"train": 0, "eval": 0, "predict": 0}


def count_calls(monkeypatch):
    """Notes `(program, steps)` of every call."""
    calls = []
    original = Program.__call__

    def counted(self, *args):
        if self.name in ("train step", "eval step"):
            calls.append((self.name, args[-1]))
        return original(self, *args)

    monkeypatch.setattr(Program, "__call__", counted)
    return calls


@pytest.mark.parametrize("execution", [{"steps_per_call": 5}, {"device_data": 0}])
def test_a_convolutional_net_trains_all_its_steps_one_by_one(execution, monkeypatch):
    calls = count_calls(monkeypatch)
    x, y = IMAGES[:60], Y[:60]
    trainer = Trainer(Digits(), optimizer="sgd", learning_rate=0.1, **execution)
    history = trainer.fit(
        x, y, batch_size=8, epochs=3, validation_data=(x, y), verbose=0
    )
    assert calls.count(("train step", 1)) == 3 * 8
    assert calls.count(("eval step", 1)) == 3 * 8
    assert len(calls) == 6 * 8
    assert int(trainer.state.step) == trainer.step == 24
    assert trainer.compiles == {"train": 1, "eval": 1, "predict": 0}
    losses = history.history["loss"]
    assert losses[2] < losses[0]
    predicted = trainer.predict(x[:21], batch_size=8)
    expected = Digits().apply(trainer.variables, x[:21], train=False)
    np.testing.assert_allclose(predicted, expected, atol=1e-5)


def test_a_model_that_calls_the_host_in_training_is_called_once_a_step():
    seen = []

    class Told(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.Dense(3)(x)
            if train:
                jax.debug.callback(lambda s: seen.append(float(s)), x.sum())
            return x

    trainer = Trainer(Told(), optimizer="sgd", learning_rate=1e-9)

    def forget(loop):
        jax.effects_barrier()
        seen.clear()  # what `init` said

    trainer.fit(
        X,
        Y,
        batch_size=16,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=LambdaCallback(on_train_begin=forget),
    )
    jax.effects_barrier()
    assert trainer.step == 8
    sums = [
        float(Told().apply(trainer.variables, X[i : i + 16], train=False).sum())
        for i in range(0, 64, 16)
    ]
    np.testing.assert_allclose(seen, sums * 2, rtol=1e-4, atol=1e-4)


def test_a_model_that_calls_the_host_in_evaluation_only_predicts_as_before():
    """Programs for prediction are kept once there are targets; they stay what they
    are, whether a call of theirs runs one batch or several."""

    class Told(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.Dense(3)(x)
            if not train:
                jax.debug.callback(lambda s: None, x.sum())
            return x

    trainer = Trainer(Told(), optimizer="sgd", learning_rate=1e-9)
    before = trainer.predict(X, batch_size=8)
    trainer.fit(X, Y, batch_size=8, verbose=0)
    after = trainer.predict(X, batch_size=8)
    assert after.shape == before.shape == (64, 3)
    np.testing.assert_allclose(after, before, atol=1e-6)


# ------------------------------------------------------------------ Program


class Told:
    def __init__(self):
        self.heard = []

    def compiling(self, program):
        self.heard.append(("compiling", program.name))

    def compiled(self, program, seconds):
        assert seconds > 0
        self.heard.append(("compiled", program.name))


def test_a_program_counts_its_traces_and_tells_of_them():
    program, listener = Program("double", noting(lambda x: 2 * x)), Told()
    with listening(listener):
        for shape in ((3,), (3,), (4,), (3,), (5,)):
            same(program(np.ones(shape, np.float32)), np.full(shape, 2, np.float32))
    assert program.traces == 3
    assert [s[0].shape for s in program.signatures] == [(4,), (5,)]
    assert listener.heard == [("compiling", "double"), ("compiled", "double")] * 3
    program(np.ones(6, np.float32))
    assert len(listener.heard) == 6


def test_counting_flops_is_no_compile_and_hides_none():
    program, listener = Program("matmul", noting(jnp.matmul)), Told()
    a, b = np.ones((8, 16), np.float32), np.ones((16, 32), np.float32)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (a, b))
    by_hand = pytest.approx(2 * 8 * 16 * 32, rel=0.1)
    with listening(listener):
        found = program.analyze(a, b)
        assert program.flops(shapes) == by_hand
        assert program.traces == 0
        assert program.signatures == ()
        program(a, b)
        assert program.traces == 1
        assert program.flops(shapes) == by_hand
    assert found["flops"] == by_hand
    assert found["bytes"] == 4 * (8 * 16 + 16 * 32 + 8 * 32)
    assert listener.heard == [("compiling", "matmul"), ("compiled", "matmul")]


def test_a_check_before_the_fit_hides_no_compile():
    trainer = Trainer(nn.Dense(3), device_data=0, prefetch=0)
    trainer.check(X, Y, batch_size=16)
    timing = trainer.fit(X, Y, batch_size=16, verbose=0).timing
    assert trainer.compiles["train"] == 1
    assert timing.flops_per_second[0] > 0


def test_a_program_that_must_be_waited_for_is_ready_when_it_returns():
    power = noting(lambda x: jnp.linalg.matrix_power(x, 64))
    program = Program("slow", power, wait=True)
    assert program(np.eye(200, dtype=np.float32)).is_ready()


def test_empty_running_has_buffers_of_its_own():
    logs = {"loss": Average.empty()}
    shapes = jax.eval_shape(lambda: logs)
    placement = find_placement(1)
    one, two = (
        empty_accumulators(shapes, placement),
        empty_accumulators(shapes, placement),
    )
    assert int(one.index) == 0
    assert one.index.dtype == jnp.int32
    pointers = {
        leaf.unsafe_buffer_pointer()
        for running in (one, two)
        for leaf in jax.tree.leaves(running)
    }
    assert len(pointers) == 14
