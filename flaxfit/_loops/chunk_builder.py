"""Builds chunks: batches stacked on the device for one call of a program."""

from typing import NamedTuple

import jax
import numpy as np

from flaxfit._core.arrays import empty_array
from flaxfit._core.types import Batch, HostArray
from flaxfit._programs.chunks import Chunk, Stack, stack_capacity
from flaxfit._programs.placement import Placement
from flaxfit.data.host.arrays import copy_host_arrays, on_device


class Ready(NamedTuple):
    """A segment on the device.

    Attributes:
      segment: the batches.
      batches: how many of them have a meaning.
      examples: rows of each batch that are no fill, and in training count.
    """

    segment: Chunk
    batches: int
    examples: tuple[int, ...]


class SegmentPacker:
    """Stacks batches for `Prefetch`; those on a device, or too large, stay alone.

    Args:
      placement: the devices.
      stacks: whether batches are stacked at all.
      steps_per_call: the steps of a call, None to go by the clock.
      bytes_per_output: what a batch leaves on the device.
      lent: whether batches hold only until the next one is read: then those that stay
        alone are copied, as stacked ones are anyway.
    """

    def __init__(
        self,
        placement: Placement,
        stacks: bool,
        steps_per_call: int | None,
        bytes_per_output: int,
        lent: bool = False,
    ) -> None:
        self._placement = placement
        self._lent = lent
        self._stacks = stacks
        self._steps_per_call = steps_per_call
        self._bytes_per_output = bytes_per_output
        self._packed: _HostStack | _Alone | None = None

    @property
    def empty(self) -> bool:
        return self._packed is None

    @property
    def full(self) -> bool:
        return self._packed is not None and self._packed.full

    def takes(self, batch: Batch) -> bool:
        packed = self._packed
        return isinstance(packed, _HostStack) and packed.takes(batch)

    def add(self, batch: Batch) -> None:
        examples = _count_examples(batch.weights)
        if not isinstance(self._packed, _HostStack):
            capacity = self._capacity(batch)
            if capacity == 1:
                batch = copy_host_arrays(batch) if self._lent else batch
                self._packed = _Alone(batch, examples)
                return
            self._packed = _HostStack(batch, capacity)
        self._packed.add(batch, examples)

    def close(self) -> "_HostStack | _Alone":
        packed, self._packed = self._packed, None
        assert packed is not None
        return packed

    def send(self, closed: "_HostStack | _Alone") -> Ready:
        if isinstance(closed, _Alone):
            segment = self._placement.put_chunk(closed.batch)
            return Ready(segment, 1, (closed.examples,))
        segment = self._placement.put_chunk(Stack(closed.batches))
        return Ready(segment, len(closed.examples), tuple(closed.examples))

    def _capacity(self, batch: Batch) -> int:
        if not self._stacks or on_device(batch):
            return 1
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
        size = max(size, self._bytes_per_output)
        return stack_capacity(size, self._steps_per_call)


class _Alone(NamedTuple):
    batch: Batch
    examples: int
    full: bool = True


class _HostStack:
    """Batches copied side by side into arrays of their own."""

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

    def takes(self, batch: Batch) -> bool:
        return all(
            isinstance(leaf, np.ndarray) and stacked.shape[1:] == leaf.shape
            for stacked, leaf in zip(self._leaves, jax.tree.leaves(batch), strict=True)
        )

    def add(self, batch: Batch, examples: int) -> None:
        for stacked, leaf in zip(self._leaves, jax.tree.leaves(batch), strict=True):
            stacked[len(self.examples)] = leaf
        self.examples.append(examples)


def _count_examples(weights: HostArray | jax.Array) -> int:
    """Returns how many rows have any weight; on a device, where reading waits, all."""
    if isinstance(weights, jax.Array):
        return len(weights)
    if weights.ndim == 1:
        return int(np.count_nonzero(weights))
    return int(np.count_nonzero((weights != 0).reshape(len(weights), -1).any(axis=1)))
