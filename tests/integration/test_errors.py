"""Wrong input, as users give it: what is said, and that the trainer is unharmed."""

import contextlib
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

from flaxfit import (
    Callback,
    CheckpointError,
    DataError,
    DetectionError,
    EarlyStopping,
    LambdaCallback,
    Loss,
    Trainer,
)

ROWS = 32  # the default batch size: streams and arrays share one program
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 4)).astype(np.float32)
LABELS = (np.arange(ROWS) % 3).astype(np.int32)
VALUES = X[:, :1].copy()
BITS = (np.arange(ROWS) % 2).astype(np.int32)[:, None]
ONE_HOT = np.eye(3, dtype=np.float32)[LABELS]
TOKENS = RNG.integers(0, 5, size=(ROWS, 6)).astype(np.int32)
ONES = np.ones(ROWS, np.float32)


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.Dense(3)(nn.Embed(5, 4)(ids).mean(axis=1))


class Pair(nn.Module):
    @nn.compact
    def __call__(self, a, b):
        return nn.Dense(3)(jnp.concatenate([a, b], axis=-1))


class Unflagged(nn.Module):
    """BatchNorm, and nothing that says whether it trains."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=False)(x))


class Kind(NamedTuple):
    """A model, its loss, and data that suits it."""

    model: nn.Module
    x: Any
    y: Any
    loss: Any = "auto"


KINDS = {
    "classes": Kind(nn.Dense(3), X, LABELS),
    "one-hot": Kind(nn.Dense(3), X, ONE_HOT, "categorical_crossentropy"),
    "values": Kind(nn.Dense(1), X, VALUES),
    "binary": Kind(nn.Dense(1), X, BITS),
    "tokens": Kind(Tokens(), TOKENS, LABELS),
    "pair": Kind(Pair(), (X, X), LABELS),
}


class Case(NamedTuple):
    """A wrong call, and what it answers; `trained` if it says something else then."""

    name: str
    call: Callable[[Trainer], Any]
    error: type[Exception] | tuple[type[Exception], ...]
    text: str
    kind: str = "classes"
    trained: str | None = None


def with_value(array, value, place=5):
    changed = array.copy()
    changed.flat[place] = value
    return changed


def label(value, dtype=np.int64):
    return with_value(LABELS.astype(dtype), value, 2)


def batches(count=2):
    for _ in range(count):
        yield X, LABELS


def fits(*args, **options):
    return lambda trainer: trainer.fit(*args, verbose=0, **options)


class Misspelt(Callback):
    def on_epoch_ends(self, loop):
        raise AssertionError("never called")


class KerasStyle(Callback):
    def on_epoch_end(self, epoch, logs=None):
        raise AssertionError("never called")


IGNORE = r"Write loss=Loss\('softmax_cross_entropy_with_integer_labels', ignore_label="
BUILT_FOR = "make a new Trainer"
VALIDATE = {"validation_data": (X, LABELS)}

# --------------------------------------------------------------- labels and targets
TARGETS = [
    Case("label is classes", fits(X, label(3)), DataError, "hold 3 at row 2; 3 outputs"
         r" allow 0\.\.2\. Give the model 4 outputs"),
    Case("label 255", fits(X, label(255)), DataError, IGNORE + "255"),
    Case("uint8 label 255", fits(X, label(255, np.uint8)), DataError, IGNORE + "255"),
    Case("label -4", fits(X, label(-4)), DataError, IGNORE + "-4"),
    Case("label -1", fits(X, label(-1)), DataError, IGNORE + "-1"),
    Case("labels from 1", fits(X, LABELS + 1), DataError, "start at 1. Write y - 1"),
    Case("label beyond the first batch", fits(X, with_value(LABELS, 7, -1),
         batch_size=2), DataError, "hold 7 at row 31"),
    Case("label in evaluate", lambda t: t.evaluate(X, label(3)), DataError, "hold 3"),
    Case("label in train_on_batch", lambda t: t.train_on_batch(X, label(3)), DataError,
         "hold 3 at row 2"),
    Case("label in test_on_batch", lambda t: t.test_on_batch(X, label(-1)), DataError,
         IGNORE),
    Case("label in init", lambda t: t.init((X, label(3))), DataError,
         "hold 3 at row 2"),
    Case("label in validation_data", fits(X, LABELS, validation_data=(X, label(3))),
         DataError, "(?s)hold 3 at row 2.*in validation_data"),
    Case("label of 64 bits", fits(X, label(2**32 + 5)), DataError,
         "y is int64 and holds 4294967301, which int32 cannot .*jax_enable_x64"),
    Case("(n, 1) labels", fits(X, LABELS[:, None]), ValueError, r"[wW]rite y\[:, 0\]"),
    Case("float labels", fits(X, LABELS.astype(np.float32)), DetectionError,
         r"Write y\.astype\('int32'\)",
         trained=r"Got targets float32\[32\]; this trainer was built for int32\[32\]"),
    Case("one-hot integers", fits(X, ONE_HOT.astype(np.int32)), DetectionError,
         "Write loss='softmax_cross_entropy' for one-hot labels",
         trained=r"Got targets int32\[32,3\]"),
    Case("one-hot of a label out of range", fits(X, with_value(ONE_HOT, 0, 0)),
         DataError, r"only zeros at row 0; .*pass the labels themselves, "
         r"y\.astype\('int32'\)", "one-hot"),
    Case("integer labels for a one-hot loss", fits(X, LABELS), ValueError,
         "Write loss='softmax_cross_entropy_with_integer_labels'", "one-hot",
         trained=r"Got targets int32\[32\]"),
    Case("(n,) for (n, 1)", fits(X, VALUES[:, 0]), ValueError, r"[wW]rite y\[:, None\]",
         "values"),
    Case("(n,) labels for one output", fits(X, BITS[:, 0]), ValueError,
         r"[wW]rite y\[:, None\]", "binary"),
    Case("binary labels 0 and 2", fits(X, BITS * 2), DataError,
         "hold 2 at row 1; .* takes 0 to 1. Write y == positive", "binary"),
    Case("binary labels -1 and 1", fits(X, BITS * 2 - 1), DataError,
         r"Write \(y \+ 1\) / 2", "binary"),
    Case("no targets", fits(X), DetectionError,
         r"There are no targets .*Write fit\(x, y\)",
         trained=r"Got targets none; .*Pass \(x, y\)"),
    Case("no targets to evaluate", lambda t: t.evaluate(X), DetectionError,
         "There are no targets", trained=r"Pass \(x, y\)"),
    Case("no targets in validation_data", fits(X, LABELS, validation_data=X), DataError,
         r"(?s)Got targets none; .*Pass \(x, y\).*in validation_data"),
    Case("strings as labels", fits(X, list(LABELS.astype(str))), DataError,
         r"y has dtype <U1.*np\.unique\(labels, return_inverse=True\)\[1\]"),
    Case("NaN in y", fits(X, with_value(VALUES, np.nan)), DataError,
         "y holds nan at row 5: .*a target of weight 0 does not count", "values"),
    Case("Inf in y beyond the first batch",
         fits(X, with_value(VALUES, np.inf), batch_size=2), DataError,
         "y holds inf at row 5", "values"),
]  # fmt: skip

# -------------------------------------------------------------------------- inputs
INPUTS = [
    Case("NaN in x", fits(with_value(X, np.nan), LABELS), DataError,
         r"x holds nan at row 1: .*np\.nan_to_num\(x\)"),
    Case("Inf in x beyond the first batch",
         fits(with_value(X, np.inf, 30), LABELS, batch_size=2), DataError,
         "x holds inf at row 7"),
    Case("NaN in train_on_batch", lambda t: t.train_on_batch(with_value(X, np.nan),
         LABELS), DataError, "x holds nan at row 1"),
    Case("too large for float32", fits(X.astype(np.float64) * 1e300, LABELS), DataError,
         "x holds -?inf at row 0"),
    Case("token out of range", fits(with_value(TOKENS, 5), LABELS), DataError,
         r"x holds the token 5 at row 0; the model's nn\.Embed has 5 rows, 0\.\.4.*"
         r"Write nn\.Embed\(6, \.\.\.\)", "tokens"),
    Case("token below 0", fits(with_value(TOKENS, -1), LABELS), DataError,
         r"the token -1 .*For padding write np\.maximum\(x, 0\)", "tokens"),
    Case("token in a later batch", fits([(TOKENS, LABELS)] * 2,
         validation_data=[(with_value(TOKENS, 9), LABELS)]), DataError,
         "the token 9 at row 0", "tokens"),
    Case("token in predict", lambda t: t.predict(with_value(TOKENS, 7)), DataError,
         "the token 7 at row 0", "tokens"),
    Case("float tokens", fits(TOKENS.astype(np.float32), LABELS), ValueError,
         r"(?s)must be an integer.*while tracing the model on float32\[32,6\]",
         "tokens", trained=r"Got inputs float32\[32,6\]; .*int32\[32,6\]"),
    Case("no examples", fits(X[:0], LABELS[:0]), DataError,
         r"no examples: x has shape \(0, 4\)\. Pass at least one row"),
    Case("no examples in predict", lambda t: t.predict(X[:0]), DataError,
         "no examples"),
    Case("no examples in evaluate", lambda t: t.evaluate(X[:0], LABELS[:0]), DataError,
         "no examples"),
    Case("no examples in train_on_batch", lambda t: t.train_on_batch(X[:0], LABELS[:0]),
         DataError, "no examples"),
    Case("no examples in init", lambda t: t.init((X[:0], LABELS[:0])), DataError,
         "no examples"),
    Case("empty list", fits([]), DataError, "no examples: x has shape"),
    Case("empty tuple", fits(()), TypeError, r"a tuple of nothing: .*\(x, y\)"),
    Case("None", fits(None), TypeError,
         r"fit\(None\) gives no data\. Write fit\(x, y\)"),
    Case("a name", fits("mnits"), ValueError,
         "no dataset 'mnits': .*Did you mean 'mnist'"),
    Case("a number", fits(3), TypeError,
         "Unsupported data type int. Supported: arrays"),
    Case("a batch of strings in init", lambda t: t.init("batch"), TypeError,
         r"holds a str .*write trainer\.init\(\(x, y\)\)"),
    Case("lengths differ", fits(X, LABELS[:-1]), DataError,
         "different length: x: 32, y: 31.*cut them to the same number of rows"),
    Case("lengths differ in init", lambda t: t.init((X, LABELS[:-1])), DataError,
         "x: 32, y: 31"),
    Case("lengths of inputs differ", lambda t: t.predict((X, X[:-1])), DataError,
         "x/0: 32, x/1: 31", "pair"),
    Case("object array", fits(X.astype(object), LABELS), DataError,
         r"x has dtype object, .*write x\.astype\('float32'\)"),
    Case("dates", fits(X.astype("datetime64[s]"), LABELS), DataError,
         r"dtype datetime64\[s\].*x\.astype\('float32'\)"),
    Case("ragged list", fits([[1.0, 2.0], [3.0]], LABELS[:2]), DataError,
         r"rows that differ in length .*np\.array\(rows\)"),
    Case("masked array", fits(np.ma.masked_array(X, X > 0), LABELS), DataError,
         r"hides \d+ of its values.*x\.filled\(0\)"),
    Case("one input for two", fits(X, LABELS), DataError,
         r"x has 1 part, .*takes a, b and requires a, b\. Give x as a tuple \(a, b,\)",
         "pair"),
    Case("one input for two in predict", lambda t: t.predict(X), DataError,
         r"x has 1 part, .*as a tuple \(a, b,\)", "pair"),
    Case("three inputs for two", fits((X, X, X), LABELS), DataError, "x has 3 parts",
         "pair"),
    Case("a dict without an input", fits({"a": X, "label": LABELS}), DataError,
         r"requires a, b\. .*Trainer\(model, inputs=\{'b': 'a'\}\)", "pair"),
    Case("a dict with two candidates", fits({"p": X, "q": X, "label": LABELS}),
         DataError, "the keys p, q, label; "
         r".*Trainer\(model, inputs=\{'inputs': 'p'\}\)"),
    Case("four parts", fits((X, LABELS, ONES, ONES)), DataError,
         r"a tuple of 4 items: a batch is x, \(x,\), \(x, y\) or \(x, y, weights\)"),
    Case("a list of examples", lambda t: t.predict([X[0], X[1]]), DataError,
         r"For a list of examples write np\.stack\(x\)"),
    Case("one example", lambda t: t.predict(X[0]), ValueError,
         r"Write predict\(x\[None\]\) for one example",
         trained=r"For one example write x\[None\]"),
    Case("one example in train_on_batch", lambda t: t.train_on_batch(X[0], LABELS[0]),
         DataError, r"y is a single value .*np\.stack"),
    Case("a dataset of examples", fits(lambda: zip(X, LABELS, strict=True)), DataError,
         r"batch 0 of pass 0: y is a single value .*fit\(dataset, batch_size=32\)"),
    Case("a dataset in train_on_batch", lambda t: t.train_on_batch(batches()),
         ValueError, r"Write x, y = next\(iter\(dataset\)\)"),
    Case("validation of other features", fits(X, LABELS,
         validation_data=(X[:, :3], LABELS)), DataError,
         r"(?s)Got inputs float32\[32,3\], which need other parameters than "
         r"float32\[32,4\].*in validation_data"),
]  # fmt: skip

# ------------------------------------------------------------- weights and datasets
DATASETS = [
    Case("NaN weight", fits(X, LABELS, sample_weight=with_value(ONES, np.nan)),
         DataError, "weights hold nan at row 5; .*0 leaves an example out"),
    Case("negative weight", fits(X, LABELS, sample_weight=with_value(ONES, -1)),
         DataError,
         r"weights hold -1\.0 at row 5; weights must be finite and at least 0"),
    Case("negative weight in train_on_batch", lambda t: t.train_on_batch(X, LABELS,
         -ONES), DataError, "weights must be finite and at least 0"),
    Case("weights all 0", fits(X, LABELS, sample_weight=0 * ONES), DataError,
         "all zero.* Leave the weights out"),
    Case("weights too short", fits(X, LABELS, sample_weight=ONES[1:]), DataError,
         "x: 32, y: 32, weights: 31"),
    Case("(n, 1) weights", fits(X, LABELS, sample_weight=ONES[:, None]), DataError,
         r"Write weights\.reshape\(len\(weights\)\)"),
    Case("one number as weights", fits(X, LABELS, sample_weight=2.0), DataError,
         "weights is a single value"),
    Case("class_weight and sample_weight", fits(X, LABELS, class_weight={0: 2.0},
         sample_weight=2 * ONES), ValueError,
         r"both .*sample_weight=sample_weight \* np\.array\(\[class_weight\[c\] for c"),
    Case("class_weight by name", fits(X, LABELS, class_weight="balanced"), ValueError,
         r"e\.g\. class_weight=\{0: 1\.0, 1: 5\.0\}"),
    Case("class_weight below 0", fits(X, LABELS, class_weight={0: -1.0}), ValueError,
         r"class_weight\[0\]=-1\.0. Expected a finite number of at least 0"),
    Case("class_weight for numbers", fits(X, VALUES, class_weight={0: 2.0}), ValueError,
         r"Give the weights per example instead: fit\(x, y, sample_weight=weights\)",
         "values"),
    Case("an iterator for two epochs", lambda t: t.fit(batches(), epochs=2), DataError,
         r"make_batches, not make_batches\(\); or .*steps_per_epoch=100"),
    Case("a zip for two epochs", lambda t: t.fit(zip([X], [LABELS], strict=True),
         epochs=2), DataError, "fit got an iterator, which ends after one pass"),
    Case("a generator to validate on", lambda t: t.fit(X, LABELS, epochs=2, verbose=0,
         validation_data=batches()), DataError,
         r"validation_data got an iterator.*validation_steps=100"),
    Case("no batches", fits(lambda: iter(())), DataError,
         "no batches: .* must make a new iterable each time"),
    Case("a used generator", lambda t: t.fit(batches(0), verbose=0), DataError,
         r"yielded nothing.*fit\(make_batches\) not fit\(make_batches\(\)\)"),
    Case("a function with arguments", fits(lambda count: batches(count)), TypeError,
         r"it requires arguments .*Write lambda: "),
    Case("a function that returns arrays", fits(lambda: (X, LABELS)), TypeError,
         r"returned a tuple; .*Pass arrays directly: fit\(x, y\)"),
    Case("batch_size for a dataset", fits([(X, LABELS)], batch_size=4), ValueError,
         r"batch_size=4 is given, .*write fit\(dataset\)"),
    Case("validation_batch_size for a dataset", fits(X, LABELS, validation_batch_size=4,
         validation_data=[(X, LABELS)]), ValueError,
         "validation_batch_size=4 is given, .*write validation_data=dataset"),
    Case("y beside a list of batches", fits([(X, LABELS)], LABELS), ValueError,
         r"y is given together with a list, .*Let its items be \(x, y\)"),
    Case("y beside a generator", lambda t: t.fit(batches(), LABELS), ValueError,
         r"y is given together with a generator, .*write fit\(dataset\)"),
    Case("weights beside a dataset", fits([(X, LABELS)], sample_weight=ONES),
         ValueError, r"sample_weight is given together with a list"),
    Case("validation_split of a dataset", fits([(X, LABELS)], validation_split=0.5),
         ValueError, "with random access, not a dataset "
         r".*validation_data=\(x_val, y_val\)"),
    Case("validation_split and validation_data", fits(X, LABELS, validation_split=0.5,
         **VALIDATE), ValueError, "give one of them"),
    Case("validation_split of nothing", fits(X, LABELS, validation_split=0.999),
         ValueError, "leaves 0 to train on and 32 to validate on"),
    Case("validation_split above 1", fits(X, LABELS, validation_split=1.5), ValueError,
         r"validation_split=1\.5.*in \(0, 1\)\. Write validation_split=0\.1"),
    Case("no data to validate on", fits(X, LABELS, validation_data=(X[:0], LABELS[:0])),
         DataError, "(?s)no examples.*in validation_data"),
    Case("validation_data by name", fits(X, LABELS, validation_data="test"),
         ValueError, "Write a split after the name of its dataset: 'mnist/test'"),
]  # fmt: skip

# ----------------------------------------------------------------------- arguments
ARGUMENTS = [
    Case("validation_freq=0", fits(X, LABELS, validation_freq=0, **VALIDATE),
         ValueError, "validation_freq=0. .*whole number of at least 1"),
    Case("validation_freq=[0]", fits(X, LABELS, validation_freq=[0], **VALIDATE),
         ValueError, "validation_freq=0. .*whole number of at least 1"),
    Case("epochs=0", fits(X, LABELS, epochs=0), ValueError,
         "epochs=0. .*a whole number of at least 1"),
    Case("epochs=1.5", fits(X, LABELS, epochs=1.5), ValueError,
         r"epochs=1\.5.*Write epochs=1"),
    Case("epochs=True", fits(X, LABELS, epochs=True), ValueError,
         "epochs=True.*Write epochs=1"),
    Case("initial_epoch=-1", fits(X, LABELS, initial_epoch=-1), ValueError,
         "initial_epoch=-1. .*whole number of at least 0"),
    Case("steps_per_epoch=0", fits(X, LABELS, steps_per_epoch=0), ValueError,
         "steps_per_epoch=0. .*Write steps_per_epoch=1"),
    Case("steps=0", lambda t: t.evaluate(X, LABELS, steps=0), ValueError,
         "steps=0. .*Write steps=1"),
    Case("batch_size=0", fits(X, LABELS, batch_size=0), ValueError,
         r"batch_size=0\. .*Write batch_size=32"),
    Case("batch_size=2.5", lambda t: t.predict(X, batch_size=2.5), ValueError,
         r"batch_size=2\.5\. .*Write batch_size=32"),
    Case("shuffle='batch'", fits(X, LABELS, shuffle="batch"), ValueError,
         "shuffle='batch'. Expected True or False"),
    Case("verbose=3", lambda t: t.fit(X, LABELS, verbose=3), ValueError,
         'verbose=3: write 0, 1, 2 or "auto"'),
    Case("epoch=2", fits(X, LABELS, epoch=2), TypeError,
         "unexpected keyword argument 'epoch'"),
    Case("metrics= of fit", fits(X, LABELS, metrics=["accuracy"]), TypeError,
         "unexpected keyword argument 'metrics'"),
    Case("a callback's class", fits(X, LABELS, callbacks=[EarlyStopping]), TypeError,
         r"holds the class EarlyStopping\. Write EarlyStopping\(\)"),
    Case("a function as callback", fits(X, LABELS, callbacks=[print]), TypeError,
         r"LambdaCallback\(on_epoch_end=function\)"),
    Case("a hook misspelt", fits(X, LABELS, callbacks=Misspelt()), TypeError,
         r"Misspelt\.on_epoch_ends is not a hook.*Did you mean 'on_epoch_end'"),
    Case("a hook of Keras", fits(X, LABELS, callbacks=KerasStyle()), TypeError,
         r"Write def on_epoch_end\(self, loop\) and use loop\.epoch, loop\.logs"),
    Case("a hook misspelt in LambdaCallback", lambda t: t.fit(X, LABELS,
         callbacks=LambdaCallback(on_epoch_ends=print)), TypeError,
         "Did you mean 'on_epoch_end'"),
    Case("a monitor misspelt", fits(X, LABELS, callbacks=EarlyStopping("val_los"),
         **VALIDATE), ValueError,
         r"Did you mean 'val_loss'\? It will log loss, val_loss, learning_rate"),
    Case("a monitor without validation", fits(X, LABELS, callbacks=EarlyStopping()),
         ValueError, r"Write fit\(\.\.\., validation_data="),
    Case("a state of None", lambda t: setattr(t, "state", None),
         (TypeError, ValueError),
         r"state must be a TrainState|state = trainer\.init\(batch\)"),
    Case("no state in train_step", lambda t: t.train_step(None, (X, LABELS)), TypeError,
         r"Write state = trainer\.init\(batch\), then state, logs = "
         r"trainer\.train_step\(state, batch\)"),
]  # fmt: skip
CASES = TARGETS + INPUTS + DATASETS + ARGUMENTS
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def trainer_of(kind):
    return Trainer(KINDS[kind].model, loss=KINDS[kind].loss)


def host_copy(state):
    """The state's values, typed keys as their data."""
    state = state.replace(rng=jax.random.key_data(state.rng))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_equal(state, expected):
    """Equal to the last bit."""
    for one, other in zip(host_copy(state), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def trained():
    """kind -> a trainer that was fitted once; they are shared by all cases."""
    trainers: dict[str, Trainer] = {}

    def get(kind):
        if kind not in trainers:
            trainers[kind] = trainer_of(kind)
            trainers[kind].fit(KINDS[kind].x, KINDS[kind].y, verbose=0)
        return trainers[kind]

    return get


def assert_fits(trainer, kind, compiles=None):
    """A correct fit works, and compiles nothing where `compiles` says so."""
    step = trainer.step
    history = trainer.fit(KINDS[kind].x, KINDS[kind].y, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert trainer.step == step + 1
    assert trainer.compiles["train"] == (1 if compiles is None else compiles["train"])


def test_there_are_enough_cases():
    assert len(CASES) >= 100
    assert len({case.name for case in CASES}) == len(CASES)


@EVERY_CASE
def test_a_trained_trainer_refuses_and_is_unharmed(trained, case):
    trainer = trained(case.kind)
    state, compiles = host_copy(trainer.state), trainer.compiles
    # A trained trainer may refuse data for not being like that of the first fit.
    error = case.error if case.trained is None else ValueError
    with pytest.raises(error, match=case.trained or case.text):
        case.call(trainer)
    assert trainer.compiles == compiles
    assert_equal(trainer.state, state)
    assert_fits(trainer, case.kind, compiles)


@EVERY_CASE
def test_a_new_trainer_refuses_and_is_unharmed(trained, case):
    trainer = trainer_of(case.kind)
    with pytest.raises(case.error, match=case.text):
        case.call(trainer)
    assert trainer.compiles == {"train": 0, "eval": 0, "predict": 0}
    assert trainer.step == 0
    kind = KINDS[case.kind]
    # Traced, not computed: a correct batch is taken, and as by one never asked wrong.
    never_asked_wrong = trained(case.kind)
    state = jax.eval_shape(lambda: trainer.init((kind.x, kind.y)))
    expected = jax.eval_shape(lambda: never_asked_wrong.init((kind.x, kind.y)))
    assert state == expected


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t.predict(X[:, :3]),
        lambda t: t.evaluate(X[:, :2], LABELS),
        lambda t: t.fit(X[:, :3], label(3), verbose=0),
        lambda t: t.init((X[:, :3], LABELS)),
        lambda t: t.fit(lambda: broken(0), verbose=0),
    ],
    ids=["predict", "evaluate", "labels", "init", "loader"],
)
def test_other_data_before_the_first_step_binds_to_nothing(call):
    """As long as nothing was learnt, data of another form may come."""
    trainer = trainer_of("classes")
    with contextlib.suppress(DataError, OSError):
        call(trainer)
    assert_fits(trainer, "classes")
    fresh = trainer_of("classes")
    fresh.fit(X, LABELS, verbose=0)
    assert_equal(trainer.state, host_copy(fresh.state))


def test_a_state_that_was_assigned_binds_to_its_data():
    trainer = trainer_of("classes")
    trainer.predict(X)
    trainer.state = trainer.state.replace(params=trainer.state.params)
    with pytest.raises(DataError, match=r"Got inputs float32\[32,3\]"):
        trainer.fit(X[:, :3], LABELS, verbose=0)


# ------------------------------------------------------------------- mid-stream


def broken(good):
    yield from batches(good)
    raise OSError("disk gone")


MIDSTREAM = {
    "label": (lambda: iter([(X, LABELS), (X, label(3))]), DataError,
              r"batch 1 of pass 0: The targets hold 3 at row 2", 1),
    "dtype": (lambda: iter([(X, LABELS), (X, LABELS), (X, VALUES[:, 0])]), DataError,
              r"batch 2 of pass 0 differs .*: y is float32\[batch\], was int32\[batch\]"
              r"\. .*\.astype\(\.\.\.\)", 2),
    "features": (lambda: iter([(X, LABELS), (X[:, :3], LABELS)]), DataError,
                 r"batch 1 of pass 0 .*x is float32\[batch,3\], was .*\[batch,4\].* "
                 "pad rows", 1),
    "structure": (lambda: iter([{"x": X, "y": LABELS}, {"x": X}]), DataError,
                  r"batch 1 of pass 0 .*y is missing, was int32\[batch\]", 1),
    "nesting": (lambda: iter([(X, LABELS), (X, {"a": LABELS})]), DataError,
                r"batch 1 of pass 0 .*y/a is int32\[batch\], was missing", 1),
    "lengths": (lambda: iter([(X, LABELS), (X, LABELS[:3])]), DataError,
                "batch 1 of pass 0: .* x: 32, y: 3", 1),
    "weights": (lambda: iter([(X, LABELS, ONES), (X, LABELS, -ONES)]), DataError,
                r"batch 1 of pass 0: weights hold -1\.0", 1),
    "strings": (lambda: iter([(X, LABELS), (X, LABELS.astype(str))]), DataError,
                r"batch 1 of pass 0: y has dtype <U", 1),
    "loader": (lambda: broken(2), OSError,
               "(?s)disk gone.*while reading batch 2 of pass 0", 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MIDSTREAM)
def test_a_stream_that_goes_wrong_keeps_the_last_finished_step(trained, name):
    data, error, text, finished = MIDSTREAM[name]
    trainer = trained("classes")
    step, seen = trainer.step, []
    keep = LambdaCallback(on_train_batch_end=lambda loop: seen.append(loop.state))
    with pytest.raises(error, match=text):
        trainer.fit(data, callbacks=keep, verbose=0)
    assert trainer.step == step + finished
    assert_equal(trainer.state, host_copy(seen[-1]))
    assert_fits(trainer, "classes", trainer.compiles)


def test_an_iterator_that_runs_dry_before_the_epochs_steps(trained):
    trainer = trained("classes")
    step = trainer.step
    text = r"used up, .*5 steps were asked for.*fit\(make_batches\) not fit\(make_"
    with pytest.raises(DataError, match=text):
        trainer.fit(batches(2), steps_per_epoch=5, verbose=0)
    assert trainer.step == step + 2
    assert_fits(trainer, "classes", trainer.compiles)


def test_validation_data_that_runs_dry(trained):
    trainer = trained("classes")
    text = r"used up, .*validation_data=make_batches not validation_data=make_batches\("
    with pytest.raises(DataError, match=text):
        trainer.fit(
            X,
            LABELS,
            epochs=3,
            validation_data=batches(1),
            validation_steps=1,
            verbose=0,
        )
    assert_fits(trainer, "classes", trainer.compiles)


def test_validation_data_whose_last_steps_are_too_few(trained):
    trainer = trained("classes")
    text = r"to validation_data is used up, after 5 batches .*2 steps were asked for"
    with pytest.raises(DataError, match=text):
        trainer.fit(
            X,
            LABELS,
            epochs=3,
            validation_data=batches(5),
            validation_steps=2,
            verbose=0,
        )
    assert_fits(trainer, "classes", trainer.compiles)


@pytest.mark.parametrize("stream", [False, True])
def test_a_misspelt_input_that_could_be_left_out(stream):
    class Optional(nn.Module):
        @nn.compact
        def __call__(self, tokens, segments=None):
            return nn.Dense(3)(tokens if segments is None else tokens + segments)

    x = {"tokens": X, "segmnts": X}
    text = "has no 'segmnts'. Did you mean 'segments'"
    with pytest.raises(DataError, match=text):
        Trainer(Optional()).fit(*([[(x, LABELS)]] if stream else (x, LABELS)))
    with pytest.raises(DataError, match=text):
        Trainer(Optional()).fit({"tokens": X}, LABELS, validation_data=(x, LABELS))


def test_numbers_where_the_model_was_built_on_integers():
    trainer = Trainer(nn.Dense(3))
    trainer.fit((X * 10).astype(np.uint8), LABELS, verbose=0)
    text = r"Got inputs float32\[32,4\]; this trainer was built for uint8"
    with pytest.raises(DataError, match=text):
        trainer.predict(X)


def test_targets_of_another_kind_that_would_mean_another_loss(trained):
    text = r"Got targets int32\[32,1\]; this trainer was built for float32\[32,1\]"
    with pytest.raises(DataError, match=f"{text}.*{BUILT_FOR}"):
        trained("values").evaluate(X, BITS)


def test_sorted_labels_are_warned_of(trained):
    text = r"takes the last examples, and y is sorted: .*permutation\(len\(x\)\)"
    with pytest.warns(UserWarning, match=text):
        fits(X, np.sort(LABELS), validation_split=0.5)(trained("classes"))


def test_batches_that_grow_are_warned_of():
    trainer = trainer_of("classes")
    data = [(X[:4], LABELS[:4]), (X, LABELS)]
    with pytest.warns(UserWarning, match="Let the first batch be the largest"):
        trainer.fit(data, verbose=0)
    assert trainer.compiles["train"] == 2


# ----------------------------------------------------- second fit with other data

SECOND = {
    "features": ((X[:, :3], LABELS), r"Got inputs float32\[32,3\], which need "
                 r"other parameters than float32\[32,4\]"),
    "rank": ((X[:, :, None], LABELS), r"Got inputs float32\[32,4,1\]; this "
             r"trainer was built for float32\[32,4\]"),
    "two inputs": (((X, X), LABELS), r"Got inputs 0/0: float32"),
    "float labels": ((X, VALUES[:, 0]), r"Got targets float32\[32\]; this trainer was "
                     r"built for int32\[32\]"),
    "one-hot": ((X, ONE_HOT), r"Got targets float32\[32,3\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", SECOND)
def test_a_second_fit_with_other_data(trained, name):
    (x, y), text = SECOND[name]
    trainer = trained("classes")
    state, compiles = host_copy(trainer.state), trainer.compiles
    with pytest.raises(DataError, match=f"{text}.*{BUILT_FOR}"):
        trainer.fit(x, y, verbose=0)
    assert_equal(trainer.state, state)
    assert_fits(trainer, "classes", compiles)


# -------------------------------------------------------------- Trainer's arguments


def cosine(total_steps):
    return optax.cosine_decay_schedule(1e-3, total_steps)


ARGUMENTS_OF_TRAINER = [
    ({"metrics": ["acuracy"]}, ValueError,
     "There is no metric 'acuracy'. Did you mean 'accuracy'"),
    ({"metrics": ["acc", "acc"]}, ValueError,
     r"'acc' is taken .*metrics=\{'my_name': \.\.\.\}"),
    ({"metrics": [lambda o, t: o[:, 0]]}, ValueError,
     r"A lambda has no name to log\. Write metrics=\{'my_name'"),
    ({"metrics": {"m": lambda o, t: o.mean()}}, ValueError,
     r"'m' returned float32\[\]\. Return one value per example"),
    ({"metrics": {"m": 3}}, TypeError, r"not int\. Write metrics=\['accuracy'\]"),
    ({"loss": "sparse_categorical_crossentrpy"}, ValueError,
     "Did you mean 'sparse_categorical_crossentropy'"),
    ({"loss": "sparse_categorical_crossentropy", "metrics": "mape"}, ValueError,
     "There is no metric 'mape'"),
    ({"loss": "mse"}, ValueError, "loss='softmax_cross_entropy_with_integer_labels'"),
    ({"loss": Loss}, TypeError, r"loss is the class Loss\. Write Loss\(\.\.\.\)"),
    ({"loss": 3}, TypeError, r"not int\. Write Loss\('squared_error'\)"),
    ({"loss": {"a": "mse"}}, ValueError, "one array: give one loss, loss='auto'"),
    ({"loss": None}, ValueError, r'There is no loss to train on: .*loss="\.\.\."'),
    ({"loss_weights": {"a": 1.0}}, ValueError, "Write one number"),
    ({"optimizer": "adamm"}, ValueError, "Did you mean 'adam'"),
    ({"optimizer": "chain"}, ValueError, r"Write optimizer=optax\.chain\("),
    ({"optimizer": None}, TypeError, "Expected a name, .*Write 'adam'"),
    ({"optimizer": optax.adam(1e-3), "learning_rate": 1e-3}, ValueError,
     r"Give the function instead\. Write optimizer=optax\.adamw, learning_rate="),
    ({"optimizer": "sgd", "weight_decay": 0.1}, ValueError,
     "no weight_decay. Write optimizer='adamw'"),
    ({"learning_rate": 0}, ValueError, "learning_rate=0. Expected a positive number"),
    ({"learning_rate": "1e-3"}, TypeError, "learning_rate='1e-3'. Expected a pos"),
    ({"clip_norm": -1.0}, ValueError, r"clip_norm=-1\.0\. Expected a positive number"),
    ({"accumulate_steps": 0}, ValueError, "accumulate_steps=0. .*at least 1"),
    ({"freeze": "encoder"}, ValueError,
     "matches no parameter. There are: bias, kernel"),
    ({"seed": -1}, ValueError, "seed=-1. .*whole number of at least 0"),
    ({"collections": "batch_stats"}, ValueError, r"collections=\['batch_stats'\]"),
    ({"collections": ["batch_stat"]}, DetectionError, "init makes no 'batch_stat'"),
    ({"rngs": "dropout"}, ValueError, r"a list of names.* Write rngs=\['dropout'\]"),
    ({"inputs": {"image": "x"}}, ValueError, r"Write Trainer\(model, inputs=\{param"),
    ({"train_flag": "trian"}, DetectionError, "train_flag=None if it has none"),
    ({"variables": np.ones(3)}, TypeError, r"variables=\{'params': params\}"),
    ({"variables": {"kernel": np.ones((4, 3))}}, ValueError,
     r"takes the collections params\. Write variables=\{'params': params\}"),
    ({"variables": {"params": {"kernel": np.ones((4, 2)), "bias": np.ones(3)}}},
     ValueError, r"kernel: the model has float32\[4,3\], given float32\[4,2\]"),
    ({"lr": 1e-3}, TypeError, "unexpected keyword argument 'lr'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "text"), ARGUMENTS_OF_TRAINER)
def test_a_wrong_argument_of_trainer(arguments, error, text):
    trainer = None
    with pytest.raises(error, match=text):
        trainer = Trainer(nn.Dense(3), **arguments)
        trainer.fit(X, LABELS, verbose=0)
    if trainer is not None:
        assert trainer.compiles == {"train": 0, "eval": 0, "predict": 0}
        with pytest.raises(ValueError, match="seen no data yet"):
            trainer.state


MODELS = [
    (nn.Dense, r"the class Dense, not a module\. Write Trainer\(Dense\(\.\.\.\)\)"),
    (flax.nnx.Linear(2, 3, rngs=flax.nnx.Rngs(0)), r"flaxfit\.Model\(init, apply\)"),
    (lambda x: x, r"got a function; .*Trainer\(nn\.Dense\(10\)\)"),
    (None, "got a NoneType"),
    ({"params": {}}, "got a dict"),
]


@pytest.mark.parametrize(("model", "text"), MODELS)
def test_what_is_no_model(model, text):
    with pytest.raises(TypeError, match=text):
        Trainer(model)


def test_batch_norm_without_a_train_flag():
    trainer = Trainer(Unflagged())
    text = r'contains BatchNorm, .*Trainer\(model, train_flag="name"\)'
    with pytest.raises(DetectionError, match=text):
        trainer.fit(X, LABELS, verbose=0)
    assert trainer.compiles["train"] == 0


def test_a_loss_of_every_output_with_every_target():
    """(n, 1) against (n,) broadcasts to (n, n), unless jax is told to refuse it."""
    pairwise = {"loss": lambda outputs, targets: (outputs - targets) ** 2}
    metric = {"metrics": {"m": lambda outputs, targets: outputs - targets[:, 0]}}
    with jax.numpy_rank_promotion("allow"):
        with pytest.raises(ValueError, match=r"every output with .*y\[:, None\]"):
            Trainer(nn.Dense(1), **pairwise).fit(X, VALUES[:, 0], verbose=0)
        with pytest.raises(ValueError, match=r"'m' .*every output with every target"):
            Trainer(nn.Dense(1), **metric).fit(X, VALUES, verbose=0)


def test_a_scalar_loss_takes_no_weights():
    trainer = Trainer(nn.Dense(1), loss=lambda o, t: ((o - t) ** 2).mean())
    with pytest.raises(DataError, match=r"float\[batch\], or leave sample_weight and"):
        trainer.fit(X, VALUES, sample_weight=np.arange(ROWS), verbose=0)
    assert trainer.compiles["train"] == 0


def test_a_schedule_of_total_steps_needs_to_know_them():
    trainer = Trainer(nn.Dense(3), learning_rate=cosine)
    text = "number of steps is not known .*Pass steps_per_epoch= to fit"
    with pytest.raises(ValueError, match=text):
        trainer.fit(lambda: batches(), verbose=0)
    assert np.isfinite(trainer.evaluate(X, LABELS)["loss"])
    with pytest.raises(ValueError, match=text):
        trainer.train_on_batch(X, LABELS)
    with pytest.raises(ValueError, match=text):
        trainer.fit(batches(), verbose=0)
    trainer.fit(lambda: batches(), steps_per_epoch=2, verbose=0)
    with pytest.raises(ValueError, match=text):
        trainer.fit(lambda: batches(), verbose=0)
    assert trainer.step == 2


# -------------------------------------------------------------------------- state


def other_params(**params):
    return lambda state: state.replace(params={**state.params, **params})


STATES = [
    (lambda state: state.params, TypeError, "TrainState, got dict. Write "
     r"trainer\.state = trainer\.state\.replace\(params=\.\.\.\)"),
    (other_params(kernel=np.ones((4, 2), np.float32)), ValueError,
     r"kernel: is float32\[4,3\], given float32\[4,2\]"),
    (other_params(extra=np.ones(2, np.float32)), ValueError,
     r"extra: is missing, given float32\[2\]"),
    (lambda state: state.replace(params={"bias": state.params["bias"]}), ValueError,
     r"kernel: is float32\[4,3\], given missing"),
    (lambda state: state.replace(rng=jax.random.PRNGKey(0)), ValueError,
     r"rng: is key<fry>\[\], given uint32\[2\]"),
    (lambda state: state.replace(step=jnp.float32(0)), ValueError,
     r"step: is int32\[\], given float32\[\]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), STATES)
def test_a_state_that_does_not_fit(trained, change, error, text):
    trainer = trained("classes")
    state, compiles = host_copy(trainer.state), trainer.compiles
    with pytest.raises(error, match=text):
        trainer.state = change(trainer.state)
    assert_equal(trainer.state, state)
    assert_fits(trainer, "classes", compiles)


def test_nothing_to_show_or_save_before_data(tmp_path):
    trainer = trainer_of("classes")
    for call in (
        lambda: trainer.state,
        lambda: trainer.variables,
        lambda: trainer.save(tmp_path / "run.msgpack"),
        trainer.summary,
    ):
        with pytest.raises(ValueError, match=r"state = trainer\.init\(batch\)"):
            call()
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------- files

FILES = {
    "pickle": (pickle.dumps({}), "looks like a Python pickle. Expected a file "
               r"written by trainer\.save\(path\)"),
    "json": (b'{"a": 1}', "looks like a JSON file"),
    "empty": (b"", "its 0 bytes are not a whole msgpack file"),
    "flax": (serialization.to_bytes({"params": {"bias": np.ones(3)}}),
             r"Write flaxfit\.load_params\(path\) for its parameters"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_load_of_a_file_that_is_something_else(tmp_path, name):
    data, text = FILES[name]
    path = tmp_path / "run.msgpack"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=text):
        Trainer.load(path, nn.Dense(3))


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "run.msgpack"
    trained("classes").save(path)
    return path


LOADS = [
    (nn.Dense(4), {}, CheckpointError, r"params/kernel: float32\[4,3\] in the file, "
     r"float32\[4,4\] here(?s:.*)Build the model as it was"),
    (nn.Sequential([nn.Dense(3)]), {}, CheckpointError,
     r"params/layers_0/kernel: nothing in the file, float32\[4,3\] here"),
    (Pair(), {}, CheckpointError, "saved for inputs that Pair cannot take"),
    (nn.Dense(3), {"optimizer": "sgd"}, CheckpointError,
     "(?s)Only the optimizer's state differs: give the Trainer the optimizer"),
    (nn.Dense(3), {"learningrate": 1.0}, TypeError, "Did you mean 'learning_rate'"),
    (nn.Dense, {}, TypeError, r"Write Trainer\(Dense\(\.\.\.\)\)"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "changes", "error", "text"), LOADS)
def test_load_with_what_does_not_fit(saved, model, changes, error, text):
    with pytest.raises(error, match=text):
        Trainer.load(saved, model, **changes)


def test_load_of_a_file_cut_off_or_missing_and_of_a_folder(saved, tmp_path):
    cut = tmp_path / "cut.msgpack"
    cut.write_bytes(saved.read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    for path, text in (
        (cut, r"is damaged: it is cut off after [\d,]+ bytes\. Use an older"),
        (tmp_path / "none", "There is no file"),
        (tmp_path / "empty", "is a folder without a checkpoint; give the file"),
    ):
        with pytest.raises(CheckpointError, match=text):
            Trainer.load(path, nn.Dense(3))


def test_load_of_what_was_a_function(tmp_path):
    trainer = Trainer(nn.Dense(1), loss=lambda o, t: ((o - t) ** 2)[:, 0])
    trainer.predict(X)
    trainer.save(tmp_path / "run.msgpack")
    with pytest.raises(
        CheckpointError, match=r"Give it again: .*, model, loss=\.\.\.\)"
    ):
        Trainer.load(tmp_path / "run.msgpack", nn.Dense(1))
