"""Helpers to describe datasets; `open.py` opens data of any kind."""

from flaxfit.data.adapters.image_folder import image_folder
from flaxfit.data.adapters.registry import register_adapter
from flaxfit.data.adapters.tfds import tfds
from flaxfit.data.datasets.batches import Batches
from flaxfit.data.datasets.examples import Examples

__all__ = ["Batches", "Examples", "image_folder", "register_adapter", "tfds"]
