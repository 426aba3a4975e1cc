"""Which devices there are to train on, and what of a step lies where on them."""

import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flaxfit._segments import Segment, Stack
from flaxfit._types import Batch, PyTree

_AXIS = "data"
# Where nothing tells how much memory is free.
_ASSUMED_FREE_BYTES = 2**31


class Placement(NamedTuple):
    """Data-parallel training on some devices.

    The state lies on all of them, each has its share of the rows of every batch.

    Attributes:
      devices: those to train on.
      mesh: they as a mesh, all axes of it for the rows of a batch; None for jax's
        default device, where nothing has to be placed.
      chosen: whether a user chose them, so that no other number will do.
    """

    devices: tuple[Any, ...]
    mesh: Mesh | None
    chosen: bool = False

    def __deepcopy__(self, memo: Any) -> "Placement":
        return self  # devices are what they are

    @property
    def replicated(self) -> NamedSharding | None:
        """The sharding of what every device has whole."""
        return self._sharding()

    def for_rows(self, rows: int) -> "Placement":
        """Returns the placement for training on batches of `rows`.

        A batch is never filled up for the sake of devices: batch statistics would
        then depend on their number. So it takes as many as divide it.

        Raises:
          ValueError: the devices were chosen, and do not divide the batch.
        """
        count = len(self.devices)
        if rows % count == 0:
            return self
        fewer = max(n for n in range(1, count) if rows % n == 0)
        if self.chosen:
            raise ValueError(
                f"batch_size={rows} cannot be split evenly over {count} devices. "
                f"Write batch_size={-(-rows // count) * count}, or "
                f"Trainer(model, devices={fewer})."
            )
        return _on(self.devices[:fewer])

    def put(self, tree: PyTree) -> PyTree:
        """Returns the arrays on every device, whole; buffers of their own."""
        return jax.device_put(tree, self.replicated, may_alias=False)

    def put_segment(self, segment: Segment) -> Segment:
        """Returns a segment's batches on the devices, their rows divided among them.

        Batches whose rows the devices do not divide go to each of them whole. The
        arrays may be shared with the device: they must not be written to again.
        """
        if isinstance(segment, Batch):
            return self._put_rows(segment, len(segment.weights), ())
        if isinstance(segment, Stack):
            rows = segment.batches.weights.shape[1]
            return Stack(self._put_rows(segment.batches, rows, (None,)))
        order = self._put_rows(segment.order, segment.order.shape[1], (None,))
        return segment.replace(order=order)

    def room_for(self, size: int, share: float) -> Literal["whole", "divided"] | None:
        """Returns how data fits on the devices: whole on each, by rows, or not.

        Args:
          size: bytes.
          share: what the data may take of the memory that is free.
        """
        room = share * free_memory(self.devices)
        if size <= room:
            return "whole"
        return "divided" if size <= room * len(self.devices) else None

    def put_data(self, data: PyTree, how: Literal["whole", "divided"]) -> PyTree:
        """Returns arrays `[rows, ...]` on the devices, as `room_for` said.

        The arrays may be shared with the device: they must not be written to again.
        """
        spec = (self._axes,) if how == "divided" else ()
        return jax.device_put(data, self._sharding(*spec))

    def rounded(self, rows: int) -> int:
        """Returns the next number of rows that the devices divide."""
        return -(-rows // len(self.devices)) * len(self.devices)

    def _put_rows(self, tree: PyTree, rows: int, leading: tuple[None, ...]) -> PyTree:
        divided = rows % len(self.devices) == 0
        spec = (*leading, self._axes) if divided else ()
        return jax.device_put(tree, self._sharding(*spec))

    @property
    def _axes(self) -> Any:
        return () if self.mesh is None else self.mesh.axis_names

    def _sharding(self, *spec: Any) -> NamedSharding | None:
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(*spec))


def find_placement(devices: Any = None) -> Placement:
    """Returns where to train.

    Args:
      devices: None for all local devices (or for `jax_default_device` alone, where
        it is set), their number, a list of them, or a `jax.sharding.Mesh`.

    Raises:
      ValueError: more devices than there are, or none.
      TypeError: something else.
    """
    if devices is None:
        default = jax.config.jax_default_device  # type: ignore[attr-defined]
        if default is not None:
            return Placement((_as_device(default),), None)
        return _on(tuple(jax.local_devices()))
    if isinstance(devices, Mesh):
        # Of explicit axes, Flax's layers would have to say shardings themselves.
        shape = devices.devices.shape
        auto = Mesh(devices.devices, devices.axis_names, (AxisType.Auto,) * len(shape))
        return Placement(tuple(devices.devices.flat), auto, chosen=True)
    if isinstance(devices, int | np.integer) and not isinstance(devices, bool):
        there = jax.local_devices()
        if not 1 <= devices <= len(there):
            raise ValueError(
                f"devices={devices}: there are {len(there)} ({there[0].platform}). "
                f"Write devices={len(there)}, or leave it out for all of them."
            )
        return _on(tuple(there[:devices]), chosen=True)
    if isinstance(devices, Sequence) and not isinstance(devices, str) and devices:
        if all(isinstance(device, jax.Device) for device in devices):
            return _on(tuple(devices), chosen=True)
    raise TypeError(
        f"devices={devices!r}: write their number, devices=1; a list, "
        "devices=jax.devices()[:2]; a jax.sharding.Mesh; or None for all."
    )


def free_memory(devices: Sequence[Any]) -> int:
    """Returns the bytes that are free on each of the devices.

    The host's memory is shared among the devices of a CPU.
    """
    stats = [device.memory_stats() for device in devices]
    told = [s for s in stats if s and "bytes_limit" in s]
    if told:
        return min(int(s["bytes_limit"]) - int(s["bytes_in_use"]) for s in told)
    try:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        free = _ASSUMED_FREE_BYTES
    return free // len(devices)


def _on(devices: tuple[Any, ...], *, chosen: bool = False) -> Placement:
    if len(devices) == 1 and devices[0] == jax.local_devices()[0]:
        return Placement(devices, None, chosen)
    mesh = Mesh(np.array(devices), (_AXIS,), (AxisType.Auto,))
    return Placement(devices, mesh, chosen)


def _as_device(default: Any) -> Any:
    """Returns a device for what `jax_default_device` may be: one, or a platform."""
    return (
        jax.local_devices(backend=default)[0] if isinstance(default, str) else default
    )
