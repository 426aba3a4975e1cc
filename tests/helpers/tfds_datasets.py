"""TFDS datasets of scikit-learn's data, prepared without network and TensorFlow."""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Of the digits, in their order.
SIZES = {"train": 300, "validation": 40, "test": 60}


def digits(split):
    """The digits of a split as arrays, `uint8[n, 8, 8, 1]` and `int64[n]`, in order."""
    images, labels = load_digits(return_X_y=True)
    images = (images * 15).astype(np.uint8).reshape(-1, 8, 8, 1)
    sizes = list(SIZES.values())
    first = sum(sizes[: list(SIZES).index(split)])
    rows = slice(first, first + SIZES[split])
    return images[rows], labels[rows]


class FewDigits(tfds.core.GeneratorBasedBuilder):
    """Pictures, class names, text that is not trained on, and three splits."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(names=NAMES),
                    "id": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SIZES}

    def _generate_examples(self, split):
        for number, (image, label) in enumerate(zip(*digits(split), strict=True)):
            # A Pillow image: TFDS needs TensorFlow to write an array as PNG.
            picture = Image.fromarray(image[..., 0])
            example = {"image": picture, "label": int(label), "id": f"digit {number}"}
            yield number, example


class FewPatients(tfds.core.GeneratorBasedBuilder):
    """Two configs, two inputs, and names that no one but the dataset knows."""

    VERSION = tfds.core.Version("2.1.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name="small", description="64 patients"),
        tfds.core.BuilderConfig(name="large", description="128 patients"),
    ]

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "mean": tfds.features.Tensor(shape=(10,), dtype=np.float32),
                    "worst": tfds.features.Tensor(shape=(10,), dtype=np.float32),
                    "benign": tfds.features.ClassLabel(num_classes=2),
                }
            ),
            supervised_keys=(("mean", "worst"), "benign"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        x, y = load_breast_cancer(return_X_y=True)
        x = (x / x.max(axis=0)).astype(np.float32)
        for row in range(64 if self.builder_config.name == "small" else 128):
            example = {"mean": x[row, :10], "worst": x[row, 20:], "benign": int(y[row])}
            yield row, example


def prepare_all(data_dir):
    """Prepares all of them in a folder."""
    for builder in (
        FewDigits(data_dir=data_dir),
        FewPatients(data_dir=data_dir, config="small"),
        FewPatients(data_dir=data_dir, config="large"),
    ):
        builder.download_and_prepare(file_format="array_record")
