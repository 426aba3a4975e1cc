"""Converts torch tensors to NumPy arrays, without a copy where possible."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np

from flaxfit._core.errors import DataError
from flaxfit._core.lazy_types import comes_from
from flaxfit._core.types import HostArray


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor of torch; does not import torch."""
    return comes_from(value, "torch", "Tensor")


def stack_tensors(tensors: Sequence[Any]) -> HostArray | None:
    """Returns tensors as `[len(tensors), ...]`.

    None if not all are tensors of one shape, dtype and device.
    """
    if any(not is_tensor(each) or each.is_nested for each in tensors):
        return None
    if len({(each.shape, each.dtype, each.device) for each in tensors}) > 1:
        return None
    return as_numpy(import_module("torch").stack(list(tensors)))


def as_numpy(tensor: Any) -> HostArray:
    """Returns a tensor on any device as an array of its dtype, including bfloat16.

    Raises:
      DataError: a sparse or nested tensor.
    """
    if tensor.is_nested:
        raise DataError(
            "a nested tensor of torch has rows of different length and is not an "
            "array. Write torch.nested.to_padded_tensor(x, 0.0), and give padding "
            "weight 0."
        )
    if str(tensor.layout) != "torch.strided":
        raise DataError(
            f"a tensor of layout {tensor.layout} is sparse, not an array. Write "
            "x.to_dense() where the batches are made."
        )
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    # NumPy has no bfloat16 or float8, and torch does not know those of ml_dtypes.
    float_type = getattr(ml_dtypes, str(tensor.dtype).removeprefix("torch."), None)
    if float_type is None:
        array: HostArray = tensor.numpy()
        return array
    torch = import_module("torch")
    bits = torch.uint8 if tensor.element_size() == 1 else torch.int16
    return np.asarray(tensor.view(bits).numpy()).view(float_type)
