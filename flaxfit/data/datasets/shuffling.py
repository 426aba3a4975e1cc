"""The order of examples in a pass: a function of seed and pass only."""

from collections.abc import Sequence

import numpy as np

from flaxfit._core.types import HostArray


def order_of_pass(
    total: int, pass_index: int, *, shuffle: bool, seed: Sequence[int]
) -> HostArray:
    """Returns the rows of one pass, `int64[total]`, ascending or shuffled."""
    if not shuffle:
        return np.arange(total)
    return seeded(*seed, pass_index).permutation(total)


def batches_of_pass(order: HostArray, batch_size: int) -> HostArray:
    """Returns the rows of the batches of one pass, `int64[batches, batch_size]`.

    The last batch is filled up with the first rows of the pass. These have weight 0,
    and such a row `r` is stored as `~r`.
    """
    total = len(order)
    num_batches = -(-total // batch_size)
    filled = order[np.arange(num_batches * batch_size) % total]
    filled[total:] = ~filled[total:]
    return filled.reshape(-1, batch_size)


def seeded(*seed: int) -> np.random.Generator:
    """Returns a random generator that depends on these numbers only."""
    return np.random.default_rng(np.random.SeedSequence(seed))


def rows_of(coded: HostArray) -> tuple[HostArray, int]:
    """Returns the rows of a batch of `batches_of_pass`, and how many are real."""
    added = coded < 0
    return np.where(added, ~coded, coded), int(coded.size - np.count_nonzero(added))
