"""Arrays: axes, types and buffers, on the host and on devices."""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

_ALIGNMENT = 64  # bytes; XLA copies memory with a smaller alignment
_Array = TypeVar("_Array", np.ndarray[Any, Any], jax.Array)


def empty_array(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Returns an uninitialized array that a CPU device takes over without a copy.

    The parts that are never filled cost nothing: their pages are never touched.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def append_axes(array: _Array, ndim: int) -> _Array:
    """Returns the array with axes of length 1 appended until it has `ndim` axes.

    Weights `[batch]` then broadcast against values `[batch, ...]`. An array with
    more axes is returned as it is.
    """
    return array.reshape(array.shape + (1,) * (ndim - array.ndim))


def strongly_typed(value: Any, dtype: Any = None) -> jax.Array:
    """Returns an array without a weak type, in `dtype` if given; keys stay as they are.

    A weakly typed array comes back strongly typed from a compiled loop, which would
    then be compiled a second time for it.
    """
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return array
    return array.astype(array.dtype if dtype is None else dtype)


def copy_array(array: jax.Array, like: Any = None) -> jax.Array:
    """Returns the values in a new buffer.

    Args:
      array: the values.
      like: the array to whose devices the copy goes, `array` by default. If `like` is
        not committed to its devices, the copy is not either.
    """
    like = array if like is None else like
    # Without a sharding, a key would leave its devices.
    placed = isinstance(like, jax.Array) and like.committed
    return jax.device_put(array, like.sharding if placed else None, may_alias=False)
