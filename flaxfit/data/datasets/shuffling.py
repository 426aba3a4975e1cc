"""The order of examples in a pass, as a function of seed and pass only."""

from collections.abc import Sequence

import numpy as np

from flaxfit._core.types import HostArray


def order_of_pass(
    total: int, pass_index: int, *, shuffle: bool, seed: Sequence[int]
) -> HostArray:
    """Returns the rows of one pass, `int64[total]`, in the given order or shuffled."""
    if not shuffle:
        return np.arange(total)
    return seeded(*seed, pass_index).permutation(total)


def batches_of_pass(order: HostArray, batch_size: int) -> HostArray:
    """Returns the rows of the batches of one pass, `int64[batches, batch_size]`.

    Where the last batch is only filled up, at weight 0, with the first rows of the
    pass, the row `r` is written as `~r`.
    """
    total = len(order)
    num_batches = -(-total // batch_size)
    filled = order[np.arange(num_batches * batch_size) % total]
    filled[total:] = ~filled[total:]
    return filled.reshape(-1, batch_size)


def seeded(*seed: int) -> np.random.Generator:
    """Returns a generator that is a function of these numbers."""
    return np.random.default_rng(np.random.SeedSequence(seed))


def rows_of(coded: HostArray) -> tuple[HostArray, int]:
    """Returns the rows that an order names, and how many of them are no fill."""
    fill = coded < 0
    return np.where(fill, ~coded, coded), int(coded.size - np.count_nonzero(fill))
