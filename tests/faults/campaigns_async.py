"""A snapshot is written while training goes on in the same memory (F19)."""

import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from content import digest_of, state_of
from harness import Outcome, Tally, fresh

from flaxfit import checkpoint


def f19_donated(trials: int, seed: int, folder: Path) -> Outcome:
    """Saved bytes are the state at the time of the call, whatever is donated later."""
    return fresh(_f19_donated, trials, seed, folder, timeout=3600)


def _f19_donated(trials: int, seed: int, folder: Path) -> Outcome:
    tally = Tally()

    @jax.jit
    def change(state):
        return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)

    step = jax.jit(change, donate_argnums=0)
    state = jax.device_put(state_of(seed, 2**18))
    for trial in range(trials):
        path = folder / f"{trial % 2}.msgpack"
        with tally.trial(f"snapshot {trial}"):
            expected = digest_of(jax.tree.map(np.array, state))
            before = jax.tree.leaves(state)[0]
            snapshot = checkpoint.snapshot(state, copy=True)
            errors: list[BaseException] = []

            def write(path=path, snapshot=snapshot, errors=errors, trial=trial):
                try:
                    checkpoint.write(path, snapshot, {"step": trial})
                except BaseException as err:
                    errors.append(err)

            writer = threading.Thread(target=write)
            writer.start()
            for _ in range(3):
                state = step(state)
            jax.block_until_ready(state)
            writer.join()
            assert before.is_deleted(), "nothing was donated"
            assert not errors, errors
            assert digest_of(checkpoint.load(path).state) == expected
    return tally.outcome()
