"""The store of the state: what was read stays valid, whatever is donated later."""

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


def donate(store):
    """Trains a step as a program does: consumes the state, puts the next one."""
    with store.lock:
        state = store.take()
        new = state_of(int(state.step) + 1)
        for leaf in (state.step, *state.params.values(), state.rng):
            leaf.delete()
        store.put(new)


def test_an_empty_store_has_nothing():
    store = TrainStateStore()
    assert store.empty and not store.has_trained and store.version == 0
    with pytest.raises(AssertionError):
        store.peek()


def test_what_was_read_outlives_a_donation():
    store = TrainStateStore(state_of(1))
    kept = store.read()
    donate(store)
    assert int(kept.step) == 1 and not kept.params["w"].is_deleted()
    assert int(store.peek().step) == 2


def test_what_nobody_reads_is_donated_without_a_copy():
    store = TrainStateStore(state_of(1))
    inside = store.peek()
    assert store.take() is inside
    store.read()
    copy = store.take()
    assert copy is not inside
    same(copy, inside)
    assert store.take() is copy  # one copy a reader


def test_what_is_borrowed_stays_valid_until_it_is_given_back():
    store = TrainStateStore(state_of(1))
    with store.borrow() as state:
        donate(store)
        np.testing.assert_array_equal(state.params["w"], [1, 1, 1])
    inside = store.peek()
    assert store.take() is inside


def test_a_fresh_state_is_nothing_that_was_trained():
    store = TrainStateStore()
    store.put(state_of(0), fresh=True)
    assert not store.has_trained and not store.empty
    store.read()
    store.take()  # a copy of a fresh state is fresh too
    assert not store.has_trained
    donate(store)
    assert store.has_trained


def test_the_version_counts_replacements():
    store = TrainStateStore(state_of(0))
    before = store.version
    store.read()
    store.peek()
    assert store.version == before
    donate(store)
    assert store.version > before


def test_a_store_can_be_pickled():
    store = TrainStateStore(state_of(4))
    copy = pickle.loads(pickle.dumps(store))
    same(copy.peek(), store.peek())
    donate(copy)
    assert (int(copy.peek().step), int(store.peek().step)) == (5, 4)


def test_threads_read_whole_states_while_another_trains():
    store = TrainStateStore(state_of(0))
    found, done = [], threading.Event()

    def read():
        while not done.is_set():
            with store.borrow() as state:
                found.append((int(state.step), float(state.params["w"][0])))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(50):
        donate(store)
    done.set()
    for reader in readers:
        reader.join()
    assert found and all(step == value for step, value in found)
    assert int(store.peek().step) == 50
