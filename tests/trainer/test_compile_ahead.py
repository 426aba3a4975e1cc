"""`trainer.compile`: the compiles of a run, paid ahead and not twice."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from helpers.data import labeled
from helpers.models import Net

from flaxfit import DataError, Trainer

X, Y = labeled(40)


def make_batches():
    for start in range(0, 40, 8):
        yield X[start : start + 8], Y[start : start + 8]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("kind", ["arrays", "stream"])
def test_a_run_compiles_nothing_more(devices, kind, compiled):
    trainer = Trainer(Net(dropout=0), metrics=["accuracy"], devices=devices)
    if kind == "arrays":
        data, size = (X, Y), {"batch_size": 8}
    else:
        data, size = (make_batches,), {}
    seconds = trainer.compile(*data, **size, verbose=0)
    assert list(seconds) == ["train", "eval", "predict"]
    assert all(value > 0 for value in seconds.values())
    assert trainer.compiles == {"train": 1, "eval": 1, "predict": 1}
    assert trainer.step == 0

    assert compiled  # the listener does hear compiles
    compiled.clear()
    trainer.fit(*data, **size, epochs=2, verbose=0)
    trainer.evaluate(*data, **size, verbose=0)
    trainer.predict(*data[:1], **size, verbose=0)
    assert compiled == []
    assert trainer.compiles == {"train": 1, "eval": 1, "predict": 1}
    assert trainer.step == 10


def test_it_trains_nothing_and_changes_no_result():
    plain, ahead = Trainer(Net(dropout=0)), Trainer(Net(dropout=0))
    ahead.compile(X, Y, verbose=0)
    histories = [t.fit(X, Y, epochs=2, verbose=0).history for t in (plain, ahead)]
    assert histories[0] == histories[1]
    jax.tree.map(np.testing.assert_array_equal, plain.variables, ahead.variables)


def test_the_second_time_is_free(capsys, compiled):
    trainer = Trainer(nn.Dense(3))
    trainer.compile(X, Y)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("…")[0] for line in shown] == [
        "compiling train step",
        "compiling eval step",
        "compiling predict step",
    ]
    compiled.clear()
    trainer.compile(X, Y)
    assert compiled == []
    assert capsys.readouterr().out == ""


def test_a_rate_that_depends_on_the_length_takes_the_length():
    def rate(total_steps):
        return optax.linear_schedule(1.0, 0.0, total_steps)

    trainer = Trainer(nn.Dense(3), optimizer="sgd", learning_rate=rate)
    trainer.compile(X, Y, batch_size=8, epochs=4, verbose=0)
    history = trainer.fit(X, Y, batch_size=8, epochs=4, verbose=0)
    assert trainer.compiles["train"] == 1
    assert history.history["learning_rate"] == pytest.approx([0.8, 0.55, 0.3, 0.05])


@pytest.mark.parametrize(
    ("arguments", "named", "error", "text"),
    [
        ((), {}, TypeError, r"Write Trainer\(model, loss=\.\.\."),
        ((), {"optimizer": "adam", "loss": "mse"}, TypeError,
         r"compile\(optimizer=\.\.\., loss=\.\.\.\) has nothing to configure"),
        ((X, Y), {"metrics": ["accuracy"]}, TypeError, "nothing to configure here"),
        ((make_batches(),), {}, DataError, "compile got an iterator and would use up"),
        ((X, Y[:3]), {}, DataError, "different length"),
    ],
)  # fmt: skip
def test_what_it_refuses(arguments, named, error, text):
    trainer = Trainer(nn.Dense(3))
    with pytest.raises(error, match=text):
        trainer.compile(*arguments, **named)
    assert trainer.compiles == {"train": 0, "eval": 0, "predict": 0}
