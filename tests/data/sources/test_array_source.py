"""Arrays as a source: order, tail, split, weights."""

import warnings

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from helpers.data import labeled
from helpers.models import Linear
from helpers.sources import as_inputs_source, as_source, as_whole

from flaxfit import Trainer
from flaxfit._core.errors import DataError
from flaxfit._core.types import Batch, CallSpec
from flaxfit.data.binding.binding import Binding
from flaxfit.data.sources.array_source import split_validation

ONE = Binding(CallSpec(("x",), (), ("x",)))
TWO = Binding(CallSpec(("a", "b"), (), ("a", "b")))
X = np.arange(20, dtype=np.float32).reshape(10, 2)
Y = np.arange(10, dtype=np.int32)


def rows(source, index=0):
    return [batch.targets.tolist() for batch in source.batches(index)]


def test_batches_in_order_with_a_filled_tail():
    source = as_source(X, Y, binding=ONE, batch_size=4)
    assert rows(source) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    weights = [batch.weights.tolist() for batch in source.batches(0)]
    assert weights == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    for batch in source.batches(0):
        np.testing.assert_array_equal(batch.inputs[0], X[batch.targets])
        assert batch.weights.dtype == np.float32
    assert (source.kind, source.one_shot) == ("arrays", False)
    assert (source.num_batches, source.num_examples, source.batch_size) == (3, 10, 4)
    np.testing.assert_array_equal(source.example.targets, [0, 1, 2, 3])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rows", [4, 5])
def test_batches_are_copies(rows, shuffle):
    weights = np.ones(10, np.float32)
    source = as_source(X, Y, weights, binding=ONE, batch_size=rows, shuffle=shuffle)
    for batch in (source.example, *source.batches(0)):
        assert not np.shares_memory(batch.inputs[0], X)
        assert not np.shares_memory(batch.targets, Y)
        assert not np.shares_memory(batch.weights, weights)


def test_a_batch_size_asked_for_is_at_most_the_number_of_examples():
    """As otherwise a batch would hold rows twice, and BatchNorm count them twice."""
    for size in ({"batch_size": 8}, {}):
        for source in (
            as_source(X[:3], Y[:3], binding=ONE, **size),
            as_inputs_source(X[:3], binding=ONE, **size),
        ):
            assert (source.batch_size, source.num_batches) == (3, 1)
            assert [b.weights.tolist() for b in source.batches(0)] == [[1, 1, 1]]


def test_a_batch_size_compiled_for_before_stays_and_rows_wrap_around():
    source = as_source(X[:3], Y[:3], binding=ONE, default_batch_size=8)
    assert rows(source) == [[0, 1, 2, 0, 1, 2, 0, 1]]
    assert source.example.weights.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    inputs = as_inputs_source(X[:3], binding=ONE, default_batch_size=8)
    assert inputs.batch_size == 8


def test_no_pad_leaves_the_tail_short():
    source = as_source(X, Y, binding=ONE, batch_size=4)
    source.pad = False
    assert [len(batch) for batch in rows(source)] == [4, 4, 2]
    assert [b.weights.tolist() for b in source.batches(0)][2] == [1, 1]


def test_shuffle_is_a_permutation_by_seed_and_pass():
    def order(seed, index):
        source = as_source(X, Y, binding=ONE, batch_size=4, shuffle=True, seed=seed)
        batches = list(source.batches(index))
        for batch in batches:
            np.testing.assert_array_equal(batch.inputs[0], X[batch.targets])
        real = [b.targets[b.weights > 0] for b in batches]
        # The fill is the first rows of the same order.
        assert batches[2].targets[2:].tolist() == batches[0].targets[:2].tolist()
        return np.concatenate(real).tolist()

    orders = [order((0, 1), 0), order((0, 1), 1), order((0, 2), 0)]
    assert all(sorted(each) == Y.tolist() for each in orders)
    assert len(set(map(tuple, orders))) == 3
    assert order((0, 1), 1) == orders[1]
    expected = np.random.default_rng(np.random.SeedSequence([0, 1, 1])).permutation(10)
    assert orders[1] == expected.tolist()


@pytest.mark.parametrize(
    "data",
    [
        ((X, Y),),
        ([X, Y],),
        ({"x": X, "y": Y},),
        ({"image": X, "label": Y},),
        (X.tolist(), Y.tolist()),
        (jnp.asarray(X), jnp.asarray(Y)),
        (X.astype(np.float64), Y.astype(np.int64)),
        (pd.DataFrame(X, columns=["a", "b"]), pd.Series(Y)),
        (Batch((X,), Y, None),),
    ],
)
def test_every_way_to_say_the_same(data):
    source = as_source(*data, binding=ONE, batch_size=10)
    batch = source.example
    inputs = batch.inputs["x"] if isinstance(batch.inputs, dict) else batch.inputs[0]
    np.testing.assert_array_equal(inputs, X)
    np.testing.assert_array_equal(batch.targets, Y)
    assert (inputs.dtype, batch.targets.dtype) == (np.float32, np.int32)
    assert type(inputs) is np.ndarray


def test_several_inputs_and_targets():
    source = as_source((X, Y), {"p": Y, "q": X}, binding=TWO, batch_size=10)
    assert [part.shape for part in source.example.inputs] == [(10, 2), (10,)]
    assert sorted(source.example.targets) == ["p", "q"]
    nested = as_source(((X, Y), Y), binding=TWO, batch_size=10)
    assert len(nested.example.inputs) == 2


def test_the_default_batch_size():
    many = np.zeros((40, 2), np.float32)
    assert as_source(many, many, binding=ONE).batch_size == 32
    assert as_source(X, Y, binding=ONE, default_batch_size=3).batch_size == 3
    assert as_inputs_source(X, binding=ONE, default_batch_size=3).batch_size == 3


def test_uint8_stays():
    assert as_source(X.astype(np.uint8), Y, binding=ONE).example.inputs[0].dtype == (
        np.uint8
    )


def test_mapped_files_are_narrowed_batch_by_batch(tmp_path):
    np.save(tmp_path / "x.npy", X.astype(np.float64))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    source = as_source(mapped, Y, binding=ONE, batch_size=4, shuffle=True)
    assert isinstance(source._leaves[0], np.memmap)
    for batch in source.batches(0):
        assert batch.inputs[0].dtype == np.float32
        np.testing.assert_array_equal(batch.inputs[0], X[batch.targets])
    assert as_whole(mapped, Y, binding=ONE).batch.inputs[0].dtype == np.float32


def test_arrays_that_are_not_contiguous():
    source = as_source(X.T.copy().T, Y, binding=ONE, batch_size=4, shuffle=True)
    for batch in source.batches(0):
        np.testing.assert_array_equal(batch.inputs[0], X[batch.targets])


def test_sample_weights_and_the_mask_of_the_fill():
    weights = np.arange(10.0)
    source = as_source(X, Y, weights, binding=ONE, batch_size=8)
    last = list(source.batches(0))[1]
    assert last.weights.tolist() == [8, 9, 0, 0, 0, 0, 0, 0]
    assert last.weights.dtype == np.float32
    tokens = np.tile(Y[:, None], (1, 3))
    source = as_source(X, tokens, np.ones((10, 3)), binding=ONE, batch_size=8)
    last = list(source.batches(0))[1]
    assert last.weights.sum(axis=1).tolist() == [3, 3, 0, 0, 0, 0, 0, 0]
    data = as_source({"x": X, "y": Y}, sample_weight=weights, binding=ONE)
    assert data.example.weights[:10].tolist() == weights.tolist()


@pytest.mark.parametrize(
    "targets",
    [
        np.array([0, 1, 2, 1]),
        np.array([[0], [1], [2], [1]]),
        np.array([0.0, 1.0, 2.0, 1.0]),
        np.eye(3)[[0, 1, 2, 1]],
        np.eye(3, dtype=np.int32)[[0, 1, 2, 1]],
        {"only": np.array([0, 1, 2, 1])},
    ],
)
def test_class_weight(targets):
    weight = {1: 5.0, 0: 0.5, 7: 3}
    batch = as_whole(X[:4], targets, binding=ONE, class_weight=weight).batch
    assert batch.weights.tolist() == [0.5, 5, 1, 5]
    assert batch.weights.dtype == np.float32


def test_class_weight_of_pictures_of_two_classes():
    masks = np.array([[[0, 1], [1, 1]]])
    batch = as_whole(X[:1], masks, binding=ONE, class_weight={1: 5.0}).batch
    assert batch.weights.tolist() == [[[1, 5], [5, 5]]]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.array([[0.0, 1, 1], [1, 0, 0]]), "float32.*not all rows are one-hot"),
        (np.array([[0, 1, 1], [1, 0, 0]]), r"int32\[2,3\].*several labels.*np\.where"),
        (np.array([[False, True, True], [True, False, False]]), "not all rows are"),
        (np.array([[0.8, 0.2], [0.1, 0.9]]), r"weights\[y\.argmax\(-1\)\]"),
        (np.array([[0.0, 2.0], [1.0, 1.0]]), r"classes y\.astype\('int32'\)"),
    ],
)
def test_class_weight_refuses_rows_of_several_labels(targets, message):
    with pytest.raises(ValueError, match=message):
        as_source(X[:2], targets, binding=ONE, class_weight={1: 5.0})


def test_class_weight_per_token():
    tokens = np.array([[0, 1, 1], [2, -1, 0]])
    weight = {1: 5.0, 0: 0.5}
    batch = as_whole(X[:2], tokens, binding=ONE, class_weight=weight).batch
    assert batch.weights.tolist() == [[0.5, 5, 5], [1, 1, 0.5]]


@pytest.mark.parametrize(
    ("targets", "weight", "arguments", "message"),
    [
        (Y, {"cat": 1.0}, {}, r"class_weight key='cat'.*a whole number"),
        (Y, {1.5: 1.0}, {}, "key=1.5"),
        (Y, {1: -1.0}, {}, r"class_weight\[1\]=-1.0"),
        (Y, {1: "a"}, {}, r"class_weight\[1\]='a'"),
        (Y, [1.0], {}, r"class_weight=\[1.0\]: expected a dict"),
        (Y, {}, {}, "expected a dict"),
        (Y + 0.5, {1: 2.0}, {}, "values such as 0.5.*sample_weight"),
        ((Y, Y), {1: 2.0}, {}, "exactly one target, but there are 2"),
        (None, {1: 2.0}, {}, "exactly one target, but there are 0"),
        (Y, {1: 2.0}, {"sample_weight": Y}, "both class_weight and sample weights"),
    ],
)
def test_class_weight_refuses(targets, weight, arguments, message):
    with pytest.raises(ValueError, match=message):
        as_source(X, targets, **arguments, binding=ONE, class_weight=weight)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"y": Y[:4]}, DataError, "different length: x: 10, y: 4"),
        ({"y": Y, "sample_weight": Y[:3]}, DataError, "x: 10, y: 10, weights: 3"),
        ({"y": Y, "sample_weight": X}, DataError, r"weights have shape \(10, 2\), y"),
        ({"y": Y, "sample_weight": {"a": Y}}, DataError, "weights are a dict"),
        ({"y": Y, "sample_weight": 0 * Y}, DataError, "all zero"),
        ({"y": Y, "sample_weight": -Y}, DataError, "weights hold -1.0 at row 1"),
        ({"y": Y, "batch_size": 0}, ValueError, "batch_size=0. Expected a whole"),
        ({"y": Y, "batch_size": True}, ValueError, "batch_size=True"),
        ({"y": Y, "batch_size": 2.0}, ValueError, "batch_size=2.0"),
        ({"y": list("abcdefghij")}, DataError, "y has dtype <U1"),
        ({"y": Y + np.int64(2**40)}, DataError, "y is int64"),
    ],
)
def test_as_source_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        as_source(X, **arguments, binding=ONE)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (X * np.nan, DataError, "x holds nan at row 0"),
        (X[:0], DataError, r"no examples: x has shape \(0, 2\)"),
        ([], DataError, "no examples"),
        (None, TypeError, r"fit\(None\) gives no data"),
        (3, TypeError, "Unsupported data type int. Supported: arrays"),
        ((X, iter([Y])), TypeError, "a tuple of ndarray, list_iterator: .*a list"),
        ({"x": 3, "y": iter([Y])}, TypeError, "a dict of int, list_iterator"),
        ((), TypeError, "a tuple of nothing"),
        (pd.DataFrame({"a": ["p", "q"]}), DataError, "the column 'a' is text"),
        ({"image": X, "idx": Y, "label": Y}, DataError, "has the keys image, idx"),
        ([X, Y, Y, Y], DataError, r"a list of 4 items: .*np\.stack"),
    ],
)
def test_as_source_refuses_data(data, error, message):
    with pytest.raises(error, match=message):
        as_source(data, binding=ONE)


def test_weights_are_given_once():
    with pytest.raises(ValueError, match="sample_weight is given twice"):
        as_source((X, Y, Y), sample_weight=Y, binding=ONE)
    with pytest.raises(ValueError, match="a Batch contains its y"):
        as_source(Batch((X,), Y, None), Y, binding=ONE)


def test_a_first_batch_of_weight_zero_is_fine():
    weights = (Y >= 8).astype(float)
    assert as_source(X, Y, weights, binding=ONE, batch_size=4).example is not None


def test_check_sees_all_rows_and_only_when_asked():
    seen = []
    source = as_source(X, Y, binding=ONE, batch_size=4)
    rows(source)
    assert seen == []
    source.check(seen.append)
    assert [batch.targets.tolist() for batch in seen] == [Y.tolist()]
    assert seen[0].weights.tolist() == [1] * 10


def test_split_validation_takes_the_last_part():
    data = Batch((X,), np.array([0, 1] * 5), None)
    train, validation = split_validation(data, 0.25)
    assert (len(train.targets), len(validation.targets)) == (7, 3)
    np.testing.assert_array_equal(validation.inputs[0], X[7:])
    assert train.weights is None
    assert as_source(train, binding=ONE).num_examples == 7


@pytest.mark.parametrize("labels", [Y, Y[::-1], Y.astype(np.uint8), Y[:, None]])
def test_split_validation_warns_of_sorted_labels(labels):
    with pytest.warns(UserWarning, match=r"y is sorted: .* fit\(x\[order\], y\[order"):
        split_validation(Batch((X,), labels, None), 0.5)


@pytest.mark.parametrize("labels", [0 * Y, Y + 0.5, Y % 3, None])
def test_split_validation_is_silent_otherwise(labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_validation(Batch((X,), labels, None), 0.5)


@pytest.mark.parametrize("fraction", [0, 1, 1.5, -0.1, True, "a", 0.99999, None])
def test_split_validation_refuses(fraction):
    with pytest.raises(ValueError, match=r"validation_split=.*validation_data="):
        split_validation(Batch((X[:1],), Y[:1], None), fraction)


@pytest.mark.parametrize(
    ("binding", "x", "shapes"),
    [
        (ONE, X, [(10, 2)]),
        (ONE, (X,), [(10, 2)]),
        (ONE, (X, Y), [(10, 2)]),
        (ONE, (X, Y, Y), [(10, 2)]),
        (ONE, {"image": X, "label": Y}, [(10, 2)]),
        (ONE, {"image": X}, [(10, 2)]),
        (TWO, (X, Y), [(10, 2), (10,)]),
        (TWO, [X, Y], [(10, 2), (10,)]),
        (TWO, ((X, Y), Y), [(10, 2), (10,)]),
        (Binding(ONE.call, inputs=lambda raw: raw[0]), (X, Y), [(10, 2)]),
    ],
)
def test_as_inputs_source(binding, x, shapes):
    source = as_inputs_source(x, binding=binding, batch_size=10)
    assert [part.shape for part in source.example.inputs] == shapes
    assert source.example.targets is None


def test_predict_ignores_weights_and_takes_nan():
    source = as_inputs_source((X * np.nan, Y, 0 * Y), binding=ONE, batch_size=8)
    assert [b.weights.sum() for b in source.batches(0)] == [8, 2]


def test_predict_of_a_dict_the_model_takes_as_one():
    source = as_inputs_source({"p": X, "q": X}, binding=ONE, batch_size=4)
    assert sorted(source.example.inputs[0]) == ["p", "q"]


def test_predict_refuses_a_list_of_examples():
    with pytest.raises(DataError, match=r"list of 10 arrays .* np.stack"):
        as_inputs_source(list(X), binding=ONE)


def test_as_batch_is_whole_and_has_weights():
    batch = as_whole(X, Y, binding=ONE).batch
    assert (len(batch.targets), batch.weights.tolist()) == (10, [1] * 10)
    with pytest.raises(ValueError, match=r"not a dataset.*next\(iter\(dataset\)\)"):
        as_whole([(X, Y)], binding=ONE)


def test_inputs_of_a_function_may_be_lists():
    x, y = labeled(8)
    trainer = Trainer(Linear(), inputs=lambda batch: batch["a"].tolist())
    trainer.fit({"a": x, "label": y}, batch_size=4, shuffle=False, verbose=0)
    same = Trainer(Linear())
    same.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    assert np.array_equal(trainer.predict({"a": x}), same.predict(x))
