"""Datasets of one's own: what `fit` takes besides arrays and known kinds."""

from flaxfit.data.batches import Batches
from flaxfit.data.examples import Examples
from flaxfit.data.image_folder import image_folder

__all__ = ["Batches", "Examples", "image_folder"]
