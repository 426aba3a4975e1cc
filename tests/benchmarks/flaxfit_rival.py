"""`Trainer(model).fit` as a user writes it, with its progress bar."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tables import watched
from workloads import LEARNING_RATE, Workload

from flaxfit import Callback, Trainer


class FlaxfitFit:
    """flaxfit's `fit`, `evaluate` and `predict`.

    Args:
      workload: what is trained.
      own_init: whether the trainer initializes the variables itself.
      callbacks: for every `fit`.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        own_init: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self._workload = workload
        self._callbacks = list(callbacks)
        self.trainer = Trainer(
            workload.module,
            metrics=[workload.metric],
            learning_rate=LEARNING_RATE,
            variables=None if own_init else workload.variables,
        )

    def train(self, epochs: int, *, shuffle: bool = True) -> tuple[float, float]:
        """Trains on; returns the mean loss and metric of the last epoch."""
        workload = self._workload
        with watched():
            history = self.trainer.fit(
                workload.x,
                workload.y,
                batch_size=workload.batch_size,
                epochs=epochs,
                shuffle=shuffle,
                callbacks=self._callbacks,
                verbose=1,
            )
        return _pair({name: last[-1] for name, last in history.history.items()})

    def evaluate(self) -> tuple[float, float]:
        """Returns the mean loss and metric over the training data."""
        x, y = self._workload.x, self._workload.y
        with watched():
            return _pair(
                self.trainer.evaluate(
                    x, y, batch_size=self._workload.batch_size, verbose=1
                )
            )

    def predict(self) -> np.ndarray:
        """Returns the outputs for the training inputs."""
        x = self._workload.x
        with watched():
            return self.trainer.predict(
                x, batch_size=self._workload.batch_size, verbose=1
            )


def _pair(logs: dict[str, Any]) -> tuple[float, float]:
    metrics = [v for k, v in logs.items() if k not in ("loss", "learning_rate")]
    return logs["loss"], metrics[0]
