"""The hook contract and the built-in callbacks, one per file."""

from flaxfit.callbacks.base import Callback, LoopState
from flaxfit.callbacks.early_stopping import EarlyStopping
from flaxfit.callbacks.lambda_callback import LambdaCallback
from flaxfit.callbacks.model_checkpoint import ModelCheckpoint

__all__ = [
    "Callback",
    "EarlyStopping",
    "LambdaCallback",
    "LoopState",
    "ModelCheckpoint",
]
