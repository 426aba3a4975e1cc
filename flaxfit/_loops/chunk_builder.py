"""Builds chunks: stacks batches on the host and sends each stack to the device."""

from typing import NamedTuple

import jax
import numpy as np

from flaxfit._core.arrays import empty_array
from flaxfit._core.types import Batch, HostArray
from flaxfit._programs.chunks import Chunk, Stack, stack_capacity
from flaxfit._programs.placement import Placement
from flaxfit.data.host.arrays import copy_host_arrays, on_device


class DeviceChunk(NamedTuple):
    """A chunk on the device.

    Attributes:
      chunk: the batches.
      batches: how many of them are used.
      examples: for each batch the rows that are not padding and, in training, have
        any weight.
    """

    chunk: Chunk
    batches: int
    examples: tuple[int, ...]


class ChunkBuilder:
    """Stacks batches; those on a device, or too large, form a chunk each.

    Args:
      placement: the devices.
      stacks: whether batches are stacked at all.
      steps_per_call: the steps of a call, None to tune them by the clock.
      bytes_per_output: size of a batch's outputs on the device.
      reuses_buffers: whether the source writes its next batch into the same memory:
        then single batches are copied. A stack is a copy anyway.
    """

    def __init__(
        self,
        placement: Placement,
        stacks: bool,
        steps_per_call: int | None,
        bytes_per_output: int,
        reuses_buffers: bool = False,
    ) -> None:
        self._placement = placement
        self._reuses_buffers = reuses_buffers
        self._stacks = stacks
        self._steps_per_call = steps_per_call
        self._bytes_per_output = bytes_per_output
        self._open: _HostStack | _SingleBatch | None = None

    @property
    def empty(self) -> bool:
        return self._open is None

    @property
    def full(self) -> bool:
        return self._open is not None and self._open.full

    def fits(self, batch: Batch) -> bool:
        return isinstance(self._open, _HostStack) and self._open.fits(batch)

    def add(self, batch: Batch) -> None:
        examples = _count_examples(batch.weights)
        if not isinstance(self._open, _HostStack):
            capacity = self._capacity(batch)
            if capacity == 1:
                batch = copy_host_arrays(batch) if self._reuses_buffers else batch
                self._open = _SingleBatch(batch, examples)
                return
            self._open = _HostStack(batch, capacity)
        self._open.add(batch, examples)

    def close(self) -> "_HostStack | _SingleBatch":
        closed, self._open = self._open, None
        assert closed is not None
        return closed

    def send(self, closed: "_HostStack | _SingleBatch") -> DeviceChunk:
        if isinstance(closed, _SingleBatch):
            chunk = self._placement.put_chunk(closed.batch)
            return DeviceChunk(chunk, 1, (closed.examples,))
        chunk = self._placement.put_chunk(Stack(closed.batches))
        return DeviceChunk(chunk, len(closed.examples), tuple(closed.examples))

    def _capacity(self, batch: Batch) -> int:
        if not self._stacks or on_device(batch):
            return 1
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
        size = max(size, self._bytes_per_output)
        return stack_capacity(size, self._steps_per_call)


class _SingleBatch(NamedTuple):
    batch: Batch
    examples: int
    full: bool = True


class _HostStack:
    """Batches copied side by side into newly allocated arrays."""

    def __init__(self, like: Batch, capacity: int) -> None:
        self.batches: Batch = jax.tree.map(
            lambda leaf: empty_array((capacity, *leaf.shape), leaf.dtype), like
        )
        self._leaves = jax.tree.leaves(self.batches)
        self.examples: list[int] = []
        self._capacity = capacity

    @property
    def full(self) -> bool:
        return len(self.examples) == self._capacity

    def fits(self, batch: Batch) -> bool:
        return all(
            isinstance(leaf, np.ndarray) and stacked.shape[1:] == leaf.shape
            for stacked, leaf in zip(self._leaves, jax.tree.leaves(batch), strict=True)
        )

    def add(self, batch: Batch, examples: int) -> None:
        for stacked, leaf in zip(self._leaves, jax.tree.leaves(batch), strict=True):
            stacked[len(self.examples)] = leaf
        self.examples.append(examples)


def _count_examples(weights: HostArray | jax.Array) -> int:
    """Counts the rows with any weight; on a device, where reading would wait, all."""
    if isinstance(weights, jax.Array):
        return len(weights)
    if weights.ndim == 1:
        return int(np.count_nonzero(weights))
    return int(np.count_nonzero((weights != 0).reshape(len(weights), -1).any(axis=1)))
