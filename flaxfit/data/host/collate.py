"""Stacks single examples into one nested batch of NumPy arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flaxfit._core.errors import DataError
from flaxfit._core.types import HostArray
from flaxfit.data.host.arrays import as_array, is_scalar
from flaxfit.data.host.torch_tensors import is_tensor, stack_tensors


def collate(
    examples: Sequence[Any], join: Callable[[Sequence[Any]], HostArray] | None = None
) -> Any:
    """Returns a raw batch of examples of the same nesting.

    Args:
      examples: at least one pytree of arrays, numbers and text.
      join: values of a leaf -> array, instead of `stack`.

    Returns:
      The same nesting of arrays `[len(examples), ...]`; a leaf whose values differ in
      shape becomes an array of objects.

    Raises:
      DataError: examples of different nesting.
    """
    first = examples[0]
    kind = type(first)
    same = all(type(example) is kind for example in examples)
    if not same and not all(map(is_scalar, examples)):
        raise DataError(
            "examples differ in type: "
            f"{', '.join(sorted({type(e).__name__ for e in examples}))}. All examples "
            "need the same nesting."
        )
    if isinstance(first, Mapping):
        for other in examples:
            if other.keys() != first.keys():
                raise DataError(
                    f"examples differ in their keys: {', '.join(map(str, first))} and "
                    f"{', '.join(map(str, other))}. All examples need the same keys."
                )
        return {key: collate([e[key] for e in examples], join) for key in first}
    if isinstance(first, tuple | list) and not is_list_of_numbers(first):
        for other in examples:
            if len(other) != len(first):
                raise DataError(
                    f"examples differ in length: a {kind.__name__} of {len(first)} and "
                    f"one of {len(other)} parts. All examples need the same nesting."
                )
        parts = [collate(part, join) for part in zip(*examples, strict=True)]
        return kind(*parts) if hasattr(first, "_fields") else kind(parts)
    if first is None:
        return None
    join = join or stack
    leaf = kind is np.ndarray or is_scalar(first) or is_tensor(first)
    if leaf or isinstance(first, list):
        return join(examples)
    leaves, structure = jax.tree.flatten(first)
    others = (jax.tree.flatten(each)[1] for each in examples)
    if any(bool(other != structure) for other in others):  # type: ignore[operator]
        raise DataError(f"examples differ in nesting: the first one has {structure}.")
    if len(leaves) == 1 and leaves[0] is first:
        return join(examples)
    columns = zip(*(jax.tree.leaves(each) for each in examples), strict=True)
    return jax.tree.unflatten(structure, [join(column) for column in columns])


def stack(values: Sequence[Any]) -> HostArray:
    """Returns `[len(values), ...]`; an array of objects if the shapes differ."""
    if isinstance(values[0], bool | int | float | str | bytes | np.generic):
        return np.array(values)
    if is_tensor(values[0]) and (whole := stack_tensors(values)) is not None:
        return whole
    arrays = [as_array(value) for value in values]
    first = arrays[0]
    shape, dtype = first.shape, first.dtype
    if any(array.shape != shape for array in arrays):
        ragged = np.empty(len(arrays), object)
        ragged[:] = arrays
        return ragged
    if any(array.dtype != dtype for array in arrays):
        return np.stack(arrays)
    if not shape:
        return np.array(arrays)
    stacked = np.empty((len(arrays), *shape), dtype)
    for row, array in enumerate(arrays):
        stacked[row] = array
    return stacked


def looks_single(item: Any) -> bool:
    """Whether an item is a single example, and not a batch.

    It is one if a part of it is a single value, or if its parts differ in length: all
    parts of a batch have one row per example.
    """
    if isinstance(item, Mapping):
        item = tuple(item.values())
    elif isinstance(item, tuple | list) and not is_list_of_numbers(item):
        item = tuple(item)
    lengths = set()
    for leaf in jax.tree.leaves(item, is_leaf=is_list_of_numbers):
        if is_scalar(leaf):
            return True
        if hasattr(leaf, "__len__"):
            lengths.add(len(leaf))
    return len(lengths) > 1


def is_list_of_numbers(value: Any) -> bool:
    """Whether a value is a list, nested or not, of numbers: one array."""
    return isinstance(value, list) and all(
        is_scalar(each) or is_list_of_numbers(each) for each in value
    )
