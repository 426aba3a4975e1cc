"""Checkpoints: a `TrainState` in one file, written atomically, read strictly."""

from flaxfit.checkpoint.api import (
    Snapshot,
    check_writable,
    load,
    load_params,
    load_variables,
    nonfinite_leaf,
    read_meta,
    save,
    snapshot,
    verify,
    write,
)
from flaxfit.checkpoint.file_format import Checkpoint
from flaxfit.checkpoint.restore import Put, RestoreReport, restore

__all__ = [
    "Checkpoint",
    "Put",
    "RestoreReport",
    "Snapshot",
    "check_writable",
    "load",
    "load_params",
    "load_variables",
    "nonfinite_leaf",
    "read_meta",
    "restore",
    "save",
    "snapshot",
    "verify",
    "write",
]

Checkpoint.__module__ = Snapshot.__module__ = (
    __name__  # pickled, as in flaxfit/__init__.py
)
