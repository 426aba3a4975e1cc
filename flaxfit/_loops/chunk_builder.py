"""Builds chunks: stacks batches on the host and sends each stack to the device."""

from dataclasses import dataclass
from typing import Any, NamedTuple

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
      examples: for each batch, the number of rows that are neither padding nor, in
        training, of weight 0.
    """

    chunk: Chunk
    batches: int
    examples: tuple[int, ...]


@dataclass
class ChunkBuilder:
    """Stacks batches; a batch that is on a device, or too large, is a chunk by itself.

    Attributes:
      placement: sends chunks to the devices.
      stacks: whether batches are stacked at all.
      steps_per_call: the steps of a call, None to tune them by timing.
      bytes_per_output: size of a batch's outputs on the device.
      reuses_buffers: whether the source writes its next batch into the same memory, so
        that single batches must be copied. A stack is a copy anyway.
    """

    placement: Placement
    stacks: bool
    steps_per_call: int | None
    bytes_per_output: int
    reuses_buffers: bool

    def __post_init__(self) -> None:
        self._start_next()

    def _start_next(self) -> None:
        self._capacity = 1
        self._chunk: Any = None  # a `Batch` or a `Stack`
        self._leaves: list[HostArray] = []
        self._examples: list[int] = []

    @property
    def empty(self) -> bool:
        """Whether the open chunk holds no batch."""
        return not self._examples

    @property
    def full(self) -> bool:
        """Whether the open chunk takes no more batches."""
        return len(self._examples) == self._capacity

    def fits(self, batch: Batch) -> bool:
        """Whether the batch has the shapes of the open stack."""
        return all(
            isinstance(leaf, np.ndarray) and stacked.shape[1:] == leaf.shape
            for stacked, leaf in zip(self._leaves, jax.tree.leaves(batch), strict=True)
        )

    def add(self, batch: Batch) -> None:
        """Adds a batch to the open chunk."""
        if self.empty:
            self._open(batch)
        leaves = jax.tree.leaves(batch) if self._leaves else []
        for stacked, leaf in zip(self._leaves, leaves, strict=True):
            stacked[len(self._examples)] = leaf
        self._examples.append(_count_examples(batch.weights))

    def close(self) -> tuple[Any, list[int]]:
        """Returns the open chunk and starts the next one."""
        closed = self._chunk, self._examples
        self._start_next()
        return closed

    def send(self, closed: tuple[Any, list[int]]) -> DeviceChunk:
        """Transfers a closed chunk; this may be slow, so call it without a lock."""
        chunk, examples = closed
        placed = self.placement.put_chunk(chunk)
        return DeviceChunk(placed, len(examples), tuple(examples))

    def _open(self, batch: Batch) -> None:
        if self.stacks and not on_device(batch):
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
            size = max(size, self.bytes_per_output)
            self._capacity = stack_capacity(size, self.steps_per_call)
        if self._capacity == 1:
            self._chunk = copy_host_arrays(batch) if self.reuses_buffers else batch
            return
        stacked: Batch = jax.tree.map(
            lambda leaf: empty_array((self._capacity, *leaf.shape), leaf.dtype), batch
        )
        self._chunk, self._leaves = Stack(stacked), jax.tree.leaves(stacked)


def _count_examples(weights: HostArray | jax.Array) -> int:
    """Counts the rows with any weight; on a device all rows, as reading would wait."""
    if isinstance(weights, jax.Array):
        return len(weights)
    if weights.ndim == 1:
        return int(np.count_nonzero(weights))
    return int(np.count_nonzero((weights != 0).reshape(len(weights), -1).any(axis=1)))
