"""A loss that is not finite: noticed, named, and dealt with as one chose."""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import DropoutNet

from flaxfit import EarlyStopping, LambdaCallback, Trainer
from flaxfit._runs import checkpoint_manager

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 4)).astype("float32")
Y = RNG.normal(size=(24, 3)).astype("float32")
BAD = X.copy()
BAD[13] = 1e30  # batch 4 of 6: its loss is infinite


def fit(trainer, x=BAD, **options):
    options = {"epochs": 2, "batch_size": 4, "shuffle": False, "verbose": 0} | options
    return trainer.fit(x, Y, **options)


def params(trainer):
    return jax.tree.map(np.asarray, trainer.state.params)


def by_hand(steps, skip=()):
    """Returns the parameters after the given batches, by the public step."""
    trainer = Trainer(DropoutNet(), nonfinite="ignore")
    state = trainer.init((X[:4], Y[:4]))
    for number in steps:
        rows = slice(4 * (number % 6), 4 * (number % 6) + 4)
        new, _ = trainer.train_step(state, (BAD[rows], Y[rows]))
        state = state.replace(step=new.step) if number in skip else new
    return jax.tree.map(np.asarray, state.params)


@pytest.mark.parametrize("steps_per_call", ["auto", 1, 3])
def test_training_stops_and_says_where(steps_per_call):
    trainer = Trainer(DropoutNet(), steps_per_call=steps_per_call)
    with pytest.warns(UserWarning, match=r"not finite at step 4 \(epoch 1, batch 4\)"):
        history = fit(trainer)
    assert history.stop_reason == "the loss is not finite at step 4 (epoch 1, batch 4)"
    assert history.epoch == [] and history.history == {}


def test_it_is_named_in_a_later_epoch():
    trainer, x = Trainer(DropoutNet()), X.copy()
    poison = LambdaCallback(
        on_epoch_begin=lambda loop: loop.epoch == 1 and x.__setitem__(9, 1e30)
    )
    with pytest.warns(UserWarning, match=r"at step 9 \(epoch 2, batch 3\)"):
        history = trainer.fit(
            lambda: ((x[i : i + 4], Y[i : i + 4]) for i in range(0, 24, 4)),
            epochs=3,
            callbacks=poison,
            verbose=0,
        )
    assert history.epoch == [0]


def test_the_best_state_comes_back():
    trainer, best = Trainer(DropoutNet()), []
    fit(trainer, X, epochs=1)
    stopping = EarlyStopping("loss", patience=9)
    x = X.copy()

    def poison(loop):
        best.append(jax.tree.map(np.asarray, loop.state.params))
        x[:] = 1e30

    with pytest.warns(UserWarning, match="the trainer holds the state after that step"):
        trainer.fit(
            lambda: [(x, Y)],
            epochs=2,
            verbose=0,
            callbacks=[stopping, LambdaCallback(on_epoch_end=poison)],
        )
    jax.tree.map(np.testing.assert_array_equal, params(trainer), best[0])


def test_a_run_goes_back_to_its_last_checkpoint(tmp_path):
    trainer = Trainer(DropoutNet())
    with pytest.warns(UserWarning, match="the trainer holds the checkpoint of step 2"):
        fit(trainer, run_dir=tmp_path, save_every=2)
    assert trainer.step == 2
    jax.tree.map(np.testing.assert_array_equal, params(trainer), by_hand(range(2)))
    # The same line again comes to the same batch, and a finite one goes on.
    again = Trainer(DropoutNet())
    with pytest.warns(UserWarning, match=r"at step 4 \(epoch 1, batch 4\)"):
        fit(again, run_dir=tmp_path, save_every=2)
    fine = Trainer(DropoutNet())
    assert fit(fine, X, run_dir=tmp_path).epoch == [0, 1]
    assert all(map(is_finite, tmp_path.glob("*.msgpack")))


def is_finite(path):
    from flaxfit import checkpoint

    leaves = jax.tree.leaves(checkpoint.load(path).state["params"])
    return all(np.isfinite(leaf).all() for leaf in leaves)


def test_a_batch_may_be_left_out():
    trainer = Trainer(DropoutNet(), nonfinite="skip")
    with pytest.warns(
        UserWarning, match=r"Skipped 1 batch of epoch .: .*first at step"
    ):
        history = fit(trainer)
    assert history.epoch == [0, 1] and np.isfinite(history.history["loss"]).all()
    assert trainer.step == 12
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        params(trainer),
        by_hand(range(12), skip=(3, 9)),
    )


def test_so_may_one_whose_gradient_alone_is_not_finite():
    def loss(outputs, targets):
        # The square root of 0 has the value 0, and no gradient.
        return jnp.sqrt(jnp.sum(jnp.square(outputs), axis=-1) * targets[:, 0])

    y = np.ones((24, 3), np.float32)
    y[5] = 0
    trainer = Trainer(DropoutNet(), loss=loss, nonfinite="skip")
    with pytest.warns(UserWarning, match="Skipped 1 batch of epoch 1"):
        trainer.fit(X, y, batch_size=4, shuffle=False, verbose=0)
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(params(trainer)))


def test_training_may_go_back_and_past_the_batch(tmp_path):
    trainer = Trainer(DropoutNet(), nonfinite="rollback")
    with pytest.warns(
        UserWarning, match="Rolled back to the checkpoint of step 2; train"
    ):
        history = fit(trainer, run_dir=tmp_path, save_every=2, epochs=1)
    assert history.epoch == [0] and np.isfinite(history.history["loss"]).all()
    # Two batches, then those after the fourth: steps 3 and 4 by their number.
    assert trainer.step == 4
    # The time was spent on six batches, and no row of them is counted twice.
    assert (history.timing.steps, history.timing.examples) == ([6], [24])
    hand = Trainer(DropoutNet(), nonfinite="ignore")
    state = hand.init((X[:4], Y[:4]))
    for number in (0, 1, 4, 5):
        rows = slice(4 * number, 4 * number + 4)
        state, _ = hand.train_step(state, (BAD[rows], Y[rows]))
    jax.tree.map(np.testing.assert_array_equal, params(trainer), state.params)


def test_it_does_not_go_back_for_ever(tmp_path):
    trainer = Trainer(DropoutNet(), nonfinite="rollback")
    bad = np.full_like(X, 1e30)
    bad[:4] = X[:4]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(trainer, bad, run_dir=tmp_path, save_every=1)
    texts = [str(warning.message) for warning in caught]
    assert ["Rolled back to the checkpoint of step 1" in text for text in texts] == [
        *[True] * 3,
        False,
    ]
    assert "Training stopped; the trainer holds the checkpoint of step 1" in texts[3]
    assert (
        trainer.step == 1
        and checkpoint_manager.newest(tmp_path).meta["loop"]["step"] == 1
    )


def test_it_may_be_ignored():
    trainer = Trainer(DropoutNet(), nonfinite="ignore")
    history = fit(trainer)
    assert trainer.step == 12 and not np.isfinite(history.history["loss"]).any()


def test_nothing_is_read_for_it_at_every_step(monkeypatch):
    def reads(nonfinite, steps):
        trainer, counts = (
            Trainer(DropoutNet(), nonfinite=nonfinite, steps_per_call=1),
            [],
        )
        fit(trainer, X, epochs=1)
        get = jax.device_get
        with monkeypatch.context() as patch:
            patch.setattr(jax, "device_get", lambda tree: counts.append(1) or get(tree))
            fit(trainer, X, epochs=1, batch_size=24 // steps)
        return len(counts)

    assert reads("stop", 2) == reads("stop", 24) == reads("ignore", 24)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"nonfinite": "stopp"}, "Did you mean 'stop'"),
        ({"nonfinite": None}, "nonfinite=None. Expected one of"),
    ],
)
def test_wrong_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        Trainer(DropoutNet(), **options)


def test_going_back_needs_somewhere_to_go_back_to(tmp_path):
    trainer = Trainer(DropoutNet(), nonfinite="rollback")
    with pytest.raises(ValueError, match=r'Write fit\(\.\.\., run_dir="runs/a"\)'):
        fit(trainer)
    with pytest.raises(ValueError, match="opens the data again after a bad batch"):
        trainer.fit(iter([(X, Y)]), run_dir=tmp_path / "a", verbose=0)
    assert os.listdir(tmp_path / "a") == [".lock"]
