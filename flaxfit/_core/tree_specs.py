"""Shapes and dtypes of the leaves of a tree, and the differences between two trees."""

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from flaxfit._core.types import PyTree

_MOST_LINES = 20


class LeafSpec(NamedTuple):
    """Shape and dtype of an array.

    Attributes:
      shape: the length of each axis, or a name for an axis of any length.
      dtype: the name of the dtype.
    """

    shape: tuple[int | str, ...]
    dtype: str

    @classmethod
    def of(cls, array: Any) -> Self:
        """Returns the spec of anything with a shape and a dtype."""
        return cls(tuple(array.shape), str(array.dtype))

    @property
    def is_inexact(self) -> bool:
        """Whether the dtype is a float or complex one."""
        return self.dtype.startswith(("float", "bfloat", "complex"))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Difference(NamedTuple):
    """One path at which two trees differ; None for a tree without that path."""

    path: Any
    wanted: LeafSpec | None
    given: LeafSpec | None


def specs_of(tree: PyTree) -> dict[str, LeafSpec]:
    """Returns the spec of every leaf by its path, with the dtypes jax would use."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_text(path): LeafSpec.of(shape_of(leaf)) for path, leaf in leaves}


def path_text(path: Any) -> str:
    """Returns jax's key path as text: `"Dense_0/kernel"`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def listed(specs: Mapping[str, LeafSpec]) -> str:
    """Returns e.g. `"x: float32[32,3], y: int32[32]"`; a single array has no name."""
    if list(specs) in ([""], ["0"]):
        return str(*specs.values())
    return ", ".join(f"{path}: {spec}" for path, spec in specs.items()) or "none"


def describe(tree: PyTree) -> str:
    """Returns e.g. `"float32[32,784]"`, in the nesting of `tree`.

    A leaf that is not an array is described by the name of its type.
    """

    def one(x: Any) -> str:
        return str(LeafSpec.of(x)) if is_array(x) else type(x).__name__

    return str(jax.tree.map(one, tree)).replace("'", "")


def is_array(value: Any) -> bool:
    """Whether `value` is one array, or the shape and dtype of one."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def holds_integers(array: Any) -> bool:
    """Whether an array holds integers or booleans."""
    return jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool


def diff(
    wanted: Mapping[Any, LeafSpec], given: Mapping[Any, LeafSpec]
) -> list[Difference]:
    """Returns the paths at which two trees differ, in the order of `wanted` first."""
    paths = dict.fromkeys([*wanted, *given])
    pairs = (Difference(path, wanted.get(path), given.get(path)) for path in paths)
    return [one for one in pairs if one.wanted != one.given]


def difference_lines(
    differences: Iterable[Difference], line: str, *, absent: str = "missing"
) -> list[str]:
    """Returns a line for each difference: at most 20, then the number of the others.

    Args:
      differences: what `diff` returned.
      line: a template with `{path}`, `{wanted}` and `{given}`.
      absent: the text for a tree without the path.
    """
    lines = [
        line.format(
            path=path,
            wanted=absent if wanted is None else wanted,
            given=absent if given is None else given,
        )
        for path, wanted, given in differences
    ]
    more = len(lines) - _MOST_LINES
    indent = " " * (len(line) - len(line.lstrip()))
    rest = [f"{indent}... and {more} more"] if more > 0 else []
    return lines[:_MOST_LINES] + rest


def add_row(tree: PyTree, rows: int) -> PyTree:
    """Returns the shapes of a batch with one more row than its `rows`.

    An array whose first axis does not have `rows` entries keeps its shape. A model's
    outputs for this batch show which of them have the batch as their first axis.
    """

    def longer(x: Any) -> jax.ShapeDtypeStruct:
        shape = (rows + 1, *x.shape[1:]) if x.shape[:1] == (rows,) else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(longer, shapes_of(tree))


def shapes_of(tree: PyTree) -> PyTree:
    """Returns the shapes and dtypes jax would give the arrays of `tree`."""
    return jax.tree.map(shape_of, tree)


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype jax would give an array or number."""
    if not hasattr(x, "dtype"):
        x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))


def form_of(tree: PyTree) -> tuple[Hashable, ...]:
    """Returns the structure of a tree, and the shape and dtype of every leaf."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, x.dtype) for x in leaves)
