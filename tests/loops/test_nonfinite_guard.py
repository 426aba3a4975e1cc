"""The guard on its own: a hand-made fit, a queue of finished calls, and no trainer."""

import warnings
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from flaxfit import TrainState
from flaxfit._core.state_store import TrainStateStore
from flaxfit._loops.nonfinite import NonFiniteGuard
from flaxfit._programs.compile import EpochAccumulators
from flaxfit._reporting.history import History
from flaxfit.callbacks.base import LoopState


def state_at(step):
    return TrainState(jnp.int32(step), {}, {}, (), jnp.zeros((), jnp.uint32))


def accumulators(index=6, bad=-1, skipped=0):
    return EpochAccumulators(
        index=jnp.int32(index), logs={}, bad=jnp.int32(bad), skipped=jnp.int32(skipped)
    )


def guarded(nonfinite, checkpoint=None, **running):
    """A guard over epoch 2 of 6 batches each, after step 12 of the training."""
    store = TrainStateStore(state_at(10))
    loop = LoopState(
        store,
        history=History(),
        step=12,
        epoch=1,
        epochs=3,
        steps_per_epoch=6,
        log_names=["loss"],
    )
    loop.batch, loop.running = 6, accumulators(**running)
    fit = SimpleNamespace(
        loop=loop,
        nonfinite=nonfinite,
        ending=False,
        store=store,
        session=SimpleNamespace(last_checkpoint=lambda: checkpoint),
        resolved=SimpleNamespace(empty=lambda: accumulators(index=0)),
    )
    queue = SimpleNamespace(
        finished=(accumulators(**running), 1), wait_all=lambda: None
    )
    return NonFiniteGuard(fit, queue), fit


@pytest.mark.parametrize("nonfinite", ["stop", "skip", "rollback", "ignore"])
def test_finite_losses_pass(nonfinite):
    guard, fit = guarded(nonfinite)
    guard.check()
    assert not fit.loop.stopped and not guard.should_break
    assert (fit.loop.step, fit.loop.batch) == (12, 6)


def test_stop_names_step_and_batch_and_keeps_the_last_good_state():
    guard, fit = guarded("stop", bad=3)
    with pytest.warns(UserWarning, match=r"not finite at step 10 \(epoch 2, batch 4\)"):
        guard.check()
    assert fit.loop.outcome == (
        "the loss is not finite at step 10 (epoch 2, batch 4)",
        "nonfinite",
    )
    assert (fit.loop.step, fit.loop.batch) == (10, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.check()  # it is reported once


def test_skip_counts_and_goes_on():
    guard, fit = guarded("skip", bad=2, skipped=2)
    with pytest.warns(UserWarning, match=r"Skipped 2 batches of epoch 2.*batch 3"):
        guard.check()
    assert not fit.loop.stopped and not guard.should_break
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.check()  # the same number again


def test_rollback_restores_state_and_accumulators():
    checkpoint = (state_at(8), 1, accumulators(index=2))
    guard, fit = guarded("rollback", checkpoint, bad=3)
    with pytest.warns(UserWarning, match="Rolled back to the checkpoint of step 8"):
        guard.check()
    assert not fit.loop.stopped and guard.rolled_back and guard.should_break
    assert fit.loop.step == 8 and int(fit.store.peek().step) == 8
    # Batches 3 and 4 of the epoch, after the checkpoint, are in no average.
    assert int(fit.loop.running.index) == 2 and int(fit.loop.running.skipped) == 2
    assert int(fit.loop.running.bad) == -1


def test_rollback_to_another_epoch_begins_empty_averages():
    checkpoint = (state_at(6), 0, accumulators(index=6))
    guard, fit = guarded("rollback", checkpoint, bad=0)
    with pytest.warns(UserWarning, match="step 6"):
        guard.check()
    assert int(fit.loop.running.index) == 0 and int(fit.loop.running.skipped) == 1


def test_rollback_without_a_checkpoint_stops():
    guard, fit = guarded("rollback", bad=0)
    with pytest.warns(UserWarning, match="run_dir"):
        guard.check()
    assert fit.loop.stopped and not guard.rolled_back


def test_the_fourth_rollback_to_one_checkpoint_stops():
    checkpoint = (state_at(8), 1, accumulators(index=2))
    guard, fit = guarded("rollback", checkpoint, bad=3)
    for number in range(4):
        fit.loop.running, fit.loop.batch = accumulators(bad=3), 6
        guard.rolled_back = False
        with pytest.warns(UserWarning):
            guard.check()
        assert fit.loop.stopped is (number == 3)


def test_polling_looks_a_few_times_a_second_only(monkeypatch):
    guard, fit = guarded("stop", bad=0)
    guard.poll()
    assert not fit.loop.stopped
    monkeypatch.setattr("flaxfit._loops.nonfinite._SECONDS_BETWEEN_POLLS", 0.0)
    with pytest.warns(UserWarning, match="batch 1"):
        guard.poll()
    assert fit.loop.stopped
