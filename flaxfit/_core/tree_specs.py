"""Paths, shapes and dtypes of a tree, and the differences between two trees."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxfit._core.types import PyTree

_MOST_LINES = 20


class Form(NamedTuple):
    """What there is to say of an array without its values.

    Attributes:
      kind: `"number"` or `"integer"`, as far as a model cares.
      ndim: its number of axes.
      text: e.g. `"float32[32, 784]"`.
    """

    kind: str
    ndim: int
    text: str


def forms_of(tree: PyTree) -> dict[str, Form]:
    """Returns the form of every leaf by its path, with the dtypes jax would use."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): _form(shape_of(leaf)) for path, leaf in leaves}


def listed(forms: Mapping[str, Form]) -> str:
    """Returns e.g. `"['x'] float32[32, 3], ['y'] int32[32]"`."""
    return ", ".join(f"{path} {f.text}".strip() for path, f in forms.items()) or "none"


def differences(
    wanted: PyTree, given: PyTree, *, where: str = "", wanted_is: str
) -> list[str]:
    """Returns a line for each path that differs, at most 20 and how many more.

    Args:
      wanted: arrays or shapes.
      given: arrays or shapes.
      where: comes before every path.
      wanted_is: says what `wanted` is, e.g. `"the model has"`.
    """
    before, after = forms_of(wanted), forms_of(given)
    lines = []
    for path in sorted(before.keys() | after.keys()):
        texts = [f[path].text if path in f else "absent" for f in (before, after)]
        if texts[0] != texts[1]:
            lines.append(f"  {where}{path}: {wanted_is} {texts[0]}, given {texts[1]}")
    more = len(lines) - _MOST_LINES
    return lines if more <= 0 else [*lines[:_MOST_LINES], f"  and {more} more"]


def one_row_more(tree: PyTree, rows: int) -> PyTree:
    """Returns the shapes of a batch with one row more than its `rows`.

    What grows with it has the batch as its first axis; what stays has not.
    """

    def longer(x: Any) -> jax.ShapeDtypeStruct:
        shape = (rows + 1, *x.shape[1:]) if x.shape[:1] == (rows,) else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(longer, shapes_of(tree))


def describe_array(x: Any) -> str:
    """Returns e.g. `"float32[32, 784]"`."""
    return f"{x.dtype}{list(x.shape)}"


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


def _form(x: jax.ShapeDtypeStruct) -> Form:
    kind = "number" if jnp.issubdtype(x.dtype, jnp.inexact) else "integer"
    return Form(kind, len(x.shape), describe_array(x))
