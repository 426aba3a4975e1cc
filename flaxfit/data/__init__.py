"""Datasets of one's own: what `fit` takes besides arrays and known kinds."""

from flaxfit.data.examples import Examples

__all__ = ["Examples"]
