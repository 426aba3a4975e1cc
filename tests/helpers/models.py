"""Models that several tests train. Special ones stand beside their tests."""

import flax.linen as nn


class Linear(nn.Module):
    """One dense layer over an input named `x`, for three classes."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


class DropoutNet(nn.Module):
    """An RNG stream and no collection."""

    @nn.compact
    def __call__(self, x, train: bool):
        return nn.Dense(3)(nn.Dropout(0.2, deterministic=not train)(x))


class Net(nn.Module):
    """A collection, batch statistics, and an RNG stream unless `dropout` is 0."""

    dropout: float = 0.2

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return nn.Dense(3)(x)
