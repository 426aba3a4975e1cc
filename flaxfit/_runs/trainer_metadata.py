"""Metadata of a saved trainer: its arguments and the shapes of a batch.

A file holds only text, numbers, and lists and dicts of them; any other argument is
noted by name, and has to be given again.
"""

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flaxfit._core.errors import CheckpointError, did_you_mean
from flaxfit._core.types import Batch, PyTree
from flaxfit.data.datasets.columns import Columns

_OBJECT = "__object__"
_PACKAGES = ("flaxfit", "jax", "flax", "optax")


def to_meta(
    config: Mapping[str, Any],
    example: Batch,
    *,
    batch_size: int,
    opt_state: PyTree,
    class_names: Sequence[str] = (),
    columns: Columns | None = None,
) -> dict[str, Any]:
    """Returns the description of a trainer, in plain msgpack types.

    Args:
      config: the trainer's arguments.
      example: the shapes of the batch it was built from.
      batch_size: the batch size of the last fit.
      opt_state: the shapes of the optimizer's state.
      class_names: the names of the classes, if the data named them.
      columns: how the columns of its tables are read.
    """
    fields = ("inputs", "targets", "weights")
    try:
        shapes = {name: _pack_shapes(getattr(example, name)) for name in fields}
    except TypeError:  # A file cannot describe this structure; the data shows it.
        shapes = None
    return {
        "versions": {name: _version(name) for name in _PACKAGES},
        "config": {name: _pack(value) for name, value in config.items()},
        "batch_size": batch_size,
        "example": shapes,
        "optimizer": _outline(opt_state),
        "contents": "state",
        "class_names": list(class_names),
        "columns": columns and columns.to_plain(),
    }


def example_of(meta: Mapping[str, Any]) -> Batch | None:
    """Returns the shapes of a trainer's first batch, None if a file has none."""
    shapes = meta.get("example")
    if not shapes:
        return None
    return Batch(**{name: _unpack_shapes(packed) for name, packed in shapes.items()})


def from_meta(
    meta: Mapping[str, Any], changes: Mapping[str, Any], path: str
) -> tuple[dict[str, Any], Batch | None, int]:
    """Returns the trainer's arguments, the shapes of its batch, and its batch size.

    The shapes are None if a file cannot describe their structure. The arguments in
    `changes` replace the saved ones.

    Raises:
      CheckpointError: an argument was a function or an object and is not given again,
        or the file was not saved by a trainer.
      TypeError: an argument in `changes` that `Trainer` does not have.
    """
    try:
        saved, example = dict(meta["config"]), example_of(meta)
        batch_size = int(meta["batch_size"])
    except KeyError as error:
        raise CheckpointError(
            f"{path!r} does not describe its trainer ({error} is missing). "
            f"Trainer.load reads files that trainer.save wrote."
        ) from error
    for name in changes:
        if name not in saved:
            raise TypeError(
                f"Trainer.load(..., {name}=...): Trainer has no such argument."
                f"{did_you_mean(name, saved)}"
            )
    kept = {name: value for name, value in saved.items() if name not in changes}
    missing = {name: v[_OBJECT] for name, v in kept.items() if _is_object(v)}
    if missing:
        given = ", ".join(f"{name}={text}" for name, text in missing.items())
        arguments = ", ".join(f"{name}=..." for name in missing)
        raise CheckpointError(
            f"{path!r} was saved by a Trainer with {given}, which a file cannot "
            f"hold. Give it again: Trainer.load({path!r}, model, {arguments})."
        )
    return {**saved, **changes}, example, batch_size


def _outline(node: Any) -> str:
    """Returns the names of an optimizer's parts: `"(ScaleByAdamState, EmptyState)"`."""
    if isinstance(node, Mapping):
        children = list(node.values())
    elif isinstance(node, tuple | list):
        children = list(node)
    else:
        return ""
    name = type(node).__name__ if hasattr(node, "_fields") else ""
    inner = ", ".join(filter(None, map(_outline, children)))
    enclosed = inner and (name or len(children) > 1)
    return f"{name}({inner})" if enclosed else name or inner


def _pack(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.integer | np.floating):
        return value.item()
    packed: Any = {_OBJECT: _text(value)}
    if isinstance(value, list | tuple):
        items = [_pack(item) for item in value]
        packed = items if not any(map(_is_object, items)) else packed
    elif isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        fields = {key: _pack(item) for key, item in value.items()}
        packed = fields if not any(map(_is_object, fields.values())) else packed
    return packed


def _is_object(packed: Any) -> bool:
    return isinstance(packed, dict) and _OBJECT in packed


def _text(value: Any) -> str:
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else f"<{type(value).__name__}>"


def _pack_shapes(tree: PyTree) -> Any:
    if tree is None:
        return None
    if isinstance(tree, jax.ShapeDtypeStruct):
        return {"shape": list(tree.shape), "dtype": str(tree.dtype)}
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {"dict": {key: _pack_shapes(value) for key, value in tree.items()}}
    if type(tree) in (tuple, list):
        return {type(tree).__name__: [_pack_shapes(value) for value in tree]}
    raise TypeError(f"a file cannot describe a {type(tree).__name__}")


def _unpack_shapes(packed: Any) -> PyTree:
    if packed is None:
        return None
    if "dict" in packed:
        return {key: _unpack_shapes(value) for key, value in packed["dict"].items()}
    for kind, make in (("tuple", tuple), ("list", list)):
        if kind in packed:
            return make(_unpack_shapes(value) for value in packed[kind])
    return jax.ShapeDtypeStruct(tuple(packed["shape"]), np.dtype(packed["dtype"]))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
