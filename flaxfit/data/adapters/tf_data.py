"""Adapts `tf.data` datasets, without importing TensorFlow."""

from typing import Any

import jax

from flaxfit._core.errors import DataError, caller
from flaxfit._core.lazy_types import comes_from
from flaxfit.data.datasets.example_dataset import ExampleSet
from flaxfit.data.datasets.stream import DatasetInfo, Stream
from flaxfit.data.host.arrays import call_text

_ENDLESS = -1
_LINES = (
    ("RaggedTensorSpec", "ragged", "x.to_tensor()"),
    ("SparseTensorSpec", "sparse", "tf.sparse.to_dense(x)"),
)


def matches(x: Any) -> bool:
    """Whether `x` is a `tf.data.Dataset`."""
    return comes_from(x, "tensorflow", "DatasetV2", "DatasetV1")


def adapt(x: Any) -> Stream | ExampleSet:
    """Returns a dataset as batches, or as single examples if it is not batched.

    Raises:
      DataError: elements that are not dense tensors.
    """
    spec = x.element_spec
    leaves = jax.tree.leaves(spec)
    _check(leaves)
    number = int(x.cardinality())
    length = number if number >= 0 else None
    rest: Any = {
        "endless": number == _ENDLESS,
        "info": DatasetInfo(keys=tuple(spec) if isinstance(spec, dict) else ()),
    }

    def read(*unused: int) -> Any:
        return x.as_numpy_iterator()

    if _is_batched(leaves):
        return Stream("tf.data.Dataset", read, length, **rest)
    return ExampleSet("tf.data.Dataset", length, iterate=read, **rest)


def _check(leaves: list[Any]) -> None:
    for leaf in leaves:
        kind = type(leaf).__name__
        for name, word, line in _LINES:
            if kind == name:
                raise DataError(
                    f"the tf.data.Dataset given to {caller()} has {word} tensors, not "
                    f"arrays. Write dataset.map(lambda x, y: ({line}, y))."
                )
        if not hasattr(leaf, "shape"):
            raise DataError(
                f"the tf.data.Dataset given to {caller()} has elements with a {kind}: "
                "expected tensors, (x, y) or a dict. For windows write dataset = "
                "dataset.flat_map(lambda w: w.batch(size)), then "
                f"{call_text('dataset.batch(32)')}."
            )


def _is_batched(leaves: list[Any]) -> bool:
    """Whether elements are batches: all tensors have a first axis of the same length.

    Unknown lengths count as the same.
    """
    shapes = [leaf.shape for leaf in leaves if leaf.shape.rank is not None]
    if any(shape.rank == 0 for shape in shapes):
        return False
    return len({shape[0] for shape in shapes if shape[0] is not None}) <= 1
