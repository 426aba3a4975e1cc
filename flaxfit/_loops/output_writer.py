"""Writes predictions into arrays that the user provides, call by call."""

from collections.abc import Generator
from contextlib import closing
from typing import Any

import jax
import numpy as np

from flaxfit._core.errors import UsageError, UsageTypeError
from flaxfit._core.types import PyTree
from flaxfit._loops.predict_loop import Part, real_rows


class OutputWriter:
    """Writes outputs into arrays in memory, mapped from a file, or written by slices.

    Args:
      out: arrays `[examples, ...]`, nested like the outputs; any objects with a shape
        and a NumPy dtype that support `out[start:stop] = rows`.
      outputs: the outputs of one batch, with shapes and dtypes.
      examples: how many there will be, None if unknown before reading.

    Raises:
      TypeError: an object that cannot be written into.
      ValueError: arrays that are read-only, are nested differently, have another shape
        or length, or have a dtype that cannot hold the outputs.
    """

    def __init__(self, out: PyTree, outputs: PyTree, examples: int | None) -> None:
        targets: list[Any] = []
        try:
            jax.tree.map(lambda output, target: targets.append(target), outputs, out)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"out is nested as {jax.tree.structure(out)}, the outputs as "
                f"{jax.tree.structure(outputs)}: give one array for each output."
            ) from error
        for target, output in zip(targets, jax.tree.leaves(outputs), strict=True):
            _check(target, output, examples)
        if len(lengths := {target.shape[0] for target in targets}) > 1:
            raise ValueError(
                f"the arrays of out have {', '.join(map(str, sorted(lengths)))} rows: "
                "give each of them one row per example."
            )
        self._out = out
        self._targets = targets

    def write(self, parts: Generator[Part]) -> PyTree:
        """Writes the outputs that `Prediction.run` yields, and returns the arrays.

        Raises:
          ValueError: there are more examples than rows, or fewer.
        """
        done, room = 0, self._targets[0].shape[0]
        try:
            with closing(parts):
                for outputs, examples in parts:
                    rows = sum(examples)
                    if done + rows > room:
                        raise ValueError(
                            f"out has {room} rows, but there are more examples. Give "
                            "more rows, or limit the number of batches: "
                            f"steps={max(1, room // max(examples))}."
                        )
                    leaves = jax.tree.leaves(outputs)
                    for target, leaf in zip(self._targets, leaves, strict=True):
                        start = done
                        for piece in real_rows(leaf, examples):
                            target[start : start + len(piece)] = piece
                            start += len(piece)
                    done += rows
            if done < room:
                raise ValueError(
                    f"out has {room} rows, but there were {done} examples: the rows "
                    f"from {done} on are unchanged. Give out[:{done}]."
                )
        except Exception as error:
            error.add_note(f"the first {done} rows of out are written")
            raise
        return self._out


def _check(target: Any, output: Any, examples: int | None) -> None:
    kind, advice = f"out is a {type(target).__name__}", _advice(output, examples)
    shape = getattr(target, "shape", None)
    writable = hasattr(target, "__setitem__") and not isinstance(target, jax.Array)
    if shape is None or not writable:
        given = f"{kind}, which cannot be written into row by row"
        raise UsageTypeError(given, write=advice)
    flags = getattr(target, "flags", None)
    if getattr(target, "read_only", False) or not getattr(flags, "writeable", True):
        raise UsageError(
            f"{kind} that is read-only: open it for writing, for example a memmap "
            "with mode='r+'"
        )
    if tuple(shape[1:]) != output.shape[1:] or not len(shape):
        wanted = ", ".join(["examples", *map(str, output.shape[1:])])
        given = f"out has the shape {tuple(shape)}, but the outputs are {output.dtype}"
        raise UsageError(f"{given}[{wanted}]", write=advice)
    if examples is not None and shape[0] != examples:
        rows = f"out[:{examples}]" if shape[0] > examples else "more rows"
        given = f"out has {shape[0]} rows, but there are {examples} examples"
        raise UsageError(given, f"Give {rows}")
    try:
        dtype = np.dtype(getattr(target.dtype, "numpy_dtype", target.dtype))
    except (AttributeError, TypeError) as error:
        expected = "Give its NumPy view; for torch, out=out.numpy()"
        raise UsageTypeError(f"{kind} without a NumPy dtype", expected) from error
    # Integers that are too large would wrap around; floats are rounded.
    exact = np.issubdtype(dtype, np.integer)
    if not np.can_cast(output.dtype, dtype, "safe" if exact else "same_kind"):
        given = f"out is {dtype}, which cannot hold the outputs"
        raise UsageError(f"{given}: they are {output.dtype}", write=advice)


def _advice(output: Any, examples: int | None) -> str:
    rows = "examples" if examples is None else str(examples)
    shape = ", ".join([rows, *map(str, output.shape[1:])])
    return (
        f"out=np.lib.format.open_memmap('out.npy', 'w+', np.dtype('{output.dtype}'), "
        f"({shape}{',' if len(output.shape) == 1 else ''}))"
    )
