import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxfit._core.state_store import TrainStateStore
from flaxfit._core.types import Average, Sum, TrainState


def make_state():
    return TrainState(
        step=jnp.int32(0),
        params={"w": jnp.arange(3.0)},
        collections={},
        opt_state=(),
        rng=jax.random.key(0),
    )


def test_average_weighs_and_leaves_weight_0_out_even_where_it_is_nan():
    values = jnp.array([[1.0, 2.0], [3.0, 5.0], [jnp.nan, jnp.inf]])
    average = Average.of(values, jnp.array([1.0, 3.0, 0.0]))
    assert float(average.compute()) == (1 + 2 + 3 * 3 + 3 * 5) / 8
    gradient = jax.grad(lambda v: Average.of(v, jnp.array([1.0, 3.0, 0.0])).total)
    np.testing.assert_array_equal(gradient(values), [[1, 1], [3, 3], [0, 0]])


def test_average_of_elementwise_weights():
    values = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    average = Average.of(values, jnp.array([[1.0, 0.0], [1.0, 2.0]]))
    assert float(average.compute()) == (1 + 3 + 10) / 4


def test_average_still_adds_up_after_millions_of_small_batches():
    one = Average.of(jnp.array([0.1]), jnp.array([1.0]))

    def body(_, total):
        return total.merge(one)

    merged = jax.jit(lambda: jax.lax.fori_loop(1, 20_000_000, body, one))()
    # 2**24 + 1 is no float32: a plain sum would have stopped counting there.
    count = float(np.float64(merged.count) + np.float64(merged.count_residual))
    assert count == 20_000_000
    np.testing.assert_allclose(merged.compute(), 0.1, rtol=1e-6)


def test_average_reports_infinity_as_it_is():
    bad = Average.of(jnp.array([jnp.inf]), jnp.array([1.0]))
    good = Average.of(jnp.array([1.0]), jnp.array([1.0]))
    assert float(bad.merge(good).compute()) == np.inf


def test_sum_of_means_over_different_counts():
    a = Average.of(jnp.array([1.0, 3.0]), jnp.ones(2))
    b = Average.of(jnp.array([10.0]), jnp.ones(1))
    none = Average.of(jnp.array([1.0]), jnp.zeros(1))
    total = Sum({"a": a, "b": b, "c": none})
    assert float(total.compute()) == 12.0
    merged = total.merge(Sum({"a": b, "b": b, "c": none}))
    np.testing.assert_allclose(merged.compute(), 14 / 3 + 10, rtol=1e-6)


def test_what_was_read_survives_donation_and_what_was_not_is_not_copied():
    donate = jax.jit(lambda s: s.replace(step=s.step + 1), donate_argnums=0)
    holder = TrainStateStore(make_state())
    kept = holder.read()
    holder.put(donate(holder.take()))
    np.testing.assert_array_equal(kept.params["w"], [0, 1, 2])
    assert not kept.rng.is_deleted()
    current = holder.peek()
    assert holder.take() is current  # nobody read it: nothing to save


def test_an_empty_holder_says_so():
    assert TrainStateStore().empty
    assert not TrainStateStore(make_state()).empty


@pytest.mark.parametrize("name", ["step", "params", "rng"])
def test_copies_share_no_buffer(name):
    from flaxfit._core.types import copy_state

    state = make_state()
    copied = copy_state(state)
    jax.tree.map(lambda x: x.delete(), getattr(copied, name))
    assert not any(x.is_deleted() for x in jax.tree.leaves(getattr(state, name)))
