"""Every trap of linen, with no argument but the model, against a hand-written step."""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.core
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxfit import DetectionError, Trainer

X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 16).astype(np.int32)


class TrainByDefault(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


class DeterministicByDefault(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(8)(x))
        return nn.Dense(3)(x)


class RunningAverage(nn.Module):
    @nn.compact
    def __call__(self, x, use_running_average):
        x = nn.BatchNorm(use_running_average=use_running_average)(nn.Dense(8)(x))
        return nn.Dense(3)(x)


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, *, training):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not training)(x))


class IsTraining(nn.Module):
    @nn.compact
    def __call__(self, x, is_training: bool = False):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not is_training)(x))


class FlagAsAttribute(nn.Module):
    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=self.deterministic)(x))


class MergedFlag(nn.Module):
    deterministic: bool | None = True

    @nn.compact
    def __call__(self, x, deterministic: bool | None = None):
        off = nn.merge_param("deterministic", self.deterministic, deterministic)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=off)(x))


class Counter(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        started = self.has_variable("counters", "calls")
        calls = self.variable("counters", "calls", lambda: jnp.zeros((), jnp.int32))
        if started and train:
            calls.value += 1
        return nn.Dense(3)(x)


class Sower(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        h = nn.Dense(8)(x)
        self.sow("intermediates", "hidden", h)
        self.sow("losses", "activity", 0.1 * jnp.mean(h**2))
        self.sow("metrics", "mean", jnp.mean(h))
        return nn.Dense(3)(h)


class ReducingSower(nn.Module):
    """A sow that reduces keeps its shape, and still is not state."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(8)(x)
        keep = {"reduce_fn": lambda a, b: a + b, "init_fn": lambda: jnp.zeros(())}
        self.sow("losses", "activity", 0.1 * jnp.mean(h**2), **keep)
        return nn.Dense(3)(h)


class OwnStream(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        if train:
            x += 0.5 * jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(3)(x)


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.SpectralNorm(nn.Dense(3))(x, update_stats=train)


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.relu(x), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        stack = nn.scan(
            _Block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
        )
        x, _ = stack()(x, train)
        return nn.Dense(3)(x)


class PmapAge(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(x)
        return nn.Dense(3)(x)


class _Inner(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.remat(_Inner, static_argnums=(2,))()(x, train)
        return nn.Dense(3)(x)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(nn.GRUCell(8))(x[:, :, None])[:, -1])


class BFloat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)(x)


class Case(NamedTuple):
    """What one would have to know to train a module by hand."""

    module: nn.Module
    train: dict[str, Any] = {}  # noqa: RUF012
    evaluation: dict[str, Any] = {}  # noqa: RUF012
    carried: tuple[str, ...] = ()
    rngs: tuple[str, ...] = ()
    flag: str = "none"


ON, OFF = {"train": True}, {"train": False}
CASES = {
    "train=True by default": Case(
        TrainByDefault(), ON, OFF, ("batch_stats",), ("dropout",), "train="
    ),
    "deterministic=True by default": Case(
        DeterministicByDefault(),
        {"deterministic": False},
        {"deterministic": True},
        rngs=("dropout",),
        flag="deterministic=",
    ),
    "use_running_average": Case(
        RunningAverage(),
        {"use_running_average": False},
        {"use_running_average": True},
        ("batch_stats",),
        flag="use_running_average=",
    ),
    "training, keyword only": Case(
        Training(),
        {"training": True},
        {"training": False},
        rngs=("dropout",),
        flag="training=",
    ),
    "is_training": Case(
        IsTraining(),
        {"is_training": True},
        {"is_training": False},
        rngs=("dropout",),
        flag="is_training=",
    ),
    "flag as attribute": Case(
        FlagAsAttribute(), rngs=("dropout",), flag="attribute deterministic"
    ),
    "flag as argument and attribute": Case(
        MergedFlag(), rngs=("dropout",), flag="deterministic="
    ),
    "custom counter": Case(Counter(), ON, OFF, ("counters",), flag="train="),
    "sown": Case(Sower(), ON, OFF, flag="train="),
    "sown with a reduction": Case(ReducingSower()),
    "stream of its own": Case(OwnStream(), ON, OFF, rngs=("noise",), flag="train="),
    "SpectralNorm": Case(Spectral(), ON, OFF, ("batch_stats",), flag="train="),
    "BatchNorm in nn.scan": Case(Scanned(), ON, OFF, ("batch_stats",), flag="train="),
    "nn.remat": Case(Remat(), ON, OFF, ("batch_stats",), ("dropout",), "train="),
    "nn.RNN": Case(Recurrent()),
    "bfloat16 parameters": Case(BFloat()),
}


def by_hand(case: Case, steps: int) -> dict[str, Any]:
    """Trains as a user of plain Flax would; returns the variables."""
    module = case.module
    if case.flag == "attribute deterministic":
        module = module.clone(deterministic=False)
    if isinstance(module, MergedFlag):
        module = module.clone(deterministic=False)
    root = jax.random.key(0)
    streams = {n: jax.random.fold_in(root, zlib.crc32(n.encode())) for n in case.rngs}
    variables = module.init({**streams, "params": root}, X[:8], **case.train)
    params, carried = variables["params"], {n: variables[n] for n in case.carried}
    tx = optax.sgd(0.1)
    opt_state = tx.init(params)

    def loss_fn(params, carried, x, y, rngs):
        outputs, updated = module.apply(
            {"params": params, **carried},
            x,
            **case.train,
            rngs=rngs,
            mutable=[*case.carried, "losses"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(
            outputs.astype(jnp.float32), y
        ).mean()
        loss += sum(jnp.sum(v) for v in jax.tree.leaves(updated.pop("losses", {})))
        return loss, updated

    for step in range(steps):
        rows = slice(8 * (step % 2), 8 * (step % 2) + 8)
        rngs = {n: jax.random.fold_in(k, step) for n, k in streams.items()}
        (_, carried), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
            params, carried, X[rows], Y[rows], rngs
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return {"params": params, **carried}


def assert_equal(actual, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), **tolerance
        ),
        actual,
        expected,
    )


@pytest.mark.parametrize("name", CASES)
def test_trap_trains_like_a_hand_written_loop(name):
    case = CASES[name]
    # Adam would blow the rounding noise of gradients that are 0 up to full steps.
    trainer = Trainer(case.module, optimizer="sgd", learning_rate=0.1)
    history = trainer.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    detected = trainer._builder.resolved.adapted.detected
    assert (detected.carried, detected.rngs) == (case.carried, case.rngs)
    assert detected.train_flag == case.flag
    assert_equal(trainer.variables, dict(by_hand(case, 4)), rtol=0, atol=1e-6)
    assert np.all(np.isfinite(history.history["loss"]))

    before = jax.device_get(trainer.variables)
    first, second = trainer.evaluate(X, Y), trainer.evaluate(X, Y)
    assert first == second
    jax.tree.map(np.testing.assert_array_equal, trainer.variables, before)
    module = case.module
    outputs = module.apply(trainer.variables, X, **case.evaluation)
    assert_equal(trainer.predict(X), outputs, rtol=0, atol=1e-6)
    assert trainer.compiles == {"train": 1, "eval": 1, "predict": 1}


def test_batch_norm_of_the_pmap_age_equals_the_one_without_axis_name():
    class Today(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(3)(x)

    old, new = Trainer(PmapAge()), Trainer(Today())
    for trainer in (old, new):
        trainer.fit(X, Y, batch_size=8, epochs=2, verbose=0)
    assert old._builder.resolved.adapted.detected.axis_names == ("batch",)
    jax.tree.map(np.testing.assert_array_equal, old.variables, new.variables)


def test_the_unbound_axis_message_of_jax_is_still_understood():
    with pytest.raises(NameError, match=r"unbound axis name:? batch"):
        jax.eval_shape(lambda x: jax.lax.pmean(x, "batch"), jnp.zeros(2))


class _Asks(nn.Module):
    @nn.compact
    def __call__(self, x):
        if self.has_rng("extra"):
            x += 1
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


class _AsksInside(nn.Module):
    inner: nn.Module

    def setup(self):
        self.scale = self.has_rng("scale")

    def __call__(self, x):
        return nn.remat(lambda module, x: module(x))(self.inner, x)


@pytest.mark.parametrize(
    ("module", "asked"),
    [(_Asks(), {"extra"}), (_AsksInside(_Asks()), {"extra", "scale"})],
)
def test_streams_are_noted_and_neither_flax_nor_the_module_is_changed(module, asked):
    from flaxfit._models.linen import _note_streams

    drawn, found, key = set(), set(), jax.random.key(0)
    scope, modules = flax.core.Scope, (module, getattr(module, "inner", module))
    before = vars(scope).copy(), vars(nn.Module).copy()
    with nn.intercept_methods(_note_streams(drawn, found)):
        module.apply({}, X, rngs={"params": key})
    assert (drawn, found) == ({"noise"}, asked)
    assert (vars(scope), vars(nn.Module)) == before
    for each in modules:
        assert "make_rng" not in vars(each) and "has_rng" not in vars(each)


def test_a_stream_drawn_by_a_function_in_a_lifted_transform():
    def noise(module, x):
        return jax.random.normal(module.make_rng("noise"), x.shape)

    class Lifted(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            if train:
                x += nn.remat(noise)(self, x)
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))

    trainer = Trainer(Lifted())
    trainer.fit(X, Y, verbose=0)
    detected = trainer._builder.resolved.adapted.detected
    assert (detected.rngs, detected.eval_rngs) == (("dropout", "noise"), ())


def test_a_stream_that_is_asked_for_is_there_in_training_only():
    class Hinted(nn.Module):
        @nn.compact
        def __call__(self, x):
            if self.has_rng("noise"):
                x = x * 0 + 100 * jax.random.normal(self.make_rng("inner"), x.shape)
            return nn.Dense(3)(x)

    trainer = Trainer(Hinted(), learning_rate=1e-6)
    history = trainer.fit(X, Y, verbose=0).history
    detected = trainer._builder.resolved.adapted.detected
    assert (detected.rngs, detected.eval_rngs) == (("inner", "noise"), ())
    assert history["loss"][0] > 5 > trainer.evaluate(X, Y)["loss"]


def test_an_explicit_params_stream_does_not_swallow_dropout():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = x + jax.random.normal(self.make_rng(), x.shape)
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))

    trainer = Trainer(Both())
    trainer.fit(X, Y, verbose=0)
    detected = trainer._builder.resolved.adapted.detected
    assert (detected.rngs, detected.eval_rngs) == (("dropout", "params"), ("params",))


def test_a_jitted_submodule_makes_no_stream_of_params():
    class Row(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dropout(0.5, deterministic=not train)(x)

    class Jitted(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            return nn.Dropout(0.5, deterministic=not train)(nn.jit(nn.Dense)(3)(x))

    trainer = Trainer(Jitted())
    trainer.fit(X, Y, verbose=0)
    detected = trainer._builder.resolved.adapted.detected
    assert (detected.rngs, detected.eval_rngs) == (("dropout",), ())

    class Unsplit(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.jit(nn.Dense)(3)(x)
            rows = nn.vmap(
                Row,
                variable_axes={"params": None},
                split_rngs={"params": False},
                in_axes=(0, None),
            )
            return rows()(x, train)

    # Plain Flax refuses it; with a stream "params" all rows would share one mask.
    with pytest.raises(flax.errors.InvalidRngError, match='PRNG for "dropout"'):
        Trainer(Unsplit()).fit(X, Y, verbose=0)


def test_flags_as_attributes_are_all_set_beside_an_argument():
    class Both(nn.Module):
        use_running_average: bool = False
        deterministic: bool = True

        @nn.compact
        def __call__(self, x, train: bool = False):
            del train
            x = nn.BatchNorm(use_running_average=self.use_running_average)(x)
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=self.deterministic)(x))

    trainer = Trainer(Both())
    trainer.fit(X, Y, batch_size=8, verbose=0)
    detected = trainer._builder.resolved.adapted.detected
    assert detected.rngs == ("dropout",)
    assert detected.train_flag == (
        "train=, attribute deterministic, attribute use_running_average"
    )
    whole, halves = trainer.predict(X), trainer.predict(X, batch_size=8)
    np.testing.assert_allclose(whole, halves, atol=1e-6)
    assert np.any(trainer.variables["batch_stats"]["BatchNorm_0"]["mean"] != 0)


def test_a_receiver_of_another_name():
    class Odd(nn.Module):
        @nn.compact
        def __call__(me, x):
            return nn.Dense(3)(x)

    assert Trainer(Odd()).predict(X).shape == (len(X), 3)


def test_named_streams_are_given_to_evaluation_only_if_it_draws():
    class Hinted(nn.Module):
        @nn.compact
        def __call__(self, x):
            if self.has_rng("noise"):
                x = x + 9 * jax.random.normal(self.make_rng("noise"), x.shape)
            return nn.Dense(3)(x)

    trainer = Trainer(Hinted(), rngs=["noise"])
    trainer.fit(X, Y, verbose=0)
    np.testing.assert_allclose(
        trainer.predict(X, batch_size=5), trainer.predict(X), atol=1e-6
    )


def test_every_flag_of_the_call_is_set():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False, deterministic: bool = True):
            assert train != deterministic
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=deterministic)(x))

    trainer = Trainer(Two())
    trainer.fit(X, Y, verbose=0)
    assert trainer._builder.resolved.adapted.detected.rngs == ("dropout",)


def test_a_flag_behind_keyword_arguments_can_be_named():
    class Wrapper(nn.Module):
        @nn.compact
        def __call__(self, *args, **kwargs):
            return Training()(*args, **kwargs)

    trainer = Trainer(Wrapper(), train_flag="training")
    trainer.fit(X, Y, verbose=0)
    assert trainer._builder.resolved.adapted.detected.rngs == ("dropout",)


@pytest.mark.parametrize("mode", [True, False])
def test_values_sown_in_one_mode_only(mode):
    class Moody(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            if train == mode:
                self.sow("losses", "extra", jnp.float32(5.0))
                self.sow("metrics", "seen", jnp.float32(7.0))
            return nn.Dense(3)(x)

    trainer = Trainer(Moody())
    history = trainer.fit(X, Y, epochs=2, validation_data=(X, Y), verbose=0).history
    seen = ["seen"] if mode else ["val_seen"]
    assert [name for name in history if "seen" in name] == seen
    assert history[seen[0]] == [7.0, 7.0]
    assert abs(history["loss"][1] - history["val_loss"][1]) > 4
    assert trainer.compiles == {"train": 1, "eval": 1, "predict": 0}


def test_only_sown_losses_and_only_in_training():
    class Alone(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            h = nn.Dense(3)(x)
            if train:
                self.sow("losses", "size", jnp.mean(h**2))
            return h

    trainer = Trainer(Alone(), loss=None, learning_rate=0.1)
    history = trainer.fit(X, epochs=20, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert trainer.evaluate(X) == {}


def test_sown_metrics_never_replace_a_log():
    class Rude(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("loss", "accuracy", "learning_rate", "val_loss"):
                self.sow("metrics", name, jnp.float32(123.0))
            return nn.Dense(3)(x)

    trainer = Trainer(Rude(), metrics=["accuracy"])
    history = trainer.fit(X, Y, validation_data=(X, Y), verbose=0).history
    assert history["loss"][0] < 10 and history["val_loss"][0] < 10
    assert history["accuracy"][0] <= 1
    assert history["learning_rate"] == [pytest.approx(1e-3)]
    assert history["metrics/loss"] == history["metrics/accuracy"] == [123.0]


def test_sown_losses_join_the_loss_and_sown_metrics_are_logged():
    trainer = Trainer(Sower())
    trainer.fit(X, Y, batch_size=8, epochs=1, shuffle=False, verbose=0)
    values = trainer.evaluate(X, Y, batch_size=16)
    outputs, sown = Sower().apply(
        trainer.variables, X, mutable=["losses", "metrics", "intermediates"]
    )
    expected = optax.softmax_cross_entropy_with_integer_labels(outputs, Y).mean()
    expected += sown["losses"]["activity"][0]
    np.testing.assert_allclose(values["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(values["mean"], sown["metrics"]["mean"][0], rtol=1e-5)
    hidden = trainer.predict_intermediates(X)["hidden"][0]
    np.testing.assert_allclose(hidden, sown["intermediates"]["hidden"][0], rtol=1e-6)


class _SowingBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(4)(x)
        self.sow("losses", "balance", jnp.mean(x**2))
        self.sow("metrics", "scale", jnp.mean(jnp.abs(x)))
        return x, None


class ScannedSower(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "losses": 0, "metrics": 0}
        stack = nn.scan(
            _SowingBlock, axes, split_rngs={"params": True}, length=self.layers
        )
        x, _ = stack()(x, None)
        self.sow("losses", "norm", jnp.mean(x**2, axis=1))
        self.sow("losses", "norm", 0.5 * jnp.mean(x**2, axis=1))
        return nn.Dense(3)(x)


@pytest.mark.parametrize("rows", [4, 16])
def test_a_stack_of_sown_losses_is_not_taken_for_a_batch(rows):
    model = ScannedSower(layers=4)
    trainer = Trainer(model, variables=model.init(jax.random.key(0), X))
    values = trainer.evaluate(X, Y, batch_size=rows)
    variables = {"params": trainer.variables["params"]}
    outputs, sown = model.apply(variables, X, mutable=["losses", "metrics"])
    losses = jax.tree.leaves(sown["losses"])
    expected = optax.softmax_cross_entropy_with_integer_labels(outputs, Y).mean()
    expected += sum(np.sum(v) if v.shape == (4,) else np.mean(v) for v in losses)
    np.testing.assert_allclose(values["loss"], expected, rtol=1e-5)
    (scale,) = jax.tree.leaves(sown["metrics"])
    np.testing.assert_allclose(values["scale"], scale.mean(), rtol=1e-5)


def test_complex_parameters_descend():
    class Complex(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, param_dtype=jnp.complex64, dtype=jnp.complex64)(x)

    targets = (X @ np.array([1 + 2j, -1j, 0.5, 2 - 1j], np.complex64))[:, None]
    trainer = Trainer(Complex(), optimizer="sgd", learning_rate=0.1)
    history = trainer.fit(
        X.astype(np.complex64), targets, batch_size=16, epochs=200, verbose=0
    )
    # Without the conjugate the imaginary part would climb instead.
    assert history.history["loss"][-1] < 1e-3 * history.history["loss"][0]
    kernel = trainer.variables["params"]["Dense_0"]["kernel"]
    assert kernel.dtype == jnp.complex64


def test_tuple_and_dict_outputs_are_paired_with_their_targets():
    class Two(nn.Module):
        named: bool

        @nn.compact
        def __call__(self, x):
            kind, size = nn.Dense(3, name="kind")(x), nn.Dense(1, name="size")(x)
            return {"kind": kind, "size": size} if self.named else (kind, size)

    sizes = X[:, :1]
    for named, targets in ((False, (Y, sizes)), (True, {"kind": Y, "size": sizes})):
        trainer = Trainer(Two(named))
        history = trainer.fit(X, targets, epochs=1, batch_size=8, verbose=0).history
        losses = [name for name in history if name.endswith("_loss")]
        assert losses == (["kind_loss", "size_loss"] if named else ["0_loss", "1_loss"])
        np.testing.assert_allclose(
            history["loss"], [sum(history[n][0] for n in losses)], rtol=1e-6
        )
        values = trainer.evaluate(X, targets)
        outputs = trainer.predict(X)
        kind, size = (outputs["kind"], outputs["size"]) if named else outputs
        cross = optax.softmax_cross_entropy_with_integer_labels(kind, Y).mean()
        np.testing.assert_allclose(
            values["loss"], cross + np.mean((size - sizes) ** 2), rtol=1e-5
        )


def test_two_inputs_by_name_with_integer_tokens():
    class TwoTowers(nn.Module):
        @nn.compact
        def __call__(self, input_ids, attention_mask, train: bool = False):
            x = nn.Embed(7, 4)(input_ids) * attention_mask[..., None]
            x = nn.Dropout(0.5, deterministic=not train)(x.mean(axis=1))
            return nn.Dense(3)(x)

    rng = np.random.default_rng(0)
    data = {
        "attention_mask": np.ones((16, 5), np.float32),
        "input_ids": rng.integers(0, 7, (16, 5)),
        "label": Y,
    }
    trainer = Trainer(TwoTowers())
    trainer.fit(data, epochs=1, batch_size=8, verbose=0)
    by_keyword = trainer.predict(data)
    outputs = TwoTowers().apply(
        trainer.variables, data["input_ids"], data["attention_mask"]
    )
    np.testing.assert_allclose(by_keyword, outputs, atol=1e-6)
    by_position = trainer = Trainer(TwoTowers())
    by_position.fit(
        (data["input_ids"], data["attention_mask"]),
        Y,
        epochs=1,
        batch_size=8,
        verbose=0,
    )


@pytest.mark.parametrize("layer", [lambda: nn.BatchNorm(), lambda: nn.Dropout(0.5)])
def test_a_layer_with_a_mode_and_no_flag_is_an_error(layer: Callable[[], nn.Module]):
    model = nn.Sequential([nn.Dense(3), layer()])
    with pytest.raises(DetectionError, match=r'train_flag="layers"'):
        Trainer(model).fit(X, Y, verbose=0)


def test_a_fixed_mode_without_a_flag_is_an_error_unless_it_is_said():
    model = nn.Sequential([nn.Dense(3), nn.Dropout(0.5, deterministic=False)])
    with pytest.raises(DetectionError, match="contains Dropout, but nothing tells"):
        Trainer(model).fit(X, Y, verbose=0)
    Trainer(model, train_flag=None).fit(X, Y, verbose=0)


def test_layers_sets_the_flag_of_a_sequential():
    model = nn.Sequential([nn.Dense(8), nn.BatchNorm(), nn.Dropout(0.5), nn.Dense(3)])
    trainer = Trainer(model, train_flag="layers")
    trainer.fit(X, Y, batch_size=8, epochs=1, verbose=0)
    mean = trainer.variables["batch_stats"]["layers_1"]["mean"]
    assert np.any(mean != 0)
    np.testing.assert_array_equal(trainer.predict(X), trainer.predict(X))


def test_a_flag_of_another_name_can_be_named():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x, frozen):
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=frozen)(x))

    trainer = Trainer(Odd(), train_flag="not frozen")
    trainer.fit(X, Y, batch_size=8, epochs=1, verbose=0)
    expected = Odd().apply(trainer.variables, X, frozen=True)
    np.testing.assert_allclose(trainer.predict(X), expected, atol=1e-6)
    with pytest.raises(DetectionError, match="has no such argument"):
        Trainer(Odd(), train_flag="froze").fit(X, Y, verbose=0)


def test_a_function_can_choose_the_module_of_a_mode():
    trainer = Trainer(
        FlagAsAttribute(),
        train_flag=lambda module, train: module.clone(deterministic=not train),
    )
    trainer.fit(X, Y, batch_size=8, epochs=1, verbose=0)
    assert trainer._builder.resolved.adapted.detected.rngs == ("dropout",)


def test_collections_and_rngs_can_be_said():
    trainer = Trainer(Counter(), collections=[], rngs=["extra"])
    trainer.fit(X, Y, batch_size=8, epochs=1, verbose=0)
    assert trainer.state.collections == {}
    assert trainer._builder.resolved.adapted.detected.rngs == ("extra",)
    with pytest.raises(DetectionError, match="init makes no 'ema'"):
        Trainer(Counter(), collections=["ema"]).fit(X, Y, verbose=0)


def test_fp8_scales_are_replaced_by_their_gradient():
    """`_overwrite_with_gradient`: state that flax's fp8 layers set by its gradient."""

    class Fp8(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)(x)

    x = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    trainer = Trainer(Fp8(), optimizer="sgd", learning_rate=0.1)
    trainer.fit(x, x / 2, batch_size=16, epochs=3, shuffle=False, verbose=0)

    name = "_overwrite_with_gradient"
    variables = Fp8().init(jax.random.key(0), x)
    params, scales = variables["params"], variables[name]

    @jax.jit
    def gradients(params, scales):
        def loss(both):
            outputs = Fp8().apply({"params": both[0], name: both[1]}, x)
            return jnp.mean((outputs - x / 2) ** 2)

        return jax.grad(loss)((params, scales))

    for _ in range(3):
        grads, scales = gradients(params, scales)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert_equal(trainer.variables, {"params": params, name: scales}, atol=1e-6)


def test_initial_parameters_are_those_of_module_init():
    trainer = Trainer(TrainByDefault(), seed=3)
    state = trainer.init((X[:8], Y[:8]))
    rngs = {"params": jax.random.key(3), "dropout": jax.random.key(0)}
    expected = TrainByDefault().init(rngs, X[:8])["params"]
    # XLA may round the last bit otherwise where it compiles other code around it.
    close = functools.partial(np.testing.assert_allclose, rtol=2.5e-7, atol=0)
    jax.tree.map(close, state.params, expected)
    again = Trainer(TrainByDefault(), seed=3).init((X[:8], Y[:8]))
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
