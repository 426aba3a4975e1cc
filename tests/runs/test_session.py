"""`fit(run_dir=...)`: the same line again goes on exactly where it stopped."""

import json
import os
import re
import shutil
import signal
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.asserts import same
from helpers.data import labeled
from helpers.models import Net

from flaxfit import (
    Callback,
    CheckpointError,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
    Trainer,
    checkpoint,
)
from flaxfit._runs import checkpoint_manager

X, Y = labeled(22, 4)


class InterruptAt(Callback):
    """Sends the process a real signal at a step."""

    def __init__(self, step, number=signal.SIGINT):
        self._step = step
        self._number = number

    def on_train_batch_end(self, loop):
        if loop.step == self._step:
            os.kill(os.getpid(), self._number)


def make(**options):
    return Trainer(Net(), metrics=["accuracy"], **options)


def fit(trainer, folder, callbacks=(), **options):
    options = {"epochs": 3, "validation_data": (X, Y), "verbose": 0} | options
    data = options.pop("data", (X, Y))
    return trainer.fit(
        *data, batch_size=4, callbacks=list(callbacks), run_dir=folder, **options
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    trainer = make()
    history = fit(trainer, tmp_path_factory.mktemp("whole") / "run")
    return trainer, history


# Resuming


@pytest.mark.parametrize("step", [1, 6, 9, 17])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(step, whole, tmp_path):
    first = fit(make(), tmp_path / "a", [InterruptAt(step)])
    assert first.stop_reason == "interrupted by Ctrl-C"
    assert len(first.epoch) == (step - 1) // 6
    trainer = make()
    history = fit(trainer, tmp_path / "a")
    same(trainer.state, whole[0].state)
    assert history.history == whole[1].history
    assert history.epoch == [0, 1, 2] and history.val_epoch == [0, 1, 2]
    assert trainer.step == 18


def test_a_finished_run_is_not_repeated_and_more_epochs_go_on(tmp_path, whole, capsys):
    fit(make(), tmp_path, epochs=2)
    trainer, steps = make(), []
    counting = LambdaCallback(on_train_batch_end=lambda loop: steps.append(loop.step))
    history = fit(trainer, tmp_path, [counting], epochs=2, verbose=2)
    assert steps == [] and trainer.step == 12 and history.epoch == [0, 1]
    assert (
        "nothing left to train: epoch 2 of 2 is done, step 12"
        in capsys.readouterr().out
    )
    history = fit(trainer, tmp_path, [counting], epochs=3, verbose=2)
    assert steps == list(range(13, 19))
    assert "changed: epochs was 2, is 3" in capsys.readouterr().out
    same(trainer.state, whole[0].state)
    assert history.history == whole[1].history


def test_fewer_epochs_than_were_done_train_nothing(tmp_path):
    fit(make(), tmp_path, epochs=2)
    trainer = make()
    assert len(fit(trainer, tmp_path, epochs=1).epoch) == 2
    assert trainer.step == 12


def test_early_stopping_goes_on_counting_and_keeps_its_best(tmp_path):
    def stopping():
        return EarlyStopping("val_accuracy", patience=2)

    noise = (
        X,
        np.random.default_rng(1).permutation(Y),
    )  # nothing to be learnt: it stops soon
    options = {"epochs": 9, "validation_data": noise}
    trainer, whole = make(learning_rate=0.1), stopping()
    history = fit(trainer, tmp_path / "whole", [whole], **options)
    assert whole.stopped_epoch is not None
    again = stopping()
    for step in (3, 8, 15):
        fit(
            make(learning_rate=0.1),
            tmp_path / "a",
            [again, InterruptAt(step)],
            **options,
        )
        again = stopping()
    resumed = make(learning_rate=0.1)
    continued = fit(resumed, tmp_path / "a", [again], **options)
    assert continued.history == history.history
    assert (again.best, again.best_epoch, again.stopped_epoch) == (
        whole.best,
        whole.best_epoch,
        whole.stopped_epoch,
    )
    same(resumed.state, trainer.state)  # that of the best epoch
    # And once more: it was stopped, and stays so, with the best state.
    once_more = make(learning_rate=0.1)
    last = fit(once_more, tmp_path / "a", [stopping()], **options)
    assert last.stop_reason == history.stop_reason
    same(once_more.state, trainer.state)


def test_a_callback_that_is_more_patient_goes_on(tmp_path, capsys):
    stopper = LambdaCallback(on_epoch_end=lambda loop: loop.stop("enough"))
    assert fit(make(), tmp_path, [stopper]).epoch == [0]
    assert fit(make(), tmp_path, [stopper]).epoch == [0]
    history = fit(make(), tmp_path, [EarlyStopping(patience=9)], verbose=2)
    assert history.epoch == [0, 1, 2]
    out = capsys.readouterr().out
    assert "changed: the callbacks, or their arguments" in out
    assert "EarlyStopping was not there before: it starts fresh" in out


def test_a_run_that_began_at_a_later_epoch_of_a_trained_trainer(tmp_path):
    def begun():
        trainer = make()
        trainer.fit(X, Y, batch_size=4, verbose=0)
        return trainer

    whole = begun()
    history = fit(whole, tmp_path / "whole", initial_epoch=1)
    assert history.epoch == [1, 2] and whole.step == 18
    fit(begun(), tmp_path / "a", [InterruptAt(9)], initial_epoch=1)
    resumed = begun()  # the same script again
    assert fit(resumed, tmp_path / "a", initial_epoch=1).history == history.history
    same(resumed.state, whole.state)


@pytest.mark.parametrize("kind", ["list", "function", "iterator"])
def test_batches_of_others_are_read_past(kind, tmp_path, capsys):
    batches = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 20, 4)]
    seen = []

    def read():
        for number, batch in enumerate(batches * 3):
            seen.append(number)
            yield batch

    def run(folder, *callbacks):
        data = {"list": batches, "function": lambda: iter(batches), "iterator": read()}
        steps = 5 if kind == "iterator" else None
        trainer = make(prefetch=0)
        history = trainer.fit(
            data[kind],
            epochs=3,
            steps_per_epoch=steps,
            callbacks=list(callbacks),
            run_dir=folder,
            verbose=2,
        )
        return trainer, history

    whole, history = run(tmp_path / "whole")
    run(tmp_path / "a", InterruptAt(8))
    capsys.readouterr()
    resumed, continued = run(tmp_path / "a")
    told = "cannot start in the middle of an epoch" in capsys.readouterr().out
    assert told is (kind != "list")  # which is entered by index
    assert continued.history == history.history
    same(resumed.state, whole.state)


@pytest.mark.parametrize("device_data", [0.25, 0])
def test_epochs_that_do_not_go_by_passes(device_data, tmp_path):
    def run(folder, *callbacks):
        trainer = make(device_data=device_data)
        return trainer, fit(trainer, folder, callbacks, steps_per_epoch=4, epochs=4)

    whole, history = run(tmp_path / "whole")
    for step in (3, 4, 10):
        run(tmp_path / "a", InterruptAt(step))
    resumed, continued = run(tmp_path / "a")
    assert continued.history == history.history
    same(resumed.state, whole.state)


def test_schedules_of_the_whole_length_go_on(tmp_path):
    def run(folder, *callbacks, **options):
        rate = lambda total_steps: optax.cosine_decay_schedule(0.1, total_steps)  # noqa: E731
        trainer = make(learning_rate=rate)
        return trainer, fit(trainer, folder, callbacks, **options)

    whole, history = run(tmp_path / "whole")
    run(tmp_path / "a", InterruptAt(7))
    resumed, continued = run(tmp_path / "a")
    assert continued.history == history.history
    assert history.history["learning_rate"][-1] < 0.01
    same(resumed.state, whole.state)


# What is kept


def test_the_folder_holds_the_last_two_the_best_the_history_and_a_log(tmp_path):
    history = fit(make(), tmp_path, save_every=4)
    assert sorted(os.listdir(tmp_path)) == [
        ".lock",
        "best.msgpack",
        "history.json",
        "log.jsonl",
        "step-0000000016.msgpack",
        "step-0000000018.msgpack",
    ]
    losses = history.history["val_loss"]
    best = checkpoint.read_meta(tmp_path / "best.msgpack")["loop"]
    assert best["step"] == 6 * (1 + int(np.argmin(losses)))
    assert (
        json.loads((tmp_path / "history.json").read_text())["values"]["loss"]
        == (history.history["loss"])
    )
    events = [json.loads(line) for line in open_lines(tmp_path / "log.jsonl")]
    assert [e["event"] for e in events] == ["start", *["epoch"] * 3, "end"]
    assert events[2]["step"] == 12
    assert events[2]["logs"]["val_loss"] == losses[1]
    fit(make(), tmp_path)
    events = [json.loads(line) for line in open_lines(tmp_path / "log.jsonl")]
    assert events[5] | {"time": 0} == {
        "time": 0,
        "event": "resume",
        "step": 18,
        "from": str(tmp_path / "step-0000000018.msgpack"),
    }


def open_lines(path):
    return path.read_text().splitlines()


def test_the_monitored_log_decides_and_is_remembered(tmp_path):
    history = fit(make(learning_rate=0.1), tmp_path, monitor="val_accuracy", epochs=4)
    values = history.history["val_accuracy"]
    best = checkpoint.read_meta(tmp_path / "best.msgpack")["loop"]["step"]
    assert best == 6 * (1 + int(np.argmax(values)))
    fit(make(learning_rate=0.1), tmp_path, monitor="val_accuracy", epochs=8)
    saved = checkpoint.read_meta(tmp_path / "best.msgpack")["loop"]["history"]
    assert saved["values"]["val_accuracy"][-1] == max(
        checkpoint_manager.newest(tmp_path).meta["loop"]["history"]["values"][
            "val_accuracy"
        ]
    )


def test_a_checkpoint_is_a_trainer_and_flax_reads_it(tmp_path, whole):
    fit(make(), tmp_path)
    loaded = Trainer.load(tmp_path, Net())
    same(loaded.state, whole[0].state)
    best = Trainer.load(tmp_path / "best.msgpack", Net())
    losses = whole[1].history["val_loss"]
    assert best.evaluate(X, Y)["loss"] == pytest.approx(min(losses), rel=1e-6)
    state = flax_read(next(tmp_path.glob("step-*18.msgpack")), whole[0].state)
    same(state.params, whole[0].state.params)


def flax_read(path, target):
    from flax import serialization

    target = target.replace(rng=np.zeros(2, np.uint32))
    return serialization.from_bytes({"state": target}, path.read_bytes())["state"]


def test_time_may_say_when_to_save(tmp_path):
    steps = []

    class Spy(Callback):
        def on_train_batch_end(self, loop):
            steps.append(sorted(f.name for f in tmp_path.glob("step-*")))

    fit(make(), tmp_path, [Spy()], epochs=1, save_every="0.000001s")
    assert "step-0000000003.msgpack" in [name for names in steps for name in names]


def test_callbacks_remember_arrays_and_states(tmp_path):
    class Memory(Callback):
        def __init__(self):
            self.seen = None

        def on_epoch_end(self, loop):
            self.seen = {
                "state": loop.state,
                "list": [np.arange(3), 1.5],
                "n": loop.epoch,
            }

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.loaded = state["seen"]

    trainer = make()
    fit(trainer, tmp_path, [Memory()], epochs=2)
    memory = Memory()
    fit(make(), tmp_path, [memory], epochs=2)
    assert memory.loaded["n"] == 1
    np.testing.assert_array_equal(memory.loaded["list"][0], [0, 1, 2])
    assert memory.loaded["list"][1] == 1.5
    same(memory.loaded["state"], trainer.state)


# Where to go on from


def test_a_run_is_moved_away_only_by_a_fit_that_begins(tmp_path):
    fit(make(), tmp_path, epochs=1)
    before = sorted(path.name for path in tmp_path.iterdir())
    bad = X.copy()
    bad[3] = np.nan
    for data, options in (
        ((bad, Y), {}),
        ((X, Y), {"validation_data": (X[:, :1], Y)}),
        ((X, Y), {"validation_data": (X, Y), "validation_split": 0.5}),
    ):
        with pytest.raises(ValueError):
            make().fit(*data, verbose=0, run_dir=tmp_path, resume="never", **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert fit(make(), tmp_path, epochs=1).epoch == [0]


def test_must_never_and_a_path(tmp_path, whole):
    with pytest.raises(CheckpointError, match='resume="must": there is no checkpoint'):
        fit(make(), tmp_path / "a", resume="must")
    fit(make(), tmp_path / "a", epochs=2)
    saved = tmp_path / "saved.msgpack"
    shutil.copy(tmp_path / "a" / "step-0000000012.msgpack", saved)
    fit(make(), tmp_path / "a", epochs=3, resume="must")
    for resume in (saved, tmp_path / "a"):
        trainer = make()
        history = fit(trainer, tmp_path / "b", resume=resume)
        same(trainer.state, whole[0].state)
        assert history.history == whole[1].history
        shutil.rmtree(tmp_path / "b")
    trainer = make()
    with pytest.warns(UserWarning, match="is now in .*old-1"):
        fit(trainer, tmp_path / "a", epochs=1, resume="never")
    assert trainer.step == 6
    assert (tmp_path / "a" / "old-1" / "step-0000000018.msgpack").exists()
    with pytest.warns(UserWarning, match="is now in .*old-2"):
        fit(make(), tmp_path / "a", resume=saved)
    # Without a folder, from a file alone.
    trainer = make()
    trainer.fit(
        X, Y, batch_size=4, epochs=3, validation_data=(X, Y), verbose=0, resume=saved
    )
    same(trainer.state, whole[0].state)


def test_an_older_file_of_the_same_folder_is_no_place_to_go_on(tmp_path):
    fit(make(), tmp_path, save_every=4)
    with pytest.raises(CheckpointError, match="the run would hold both"):
        fit(make(), tmp_path, epochs=4, resume=tmp_path / "step-0000000016.msgpack")


def test_files_that_hold_no_training_are_no_place_to_go_on(tmp_path):
    trainer = make()
    trainer.fit(X, Y, verbose=0)
    trainer.save(tmp_path / "plain.msgpack")
    with pytest.raises(CheckpointError, match="holds no training to resume"):
        fit(make(), tmp_path / "a", resume=tmp_path / "plain.msgpack")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"resume": "yes", "run_dir": "a"}, "There is no file 'yes'"),
        ({"resume": 3}, 'Got resume=3. Expected "auto", "must", "never", or the path'),
        ({"resume": "must"}, "resume='must' requires a run_dir"),
        ({"save_every": 10}, "save_every=10 requires a run_dir"),
        ({"monitor": "loss"}, "monitor='loss' requires a run_dir"),
        (
            {"save_every": 0, "run_dir": "a"},
            "save_every=0. Expected a positive number of steps",
        ),
        (
            {"save_every": "5x", "run_dir": "a"},
            "save_every='5x'. Expected a positive number",
        ),
        ({"monitor": "los", "run_dir": "a"}, "Did you mean 'loss'"),
    ],
)
def test_wrong_arguments(options, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(text)):
        make().fit(X, Y, verbose=0, **options)


def test_a_training_of_another_kind_is_not_replaced(tmp_path):
    trainer = make()
    fit(trainer, tmp_path, epochs=1)
    fit(trainer, tmp_path, epochs=2)  # its own run: it goes on
    trainer.train_on_batch(X[:4], Y[:4])
    with pytest.raises(ValueError, match="trained for 13 steps that are not part of"):
        fit(trainer, tmp_path)
    assert trainer.step == 13


# What is not as it was


def test_other_data_is_refused_within_an_epoch_and_explained_at_its_end(tmp_path):
    fit(make(), tmp_path / "a", [InterruptAt(8)])
    changes = [
        ({"data": (X[:20], Y[:20])}, make, "the number of examples was 22, is 20"),
        ({"shuffle": False}, make, "shuffle was True, is False"),
        ({}, lambda: make(seed=3), "seed was 0, is 3"),
        ({"steps_per_epoch": 4}, make, "steps_per_epoch was None, is 4"),
    ]
    for options, build, text in changes:
        trainer = build()
        with pytest.raises(CheckpointError, match=f"epoch 2, batch 2.*{text}"):
            fit(trainer, tmp_path / "a", **options)
        assert trainer.step == 0
    fit(make(), tmp_path / "a", epochs=2)
    for number, (options, build, text) in enumerate(changes):
        shutil.copytree(tmp_path / "a", tmp_path / str(number))
        with pytest.warns(UserWarning, match=f"Since the checkpoint {text}"):
            history = fit(build(), tmp_path / str(number), **options)
        assert history.epoch == [0, 1, 2]


def test_another_batch_size_is_refused_within_an_epoch(tmp_path):
    def run(batch_size, **options):
        return make().fit(
            X, Y, batch_size=batch_size, run_dir=tmp_path, verbose=0, **options
        )

    run(4, epochs=3, callbacks=InterruptAt(8))
    with pytest.raises(CheckpointError, match="batch_size was 4, is 8: examples would"):
        run(8, epochs=3)
    run(4, epochs=2)
    with pytest.warns(
        UserWarning, match="batch_size was 4, is 8: batches have the new size"
    ):
        assert run(8, epochs=3).trainer.step == 12 + 3


def test_a_new_learning_rate_is_obeyed_and_announced(tmp_path, capsys):
    fit(make(), tmp_path, [InterruptAt(8)])
    history = fit(make(learning_rate=0.5), tmp_path, verbose=2)
    assert (
        "learning_rate was None, is 0.5: the new one applies" in capsys.readouterr().out
    )
    assert history.history["learning_rate"] == pytest.approx([1e-3, 0.5, 0.5])


def test_another_optimizer_does_not_fit_and_harms_nothing(tmp_path):
    fit(make(), tmp_path, epochs=1)
    trainer = make(optimizer="sgd")
    with pytest.raises(CheckpointError, match="params_only=True"):
        fit(trainer, tmp_path)
    assert trainer.step == 0
    trainer.fit(X, Y, verbose=0)


def test_other_metrics_begin_anew_within_an_epoch(tmp_path):
    fit(make(), tmp_path, [InterruptAt(8)])
    with pytest.warns(UserWarning, match="the means of epoch 2 start at batch 2"):
        fit(Trainer(Net(), metrics=["accuracy", "top_2_accuracy"]), tmp_path)


# Folders that are not as they should be


def test_a_damaged_checkpoint_is_passed_over(tmp_path, whole):
    fit(make(), tmp_path, epochs=2, save_every=4)
    newest = tmp_path / "step-0000000012.msgpack"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    trainer = make()
    with pytest.warns(
        UserWarning, match="step-0000000012.msgpack' is damaged and pass"
    ):
        history = fit(trainer, tmp_path)
    same(trainer.state, whole[0].state)
    assert history.history == whole[1].history


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path):
    fit(make(), tmp_path, epochs=1)
    for file in tmp_path.glob("*.msgpack"):
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r'none can be read.*resume="never"'):
        with pytest.warns(UserWarning, match="is damaged and passed over"):
            fit(make(), tmp_path)
    with pytest.warns(UserWarning, match="old-1"):
        assert fit(make(), tmp_path, epochs=1, resume="never").epoch == [0]


def test_a_folder_belongs_to_one_process(tmp_path):
    inside = []

    class Second(Callback):
        def on_train_begin(self, loop):
            with pytest.raises(
                CheckpointError, match=r"another process|is being written"
            ):
                fit(make(), tmp_path)
            inside.append(True)

    fit(make(), tmp_path, [Second()], epochs=1)
    assert inside == [True]


def test_a_folder_that_cannot_be_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        fit(make(), tmp_path / "file" / "run")


def test_a_full_disk_costs_no_training(tmp_path, monkeypatch, whole):
    from flaxfit.checkpoint import disk

    replace, failing = disk.replace_file, []

    def full(target, write):
        if failing:
            raise OSError(28, "No space left on device")
        replace(target, write)

    monkeypatch.setattr(disk, "replace_file", full)
    switch = LambdaCallback(
        on_epoch_begin=lambda loop: (
            failing.append(1) if loop.epoch == 1 else failing.clear()
        )
    )
    trainer = make()
    with pytest.warns(UserWarning, match="failed: .*No space left.*training continues"):
        history = fit(trainer, tmp_path, [switch])
    same(trainer.state, whole[0].state)
    assert history.history == whole[1].history
    assert checkpoint_manager.newest(tmp_path).meta["loop"]["step"] == 18


# Signals


def test_sigterm_saves_and_ends_with_143(tmp_path, whole):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        fit(make(), tmp_path, [InterruptAt(8, signal.SIGTERM)])
    assert ended.value.code == 143
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert checkpoint_manager.newest(tmp_path).meta["loop"]["step"] == 8
    trainer = make()
    assert fit(trainer, tmp_path).history == whole[1].history
    same(trainer.state, whole[0].state)


def test_a_handler_of_sigterm_is_called_once_all_is_saved(tmp_path):
    calls = []

    def handler(signum, frame):
        calls.append(checkpoint_manager.newest(tmp_path).meta["loop"]["step"])
        raise InterruptedError

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(InterruptedError):
            fit(make(), tmp_path, [InterruptAt(8, signal.SIGTERM)])
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [8]


def test_handlers_are_left_alone_off_the_main_thread_and_outside_of_fit(tmp_path):
    seen = []

    def look(loop=None):
        seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))

    look()
    thread = threading.Thread(
        target=fit, args=(make(), tmp_path, [LambdaCallback(on_epoch_end=look)])
    )
    thread.start()
    thread.join()
    look()
    assert len(seen) == 5 and len(set(seen)) == 1


def test_a_run_is_resumable_after_an_error_in_the_data(tmp_path):
    batches = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 20, 4)]

    def broken():
        yield from batches[:3]
        raise RuntimeError("the loader")

    whole = make(prefetch=0)
    history = whole.fit(lambda: iter(batches), epochs=2, verbose=0)
    with pytest.raises(RuntimeError, match="the loader"):
        make(prefetch=0).fit(broken, epochs=2, run_dir=tmp_path, verbose=0)
    resumed = make(prefetch=0)
    again = resumed.fit(lambda: iter(batches), epochs=2, run_dir=tmp_path, verbose=0)
    assert again.history == history.history
    same(resumed.state, whole.state)


def test_an_error_in_a_callback_at_an_epochs_end_keeps_the_epoch_before(
    tmp_path, whole
):
    def fail(loop):
        if loop.epoch == 1:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fit(make(), tmp_path, [LambdaCallback(on_epoch_end=fail)])
    trainer = make()
    assert fit(trainer, tmp_path).history == whole[1].history
    same(trainer.state, whole[0].state)


def test_checkpoints_of_callbacks_are_places_to_go_on_from(tmp_path, whole):
    file = tmp_path / "{epoch}-{step}.msgpack"
    callbacks = [ModelCheckpoint(file, save_freq=5), InterruptAt(11)]
    make().fit(
        X,
        Y,
        batch_size=4,
        epochs=3,
        validation_data=(X, Y),
        callbacks=callbacks,
        verbose=0,
    )
    assert sorted(os.listdir(tmp_path)) == ["1-5.msgpack", "2-10.msgpack"]
    for name in os.listdir(tmp_path):
        trainer = make()
        history = trainer.fit(
            X,
            Y,
            batch_size=4,
            epochs=3,
            validation_data=(X, Y),
            resume=tmp_path / name,
            verbose=0,
        )
        same(trainer.state, whole[0].state)
        assert history.history == whole[1].history


def test_a_fit_that_fails_in_init_leaves_the_files_of_the_other_run(tmp_path):
    def broken(key, shape, dtype=None):
        def fail():
            raise RuntimeError("no memory")

        return jax.pure_callback(fail, jax.ShapeDtypeStruct(shape, jnp.float32))

    fit(make(), tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(Exception, match="no memory"):
        Trainer(nn.Dense(3, kernel_init=broken)).fit(
            X, Y, run_dir=tmp_path, resume="never", verbose=0
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == before
