"""Counts and comparisons that several tests share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def count_reads(monkeypatch):
    """Counts every way a device array becomes a host value."""
    reads = []
    array = type(jnp.zeros(()))
    for name in ("__array__", "__float__", "__int__", "__bool__", "__index__", "item"):
        original = getattr(array, name)

        def counted(self, *args, _original=original, _name=name, **kwargs):
            reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(array, name, counted)
    original = np.asarray

    def asarray(value, *args, **kwargs):
        # NumPy reads a CPU's arrays by their buffer, and asks for no `__array__`.
        if isinstance(value, jax.Array):
            reads.append("__array__")
        return original(value, *args, **kwargs)

    monkeypatch.setattr(np, "asarray", asarray)
    monkeypatch.setattr(
        jax,
        "device_get",
        lambda tree, _get=jax.device_get: (reads.append("get"), _get(tree))[1],
    )
    return reads


def same(a, b):
    """Asserts that two trees, of arrays or typed keys, are equal to the last bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(jnp.result_type(one), jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(jax.device_get(one), jax.device_get(other))


def moved(state):
    """Returns all of a state that training moves, on the host."""
    return jax.device_get(
        (state.params, state.collections, state.opt_state, state.step)
    )


def assert_survived(outcome):
    """Fails if a campaign of faults lost anything; skips where it could not run."""
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.trials > 0
    lost = outcome.trials - outcome.survived
    assert not lost, "\n".join([f"{lost} of {outcome.trials}:", *outcome.details[:20]])
