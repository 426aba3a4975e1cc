"""`ModelCheckpoint`: Keras's arguments, in the background, and the best is kept."""

import os
import re
import threading

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers.data import labeled

from flaxfit import (
    CheckpointError,
    LambdaCallback,
    ModelCheckpoint,
    Trainer,
    checkpoint,
)

X, Y = labeled(16, 4)


def fit(callback, trainer=None, values=None, **options):
    """Trains with `val_loss` set to `values`, one for each epoch."""
    given = []
    if values is not None:
        options["epochs"] = len(values)
        given = [
            LambdaCallback(
                on_test_end=lambda loop: loop.logs.update(val_loss=values[loop.epoch])
            )
        ]
    trainer = trainer or Trainer(nn.Dense(3))
    options = {"batch_size": 4, "validation_data": (X, Y), "verbose": 0} | options
    trainer.fit(X, Y, callbacks=[*given, callback], **options)
    return trainer


def step_of(path):
    return checkpoint.load(path).meta["loop"]["step"]


def test_every_epoch_has_a_file_with_its_number_and_values(tmp_path):
    trainer = fit(
        ModelCheckpoint(tmp_path / "{epoch:02d}-{val_loss:.2f}.msgpack"),
        values=[0.5, 0.25, 1.0],
    )
    names = sorted(os.listdir(tmp_path))
    assert names == ["01-0.50.msgpack", "02-0.25.msgpack", "03-1.00.msgpack"]
    loaded = Trainer.load(tmp_path / names[-1], nn.Dense(3))
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, trainer.variables)
    assert [step_of(tmp_path / name) for name in names] == [4, 8, 12]


def test_only_the_best_is_written(tmp_path):
    callback = ModelCheckpoint(tmp_path / "best.msgpack", save_best_only=True)
    fit(callback, values=[0.5, 0.75, 0.25, float("nan")])
    assert callback.best == 0.25
    assert step_of(tmp_path / "best.msgpack") == 12


def test_the_best_value_outlives_the_process(tmp_path):
    path = tmp_path / "best.msgpack"
    fit(ModelCheckpoint(path, save_best_only=True), values=[0.5, 0.25])
    again = ModelCheckpoint(path, save_best_only=True)
    fit(again, trainer=Trainer.load(path, nn.Dense(3)), values=[0.3, 0.26])
    assert again.best == 0.25 and step_of(path) == 8
    fit(again, trainer=Trainer.load(path, nn.Dense(3)), values=[0.2])
    assert again.best == 0.2 and step_of(path) == 12
    # A training that begins anew has a best of its own.
    anew = ModelCheckpoint(path, save_best_only=True)
    fit(anew, values=[0.9])
    assert anew.best == 0.9 and step_of(path) == 4


def test_a_threshold_and_a_direction(tmp_path):
    path = tmp_path / "best.msgpack"
    fit(
        ModelCheckpoint(path, save_best_only=True, initial_value_threshold=0.4),
        values=[0.5],
    )
    assert not path.exists()
    fit(ModelCheckpoint(path, save_best_only=True, mode="max"), values=[0.5, 0.75])
    assert step_of(path) == 8


def test_old_files_go_once_the_newer_is_safe(tmp_path):
    callback = ModelCheckpoint(tmp_path / "{epoch}.msgpack", keep=2)
    fit(callback, epochs=4)
    assert sorted(os.listdir(tmp_path)) == ["3.msgpack", "4.msgpack"]


@pytest.mark.parametrize("freq", [3, "0.00001s"])
def test_steps_and_time_within_an_epoch(freq, tmp_path):
    callback = ModelCheckpoint(
        tmp_path / "{epoch}-{batch}-{step}.msgpack", save_freq=freq
    )
    fit(callback, trainer=Trainer(nn.Dense(3), steps_per_call=1), epochs=2)
    expected = {"1-3-3.msgpack", "2-2-6.msgpack"}
    found = set(os.listdir(tmp_path))
    assert expected < found if isinstance(freq, str) else expected == found


def test_writing_is_in_the_background_in_order_and_over_when_fit_returns(
    tmp_path, monkeypatch
):
    from flaxfit.checkpoint import disk

    threads, replace = [], disk.replace_file

    def spy(target, write):
        threads.append((threading.current_thread().name, target.name))
        replace(target, write)

    monkeypatch.setattr(disk, "replace_file", spy)
    fit(ModelCheckpoint(tmp_path / "{epoch}.msgpack"), epochs=3)
    assert threads == [("flaxfit-writer", f"{n}.msgpack") for n in (1, 2, 3)]
    assert not [t for t in threading.enumerate() if t.name == "flaxfit-writer"]


def test_what_is_written_is_the_state_when_it_was_asked_for(tmp_path, monkeypatch):
    """A step that is given the state's memory writes over it meanwhile."""
    from flaxfit.checkpoint import disk

    go_on, replace = threading.Event(), disk.replace_file

    def slow(target, write):
        assert go_on.wait(20)
        replace(target, write)

    monkeypatch.setattr(disk, "replace_file", slow)
    kept = {}

    def keep(loop):
        kept[loop.epoch + 1] = jax.tree.map(np.array, loop.state.params)
        if loop.epoch == 1:
            go_on.set()

    callbacks = [ModelCheckpoint(tmp_path / "{epoch}.msgpack")]
    trainer = Trainer(nn.Dense(3))
    trainer.fit(
        X,
        Y,
        batch_size=4,
        epochs=2,
        verbose=0,
        callbacks=[*callbacks, LambdaCallback(on_epoch_end=keep)],
    )
    for epoch, params in kept.items():
        saved = checkpoint.load(tmp_path / f"{epoch}.msgpack").state["params"]
        jax.tree.map(np.testing.assert_array_equal, saved, params)


def test_what_a_failed_write_would_have_been_is_not_the_best(tmp_path, monkeypatch):
    from flaxfit.checkpoint import disk

    replace, failed = disk.replace_file, []

    def once(target, write):
        if not failed:
            failed.append(True)
            raise OSError(28, "No space left on device")
        replace(target, write)

    monkeypatch.setattr(disk, "replace_file", once)
    callback = ModelCheckpoint(
        tmp_path / "best.msgpack", save_best_only=True, background=False
    )
    with pytest.warns(UserWarning, match=r"Saving .*best.msgpack' failed: .*No space"):
        fit(callback, values=[0.25, 0.5])
    assert callback.best == 0.5 and step_of(tmp_path / "best.msgpack") == 8


def test_a_state_that_is_not_finite_is_not_saved_over_a_good_one(tmp_path):
    path = tmp_path / "last.msgpack"

    def poison(loop):
        if loop.epoch == 1:
            params = jax.tree.map(lambda x: x * np.nan, loop.state.params)
            loop.state = loop.state.replace(params=params)

    trainer = Trainer(nn.Dense(3), nonfinite="ignore")
    with pytest.warns(UserWarning, match="params/bias is not finite, and such a state"):
        trainer.fit(
            X,
            Y,
            batch_size=4,
            epochs=2,
            verbose=0,
            callbacks=[LambdaCallback(on_epoch_end=poison), ModelCheckpoint(path)],
        )
    assert step_of(path) == 4


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"filepath": "{epch}.msgpack"}, ValueError, "Did you mean 'epoch'"),
        ({"filepath": "{epoch"}, ValueError, "is not a format string"),
        ({"monitor": "val_los", "save_best_only": True}, ValueError, "'val_loss'"),
        ({"mode": "up"}, ValueError, "mode='up'. Expected one of 'auto', 'min', 'max'"),
        ({"keep": 0}, ValueError, "keep=0. Expected a whole number of at least 1"),
        ({"keep": 2}, ValueError, "keep=2 for a filepath that names only one file"),
        (
            {"save_freq": "soon"},
            ValueError,
            "save_freq='soon'. Expected a positive number of steps",
        ),
        ({"filepath": "file/a.msgpack"}, CheckpointError, "file"),
    ],
)
def test_wrong_arguments_are_errors_before_the_first_step(
    options, error, text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    trainer = Trainer(nn.Dense(3))
    with pytest.raises(error, match=re.escape(text)):
        fit(ModelCheckpoint(**{"filepath": "a.msgpack", **options}), trainer=trainer)
    assert trainer.step == 0


@pytest.mark.parametrize("saves", ["callback", "run_dir"])
def test_saving_every_epoch_leaves_several_steps_in_one_call(saves, tmp_path):
    callback = ModelCheckpoint(tmp_path / "last.msgpack")
    trainer, calls = Trainer(nn.Dense(3), steps_per_call=4), []
    trainer.fit(X, Y, batch_size=4, verbose=0)
    program = trainer._programs.resolved.programs.train
    run, how = program._jitted, {"callbacks": callback}
    program._jitted = lambda *args: calls.append(args[-1]) or run(*args)
    if saves == "run_dir":
        how = {"run_dir": tmp_path / "run"}
    trainer.fit(X, Y, batch_size=4, epochs=3, verbose=0, **how)
    assert calls == [4, 4, 4]
