"""Host memory that jax takes over without a copy."""

import math
from typing import Any

import numpy as np

from flaxfit._core.types import HostArray

_ALIGNMENT = 64  # bytes; XLA copies what lies otherwise


def empty_array(shape: tuple[int, ...], dtype: Any) -> HostArray:
    """Returns an array without values that a CPU device takes over without a copy.

    So what is not filled of it costs nothing: its pages are never touched.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
