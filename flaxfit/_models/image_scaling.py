"""Scales `uint8` images to floats between 0 and 1 on the device."""

import jax
import jax.numpy as jnp

from flaxfit._core.types import Array, Inputs, Model, PyTree
from flaxfit._models.base import Adapted


def as_floats(inputs: Inputs) -> Inputs:
    """Returns inputs in which every picture is `float32`, its bytes divided by 255.

    A picture is `uint8[batch, height, width, ...]`; all else stays as it is.
    """
    floats: Inputs = jax.tree.map(_as_float, inputs)
    return floats


def has_pictures(inputs: Inputs) -> bool:
    """Whether any of the inputs is `uint8[batch, height, width, ...]`."""
    return any(map(_is_picture, jax.tree.leaves(inputs)))


def given_floats(adapted: Adapted) -> Adapted:
    """Returns the model that scales pictures before it is called with them."""
    model = adapted.model

    def init(rng: Array, inputs: Inputs) -> tuple[PyTree, dict[str, PyTree]]:
        return model.init(rng, as_floats(inputs))

    def apply(
        params: PyTree,
        collections: dict[str, PyTree],
        inputs: Inputs,
        **options: object,
    ) -> tuple[PyTree, dict[str, PyTree], dict[str, PyTree]]:
        return model.apply(params, collections, as_floats(inputs), **options)  # type: ignore[arg-type]

    return adapted._replace(model=Model(init, apply))


def _is_picture(leaf: Array) -> bool:
    return leaf.dtype == jnp.uint8 and leaf.ndim >= 3


def _as_float(leaf: Array) -> Array:
    return leaf.astype(jnp.float32) / 255 if _is_picture(leaf) else leaf
