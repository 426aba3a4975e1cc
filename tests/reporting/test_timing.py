"""Where the time of a fit went: phases, rates, the remark."""

import pickle
import threading
import time
import types

import flax.linen as nn
import pytest
from helpers.data import labeled

import flaxfit._reporting.timing
import flaxfit.checkpoint
from flaxfit import Callback, LambdaCallback, Trainer
from flaxfit._reporting.timing import PHASES, Clock, Timing

X, Y = labeled(64)


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still unless it is moved."""
    made_up = types.SimpleNamespace(seconds=10.0)
    made_up.perf_counter = lambda: made_up.seconds
    monkeypatch.setattr(flaxfit._reporting.timing, "time", made_up)
    return made_up


def seconds_of(**given):
    return dict.fromkeys(PHASES, 0.0) | given


# ------------------------------------------------------------------- clock


def test_every_moment_counts_to_the_innermost_phase(now):
    clock = Clock()
    now.seconds += 1
    with clock.phase("evaluating"):
        now.seconds += 2
        with clock.phase("callbacks"):
            now.seconds += 4
        now.seconds += 8
    now.seconds += 16
    assert clock.lap() == seconds_of(stepping=17.0, evaluating=10.0, callbacks=4.0)
    assert clock.lap() == seconds_of()


def test_an_error_closes_a_phase(now):
    clock = Clock()
    with pytest.raises(RuntimeError), clock.phase("saving"):
        now.seconds += 1
        raise RuntimeError
    now.seconds += 2
    assert clock.lap() == seconds_of(stepping=2.0, saving=1.0)


def test_a_lap_inside_a_phase_goes_on_in_it(now):
    clock = Clock()
    outer = clock.switch("waiting_for_data")
    assert outer == "stepping"
    now.seconds += 3
    assert clock.lap()["waiting_for_data"] == 3.0
    now.seconds += 4
    assert clock.switch(outer) == "waiting_for_data"
    assert clock.lap() == seconds_of(waiting_for_data=4.0)


def test_time_can_be_moved_to_another_phase(now):
    clock = Clock()
    with clock.phase("evaluating"):
        now.seconds += 5
        clock.move(3.0, "compiling")
        now.seconds += 1
    assert clock.lap() == seconds_of(evaluating=3.0, compiling=3.0)


# ------------------------------------------------------------------ timing


def test_rates_are_of_training_without_compiling():
    timing = Timing()
    timing.flops_per_step = lambda: 1000.0
    timing.append(
        seconds_of(compiling=7.0, waiting_for_data=1.0, stepping=3.0, evaluating=5.0),
        steps=8,
        examples=64,
    )
    timing.append(seconds_of(stepping=2.0, callbacks=1.5), steps=8, examples=60)
    assert timing.seconds["total"] == [16.0, 3.5]
    assert timing.seconds["callbacks"] == [0.0, 1.5]
    assert timing.examples_per_second == [16.0, 30.0]
    assert timing.steps_per_second == [2.0, 4.0]
    assert timing.flops_per_second == [2000.0, 4000.0]
    assert (timing.steps, timing.examples) == ([8, 8], [64, 60])


def test_no_time_is_no_division_by_zero():
    timing = Timing()
    timing.flops_per_step = lambda: 1000.0
    timing.append(seconds_of(), steps=1, examples=1)
    assert timing.examples_per_second == [0.0]
    assert timing.flops_per_second == [0.0]
    assert Timing().flops_per_second is None
    assert "total" in repr(Timing())


@pytest.mark.parametrize(
    ("waiting", "stepping", "said"),
    [(0.3, 0.7, True), (0.19, 0.81, False), (0.4, 0.05, False), (0.0, 0.0, False)],
)
def test_the_remark_comes_where_much_of_much_time_was_waiting(waiting, stepping, said):
    timing = Timing()
    # Compiling and validation are no training, and hide nothing.
    given = seconds_of(waiting_for_data=waiting, stepping=stepping, compiling=50.0)
    timing.append(given, steps=1, examples=1)
    if said:
        assert timing.remark == (
            "the input holds training back: 30% of the training time (0.3 s) was "
            "spent waiting for batches"
        )
        assert timing.remark in repr(timing)
    else:
        assert timing.remark is None


def test_the_table_shows_shares():
    timing = Timing()
    given = seconds_of(stepping=3.0, waiting_for_data=1.0)
    timing.append(given, steps=8000, examples=64_000)
    rows = dict(line.split("  ", 1) for line in repr(timing).splitlines())
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["stepping"] == "3.00 s (75%)"
    assert rows["waiting for data"] == "1.00 s (25%)"
    assert rows["total"] == "4.00 s"
    assert rows["examples/s"] == "16.0 k"
    assert rows["steps/s"] == "2.0 k"


# -------------------------------------------------------------- whole fits


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


WIDE_X, WIDE_Y = labeled(60, 256, classes=10)


@pytest.fixture(scope="module")
def fitted():
    trainer = Trainer(Wide())
    began = time.perf_counter()
    history = trainer.fit(
        WIDE_X,
        WIDE_Y,
        batch_size=16,
        epochs=3,
        validation_data=(WIDE_X, WIDE_Y),
        verbose=0,
    )
    return trainer, history, time.perf_counter() - began


def test_phases_add_up_and_counts_are_right(fitted):
    _, history, _ = fitted
    timing = history.timing
    assert set(timing.seconds) == {*PHASES, "total"}
    for epoch in range(3):
        parts = [timing.seconds[name][epoch] for name in PHASES]
        assert sum(parts) == pytest.approx(timing.seconds["total"][epoch], rel=0.01)
        assert min(parts) >= 0
    assert timing.steps == [4, 4, 4]
    assert timing.examples == [60, 60, 60]  # the fill is no example
    assert timing.seconds["compiling"][0] > 0
    assert timing.seconds["compiling"][1:] == [0, 0]
    assert min(timing.seconds["evaluating"]) > 0
    assert timing.seconds["saving"] == [0, 0, 0]


def test_the_total_is_the_time_of_a_fit_that_is_compiled(fitted):
    trainer, _, _ = fitted
    began = time.perf_counter()
    history = trainer.fit(WIDE_X, WIDE_Y, batch_size=16, epochs=200, verbose=0)
    seconds = time.perf_counter() - began
    total = sum(history.timing.seconds["total"])
    assert 0.8 * seconds < total <= seconds


def test_the_total_is_the_time_of_the_first_fit_as_well(fitted):
    """What `fit` does before the first step is waited for, too."""
    _, history, seconds = fitted
    total = sum(history.timing.seconds["total"])
    assert 0.8 * seconds < total <= seconds


@pytest.mark.parametrize("execution", [{}, {"device_data": 0}, {"steps_per_call": 2}])
def test_flops_are_those_of_a_step_whatever_the_call(execution, fitted):
    trainer, history, _ = fitted
    if execution:
        trainer = Trainer(Wide(), **execution)
        history = trainer.fit(WIDE_X, WIDE_Y, batch_size=16, verbose=0)
    before = trainer.compiles
    timing = history.timing
    per_step = timing.flops_per_second[0] / timing.steps_per_second[0]
    # Forward, and the gradients of kernels and inputs, the first layer's left out.
    by_hand = 2 * 16 * (2 * 256 * 128 + 3 * 128 * 10)
    assert by_hand < per_step < 2 * by_hand
    assert trainer.compiles == before


def test_a_history_can_be_pickled_and_keeps_its_numbers(fitted):
    _, history, _ = fitted
    copy = pickle.loads(pickle.dumps(history))
    assert copy.timing.seconds == history.timing.seconds
    assert copy.timing.steps_per_second == history.timing.steps_per_second
    assert copy.timing.flops_per_second is None
    assert copy.history == history.history


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_slow_loader_is_waited_for_and_said_to_hold_training_back(prefetch, capsys):
    pause = [0.0]

    def batches():
        for start in range(0, 64, 4):
            time.sleep(pause[0])
            yield X[start : start + 4], Y[start : start + 4]

    trainer = Trainer(nn.Dense(3), prefetch=prefetch)
    assert trainer.fit(batches, verbose=2).timing.remark is None
    assert "holds training back" not in capsys.readouterr().out
    pause[0] = 0.05
    timing = trainer.fit(batches, verbose=2).timing
    waiting, total = (timing.seconds[n][0] for n in ("waiting_for_data", "total"))
    assert waiting > 0.6
    assert waiting > 0.7 * total
    assert timing.remark.startswith("the input holds training back: ")
    assert timing.remark in capsys.readouterr().out


class Writer(Callback):
    """Saves in an epoch's end, and does something else before."""

    def __init__(self, path):
        self.path = path

    def on_epoch_end(self, loop):
        time.sleep(0.05)
        with loop.clock.phase("saving"):
            time.sleep(0.15)
        loop.history.trainer.save(self.path)


def test_callbacks_and_saving_are_told_apart(fitted, tmp_path, monkeypatch):
    trainer, _, _ = fitted
    write = flaxfit.checkpoint.save

    def slow(*args):
        time.sleep(0.1)
        write(*args)

    monkeypatch.setattr(flaxfit.checkpoint, "save", slow)
    seconds = trainer.fit(
        WIDE_X,
        WIDE_Y,
        batch_size=16,
        epochs=2,
        verbose=0,
        callbacks=[
            Writer(tmp_path / "run"),
            LambdaCallback(on_train_batch_end=lambda loop: time.sleep(0.02)),
        ],
    ).timing.seconds
    slept = {"saving": 0.15 + 0.1, "callbacks": 0.05 + 4 * 0.02}
    for phase, least in slept.items():
        assert all(value >= least for value in seconds[phase])
    # Neither holds the other's time, nor do the others hold theirs.
    for epoch, total in enumerate(seconds["total"]):
        spent = sum(seconds[phase][epoch] for phase in PHASES)
        assert spent == pytest.approx(total)
    assert sum(seconds["callbacks"]) < sum(seconds["saving"])


def test_what_another_thread_does_is_not_counted():
    clock = Clock()

    def work():
        with clock.phase("saving"):
            time.sleep(0.05)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    seconds = clock.lap()
    assert seconds["saving"] == 0
    assert seconds["stepping"] >= 0.05


def test_a_validation_s_callbacks_are_no_evaluation(fitted):
    trainer, _, _ = fitted
    seconds = trainer.fit(
        WIDE_X,
        WIDE_Y,
        batch_size=16,
        validation_data=(WIDE_X, WIDE_Y),
        verbose=0,
        callbacks=LambdaCallback(on_test_end=lambda loop: time.sleep(0.2)),
    ).timing.seconds
    # Counted once: as evaluation it would be missing here.
    assert seconds["callbacks"][0] >= 0.2
    assert seconds["total"][0] == pytest.approx(
        sum(seconds[phase][0] for phase in PHASES)
    )


def test_a_fast_input_is_not_remarked_on(fitted):
    trainer, _, _ = fitted
    timing = trainer.fit(WIDE_X, WIDE_Y, batch_size=16, epochs=300, verbose=0).timing
    waiting, total = (sum(timing.seconds[n]) for n in ("waiting_for_data", "total"))
    assert waiting < 0.5 * total


def test_an_epoch_broken_off_is_not_counted(fitted):
    trainer, _, _ = fitted

    def fail(loop):
        if loop.epoch == 1:
            raise RuntimeError("mine")

    kept = []
    with pytest.raises(RuntimeError, match="mine"):
        trainer.fit(
            WIDE_X,
            WIDE_Y,
            batch_size=16,
            epochs=3,
            verbose=0,
            callbacks=LambdaCallback(
                on_train_batch_end=fail,
                on_train_end=lambda loop: kept.append(loop.history.timing),
            ),
        )
    assert kept[0].steps == [4]
    assert len(kept[0].seconds["total"]) == 1
