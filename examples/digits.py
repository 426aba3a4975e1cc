"""Handwritten digits: a convolutional network with BatchNorm and Dropout.

    python examples/digits.py

The data, 1,797 images of 8 x 8 pixels, comes with scikit-learn: nothing is
downloaded. Training takes less than a minute on two CPU cores.
"""

import argparse

import flax.linen as nn
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from flaxfit import Trainer


# A module like any other: flaxfit asks nothing of it. It finds by itself that
# BatchNorm keeps running statistics, that Dropout draws random numbers, and that
# `train` tells training from evaluation.
class CNN(nn.Module):
    """Two convolutions, each halving the image, and a dense layer."""

    @nn.compact
    def __call__(self, x, train: bool):
        for features in (32, 64):
            x = nn.Conv(features, kernel_size=(3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
            x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(128)(x))
        x = nn.Dropout(rate=0.5, deterministic=not train)(x)
        return nn.Dense(10)(x)  # logits: the loss applies the softmax


def load_data():
    """Returns `(x, y)` to train on and `(x, y)` to test on."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32") / 16.0
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return (x, y), (x_test, y_test)


def falling_rate(total_steps: int):
    """The learning rate falls from 0.002 to 0 along half a cosine."""
    return optax.cosine_decay_schedule(2e-3, total_steps)


def main(seed: int = 0, epochs: int = 20, plot: str = "digits_history.png"):
    """Trains, tests, plots; returns the test result."""
    (x, y), (x_test, y_test) = load_data()

    # Integer labels and ten outputs: the loss is a softmax cross-entropy. The first
    # two lines that `fit` prints say so, and every choice can be overridden here.
    trainer = Trainer(
        CNN(), metrics=["accuracy"], learning_rate=falling_rate, seed=seed
    )
    print(trainer.summary(x), end="\n\n")

    history = trainer.fit(x, y, epochs=epochs, batch_size=64, validation_split=0.1)

    result = trainer.evaluate(x_test, y_test)
    print(f"\ntest loss {result['loss']:.4f} · test accuracy {result['accuracy']:.2%}")

    # Outputs come back as NumPy arrays, one row per image, in their order.
    guesses = trainer.predict(x_test).argmax(axis=-1)
    wrong = np.flatnonzero(guesses != y_test)
    print(f"{len(wrong)} of {len(y_test)} images are taken for another digit")

    history.plot().savefig(plot, dpi=150)
    print(f"the curves are in {plot}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    main(**vars(parser.parse_args()))
