"""The trainer Flax never had: `Trainer(model).fit(ds)`."""

from flaxfit._core.errors import (
    CheckpointCorruptError,
    CheckpointError,
    DataError,
    DetectionError,
)
from flaxfit._core.types import Average, Batch, Model, TrainState
from flaxfit._programs.steps import Task, make_train_step
from flaxfit._reporting.history import History
from flaxfit.callbacks import (
    Callback,
    EarlyStopping,
    LambdaCallback,
    LoopState,
    ModelCheckpoint,
)
from flaxfit.checkpoint import RestoreReport, load_params
from flaxfit.losses.loss import Loss
from flaxfit.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "Average",
    "Batch",
    "Callback",
    "CheckpointCorruptError",
    "CheckpointError",
    "DataError",
    "DetectionError",
    "EarlyStopping",
    "History",
    "LambdaCallback",
    "LoopState",
    "Loss",
    "Model",
    "ModelCheckpoint",
    "RestoreReport",
    "Task",
    "TrainState",
    "Trainer",
    "load_params",
    "make_train_step",
]

# Pickles and reprs name the public path, so that they outlive moves inside the package.
for _name in __all__:
    globals()[_name].__module__ = __name__
del _name
