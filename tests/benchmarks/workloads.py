"""What is trained on what: a module, its arrays, the batch size, the metric.

The arrays are cut to whole batches, so that nobody gains by dropping a tail or loses
by computing one.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import models
import numpy as np

LEARNING_RATE = 1e-3
_CONTEXT = 64  # characters


@dataclass(frozen=True)
class Workload:
    """A training job.

    Attributes:
      name: what `--only` takes.
      title: what the tables say.
      module: the Flax module.
      x: inputs; a whole number of batches.
      y: targets.
      batch_size: rows of a batch.
      epochs: epochs of one measurement.
      metric: `"mae"`, and the loss is the squared error; or `"accuracy"`, and the
        loss is the softmax cross-entropy with integer labels.
      tolerance: how far losses of the same epoch may lie apart, relatively. Dropout
        draws other numbers in every rival, so that theirs are only near.
    """

    name: str
    title: str
    module: Any
    x: np.ndarray
    y: np.ndarray
    batch_size: int
    epochs: int
    metric: str
    tolerance: float = 0.01

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.x) // self.batch_size

    def flag(self, training: bool) -> dict[str, bool]:
        """Returns what else the module has to be called with."""
        named = inspect.signature(type(self.module).__call__).parameters
        return {"training": training} if "training" in named else {}

    @cached_property
    def variables(self) -> dict[str, Any]:
        """The variables that every rival starts from, as NumPy arrays."""

        def init(x: jax.Array) -> Any:
            return self.module.init(jax.random.key(0), x, **self.flag(False))

        return jax.tree.map(np.array, jax.jit(init)(self.x[: self.batch_size]))


def make_workload(name: str, quick: bool = False) -> Workload:
    """Returns a workload by its name; `quick` is as small as it can be."""
    return MAKERS[name](quick)


def _tiny(quick: bool) -> Workload:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64 * (16 if quick else 512), 4)).astype("float32")
    y = np.sin(x.sum(axis=1, keepdims=True)) + 0.1 * x[:, :1]
    epochs = 1 if quick else 100
    title = "4-8-1 MLP, batch 64"
    return Workload("tiny", title, models.TinyMLP(), x, y, 64, epochs, "mae")


def _mlp(quick: bool) -> Workload:
    rng = np.random.default_rng(0)
    rows = 128 * (8 if quick else 100)
    y = rng.integers(0, 10, size=rows).astype("int32")
    centres = rng.normal(size=(10, 784))
    x = (0.2 * centres[y] + rng.normal(size=(rows, 784))).astype("float32")
    title = "784-128-10 MLP with BatchNorm, batch 128"
    epochs = 1 if quick else 20
    module = models.BatchNormMLP()
    return Workload("mlp", title, module, x, y, 128, epochs, "accuracy")


def _digits(quick: bool) -> Workload:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rows = 64 * (4 if quick else len(labels) // 64)
    x = images[:rows].reshape(-1, 8, 8, 1).astype("float32") / 16
    y = labels[:rows].astype("int32")
    title = "digits CNN (conv, BatchNorm, Dropout), batch 64"
    epochs = 1 if quick else 10
    module = models.DigitsCNN()
    return Workload("digits", title, module, x, y, 64, epochs, "accuracy", 0.2)


def _lm(quick: bool) -> Workload:
    windows = 16 * (2 if quick else 32)
    text = _text(windows * _CONTEXT + 1)
    # "\n" and everything else that is rare stand for themselves too: no token is lost.
    letters = sorted(set(text))
    lookup = {letter: number for number, letter in enumerate(letters)}
    tokens = np.array([lookup[letter] for letter in text], dtype="int32")
    x = tokens[:-1].reshape(windows, _CONTEXT)
    y = tokens[1:].reshape(windows, _CONTEXT)
    layers = 1 if quick else 4
    title = f"{layers}-layer Transformer on text (d=128, context 64), batch 16"
    module = models.TransformerLM(vocabulary=len(letters), layers=layers)
    return Workload("lm", title, module, x, y, 16, 1, "accuracy")


def _text(length: int) -> str:
    """Returns text that every Python has: its own library's modules in order."""
    parts: list[str] = []
    found = 0
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        part = path.read_text(encoding="utf-8", errors="ignore")
        parts.append(part)
        found += len(part)
        if found >= length:
            break
    return "".join(parts)[:length]


def _resnet(quick: bool) -> Workload:
    small = quick and jax.default_backend() == "cpu"
    batch_size, side = (4, 32) if small else (128, 224)
    rows = batch_size * (2 if quick else 8)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, size=(rows, side, side, 3), dtype="uint8")
    y = rng.integers(0, 1000, size=rows).astype("int32")
    module = models.ResNet50(features=8 if small else 64)
    title = f"ResNet-50 in bfloat16 at {side} x {side}, batch {batch_size}"
    epochs = 1 if quick else 4
    # bfloat16 rounds in another order wherever XLA fuses otherwise.
    return Workload("resnet", title, module, x, y, batch_size, epochs, "accuracy", 0.1)


MAKERS: Mapping[str, Callable[[bool], Workload]] = MappingProxyType(
    {"tiny": _tiny, "mlp": _mlp, "digits": _digits, "lm": _lm, "resnet": _resnet}
)
