"""The order of examples in a pass: a function of seed and pass alone."""

from collections.abc import Sequence

import numpy as np

from flaxfit._types import HostArray


def order_of_pass(
    total: int, pass_index: int, *, shuffle: bool, seed: Sequence[int]
) -> HostArray:
    """Returns the rows of one pass, `int64[total]`.

    Args:
      total: the number of examples.
      pass_index: each pass has an order of its own.
      shuffle: False for the given order.
      seed: decides the orders.
    """
    if not shuffle:
        return np.arange(total)
    return seeded(*seed, pass_index).permutation(total)


def seeded(*seed: int) -> np.random.Generator:
    """Returns a generator that is a function of these numbers."""
    return np.random.default_rng(np.random.SeedSequence(seed))
