"""Batches that are like the first are read as it was, only faster."""

import jax
import numpy as np
import pytest
from helpers.sources import as_source

from flaxfit._core.errors import DataError
from flaxfit._core.types import Batch, CallSpec
from flaxfit.data.binding.binding import Binding
from flaxfit.data.sources import fast_path
from flaxfit.data.sources.fast_path import learn

ONE = Binding(CallSpec(("x",), (), ("x",)))
X = np.arange(12, dtype=np.float64).reshape(4, 3)
Y = np.arange(4)


def split(raw):
    return ONE.split(raw)


@pytest.mark.parametrize(
    "raw", [(X, Y), (X,), {"x": X, "y": Y}], ids=["xy", "x", "dict"]
)
def test_a_batch_that_is_alike(raw):
    learned = learn(raw, split)
    given = jax.tree.map(lambda leaf: leaf[1:], raw)
    made, slow = learned.make(given), split(given)
    np.testing.assert_array_equal(made.weights, np.ones(3, np.float32))
    (inputs,) = jax.tree.leaves(made.inputs)
    np.testing.assert_array_equal(inputs, X[1:])
    assert inputs.dtype == np.float32 and inputs.flags.owndata
    assert jax.tree.structure(made.replace(weights=None)) == jax.tree.structure(slow)
    if made.targets is not None:
        np.testing.assert_array_equal(made.targets, Y[1:])
        assert made.targets.dtype == np.int32


@pytest.mark.parametrize(
    "other",
    [
        (X.astype(np.float32), Y),
        (X[:, :2], Y),
        (X[..., None], Y),
        (X, Y[:3]),
        (X[:0], Y[:0]),
        (X, Y + 2**40),
        (X, Y, np.ones(4)),
        [X, Y],
        (X.tolist(), Y),
        (jax.numpy.ones((4, 3)), Y),
        (X[0, 0], Y),
    ],
    ids=str,
)
def test_any_other_batch_is_not_made(other):
    assert learn((X, Y), split).make(other) is None


def test_where_nothing_is_learned():
    assert learn((X.tolist(), Y), split) is None
    assert learn((X, Y, np.ones(4)), split) is None
    assert learn((X, Y), lambda raw: Batch((raw[0] * 2,), raw[1], None)) is None


def test_a_stream_reads_by_it_and_falls_back(monkeypatch):
    made = []

    class Counted(fast_path.BatchTemplate):
        def make(self, raw):
            made.append(super().make(raw))
            return made[-1]

    monkeypatch.setattr(fast_path, "BatchTemplate", Counted)
    batches = [(X, Y), (X + 1, Y), [X + 2, Y], (X[:2], Y[:2])]
    found = list(as_source(batches, binding=ONE).batches(0))
    assert [batch is not None for batch in made] == [True, False, True]
    for number, batch in enumerate(found[:3]):
        (inputs,) = jax.tree.leaves(batch.inputs)
        np.testing.assert_array_equal(inputs, X + number)
    assert found[3].weights.tolist() == [1, 1, 0, 0]
    wrong = [(X, Y), (X, Y + 2**40)]
    with pytest.raises(DataError, match=r"batch 1 of pass 0: y is int64 and holds"):
        list(as_source(wrong, binding=ONE).batches(0))


def test_a_function_for_the_inputs_may_look_at_values():
    def chosen(raw):
        return raw["a"] if raw["a"].sum() else raw["b"]

    binding = Binding(ONE.call, inputs=chosen)
    zeros = np.zeros_like(X)
    source = as_source(
        [{"a": X, "b": X + 1}, {"a": zeros, "b": X + 2}], binding=binding
    )
    sums = [float(jax.tree.leaves(b.inputs)[0].sum()) for b in source.batches(0)]
    assert sums == [X.sum(), (X + 2).sum()]


def test_one_array_in_two_places_teaches_nothing():
    """Another batch may have two."""
    x = np.ones((2, 3), np.float32)

    def batches():
        yield x, x
        yield x, x + 4

    second = list(as_source(batches, binding=ONE).batches(0))[1]
    np.testing.assert_array_equal(second.targets, x + 4)
