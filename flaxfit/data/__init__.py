"""Public helpers for custom datasets; `open.py` opens data of any kind."""

from flaxfit.data.adapters.image_folder import image_folder
from flaxfit.data.datasets.batches import Batches
from flaxfit.data.datasets.examples import Examples

__all__ = ["Batches", "Examples", "image_folder"]

for _name in __all__:
    globals()[_name].__module__ = __name__  # see flaxfit/__init__.py
del _name
