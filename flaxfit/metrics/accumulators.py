"""Accumulators beyond a mean: functions of a mean, confusion counts, the ROC curve.

They work on weights and counts, without models, losses or names.
"""

from collections.abc import Callable
from typing import Literal, Self, TypeAlias

import flax.struct
import jax.numpy as jnp

from flaxfit._core.types import Array, Average

Measure: TypeAlias = Literal["precision", "recall", "f1"]

# 2 x 8192 bins: 0.17 % wide for large scores, 3e-5 around 0, up to 16384.
_BINS = 8192
_LINEAR = 2.0**-6
_LARGEST = 2.0**14


class FunctionOfMean(flax.struct.PyTreeNode):
    """A function of a mean: the root of an error, the exponential of an entropy.

    Attributes:
      mean: the mean.
      function: applied to the value of the mean.
    """

    mean: Average
    function: Callable[[Array], Array] = flax.struct.field(pytree_node=False)

    def merge(self, other: Self) -> Self:
        """Returns both together."""
        return self.replace(mean=self.mean.merge(other.mean))

    def compute(self) -> Array:
        """Returns the function of the mean."""
        return self.function(self.mean.compute())


class ClassRatio(flax.struct.PyTreeNode):
    """Precision, recall or F1 of every class, averaged over the classes seen.

    A class is seen if it was a target or a decision. A ratio without examples is 0,
    as with scikit-learn's `zero_division=0`.

    Attributes:
      ratio: `float32[classes]` in each field: the weight in `total` is correct, out of
        the weight in `count`.
      seen: `bool[classes]`.
    """

    ratio: Average
    seen: Array

    @classmethod
    def of(
        cls, measure: Measure, hits: Array, decided: Array, actual: Array, seen: Array
    ) -> Self:
        """Makes the ratios from weights summed per class, `float32[classes]` each.

        `hits` are the correct decisions for the class, `decided` all decisions for it,
        `actual` all targets of the class.
        """
        total, count = {
            "precision": (hits, decided),
            "recall": (hits, actual),
            "f1": (2 * hits, decided + actual),
        }[measure]
        return cls(Average.sums(total, count), seen)

    def merge(self, other: Self) -> Self:
        """Returns both together."""
        return type(self)(self.ratio.merge(other.ratio), self.seen | other.seen)

    def compute(self) -> Array:
        """Returns the mean over the classes seen, NaN if none was seen."""
        ratios = jnp.where(self.ratio.count > 0, self.ratio.compute(), 0.0)
        return jnp.sum(jnp.where(self.seen, ratios, 0.0)) / jnp.sum(self.seen)


def binary_ratio(
    measure: Measure, decisions: Array, targets: Array, weights: Array
) -> ClassRatio:
    """Counts decisions for the positive class.

    Decisions and targets are `bool[batch, ...]`, weights `float32` of that shape.
    """

    def total(chosen: Array) -> Array:
        return jnp.sum(jnp.where(chosen, weights, 0.0)).reshape(1)

    return ClassRatio.of(
        measure,
        total(decisions & targets),
        total(decisions),
        total(targets),
        jnp.any(weights != 0).reshape(1),
    )


def class_ratio(
    measure: Measure, decisions: Array, targets: Array, weights: Array, classes: int
) -> ClassRatio:
    """Counts decisions for every class.

    Decisions and targets are `int[batch, ...]`, weights `float32` of that shape.
    """
    decisions, targets, weights = map(jnp.ravel, (decisions, targets, weights))

    def total(chosen: Array, weights: Array) -> Array:
        # An ignored label may be out of range; its weight is 0.
        inside = jnp.clip(chosen, 0, classes - 1)
        return jnp.zeros(classes, jnp.float32).at[inside].add(weights)

    decided, actual = total(decisions, weights), total(targets, weights)
    hits = total(targets, jnp.where(decisions == targets, weights, 0.0))
    return ClassRatio.of(measure, hits, decided, actual, decided + actual > 0)


class RocCurve(flax.struct.PyTreeNode):
    """Weights of negatives and positives by score, for the area under the ROC curve.

    Scores are counted in bins. Near 0 all bins are equally wide; further out their
    width is proportional to the score, so the scale of logits hardly matters.

    Attributes:
      counts: `float32[bins]` in each field: `total` positives, `count` negatives.
    """

    counts: Average

    @classmethod
    def of(cls, scores: Array, targets: Array, weights: Array) -> Self:
        """Counts a batch: `float[batch, ...]` scores, higher for positives.

        Targets are `bool`, weights `float32`, both of the same shape.
        """
        scores, targets, weights = map(jnp.ravel, (scores, targets, weights))
        size = jnp.log2(1 + jnp.minimum(jnp.abs(scores), _LARGEST) / _LINEAR)
        scaled = size * ((_BINS - 1) / jnp.log2(1 + _LARGEST / _LINEAR))
        bins = _BINS + jnp.floor(jnp.sign(scores) * scaled).astype(jnp.int32)
        bins = jnp.clip(bins, 0, 2 * _BINS - 1)
        lost = jnp.any(jnp.isnan(scores) & (weights != 0))

        def histogram(weights: Array) -> Array:
            empty = jnp.zeros(2 * _BINS, jnp.float32)
            # A score of NaN has no rank, so the area becomes NaN.
            return empty.at[bins].add(weights) + jnp.where(lost, jnp.nan, 0.0)

        positives = histogram(jnp.where(targets, weights, 0.0))
        negatives = histogram(jnp.where(targets, 0.0, weights))
        return cls(Average.sums(positives, negatives))

    def merge(self, other: Self) -> Self:
        """Returns both together."""
        return type(self)(self.counts.merge(other.counts))

    def compute(self) -> Array:
        """Returns the area, ties counted half; NaN without both classes.

        The area is the probability that a positive scores above a negative,
        https://en.wikipedia.org/wiki/Receiver_operating_characteristic.
        """
        positives = self.counts.total + self.counts.total_residual
        negatives = self.counts.count + self.counts.count_residual
        below = jnp.cumsum(negatives) - 0.5 * negatives
        pairs = jnp.sum(positives) * jnp.sum(negatives)
        return jnp.sum(positives * below) / pairs
