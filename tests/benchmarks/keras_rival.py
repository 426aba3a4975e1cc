"""Keras 3's `fit` around `keras.layers.FlaxLayer`, where keras is installed."""

import importlib.util
import os
from typing import Any

import numpy as np
from tables import watched
from workloads import LEARNING_RATE, Workload


def keras_is_there() -> bool:
    """Whether keras can be imported."""
    return importlib.util.find_spec("keras") is not None


def import_keras() -> Any:
    """Returns keras on its JAX backend."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    return keras


class KerasFit:
    """(c) `fit`, `evaluate` and `predict` of a Keras model that is one FlaxLayer.

    Args:
      workload: what is trained.
      steps_per_execution: as `keras.Model.compile` takes it.
    """

    def __init__(self, workload: Workload, steps_per_execution: int = 1) -> None:
        keras = import_keras()
        self._workload = workload
        shape, dtype = workload.x.shape[1:], str(workload.x.dtype)
        inputs = keras.Input(shape=shape, dtype=dtype)
        # Without variables= the layer wants TensorFlow.
        layer = keras.layers.FlaxLayer(workload.module, variables=workload.variables)
        self._model = keras.Model(inputs, layer(inputs))
        if workload.metric == "mae":
            loss, metric = keras.losses.MeanSquaredError(), "mae"
        else:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            metric = keras.metrics.SparseCategoricalAccuracy()
        self._model.compile(
            # optax's epsilon; Keras's own is 1e-7.
            optimizer=keras.optimizers.Adam(LEARNING_RATE, epsilon=1e-8),
            loss=loss,
            metrics=[metric],
            steps_per_execution=steps_per_execution,
        )

    def train(self, epochs: int, *, shuffle: bool = True) -> tuple[float, float]:
        """Trains on; returns the mean loss and metric of the last epoch."""
        workload = self._workload
        with watched():
            history = self._model.fit(
                workload.x,
                workload.y,
                batch_size=workload.batch_size,
                epochs=epochs,
                shuffle=shuffle,
                verbose=1,
            )
        loss, metric = (values[-1] for values in _sorted(history.history))
        return float(loss), float(metric)

    def evaluate(self) -> tuple[float, float]:
        """Returns the mean loss and metric over the training data."""
        workload = self._workload
        with watched():
            logs = self._model.evaluate(
                workload.x,
                workload.y,
                batch_size=workload.batch_size,
                verbose=1,
                return_dict=True,
            )
        loss, metric = _sorted(logs)
        return float(loss), float(metric)

    def predict(self) -> np.ndarray:
        """Returns the outputs for the training inputs."""
        batch_size = self._workload.batch_size
        with watched():
            return self._model.predict(
                self._workload.x, batch_size=batch_size, verbose=1
            )


def _sorted(logs: dict[str, Any]) -> tuple[Any, Any]:
    (metric,) = (values for name, values in logs.items() if name != "loss")
    return logs["loss"], metric
