"""Scales `uint8` images to floats between 0 and 1 on the device."""

import jax
import jax.numpy as jnp

from flaxfit._core.types import Array, Inputs, Model, PyTree
from flaxfit._models.base import Adapted


def scale_images(inputs: Inputs) -> Inputs:
    """Returns the inputs with every image divided by 255, as `float32`.

    An image is `uint8[batch, height, width, ...]`; other inputs stay as they are.
    """
    return jax.tree.map(_scale, inputs)


def has_images(inputs: Inputs) -> bool:
    """Whether any of the inputs is `uint8[batch, height, width, ...]`."""
    return any(map(_is_image, jax.tree.leaves(inputs)))


def with_scaled_images(adapted: Adapted) -> Adapted:
    """Returns the model with its images scaled before every call."""
    model = adapted.model

    def init(rng: Array, inputs: Inputs) -> tuple[PyTree, dict[str, PyTree]]:
        return model.init(rng, scale_images(inputs))

    def apply(
        params: PyTree,
        collections: dict[str, PyTree],
        inputs: Inputs,
        **options: object,
    ) -> tuple[PyTree, dict[str, PyTree], dict[str, PyTree]]:
        return model.apply(params, collections, scale_images(inputs), **options)  # type: ignore[arg-type]

    return adapted._replace(model=Model(init, apply))


def _is_image(leaf: Array) -> bool:
    return leaf.dtype == jnp.uint8 and leaf.ndim >= 3


def _scale(leaf: Array) -> Array:
    return leaf.astype(jnp.float32) / 255 if _is_image(leaf) else leaf
