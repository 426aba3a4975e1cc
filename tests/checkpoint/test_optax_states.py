"""Every optimizer of optax comes back from a file and goes on to the last bit."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from flaxfit import checkpoint
from flaxfit._core.types import TrainState

# Their defaults are for a single array.
NOT_FOR_TREES = ("scale_by_muon",)
HESSIAN = ("hutchinson_estimator_diag_hessian", "sophia")
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3)}


def made(function):
    """What `function` makes of defaults, None if it makes no transformation."""
    try:
        names = inspect.signature(function).parameters
        arguments = {"learning_rate": 0.1} if "learning_rate" in names else {}
        tx = function(**arguments)
        tx.init(PARAMS)
    except Exception:
        return None
    return tx if hasattr(tx, "init") and hasattr(tx, "update") else None


def found():
    """Returns module and name of all that optax exports and defaults suffice for."""
    names = []
    for module in (optax, optax.contrib):
        for name in sorted(vars(module)):
            function = getattr(module, name)
            public = name.islower() and not name.startswith("_")
            if public and callable(function) and name not in NOT_FOR_TREES:
                names.append((module, name))
    return names


CASES = [(m, n) for m, n in found() if made(getattr(m, n)) is not None]


def test_all_of_optax_is_tried():
    assert len(CASES) > 85


def updates(tx, grads, state, params, *, hessian):
    """One update as every kind of transformation takes it."""

    def loss(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    # The line searches pass on to the loss what they do not know.
    objective = {"obj_fn": loss} if hessian else {"value_fn": loss}
    return optax.with_extra_args_support(tx).update(
        grads, state, params, value=loss(params), grad=grads, **objective
    )


@pytest.mark.parametrize(
    ("module", "name"), CASES, ids=[f"{m.__name__}.{n}" for m, n in CASES]
)
def test_the_next_update_is_equal_to_the_last_bit(module, name, tmp_path):
    tx = made(getattr(module, name))
    grads = jax.tree.map(lambda leaf: leaf / 3 + 0.25, PARAMS)

    @jax.jit
    def step(state):
        with jax.numpy_rank_promotion("allow"):  # optax's own code relies on it.
            return updates(tx, grads, state, PARAMS, hessian=name in HESSIAN)

    opt_state = tx.init(PARAMS)
    for _ in range(2):
        _, opt_state = step(opt_state)
    state = TrainState(
        step=jnp.int32(2),
        params=PARAMS,
        collections={},
        opt_state=opt_state,
        rng=jax.random.key(0),
    )
    path = tmp_path / "run"
    checkpoint.check_writable(state)
    checkpoint.save(path, state, {})
    template = jax.eval_shape(lambda: state)
    restored, report = checkpoint.restore(checkpoint.load(path).state, template)
    assert len(report.loaded) == len(jax.tree.leaves(state))
    traces = step._cache_size()
    ours, theirs = step(restored.opt_state), step(opt_state)
    assert step._cache_size() == traces
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert jax.typeof(a) == jax.typeof(b)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
