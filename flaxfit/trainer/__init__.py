"""The facade: one object that trains, evaluates, predicts and saves."""

from flaxfit.trainer.trainer import Trainer

__all__ = ["Trainer"]
