"""A Dataset and a DataLoader of torch, as you have them, for a model of Flax.

    python examples/torch_loader.py

The data, 1,797 digits of 8 x 8 pixels, comes with scikit-learn: nothing is downloaded.
Training takes a few seconds on two CPU cores.
"""

import argparse

import flax.linen as nn
import numpy as np
from sklearn.datasets import load_digits

from flaxfit import Trainer

try:
    import torch
    from torch.utils.data import DataLoader, Dataset, Subset
except ImportError as error:
    raise SystemExit("This example needs torch: pip install torch") from error

TEST_IMAGES = 360


class Digits(Dataset):
    """`(image, label)` by index, with whatever Python it takes to make one."""

    classes = tuple("0123456789")  # as in torchvision: the reports know them

    def __init__(self, shift: bool):
        self.images, self.labels = load_digits(return_X_y=True)
        self.images = self.images.reshape(-1, 8, 8).astype("float32") / 16.0
        self.shift = shift

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if self.shift:
            step = int(torch.randint(-1, 2, ()))
            image = np.roll(image, step, axis=1)
        return torch.from_numpy(image), self.labels[index]


class MLP(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


def main(seed: int = 0, epochs: int = 15, num_workers: int = 0):
    """Trains, tests; returns the test result."""
    split = len(Digits(shift=False)) - TEST_IMAGES
    train = Subset(Digits(shift=True), range(split))
    test = Subset(Digits(shift=False), range(split, split + TEST_IMAGES))

    # Workers pay off where an item takes milliseconds. They must not be forked, as
    # they would be by default: jax has threads.
    workers = (
        {"multiprocessing_context": "forkserver", "persistent_workers": True}
        if num_workers
        else {}
    )
    loader = DataLoader(
        train, batch_size=64, shuffle=True, num_workers=num_workers, **workers
    )

    # Order and shifts depend on the seed of the trainer alone: two runs are alike, and
    # fit(..., run_dir="run") would continue in the middle of an epoch.
    trainer = Trainer(MLP(), metrics=["accuracy"], seed=seed)
    trainer.fit(loader, epochs=epochs, validation_data=DataLoader(test, batch_size=64))

    # A Dataset will do as well: fit puts it into batches, and shuffles it itself.
    result = trainer.evaluate(test, batch_size=64)
    print(f"\ntest loss {result['loss']:.4f} · test accuracy {result['accuracy']:.2%}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--num-workers", type=int, default=0)
    main(**vars(parser.parse_args()))
