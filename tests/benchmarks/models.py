"""The modules that are trained: plain Flax, nothing in them knows its trainer.

The flag is called `training`, the one name that `keras.layers.FlaxLayer` sets.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class TinyMLP(nn.Module):
    """4-8-1: all overhead, no computing."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(1)(nn.relu(nn.Dense(8)(x)))


class BatchNormMLP(nn.Module):
    """784-128-10 with BatchNorm."""

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        x = nn.Dense(128, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not training, momentum=0.9)(x)
        return nn.Dense(10)(nn.relu(x))


class DigitsCNN(nn.Module):
    """Two convolutions with BatchNorm, and a dense layer with Dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        for features in (32, 64):
            x = nn.Conv(features, kernel_size=(3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not training, momentum=0.9)(x)
            x = nn.max_pool(nn.relu(x), window_shape=(2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(rate=0.5, deterministic=not training)(x)
        return nn.Dense(10)(x)


class TransformerLM(nn.Module):
    """A causal language model: `int32[batch, context]` -> logits of the next token."""

    vocabulary: int
    width: int = 128
    layers: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        context = tokens.shape[1]
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (1, context, self.width)
        )
        x = nn.Embed(self.vocabulary, self.width)(tokens) + positions
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads)(h, mask=mask)
            h = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(h)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


class Bottleneck(nn.Module):
    """The block of ResNet-50."""

    features: int
    stride: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.stride, self.stride)
        y = nn.relu(self.norm()(self.conv(self.features, (1, 1))(x)))
        y = self.conv(self.features, (3, 3), strides)(y)
        y = nn.relu(self.norm()(y))
        y = self.conv(4 * self.features, (1, 1))(y)
        y = self.norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = self.norm()(self.conv(4 * self.features, (1, 1), strides)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """ResNet-50 in bfloat16, parameters in float32; reads `uint8` images."""

    features: int = 64
    blocks: tuple[int, ...] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, images: jax.Array, training: bool) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not training,
            momentum=0.9,
            dtype=jnp.bfloat16,
        )
        x = images.astype(jnp.bfloat16) / 255
        x = nn.relu(norm()(conv(self.features, (7, 7), (2, 2))(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(self.features * 2**stage, stride, conv, norm)(x)
        return nn.Dense(1000)(x.mean(axis=(1, 2)).astype(jnp.float32))
