"""Checkpoints: a `TrainState` in one file, written atomically, read strictly."""

from flaxfit.checkpoint.api import (
    Checkpoint,
    Put,
    RestoreReport,
    Snapshot,
    check_writable,
    load,
    load_params,
    load_variables,
    nonfinite_leaf,
    read_meta,
    restore,
    save,
    snapshot,
    verify,
    write,
)

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
