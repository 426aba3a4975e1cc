"""`tf.data` datasets, real ones where TensorFlow is there, and ones made by hand."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
from helpers.models import Linear
from helpers.sources import as_inputs_source, as_source

from flaxfit import Trainer
from flaxfit._core.errors import DataError
from flaxfit._core.types import CallSpec
from flaxfit.data.adapters.tf_data import matches
from flaxfit.data.binding.binding import Binding

BINDING = Binding(CallSpec(("x",), (), ("x",)))
ROWS = 10
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
Y = (np.arange(ROWS) % 3).astype(np.int32)


# ------------------------------------------------- what looks like TensorFlow's classes


class TensorShape(list):
    @property
    def rank(self):
        return len(self)


class TensorSpec(NamedTuple):
    shape: list
    ragged: bool = False


class DatasetV2:
    """As much of a `tf.data.Dataset` as is used of it, of a list of elements."""

    def __init__(self, elements, spec=None, cardinality=None):
        self.elements = elements
        self.element_spec = spec
        self.number = len(elements) if cardinality is None else cardinality

    def cardinality(self):
        return np.int64(self.number)

    def as_numpy_iterator(self):
        return iter(self.elements)


DatasetV2.__module__ = "tensorflow.python.data.ops.dataset_ops"


class _BatchDataset(DatasetV2):
    """Its class is never the public one."""


class Spec:
    def __init__(self, *shape):
        self.shape = TensorShape(shape)


class RaggedTensorSpec(Spec):
    pass


class SparseTensorSpec(Spec):
    pass


class DatasetSpec:
    pass


def batches(sizes=(4, 4, 2)):
    ends = np.cumsum(sizes)
    return [
        (X[end - size : end], Y[end - size : end])
        for size, end in zip(sizes, ends, strict=True)
    ]


def by_hand(**arguments):
    return _BatchDataset(batches(), (Spec(None, 3), Spec(None)), **arguments)


# ------------------------------------------------------------------- the real thing


def real(tf):
    return tf.data.Dataset.from_tensor_slices((X, Y))


def source_of(x, **arguments):
    return as_source(x, binding=BINDING, **arguments)


def rows(source, index=0):
    return [
        batch.targets[batch.weights > 0].tolist() for batch in source.batches(index)
    ]


def fit(x, y=None, **arguments):
    trainer = Trainer(Linear(), seed=1)
    history = trainer.fit(x, y, epochs=2, verbose=0, shuffle=False, **arguments)
    return history.history, jax.tree.map(np.asarray, trainer.state.params)


@pytest.fixture(params=["by hand", "real"])
def make(request):
    """Makes `(dataset in batches, single examples)`."""
    if request.param == "by hand":
        examples = list(zip(X, Y, strict=True))
        return by_hand(), _BatchDataset(examples, (Spec(3), Spec()))
    tf = pytest.importorskip("tensorflow")
    return real(tf).batch(4), real(tf)


def test_a_dataset_trains_as_arrays_do(make):
    batched, single = make
    source = source_of(batched)
    assert (source.kind, source.num_batches) == ("tf.data.Dataset", 3)
    expected = [Y[:4].tolist(), Y[4:8].tolist(), Y[8:].tolist()]
    assert rows(source) == rows(source, 1) == rows(source, 2) == expected
    arrays = fit(X, Y, batch_size=4)
    jax.tree.map(np.testing.assert_array_equal, fit(batched), arrays)
    jax.tree.map(np.testing.assert_array_equal, fit(single, batch_size=4), arrays)


def test_single_examples_are_put_into_batches(make):
    batched, single = make
    source = source_of(single, batch_size=4)
    assert (source.num_batches, source.num_examples) == (3, ROWS)
    assert rows(source) == rows(source, 1) == rows(source_of(batched))
    assert source_of(single).batch_size == ROWS  # 32, of which there are 10
    with pytest.raises(ValueError, match=r"batch_size=8 is given, but .*of its own"):
        source_of(batched, batch_size=8)


def test_predict(make):
    batched, single = make
    for source in (
        as_inputs_source(batched, binding=BINDING),
        as_inputs_source(single, binding=BINDING, batch_size=4),
    ):
        found = [batch.inputs[0][batch.weights > 0] for batch in source.batches(0)]
        np.testing.assert_array_equal(np.concatenate(found), X)


def test_lengths():
    assert source_of(by_hand(cardinality=-2)).num_batches is None
    endless = by_hand(cardinality=-1)
    with pytest.raises(DataError, match="steps_per_epoch"):
        source_of(endless)
    source = source_of(endless, steps=2)
    assert source.num_batches is None
    single = _BatchDataset([(X[0], Y[0])], (Spec(3), Spec()), cardinality=-1)
    with pytest.raises(DataError, match="steps_per_epoch"):
        source_of(single, batch_size=2)


@pytest.mark.parametrize(
    ("spec", "batched"),
    [
        ({"x": Spec(None, 3), "y": Spec(None)}, True),
        ({"x": Spec(4, 3), "y": Spec(4)}, True),
        ({"x": Spec(4, 3), "y": Spec(None)}, True),
        ({"x": Spec(3), "y": Spec()}, False),
        ({"x": Spec(3), "y": Spec(2)}, False),
    ],
)
def test_batches_are_told_from_examples(spec, batched):
    element = {"x": X[:4], "y": Y[:4]} if batched else {"x": X[0], "y": Y[0]}
    if not batched and spec["y"].shape:
        element["y"] = Y[:2]
    source = source_of(_BatchDataset([element, element], spec), steps=1)
    assert len(source.example.weights) == (4 if batched else 2)
    assert source.info.keys == ("x", "y")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            RaggedTensorSpec(None, None),
            r"has ragged tensors, .*\(x\.to_tensor\(\), y\)",
        ),
        (SparseTensorSpec(None, 3), r"has sparse tensors, .*tf\.sparse\.to_dense"),
        (DatasetSpec(), r"elements with a DatasetSpec: .*dataset\.flat_map"),
    ],
)
def test_elements_that_are_no_arrays(spec, message):
    with pytest.raises(DataError, match=message):
        source_of(_BatchDataset([], (spec, Spec(None))))


def test_an_empty_dataset():
    with pytest.raises(DataError, match=r"no batches: the tf\.data\.Dataset given to"):
        source_of(_BatchDataset([], (Spec(None, 3), Spec(None))))
    with pytest.raises(DataError, match=r"no (examples|batches): the tf\.data\.Data"):
        source_of(_BatchDataset([], (Spec(3), Spec())))


def test_others_are_not_recognized():
    class Mine:
        pass

    Mine.__name__ = "DatasetV2"
    assert not matches(Mine())
    assert not matches(np.ones(3))


# ---------------------------------------------------------------- with TensorFlow alone


def test_what_tensorflow_says_of_its_datasets():
    tf = pytest.importorskip("tensorflow")
    dataset = real(tf)
    with pytest.raises(DataError, match="steps_per_epoch"):
        source_of(dataset.batch(4).repeat())
    endless = source_of(dataset.batch(5).repeat(), steps=2).batches(0)
    assert [next(endless).targets[0] for _ in range(3)] == [Y[0], Y[5], Y[0]]
    unknown = dataset.filter(lambda x, y: y != 1).batch(4)
    source = source_of(unknown)
    assert source.num_batches is None
    assert np.concatenate(rows(source)).tolist() == Y[Y != 1].tolist()
    shuffled = source_of(dataset.shuffle(ROWS, seed=3).batch(4, drop_remainder=True))
    assert shuffled.num_batches == 2
    assert rows(shuffled, 1) != rows(shuffled, 2)
    fields = dataset.map(lambda x, y: {"x": x, "label": y, "text": "unused"}).batch(4)
    source = source_of(fields)
    assert source.info.unused == ("text",)
    assert set(source.info.keys) == {"label", "text", "x"}
    ragged = tf.data.Dataset.from_tensor_slices(tf.ragged.constant([[1], [2, 3]]))
    with pytest.raises(DataError, match=r"x\.to_tensor"):
        source_of(ragged.batch(2))
    sparse = tf.data.Dataset.from_tensor_slices(tf.sparse.from_dense(X)).batch(2)
    with pytest.raises(DataError, match=r"to_dense"):
        source_of(sparse)
    with pytest.raises(DataError, match=r"flat_map"):
        source_of(tf.data.Dataset.range(10).window(2))
    half = dataset.map(lambda x, y: (tf.cast(x, tf.bfloat16), y)).batch(4)
    assert str(source_of(half).example.inputs[0].dtype) == "bfloat16"


def test_tensors_are_arrays():
    tf = pytest.importorskip("tensorflow")
    ours = fit(tf.constant(X), tf.constant(Y), batch_size=4)
    jax.tree.map(np.testing.assert_array_equal, ours, fit(X, Y, batch_size=4))
