"""The trainer Flax never had: `Trainer(model).fit(ds)`."""

from flaxfit._errors import CheckpointError, DataError, DetectionError
from flaxfit._steps import Task, make_train_step
from flaxfit._types import Average, Batch, Model, TrainState
from flaxfit.callbacks import Callback, EarlyStopping, LambdaCallback, LoopState
from flaxfit.history import History
from flaxfit.losses import Loss
from flaxfit.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "Average",
    "Batch",
    "Callback",
    "CheckpointError",
    "DataError",
    "DetectionError",
    "EarlyStopping",
    "History",
    "LambdaCallback",
    "LoopState",
    "Loss",
    "Model",
    "Task",
    "TrainState",
    "Trainer",
    "make_train_step",
]
