"""Converts, narrows, pads and names host arrays. Knows no models."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flaxfit._core.arrays import strongly_typed
from flaxfit._core.errors import DataError, caller
from flaxfit._core.tree_specs import path_text
from flaxfit._core.types import Batch, HostArray, PyTree
from flaxfit.data.host.torch_tensors import as_numpy, is_tensor


def fill(batch: Batch, size: int) -> Batch:
    """Fills a short batch up to `size` rows with its own rows at weight 0.

    With real rows instead of zeros, BatchNorm sees real data only. Arrays on a device
    stay there.
    """
    rows = len(batch.weights)
    if rows >= size:
        return batch
    order = np.arange(size) % rows
    filled: Batch = jax.tree.map(lambda leaf: leaf[order], batch)
    if isinstance(filled.weights, jax.Array):
        return filled.replace(weights=filled.weights.at[rows:].set(0.0))
    filled.weights[rows:] = 0.0
    return filled


def copy_host_arrays(nest: Any) -> Any:
    """Returns a nesting with copies of its NumPy arrays; jax arrays are immutable.

    Copies inside batches, tuples, lists and dicts; returns other values unchanged.
    """
    if isinstance(nest, np.ndarray):
        return nest.copy()
    if isinstance(nest, Batch):
        return jax.tree.map(copy_host_arrays, nest)
    kind = type(nest)
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return kind(*map(copy_host_arrays, nest))
    if kind is tuple or kind is list:
        return kind(map(copy_host_arrays, nest))
    if kind is dict or kind is OrderedDict:
        return kind((key, copy_host_arrays(part)) for key, part in nest.items())
    return nest


def as_host(nest: PyTree, *, but_device: bool = False) -> PyTree:
    """Returns a nesting with every array-like in it as a NumPy array.

    jax arrays are copied to the host, a list of numbers becomes one array, and other
    array-likes (pandas, torch) are converted. dtypes are kept.

    Args:
      nest: array-likes in any nesting.
      but_device: leave jax arrays on their device. Committed arrays are copied to the
        host nevertheless: with them, programs would be compiled again, or run on the
        device they are committed to.

    Raises:
      DataError: a list of numbers whose rows differ in length, a masked array with
        hidden values, or a sparse or nested tensor of torch.
    """
    if isinstance(nest, Mapping):
        # jax.tree.map would sort the keys, which messages list.
        return {key: as_host(v, but_device=but_device) for key, v in nest.items()}
    return jax.tree.map(lambda leaf: as_array(leaf, but_device), nest, is_leaf=_is_leaf)


def is_array(value: object) -> bool:
    """Whether `value` is one array: an array-like, or a list of scalars or of lists."""
    if isinstance(value, list):
        first = value[0] if value else 0.0
        return is_scalar(first) or (isinstance(first, list) and is_array(first))
    if isinstance(value, type):
        return False
    return hasattr(value, "__array__") or (
        hasattr(value, "shape") and hasattr(value, "dtype")
    )


def is_scalar(value: object) -> bool:
    """Whether `value` is one number or one piece of text."""
    if isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        return True
    return getattr(value, "ndim", None) == 0 and is_array(value)


def is_nest(value: object) -> bool:
    """Whether `value` is at least one array, in any nesting."""
    if isinstance(value, Mapping):
        parts = [part for part in value.values() if part is not None]
        return bool(parts) and all(map(is_nest, parts))
    leaves = jax.tree.leaves(value, is_leaf=_is_leaf)
    return bool(leaves) and all(
        is_nest(leaf) if isinstance(leaf, Mapping) else is_array(leaf)
        for leaf in leaves
    )


def narrow(nest: PyTree, *, keep_mapped: bool = False) -> PyTree:
    """Returns a nesting of arrays in the dtypes that jax computes in.

    Without 64-bit mode, float64 becomes float32 and int64 becomes int32. With
    `keep_mapped`, arrays mapped from a file stay as they are: they are narrowed batch
    by batch instead of being read as a whole.

    Raises:
      DataError: an integer that the narrower dtype cannot hold.
    """
    leaves, structure = jax.tree.flatten(nest)
    wanted = [
        leaf.dtype
        if keep_mapped and isinstance(leaf, np.memmap)
        else native(leaf.dtype)
        for leaf in leaves
    ]
    if all(leaf.dtype == dtype for leaf, dtype in zip(leaves, wanted, strict=True)):
        return nest
    names = (name for name, _ in named_leaves(nest))
    narrowed = [as_dtype(*given) for given in zip(names, leaves, wanted, strict=True)]
    return jax.tree.unflatten(structure, narrowed)


def named_leaves(nest: PyTree) -> list[tuple[str, Any]]:
    """Returns `(path, leaf)` of every leaf, with paths as in messages: `x/image`."""
    if isinstance(nest, Batch):
        inputs: Any = nest.inputs
        if isinstance(inputs, tuple) and len(inputs) == 1:
            inputs = inputs[0]
        # An OrderedDict, as jax sorts the keys of a plain dict.
        nest = OrderedDict(x=inputs, y=nest.targets, weights=nest.weights)
    flat, _ = jax.tree_util.tree_flatten_with_path(nest)
    return [(path_text(path) or "x", leaf) for path, leaf in flat]


def call_text(arguments: str) -> str:
    """Returns the code that passes `arguments` to the running call, for messages.

    In checks of `validation_data` that is the argument, else the call.
    """
    name = caller()
    if name == "validation_data":
        return f"{name}=({arguments})" if "," in arguments else f"{name}={arguments}"
    return f"{name}({arguments})"


def _is_leaf(value: object) -> bool:
    # jax warns of iterables that are not pytrees, unless they are declared leaves.
    return is_array(value) or (
        jax.tree_util.default_registry.flatten_one_level(value) is None
    )


def as_array(leaf: Any, but_device: bool = False) -> Any:
    """Returns an array-like as a NumPy array; see `as_host`."""
    # A memmap keeps its type, which `narrow` checks.
    if type(leaf) is np.ndarray or isinstance(leaf, np.memmap):
        return leaf
    if but_device and isinstance(leaf, jax.Array) and not leaf.committed:
        # A weakly typed array, as `jnp.full(shape, 1.0)`, would compile once more.
        return strongly_typed(leaf) if leaf.weak_type else leaf
    if isinstance(leaf, Mapping):
        return as_host(leaf, but_device=but_device)
    if isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
        raise DataError(
            f"a masked array hides {np.ma.count_masked(leaf)} of its values, but "
            "training would use them. Write x.filled(0), and give rows that must not "
            "count the sample_weight 0."
        )
    if is_tensor(leaf):
        return as_numpy(leaf)
    try:
        return np.asarray(leaf)
    except ValueError as error:
        if not isinstance(leaf, list):
            raise
        raise DataError(
            f"a list of {len(leaf)} rows that differ in length is not an array. Pad "
            "them to one length, then write np.array(rows)."
        ) from error


def native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Returns the dtype that jax uses for `dtype`, in native byte order."""
    wanted: np.dtype[Any] = jax.dtypes.canonicalize_dtype(dtype)
    return wanted.newbyteorder("=")


def as_dtype(name: str, leaf: HostArray, dtype: np.dtype[Any]) -> HostArray:
    """Returns an array as another dtype of the same kind.

    `name` is the array's name in messages.

    Raises:
      DataError: an integer that the dtype cannot hold.
    """
    if leaf.dtype == dtype:
        return leaf
    if leaf.dtype.kind in "iu" and leaf.size:
        limits = np.iinfo(dtype)
        low, high = leaf.min(), leaf.max()
        if low < limits.min or high > limits.max:
            worst = high if high > limits.max else low
            raise DataError(
                f"{name} is {leaf.dtype} and holds {worst}, which {dtype} cannot hold "
                f"({limits.min} to {limits.max}); jax would cut it off silently. "
                "Renumber the values, or turn on 64-bit mode before anything else: "
                "jax.config.update('jax_enable_x64', True)"
            )
    with np.errstate(over="ignore"):
        return np.asarray(leaf).astype(dtype)


def on_device(nest: PyTree) -> bool:
    """Whether any array of a nesting is a jax array."""
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nest))
