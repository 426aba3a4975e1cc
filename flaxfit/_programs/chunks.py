"""Chunks: the batches that one call of a program reads."""

from typing import TypeAlias

import flax.struct
import jax
import jax.numpy as jnp

from flaxfit._core.arrays import append_axes
from flaxfit._core.types import Array, Batch, HostArray, PyTree

# A stack is one transfer for one call: large enough to make the call's overhead
# negligible, small enough to fit the CPU's cache and to be built quickly.
_STACK_BYTES = 4 * 2**20
_STACK_BATCHES = 256
_ORDER_BYTES = 2**18


class Stack(flax.struct.PyTreeNode):
    """Several consecutive batches.

    Attributes:
      batches: arrays `[capacity, batch, ...]`; the last batches may be unused.
    """

    batches: Batch


class DeviceDataset(flax.struct.PyTreeNode):
    """All examples on the device, and the row numbers of the batches.

    Attributes:
      data: arrays `[rows, ...]`; rows after the last example are unused.
      order: `int32[capacity, batch]`, row numbers in `data`. A row `r` that only fills
        up a batch, with weight 0, is stored as `~r`.
    """

    data: Batch
    order: Array | HostArray


Chunk: TypeAlias = Batch | Stack | DeviceDataset


def batch_at(chunk: Chunk, index: Array | int) -> Batch:
    """Returns batch number `index`, equal to the last bit; can be traced."""
    if isinstance(chunk, Batch):
        return chunk
    if isinstance(chunk, Stack):
        return take(chunk.batches, index)
    coded: Array = take(chunk.order, index)
    is_padding = coded < 0
    rows = jnp.where(is_padding, ~coded, coded)
    batch: Batch = jax.tree.map(
        lambda leaf: leaf.at[rows].get(mode="promise_in_bounds"), chunk.data
    )
    spread = append_axes(is_padding, batch.weights.ndim)
    return batch.replace(weights=jnp.where(spread, 0.0, batch.weights))


def take(tree: PyTree, index: Array | int) -> PyTree:
    """Returns entry `index` of the first axis of every leaf."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree
    )


def stack_capacity(bytes_per_batch: int, asked: int | None = None) -> int:
    """Returns how many batches of this size go into one `Stack`.

    That is the number the user `asked` for, or fewer if they do not fit. The size is
    that of the batch or of its outputs, whichever is larger.
    """
    most = _STACK_BATCHES if asked is None else asked
    return max(1, min(most, _STACK_BYTES // max(bytes_per_batch, 1)))


def order_capacity(batch_size: int, asked: int | None = None) -> int:
    """Returns how many batches fit in `DeviceDataset.order`; see `stack_capacity`."""
    most = 2 * _STACK_BATCHES if asked is None else asked
    room = _ORDER_BYTES if asked is None else _STACK_BYTES
    return max(1, min(most, room // (4 * batch_size)))
