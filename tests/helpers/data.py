"""Small arrays that several tests train on."""

import numpy as np


def labeled(rows, width=5, classes=3, seed=0):
    """Returns `(float32[rows, width], int32[rows])`, the same for the same seed."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)).astype(np.float32)
    return x, rng.integers(0, classes, rows).astype(np.int32)
