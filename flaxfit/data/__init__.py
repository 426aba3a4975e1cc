"""Public helpers for custom datasets; `open.py` opens data of any kind."""

from flaxfit.data.adapters.image_folder import image_folder
from flaxfit.data.datasets.batches import Batches
from flaxfit.data.datasets.examples import Examples

__all__ = ["Batches", "Examples", "image_folder"]
