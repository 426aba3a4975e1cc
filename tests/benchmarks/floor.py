"""What this machine can do at best, and what a step needs: the floor of its time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from rivals import init_carry, make_step
from workloads import Workload

_REPEATS = 4  # within one measurement, so that a dispatch costs nothing next to it


@dataclass(frozen=True)
class Probe:
    """Work of a known size, to be timed among the rivals.

    Attributes:
      run: does it, and waits for it.
      amount: floating point operations, or bytes, of one run.
    """

    run: Callable[[], object]
    amount: float


def matmul_probe(dtype: str, quick: bool) -> Probe:
    """Returns products of large matrices, at JAX's default precision."""
    on_cpu = jax.default_backend() == "cpu"
    side = (1024 if quick else 2048) if on_cpu else 8192
    matrix = jnp.full((side, side), 1 / side, dtype)

    @jax.jit
    def chain(a: jax.Array) -> jax.Array:
        product = a
        for _ in range(_REPEATS):
            product = product @ a
        return product

    def run() -> None:
        chain(matrix).block_until_ready()

    run()
    return Probe(run, 2 * side**3 * _REPEATS)


def copy_probe(quick: bool) -> Probe:
    """Returns passes over an array far larger than the caches."""
    values = jnp.zeros(2**24 if quick else 2**26, "float32")

    # Donated: else pages that are touched for the first time are what is measured.
    @partial(jax.jit, donate_argnums=0)
    def add_one(x: jax.Array) -> jax.Array:
        return x + 1

    def run() -> None:
        nonlocal values
        for _ in range(_REPEATS):
            values = add_one(values)
        values.block_until_ready()

    run()
    return Probe(run, 2 * values.nbytes * _REPEATS)


@dataclass(frozen=True)
class Cost:
    """What one step needs at least.

    Attributes:
      flops: floating point operations, by XLA's count of the hand-written step.
      bytes: parameters, collections and optimizer state read and written once, and
        the batch read once.
    """

    flops: float
    bytes: float

    def seconds(self, flop_rate: float, byte_rate: float) -> float:
        """Returns the floor: whichever of the two takes longer."""
        return max(self.flops / flop_rate, self.bytes / byte_rate)


def cost_of_step(workload: Workload) -> Cost:
    """Returns the cost of the hand-written step."""
    carry = init_carry(workload)
    size = workload.batch_size
    batch = workload.x[:size], workload.y[:size]
    compiled = jax.jit(make_step(workload)).lower(carry, *batch).compile()
    needed = 2 * _nbytes(carry) + _nbytes(batch)
    return Cost(float(compiled.cost_analysis()["flops"]), float(needed))


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
