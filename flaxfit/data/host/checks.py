"""Checks host arrays before compilation: lengths, dtypes, NaN, weights and tokens."""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxfit._core.arrays import append_axes
from flaxfit._core.errors import DataError
from flaxfit._core.tree_specs import path_text
from flaxfit._core.types import Batch, HostArray, PyTree
from flaxfit.data.host.arrays import named_leaves

LONG_DOUBLES = frozenset("gG")
_MOST_NAMED = 8


def check_lengths(nest: PyTree) -> int:
    """Returns the number of rows that all arrays `[rows, ...]` of a nesting share.

    Raises:
      DataError: arrays of different length, no rows, no inputs, a single value without
        a batch axis, or text or objects instead of numbers.
    """
    leaves = jax.tree.leaves(nest)
    inputs = nest.inputs if isinstance(nest, Batch) else nest
    if not jax.tree.leaves(inputs):
        raise DataError("no inputs: x holds no array. Write x, (x, y) or a dict.")
    if all(_is_plain(leaf) for leaf in leaves):
        rows = len(leaves[0])
        if rows and all(len(leaf) == rows for leaf in leaves):
            return rows
    named = named_leaves(nest)
    for name, leaf in named:
        _check_dtype(name, leaf)
        if np.ndim(leaf) == 0:
            raise DataError(
                f"{name} is a single value (shape ()): every array needs a leading "
                "batch axis. Pass single examples with a batch size, "
                "fit(dataset, batch_size=32), or make a batch, "
                "np.stack([x for x, _ in examples])."
            )
    lengths = {len(leaf) for _, leaf in named}
    if len(lengths) > 1:
        listed = ", ".join(f"{name}: {len(leaf)}" for name, leaf in named[:_MOST_NAMED])
        if len(named) > _MOST_NAMED:
            name, leaf = named[-1]
            listed = f"{listed}, ... {name}: {len(leaf)}"
        raise DataError(
            f"arrays of different length: {listed}. Every array needs one row per "
            "example: cut them to the same number of rows. For a list of examples "
            "write np.stack(x), for batches of graphs "
            "flaxfit.data.Batches(batches, size=...)."
        )
    if lengths == {0}:
        raise DataError(
            f"no examples: {named[0][0]} has shape {np.shape(named[0][1])}. Pass "
            "at least one row."
        )
    return lengths.pop()


def check_sized(batch: Batch, given: Any) -> int:
    """Returns the number of examples of a batch whose inputs have any shapes.

    `given` is this number, as returned by the user's function `size`.

    Raises:
      DataError: `given` is not an integer of at least 1, or not the number of targets
        or weights; text or objects instead of numbers, or no inputs.
    """
    try:
        size = operator.index(given if isinstance(given, int) else given.item())
    except (AttributeError, TypeError, ValueError):
        size = 0
    if size < 1:
        raise DataError(
            f"the function size returned {given!r}: expected the number of examples in "
            "a batch, at least 1, such as len(labels) or graph.n_node.shape[0]."
        )
    if not jax.tree.leaves(batch.inputs):
        raise DataError("no inputs: x holds no array. Write (x, y) or a dict.")
    for name, leaf in named_leaves(batch):
        _check_dtype(name, leaf)
        of_rows = name.split("/")[0] in ("y", "weights")
        if of_rows and np.shape(leaf)[:1] != (size,):
            raise DataError(
                f"the function size returned {size}, but {name} has shape "
                f"{np.shape(leaf)}: targets, weights and outputs need one row per "
                "example."
            )
    return size


def check_values(batch: Batch) -> None:
    """Checks that inputs and targets are finite.

    Targets of weight 0 may have any value. Arrays mapped from a file are not checked,
    as the whole file would have to be read.

    Raises:
      DataError: NaN or infinity in inputs, or in targets whose weight is not 0.
    """
    for name, leaf in named_leaves(batch.replace(weights=None)):
        if not jnp.issubdtype(leaf.dtype, np.inexact) or isinstance(leaf, np.memmap):
            continue
        # Needs no second array: a sum is only finite if all of its terms are.
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(leaf.sum()):
                continue
        bad = ~np.isfinite(leaf)
        if name.split("/")[0] == "y":
            bad &= append_axes(batch.weights != 0, leaf.ndim)
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(bad)[0])
            raise DataError(
                f"{name} holds {leaf[place]} at row {place[0]}: one such value makes "
                "the loss and then every parameter NaN. Drop these rows or replace the "
                "values, e.g. np.nan_to_num(x); a target of weight 0 does not count."
            )


def check_weights(weights: HostArray, *, all_zero: bool = False) -> None:
    """Checks sample weights `float32[rows, ...]`.

    With `all_zero`, all of them may be 0, as in a single batch.

    Raises:
      DataError: NaN, infinity, negative weights, or nothing but zeros.
    """
    right = np.isfinite(weights) & (weights >= 0)
    if not right.all():
        row = int(np.argwhere(~right)[0][0])
        raise DataError(
            f"weights hold {weights[row]} at row {row}; weights must be finite and at "
            "least 0, where 0 leaves an example out."
        )
    if not all_zero and not weights.any():
        raise DataError(
            "the weights are all zero, so there is nothing to average over. Leave "
            "the weights out, or give the examples that count a weight above 0."
        )


def check_tokens(batch: Batch, vocabularies: Mapping[str, int]) -> None:
    """Checks inputs that are tokens, looked up in an embedding table.

    `vocabularies` maps the path of an input in `batch.inputs` to the number of rows of
    its table.

    Raises:
      DataError: a token without a row in the table.
    """
    if not vocabularies:
        return
    flat, _ = jax.tree_util.tree_flatten_with_path(batch.inputs)
    names = named_leaves(batch.replace(targets=None, weights=None))
    for (path, tokens), (name, _) in zip(flat, names, strict=True):
        rows = vocabularies.get(path_text(path))
        if rows is None or not tokens.size:
            continue
        if tokens.min() >= 0 and tokens.max() < rows:
            continue
        place = tuple(int(i) for i in np.argwhere((tokens < 0) | (tokens >= rows))[0])
        advice = (
            f"For padding write np.maximum({name}, 0), and mask these places."
            if tokens[place] < 0
            else f"Write nn.Embed({tokens.max() + 1}, ...), or correct the tokens."
        )
        raise DataError(
            f"{name} holds the token {tokens[place]} at row {place[0]}; the model's "
            f"nn.Embed has {rows} rows, 0..{rows - 1}, and returns NaN or the row of "
            f"another token for others. {advice}"
        )


def _is_plain(leaf: Any) -> bool:
    if not isinstance(leaf, np.ndarray | jax.Array) or leaf.ndim == 0:
        return False
    return leaf.dtype.kind in "biufc" and leaf.dtype.char not in LONG_DOUBLES


def _is_missing(cell: Any) -> bool:
    if isinstance(cell, np.ndarray):
        return cell.dtype == np.object_ and any(map(_is_missing, cell.ravel()))
    nested = isinstance(cell, list | tuple)
    return any(map(_is_missing, cell)) if nested else cell is None


def _check_dtype(name: str, leaf: Any) -> None:
    dtype = leaf.dtype
    number = dtype == np.bool_ or jnp.issubdtype(dtype, np.number)
    if number and dtype.char not in LONG_DOUBLES:
        return
    if dtype == np.object_ and np.ndim(leaf) == 0:
        value = np.asarray(leaf).item()
        advice = f"write np.asarray({name}), or {name}.toarray() if it is sparse."
        if dataclasses.is_dataclass(value):
            advice = "give a dict, or use jax.tree_util.register_dataclass."
        raise DataError(f"{name} is a {type(value).__name__}, not an array: {advice}")
    missing = map(_is_missing, leaf) if dtype == np.object_ else ()
    row = next((row for row, is_missing in enumerate(missing) if is_missing), None)
    if row is not None:
        raise DataError(
            f"{name} has no value at row {row} (None), which would make the loss NaN. "
            "Leave these rows out, dataset.filter(lambda row: row[key] is not None), "
            "or give them a value and weight 0. To leave out a column that the model "
            "does not need, write Trainer(model, inputs=...)."
        )
    if dtype.kind in "OUST":
        hint = (
            f"For numbers write {name}.astype('float32'); for class names "
            "np.unique(labels, return_inverse=True)[1]; pad rows of different length."
        )
    else:
        hint = f"Convert it to a dtype of jax, e.g. {name}.astype('float32')."
    raise DataError(
        f"{name} has dtype {dtype}, shape {np.shape(leaf)}: only numbers can be "
        f"trained on. {hint} To leave out a column that the model does not need, "
        "write Trainer(model, inputs=...)."
    )
