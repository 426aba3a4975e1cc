"""Losses by name, function or `Loss`: one value per example."""

from flaxfit.losses.loss import Loss

__all__ = ["Loss"]
