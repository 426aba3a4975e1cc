"""Devices to train on, and the placement of state and batches on them."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flaxfit._core.arrays import copy_array
from flaxfit._core.errors import UsageError, UsageTypeError
from flaxfit._core.types import Batch, HostArray, PyTree
from flaxfit._core.validation import is_integer
from flaxfit._programs.chunks import Chunk, Stack

_AXIS = "data"
# Used if the free memory is unknown.
_ASSUMED_FREE_BYTES = 2**31


class Placement(NamedTuple):
    """Data-parallel training on some devices.

    Each device holds the whole state and its share of the rows of every batch.

    Attributes:
      devices: the devices to train on.
      mesh: a mesh of the devices; the rows of a batch are split over all its axes.
      chosen: whether the user chose the devices; their number must then not change.
    """

    devices: tuple[Any, ...]
    mesh: Mesh
    chosen: bool = False

    def __deepcopy__(self, memo: Any) -> "Placement":
        return self  # devices cannot be copied

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays that are copied to every device."""
        return self._sharding()

    def for_rows(self, rows: int, most: int | None = None) -> "Placement":
        """Returns the placement for training on batches of `rows`.

        A batch is never padded to fit the devices: batch statistics would depend on
        the number of devices. Instead, the largest number of devices that divides
        `rows` is used. `most` is the number of examples, if known.

        Raises:
          UsageError: the user chose the devices, and their number does not divide
            `rows`.
        """
        count = len(self.devices)
        if rows % count == 0:
            return self
        fewer = max(n for n in range(1, count) if rows % n == 0)
        if self.chosen:
            size = even_size(rows, count, most)
            line = f"batch_size={size}, or " if size else ""
            raise UsageError(
                f"batch_size={rows} cannot be split evenly over {count} devices",
                write=f"{line}Trainer(model, devices={fewer})",
            )
        return _on(self.devices[:fewer])

    def put(self, tree: PyTree) -> PyTree:
        """Returns the arrays copied to every device, in new buffers."""

        def put(leaf: Any) -> Any:
            if isinstance(leaf, jax.Array):
                # When jax copies an array to more devices, it shares the existing
                # buffer even with `may_alias=False`.
                return jax.device_put(copy_array(leaf), self.replicated)
            return jax.device_put(leaf, self.replicated, may_alias=False)

        return jax.tree.map(put, tree)

    def put_host(self, host: HostArray, like: Any = None) -> jax.Array:
        """Returns a host array copied to every device."""
        del like
        return jax.device_put(host, self.replicated)

    def put_keys(self, tree: PyTree) -> PyTree:
        """Returns the tree with its random keys copied to every device."""

        def put(leaf: Any) -> Any:
            is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            return jax.device_put(leaf, self.replicated) if is_key else leaf

        return jax.tree.map(put, tree)

    def put_chunk(self, chunk: Chunk) -> Chunk:
        """Returns a chunk on the devices, with the rows of its batches divided.

        Every device gets the whole batches if their rows cannot be divided evenly, or
        if some arrays have no rows. A device may use the memory of the given arrays, so
        they must not be written to again.
        """
        if isinstance(chunk, Batch):
            return self._put_rows(chunk, len(chunk.weights), ())
        if isinstance(chunk, Stack):
            rows = chunk.batches.weights.shape[1]
            return Stack(self._put_rows(chunk.batches, rows, (None,)))
        order = self._put_rows(chunk.order, chunk.order.shape[1], (None,))
        return chunk.replace(order=order)

    def room_for(self, size: int, share: float) -> Literal["whole", "divided"] | None:
        """Returns how data fits: whole on each device, divided by rows, or None.

        `size` is in bytes; the data may take this `share` of the free memory.
        """
        room = share * free_memory(self.devices)
        if size <= room:
            return "whole"
        return "divided" if size <= room * len(self.devices) else None

    def put_data(self, data: PyTree, how: Literal["whole", "divided"]) -> PyTree:
        """Returns arrays `[rows, ...]` on the devices; `how` is from `room_for`.

        A device may use the memory of the arrays: they must not be written to again.
        """
        spec = (self.mesh.axis_names,) if how == "divided" else ()
        return jax.device_put(data, self._sharding(*spec))

    def rounded(self, rows: int) -> int:
        """Returns `rows` rounded up to a multiple of the number of devices."""
        return -(-rows // len(self.devices)) * len(self.devices)

    def _put_rows(self, tree: PyTree, rows: int, leading: tuple[None, ...]) -> PyTree:
        divided = rows % len(self.devices) == 0 and _have_rows(tree, rows, len(leading))
        spec = (*leading, self.mesh.axis_names) if divided else ()
        return jax.device_put(tree, self._sharding(*spec))

    def _sharding(self, *spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*spec))


def has_rows(batch: Batch) -> bool:
    """Whether the first axis of every array is the batch; not so for graphs."""
    return _have_rows(batch, batch.weights.shape[0], 0)


def _have_rows(tree: PyTree, rows: int, axis: int) -> bool:
    return all(leaf.shape[axis : axis + 1] == (rows,) for leaf in jax.tree.leaves(tree))


def find_placement(devices: Any = None) -> Placement:
    """Returns the placement on the devices to train on.

    Args:
      devices: None for all local devices (only `jax_default_device`, if it is set), a
        number or a list of devices, or a `jax.sharding.Mesh`.

    Raises:
      UsageError: zero devices, more than there are, or a device listed twice.
      UsageTypeError: another type.
    """
    if devices is None:
        default = jax.config.jax_default_device  # type: ignore[attr-defined]
        if isinstance(default, str):  # a platform's name
            default = jax.local_devices(backend=default)[0]
        if default is not None:
            return _on((default,))
        return _on(tuple(jax.local_devices()))
    if isinstance(devices, Mesh):
        # With explicit axes, Flax's layers would have to specify output shardings.
        shape = devices.devices.shape
        auto = Mesh(devices.devices, devices.axis_names, (AxisType.Auto,) * len(shape))
        return Placement(tuple(devices.devices.flat), auto, chosen=True)
    if is_integer(devices):
        there = jax.local_devices()
        if not 1 <= devices <= len(there):
            raise UsageError(
                f"devices={devices}, but there are {len(there)} {there[0].platform} "
                "devices",
                write=f"devices={len(there)}, or leave it out to use all of them",
            )
        return _on(tuple(there[:devices]), chosen=True)
    if isinstance(devices, Sequence) and not isinstance(devices, str) and devices:
        if all(isinstance(device, jax.Device) for device in devices):
            if len(set(devices)) < len(devices):
                raise UsageError(f"devices={devices!r}: list every device only once")
            return _on(tuple(devices), chosen=True)
    raise UsageTypeError(
        f"devices={devices!r}: write a number, devices=1; a list, "
        "devices=jax.devices()[:2]; a jax.sharding.Mesh; or None for all devices"
    )


def free_memory(devices: Sequence[Any]) -> int:
    """Returns the number of bytes that are free on every device.

    CPU devices share the host's memory equally.
    """
    stats = [device.memory_stats() for device in devices]
    known = [s for s in stats if s and "bytes_limit" in s]
    if known:
        return min(int(s["bytes_limit"]) - int(s["bytes_in_use"]) for s in known)
    try:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not available on every system
        free = _ASSUMED_FREE_BYTES
    return min(free, _container_memory()) // len(devices)


def _container_memory() -> int:
    """Returns the free bytes of a container, which may be fewer than the machine's.

    Cached files count as free, as the kernel drops them when memory is needed; see
    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory.
    """
    root = Path("/sys/fs/cgroup")
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        stat = dict(map(str.split, (root / "memory.stat").read_text().splitlines()))
        return max(0, limit - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no container, or no limit: "max"
        return sys.maxsize


def _on(devices: tuple[Any, ...], *, chosen: bool = False) -> Placement:
    mesh = Mesh(np.array(devices), (_AXIS,), (AxisType.Auto,))
    return Placement(devices, mesh, chosen)


def even_size(rows: int, devices: int, most: int | None) -> int:
    """Returns a batch size near `rows` that `devices` divides, 0 if there is none.

    It does not exceed `most`, the number of examples, if that is known.
    """
    size = -(-rows // devices) * devices
    return size if most is None or size <= most else size - devices
