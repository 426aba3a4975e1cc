"""The holder of the state: what was read stays valid, whatever is donated later."""

import pickle
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.asserts import same

from flaxfit import TrainState
from flaxfit._core.state_store import TrainStateStore


def state_of(value):
    params = {"w": jnp.full((3,), value, jnp.float32)}
    return TrainState(jnp.int32(value), params, {}, (), jnp.zeros((), jnp.uint32))


def donate(holder):
    """Trains a step as a program does: consumes the state, puts the next one."""
    with holder.lock:
        state = holder.take()
        new = state_of(int(state.step) + 1)
        for leaf in (state.step, *state.params.values(), state.rng):
            leaf.delete()
        holder.put(new)


def test_an_empty_holder_has_nothing():
    holder = TrainStateStore()
    assert holder.empty and not holder.has_trained and holder.version == 0
    with pytest.raises(AssertionError):
        holder.peek()


def test_what_was_read_outlives_a_donation():
    holder = TrainStateStore(state_of(1))
    kept = holder.read()
    donate(holder)
    assert int(kept.step) == 1 and not kept.params["w"].is_deleted()
    assert int(holder.peek().step) == 2


def test_what_nobody_reads_is_donated_without_a_copy():
    holder = TrainStateStore(state_of(1))
    inside = holder.peek()
    assert holder.take() is inside
    holder.read()
    copy = holder.take()
    assert copy is not inside
    same(copy, inside)
    assert holder.take() is copy  # one copy a reader


def test_what_is_borrowed_stays_valid_until_it_is_given_back():
    holder = TrainStateStore(state_of(1))
    with holder.borrow() as state:
        donate(holder)
        np.testing.assert_array_equal(state.params["w"], [1, 1, 1])
    inside = holder.peek()
    assert holder.take() is inside


def test_a_fresh_state_is_nothing_that_was_trained():
    holder = TrainStateStore()
    holder.put(state_of(0), fresh=True)
    assert not holder.has_trained and not holder.empty
    holder.read()
    holder.take()  # a copy of a fresh state is fresh too
    assert not holder.has_trained
    donate(holder)
    assert holder.has_trained


def test_the_version_counts_replacements():
    holder = TrainStateStore(state_of(0))
    before = holder.version
    holder.read()
    holder.peek()
    assert holder.version == before
    donate(holder)
    assert holder.version > before


def test_a_holder_can_be_pickled():
    holder = TrainStateStore(state_of(4))
    copy = pickle.loads(pickle.dumps(holder))
    same(copy.peek(), holder.peek())
    donate(copy)
    assert (int(copy.peek().step), int(holder.peek().step)) == (5, 4)


def test_threads_read_whole_states_while_another_trains():
    holder = TrainStateStore(state_of(0))
    found, done = [], threading.Event()

    def read():
        while not done.is_set():
            with holder.borrow() as state:
                found.append((int(state.step), float(state.params["w"][0])))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(50):
        donate(holder)
    done.set()
    for reader in readers:
        reader.join()
    assert found and all(step == value for step, value in found)
    assert int(holder.peek().step) == 50
