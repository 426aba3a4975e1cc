"""Handwritten digits as a dataset of TensorFlow Datasets, trained on by its name.

    python examples/tfds_digits.py

The dataset is made of scikit-learn's digits and prepared in a folder, once: nothing is
downloaded, and neither that nor the training needs TensorFlow. With a network
`Trainer(CNN()).fit("mnist")` is all there is to it.
"""

import argparse
import tempfile
from pathlib import Path

import flax.linen as nn
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from flaxfit import Trainer

FOLDER = Path(tempfile.gettempdir()) / "flaxfit_tfds_digits"


# Only the preparation needs this class. It is not registered with TFDS, so that the
# training below reads the dataset as others would: by its name and folder.
class SklearnDigits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Pictures of 8 x 8 pixels and the digit on them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # which would download
        images, labels = load_digits(return_X_y=True)
        images = (images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
        x, x_test, y, y_test = train_test_split(
            images, labels, test_size=0.2, stratify=labels, random_state=0
        )
        return {
            "train": self._generate_examples(x, y),
            "test": self._generate_examples(x_test, y_test),
        }

    def _generate_examples(self, images, labels):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            # As Pillow's image: TFDS has TensorFlow make PNGs of arrays.
            yield number, {"image": Image.fromarray(image), "label": int(label)}


class CNN(nn.Module):
    """Two convolutions, each halving the picture, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, kernel_size=(3, 3))(x))
            x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)  # logits: the loss applies the softmax


def main(data_dir=FOLDER, seed: int = 0, epochs: int = 8):
    """Prepares the dataset, trains and tests; returns the test result."""
    SklearnDigits(data_dir=data_dir).download_and_prepare(file_format="array_record")

    # The dataset says itself what is input and what is target. Its pictures travel as
    # bytes, and become numbers between 0 and 1 on the device.
    trainer = Trainer(CNN(), metrics=["accuracy"], seed=seed)
    trainer.fit(
        "sklearn_digits",
        validation_data="sklearn_digits/test",
        data_dir=data_dir,
        epochs=epochs,
        batch_size=64,
    )

    # Any part of a split can be named: here the second half of the test split.
    part = trainer.evaluate("sklearn_digits/test[50%:]", data_dir=data_dir, verbose=0)
    print(f"half of the test split: accuracy {part['accuracy']:.2%}")

    result = trainer.evaluate("sklearn_digits/test", data_dir=data_dir)
    print(f"\ntest loss {result['loss']:.4f} · test accuracy {result['accuracy']:.2%}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    main(**vars(parser.parse_args()))
