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

# Values that are pickled, and errors, name their public path, so that their pickles
# survive moves inside the package. `inspect` then cannot find the source of the class,
# so all other classes, such as `Trainer`, keep the path of their module.
for _value in (
    Average,
    Batch,
    CheckpointCorruptError,
    CheckpointError,
    DataError,
    DetectionError,
    History,
    RestoreReport,
    TrainState,
):
    _value.__module__ = __name__
del _value
