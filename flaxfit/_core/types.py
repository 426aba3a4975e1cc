"""The types that steps take and return: state, batch, model, accumulators."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flaxfit._core.arrays import append_axes, copy_array

Array: TypeAlias = jax.Array
HostArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
PyTree: TypeAlias = Any
Inputs: TypeAlias = tuple[Any, ...] | dict[str, Any]
"""The inputs of a model: a tuple by position, or a dict by name."""


class TrainState(flax.struct.PyTreeNode):
    """Everything training changes, and nothing else: arrays only.

    Attributes:
      step: `int32[]`, the number of finished optimizer steps.
      params: the model's parameters.
      collections: Flax's mutable collections that are carried from step to step,
        by name, e.g. `{"batch_stats": {...}}`. Empty for a model without any.
      opt_state: the optax optimizer's state.
      rng: the typed PRNG key every random stream is derived from. It never
        changes: a stream's key is a function of `rng`, its name and `step`.
    """

    step: Array
    params: PyTree
    collections: dict[str, PyTree]
    opt_state: PyTree
    rng: Array


class Batch(flax.struct.PyTreeNode):
    """One batch of fixed shape.

    Attributes:
      inputs: a tuple (positional) or dict (by name), as the model is called.
      targets: any nesting of arrays `[batch, ...]`, or None.
      weights: the sample weights, `float32[batch]` or, for weights of single elements
        of the targets, `float32[batch, ...]`; 0 for rows that pad the batch.
    """

    inputs: Inputs
    targets: PyTree
    weights: Any


class CallSpec(NamedTuple):
    """The inputs a model's call takes, without its train flag.

    Attributes:
      positional: names that can be given by position, in order.
      keyword_only: names that can only be given by name.
      required: the names without a default.
      var_positional: whether it takes `*args`.
      var_keyword: whether it takes `**kwargs`.
    """

    positional: tuple[str, ...] = ("inputs",)
    keyword_only: tuple[str, ...] = ()
    required: tuple[str, ...] = ("inputs",)
    var_positional: bool = False
    var_keyword: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All names, positional ones first."""
        return self.positional + self.keyword_only


class Apply(Protocol):
    """A model's forward pass, pure."""

    def __call__(
        self,
        params: PyTree,
        collections: dict[str, PyTree],
        inputs: Inputs,
        *,
        train: bool,
        rngs: Mapping[str, Array],
    ) -> tuple[PyTree, dict[str, PyTree], dict[str, PyTree]]:
        """Returns `(outputs, collections, sown)`."""


class Model(NamedTuple):
    """A model as two pure functions; write one to train a model that is not Flax's.

    Attributes:
      init: `(rng, inputs) -> (params, collections)`.
      apply: see `Apply`.
    """

    init: Callable[[Array, Inputs], tuple[PyTree, dict[str, PyTree]]]
    apply: Apply


class Accumulator(Protocol):
    """The value of a log on the device: merged over batches, computed once."""

    def merge(self, other: Self) -> Self:
        """Returns the accumulator of the data of both."""

    def compute(self) -> Any:
        """Returns the value as a scalar."""


Logs: TypeAlias = dict[str, Any]
"""Name -> `Average`, `Sum` or any other `Accumulator`."""


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Returns `a + b` and its rounding error (Knuth, TAOCP vol. 2, 4.2.2)."""
    total = a + b
    b_virtual = total - a
    return total, (a - (total - b_virtual)) + (b - b_virtual)


def _add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Adds two sums, each with its rounding error."""
    total, error = _two_sum(a[0], b[0])
    # The error would be infinity minus infinity; the total already shows the overflow.
    error = jnp.where(jnp.isfinite(total), a[1] + b[1] + error, 0.0)
    # The residual must stay small, or it would lose digits itself.
    total, error = _two_sum(total, error)
    return total, jnp.where(jnp.isfinite(total), error, 0.0)


class Average(flax.struct.PyTreeNode):
    """A weighted mean that is merged without losing small addends.

    Attributes:
      total: `float32[]`, the sum of weight times value.
      count: `float32[]`, the sum of the weights.
      total_residual: `float32[]`, the rounding error of `total`, so that millions of
        batches of one example still add up.
      count_residual: `float32[]`, the same for `count`.
    """

    total: Array
    count: Array
    total_residual: Array
    count_residual: Array

    @classmethod
    def empty(cls) -> Self:
        """Returns an empty average; `compute()` is NaN."""
        zero = jnp.zeros((), jnp.float32)
        return cls.sums(zero, zero)

    @classmethod
    def sums(cls, total: Array, count: Array) -> Self:
        """Returns the mean `total / count` of exact sums."""
        return cls(total, count, jnp.zeros_like(total), jnp.zeros_like(count))

    @classmethod
    def of(cls, values: Array, weights: Array) -> Self:
        """Averages `values` with `weights` spread over their trailing axes.

        Args:
          values: `float[batch, ...]`.
          weights: `float[batch]` up to `float[batch, ...]`: the leading axes equal
            those of `values`, and each weight counts for every element below it.

        Elements of weight 0 are left out, even if their value is NaN.
        """
        values = values.astype(jnp.float32)
        weights = weights.astype(jnp.float32)
        spread = jnp.broadcast_to(append_axes(weights, values.ndim), values.shape)
        kept = jnp.where(spread == 0, 0, values)
        return cls.sums(jnp.sum(spread * kept), jnp.sum(spread))

    def merge(self, other: Self) -> Self:
        """Returns the mean over both."""
        total, total_residual = _add(
            (self.total, self.total_residual), (other.total, other.total_residual)
        )
        count, count_residual = _add(
            (self.count, self.count_residual), (other.count, other.count_residual)
        )
        return type(self)(total, count, total_residual, count_residual)

    def compute(self) -> Array:
        """Returns `total / count`, NaN if nothing was counted."""
        total = self.total + self.total_residual
        return total / (self.count + self.count_residual)


class Sum(flax.struct.PyTreeNode):
    """The sum of several means, each with its own count."""

    terms: dict[str, Average]

    def merge(self, other: Self) -> Self:
        """Merges term by term."""
        return type(self)(
            {name: term.merge(other.terms[name]) for name, term in self.terms.items()}
        )

    def compute(self) -> Array:
        """Returns the sum of the terms' means; a term that counted nothing is 0."""
        means = [
            (t.total + t.total_residual) / (t.count + t.count_residual + (t.count == 0))
            for t in self.terms.values()
        ]
        return sum(means[1:], start=means[0])


def copy_state(state: TrainState) -> TrainState:
    """Returns the same values in new buffers on the same devices."""
    copied: TrainState = jax.tree.map(copy_array, state)
    return copied
