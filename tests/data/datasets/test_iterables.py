"""Loaders, lists of batches, generators and iterators as a source."""

import dataclasses
import gc
import itertools
from collections import OrderedDict
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sources import as_inputs_source, as_source

from flaxfit import Trainer
from flaxfit._core.errors import DataError
from flaxfit._core.types import CallSpec
from flaxfit.data import Examples
from flaxfit.data.binding.binding import Binding
from flaxfit.data.datasets.iterables import from_iterable
from flaxfit.data.host.arrays import copy_host_arrays

ONE = Binding(CallSpec(("x",), (), ("x",)))
X = np.arange(20, dtype=np.float32).reshape(10, 2)
Y = np.arange(10, dtype=np.int32)


def make_batches(sizes=(4, 4, 2)):
    start = 0
    for size in sizes:
        yield X[start : start + size], Y[start : start + size]
        start += size


def torch_like(array):
    """Something else that shares its memory, as torch's tensors do."""

    class Tensor:
        def __array__(self, dtype=None, copy=None):
            return array[:]

    return Tensor()


class Loader:
    """Yields lists, as torch's loader does, and has no useful length."""

    def __iter__(self):
        return map(list, make_batches())

    def __len__(self):
        raise NotImplementedError


class Sequence:
    """Batches by index only, without an IndexError at the end."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return list(make_batches())[index % 3]


def source_of(data, **arguments):
    return as_source(data, **arguments, binding=ONE)


def rows(source, index=0):
    return [batch.targets.tolist() for batch in source.batches(index)]


@pytest.mark.parametrize(
    ("data", "kind", "num_batches"),
    [
        (lambda: make_batches, "generator function", None),
        (Loader, "iterable", None),
        (Sequence, "iterable", 3),
        (lambda: lambda: list(make_batches()), "generator function", None),
        (lambda: Loader, "generator function", None),
        (lambda: list(make_batches()), "iterable", 3),
        (lambda: [{"x": x, "y": y} for x, y in make_batches()], "iterable", 3),
    ],
)
def test_kinds_and_every_pass_equal(data, kind, num_batches):
    source = source_of(data())
    assert (source.kind, source.num_batches) == (kind, num_batches)
    assert (source.one_shot, source.batch_size) == (False, 4)
    assert source.num_examples is None
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 8, 9]]
    assert rows(source) == rows(source, 1) == expected
    last = list(source.batches(2))[-1]
    assert last.weights.tolist() == [1, 1, 0, 0]
    assert source.example.targets.tolist() == [0, 1, 2, 3]


def test_looking_ahead_loses_nothing_and_reads_one_batch():
    read = []

    def noting():
        for number in range(3):
            read.append(number)
            yield X[:4] + number, Y[:4]

    source = source_of(noting())
    assert read == [0]
    assert [b.inputs[0][0, 0] for b in source.batches(0)] == [0, 1, 2]
    assert read == [0, 1, 2]
    assert (source.kind, source.one_shot) == ("iterator", True)


def test_an_expensive_function_is_called_once_per_pass():
    calls = []

    def function():
        calls.append(1)
        return make_batches()

    source = source_of(function)
    rows(source), rows(source, 1)
    assert len(calls) == 2


def test_an_iterator_goes_on_where_it_was_and_then_says_what_to_write():
    source = source_of(make_batches())
    first = source.batches(0)
    assert next(first).targets.tolist() == [0, 1, 2, 3]
    del first
    gc.collect()
    assert rows(source, 1) == [[4, 5, 6, 7], [8, 9, 8, 9]]
    with pytest.raises(
        DataError,
        match=r"used up, after 3 batches in all, .* "
        r"fit\(make_batches\) not fit\(make_batches\(\)\)",
    ):
        rows(source, 2)


def test_an_iterator_that_ends_before_the_steps_asked_for():
    """Also where every reading starts at pass 0, as validation does."""
    source = source_of(make_batches(), steps=2, name="validation_data")
    assert len(list(itertools.islice(source.batches(0), 2))) == 2
    second = source.batches(0)
    assert next(second).targets[:2].tolist() == [8, 9]
    text = "validation_data is used up, after 3 batches .*2 steps were asked for"
    with pytest.raises(DataError, match=text):
        next(second)


def test_errors_name_the_pass_even_if_every_reading_starts_at_0():
    passes = iter([4, 4, 3])
    source = source_of(lambda: iter([(X[:4], Y[:4]), (X[:4], Y[: next(passes)])]))
    rows(source, 0), rows(source, 0)
    with pytest.raises(DataError, match="batch 1 of pass 2: arrays of different"):
        rows(source, 0)


@pytest.mark.parametrize("wrap", [lambda x: x, torch_like])
def test_a_loader_may_use_its_memory_again(wrap):
    def reuse():
        x, y = np.empty((2, 2), np.float32), np.empty(2, np.int32)
        weights = np.empty(2, np.float32)
        for start in range(0, 10, 2):
            x[:], y[:], weights[:] = X[start : start + 2], Y[start : start + 2], start
            weights += 1
            yield wrap(x), wrap(y), weights

    source = source_of(reuse)
    assert source.reuses_buffers
    batches = [copy_host_arrays(batch) for batch in source.batches(0)]
    np.testing.assert_array_equal(np.concatenate([b.inputs[0] for b in batches]), X)
    np.testing.assert_array_equal(np.concatenate([b.targets for b in batches]), Y)
    assert [b.weights[0] for b in batches] == [1, 3, 5, 7, 9]


def test_what_is_held_until_the_first_pass_is_copied():
    """Also what `inputs` returns."""
    buffer = X[:4].copy()
    binding = Binding(ONE.call, inputs=lambda raw: torch_like(raw[0]))
    source = as_source([(buffer, Y[:4])] * 2, binding=binding)
    assert not np.shares_memory(source.example.inputs[0], buffer)
    assert not np.shares_memory(next(source.batches(0)).inputs[0], buffer)


@pytest.mark.parametrize("rows", [2, 200_000])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_steps_read_what_a_loader_held_when_it_was_asked(prefetch, rows):
    """Stacked, alone for their size, and without a thread."""
    x, y = np.empty((rows, 3), np.float32), np.empty(rows, np.float32)

    def reuse():
        for number in range(5):
            x[:], y[:] = number, 10 * number
            yield x, y

    class Sum(nn.Module):
        @nn.compact
        def __call__(self, x):
            bias = self.param("bias", nn.initializers.zeros, ())
            return x[:, 0] + 0 * bias

    trainer = Trainer(Sum(), loss="mse", optimizer="sgd", prefetch=prefetch)
    loss = trainer.fit(reuse, verbose=0).history["loss"][0]
    assert loss == pytest.approx(81 * np.mean(np.arange(5) ** 2))
    outputs = trainer.predict(reuse, verbose=0)
    np.testing.assert_array_equal(outputs, np.repeat(np.arange(5), rows))


def test_arrays_on_a_device_go_on_as_they_are():
    def batches():
        for x, y in make_batches():
            yield jnp.asarray(x), jnp.asarray(y), jnp.ones(len(y))

    source = source_of(batches)
    first, second, third = source.batches(0)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(source.example))
    for batch in (first, second, third):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch))
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(batch))
    assert third.targets.tolist() == [8, 9, 8, 9]
    assert third.weights.tolist() == [1, 1, 0, 0]


def test_arrays_committed_to_a_device_come_to_the_host():
    """Or every program would be compiled anew for them, or run where they are."""
    x = jax.device_put(X[:4], jax.devices()[1])
    weak = jnp.full((4, 2), 1.0)
    assert weak.weak_type
    batches = list(source_of([(x, Y[:4]), (x, Y[:4]), (weak, Y[:4])]).batches(0))
    assert type(batches[1].inputs[0]) is np.ndarray
    assert not batches[2].inputs[0].weak_type


def test_what_is_on_the_host_is_checked_beside_what_is_on_a_device():
    seen = []

    def check(batch):
        assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(batch))
        seen.append((batch.inputs[0][0, 0], batch.targets[0]))

    def batches():
        yield X[:4], Y[:4]
        yield jnp.asarray(X[4:8]), Y[4:8]
        yield X[8:], jnp.asarray(Y[8:])

    source = source_of(batches)
    source.check(check)
    assert seen.pop() == (0, 0)
    rows(source)
    assert seen == [(0, 0), (0, 4), (16, 0)]


def test_an_iterable_that_is_empty_the_second_time():
    class Once:
        batches = make_batches()

        def __iter__(self):
            return map(tuple, self.batches)

    source = source_of(Once())
    rows(source)
    with pytest.raises(
        DataError, match=r"no batches in pass 1: the iterable .*repeatedly"
    ):
        rows(source, 1)


def test_a_function_that_returns_one_iterator():
    iterator = make_batches()
    source = source_of(lambda: iterator)
    rows(source)
    with pytest.raises(DataError, match=r"function .* make a new iterable each time"):
        rows(source, 1)


def test_an_iterator_with_nothing_but_next():
    class Endless:
        def __next__(self):
            return X[:4], Y[:4]

    source = source_of(Endless())
    batches = source.batches(0)
    assert source.one_shot
    assert len([next(batches) for _ in range(3)]) == 3


def test_a_loader_that_is_its_own_iterator_anew_each_time():
    class Resetting:
        def __iter__(self):
            return make_batches()

        def __next__(self):
            raise NotImplementedError

    source = source_of(Resetting())
    assert (source.one_shot, rows(source) == rows(source, 1)) == (False, True)


def test_a_builtin_without_signature_is_called():
    with pytest.raises(TypeError, match=r"iter expected|at least 1|required") as caught:
        source_of(iter)
    assert caught.value


def test_a_nesting_that_differs_without_a_name_that_does():
    binding = Binding(CallSpec(("a", "b"), (), ("a",)))
    source = as_source([((X,), Y), ({"a": X}, Y)], binding=binding)
    with pytest.raises(DataError, match=r"x is missing, was .*x/a is float32"):
        rows(source)
    source = as_source([(X, (Y, Y)), (X, [Y, Y])], binding=ONE)
    with pytest.raises(DataError, match=r"the nesting is PyTreeDef.*\[.*, was .*\("):
        list(source.batches(0))


@pytest.mark.parametrize("data", [iter([]), lambda: iter([])])
def test_no_batches(data):
    with pytest.raises(DataError, match=r"no batches: the .* given to fit yielded"):
        source_of(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: (X, Y), r"returned a tuple; .* fit\(x, y\)"),
        (lambda: 3, "returned a int"),
        (
            lambda n: make_batches(),
            r"requires arguments .*Write lambda: <lambda>\(\.\.\.\)",
        ),
    ],
)
def test_functions_that_do_not_fit(data, message):
    with pytest.raises(TypeError, match=message):
        source_of(data)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            (X[:4, :1], Y[:4]),
            r"batch 1 of pass 0 differs .*x is float32\[batch,1\], "
            r"was float32\[batch,2\]",
        ),
        ((X[:4].astype(np.float16), Y[:4]), r"x is float16\[batch,2\], was float32"),
        ((X[:4],), r"y is missing, was int32\[batch\]"),
        ((X[:4], Y[:4], Y[:4] + 1.0), None),
        ((X[:4], Y[:4], X[:4]), r"batch 1 of pass 0: weights have shape \(4, 2\)"),
        (((X[:4], X[:4]), Y[:4]), r"x is missing, was float32.*|x/0 is float32"),
        ((X[:4], Y[:3]), "batch 1 of pass 0: arrays of different length: x: 4, y: 3"),
        ((X[:0], Y[:0]), "batch 1 of pass 0: no examples"),
        ((X[0], 3), "batch 1 of pass 0: y is a single value"),
        ((X[:4], Y[:4] + np.int64(2**40)), "batch 1 of pass 0: y is int64 and holds"),
    ],
)
def test_later_batches_that_differ(second, message):
    source = source_of([(X[:4], Y[:4]), second])
    if message is None:
        assert len(rows(source)) == 2
        return
    with pytest.raises(DataError, match=message):
        rows(source)


def test_wider_dtypes_count_as_equal():
    source = source_of([(X[:4], Y[:4]), (X[:4].astype(float), Y[:4].astype(int))])
    batches = list(source.batches(0))
    assert batches[1].inputs[0].dtype == np.float32
    assert batches[1].targets.dtype == np.int32


@pytest.mark.parametrize("first", [(X[0], 3), {"x": X[0], "y": 3}])
def test_single_examples_are_named(first):
    with pytest.raises(
        DataError,
        match=r"batch 0 of pass 0: y is a single value.*fit\(dataset, batch_size=32\)",
    ):
        source_of(lambda: iter([first, first]))


def test_a_larger_batch_warns_once_and_then_sets_the_size():
    source = source_of(lambda: make_batches((2, 3, 4, 1)))
    with pytest.warns(UserWarning, match="batch 1 of pass 0 has 3 rows, .* had 2") as w:
        sizes = [len(batch) for batch in rows(source)]
    assert (sizes, len(w)) == ([2, 3, 4, 4], 1)
    assert source.batch_size == 4
    assert [len(batch) for batch in rows(source, 1)] == [4, 4, 4, 4]


def test_no_pad_leaves_sizes_alone():
    source = source_of(lambda: make_batches((2, 4, 1)))
    source.pad = False
    assert [len(batch) for batch in rows(source)] == [2, 4, 1]


def test_errors_of_the_loader_pass_through_with_a_note():
    def broken():
        yield X[:4], Y[:4]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone") as caught:
        rows(source_of(broken), 0)
    assert caught.value.__notes__ == ["while reading batch 1 of pass 0"]

    def unopened():
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file") as caught:
        source_of(unopened)
    assert caught.value.__notes__ == ["while starting pass 0 over the data"]

    binding = Binding(ONE.call, inputs=lambda raw: raw["missing"])
    with pytest.raises(KeyError) as caught_key:
        as_source([{"x": X, "y": Y}], binding=binding)
    assert caught_key.value.__notes__ == ["while reading batch 0 of pass 0"]


def test_check_is_called_with_real_rows_of_every_batch():
    seen = []

    def check(batch):
        seen.append(len(batch.targets))
        if batch.targets.max() > 8:
            raise DataError("targets hold 9")

    source = source_of(make_batches)
    source.check(check)
    assert seen.pop() == 4
    with pytest.raises(DataError, match="batch 2 of pass 0: targets hold 9"):
        rows(source)
    assert seen == [4, 4, 2]


def test_class_weight_holds_every_batch_to_what_the_first_was():
    one_hot = np.eye(3, dtype=np.int32)[[0, 1, 2, 1]]
    several = np.array([[0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]])
    source = source_of([(X[:4], one_hot), (X[:4], several)], class_weight={1: 5.0})
    with pytest.raises(
        ValueError, match=r"one-hot targets, as in the first batch, but row 1"
    ):
        list(source.batches(0))
    # Classes by place, of which a later batch looks one-hot by chance.
    tokens = np.array([[0, 2, 1], [1, 1, 0], [0, 0, 1], [0, 0, 1]])
    source = source_of([(X[:4], tokens), (X[:4], one_hot)], class_weight={1: 5.0})
    _, second = source.batches(0)
    assert second.weights.tolist() == np.where(one_hot == 1, 5, 1).tolist()


def test_class_weight_for_every_batch():
    source = source_of(make_batches, class_weight={9: 3.0})
    assert [b.weights.tolist() for b in source.batches(0)][2] == [1, 3, 0, 0]


def test_values_of_the_first_batch_are_checked():
    with pytest.raises(DataError, match="x holds nan at row 0"):
        source_of([(X * np.nan, Y)])
    with pytest.raises(DataError, match="all zero"):
        source_of([(X, Y, 0 * Y)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": Y}, "y is given together with a generator"),
        ({"sample_weight": Y}, "sample_weight is given together with a generator"),
        ({"batch_size": 4}, r"batch_size=4 is given, but .* write fit\(dataset\)"),
    ],
)
def test_arguments_of_arrays_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        source_of(make_batches(), **arguments)


@pytest.mark.parametrize(
    "batches",
    [
        [X[:4], X[4:8], X[8:]],
        [(X[:4],), (X[4:8],), (X[8:],)],
        list(make_batches()),
        [{"image": x, "label": y} for x, y in make_batches()],
    ],
)
def test_streams_for_predict(batches):
    source = as_inputs_source(iter(batches), binding=ONE)
    read = list(source.batches(0))
    assert [b.weights.sum() for b in read] == [4, 4, 2]
    np.testing.assert_array_equal(
        np.concatenate([b.inputs[0][b.weights > 0] for b in read]), X
    )
    assert all(b.targets is None for b in read)


def test_predict_refuses_a_batch_size_for_streams():
    with pytest.raises(ValueError, match=r"batch_size=4.*predict\(dataset\)"):
        as_inputs_source(iter([X]), binding=ONE, batch_size=4)


# ------------------------------------------------------------------- single examples


class Pair(NamedTuple):
    x: Any
    y: Any


class OneBuffer:
    """Examples that are all made in one place."""

    def __init__(self, kind):
        self._buffer = np.empty(2, np.float32)
        self._kind = kind

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        self._buffer[:] = X[index]
        return self._kind(self._buffer, index)


KINDS_OF_PAIRS = [
    lambda x, y: (x, y),
    Pair,
    lambda x, y: {"x": x, "y": y},
    lambda x, y: OrderedDict(x=x, y=y),
]


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("kind", KINDS_OF_PAIRS)
def test_examples_may_come_in_the_same_memory_again(kind, threads):
    one_buffer = OneBuffer(kind)
    for items in (lambda: map(one_buffer.__getitem__, range(10)), one_buffer):
        examples = Examples(items, lambda item: item, threads=threads)
        batches = list(source_of(examples, batch_size=5).batches(0))
        found = np.concatenate([b.inputs[0] for b in batches])
        np.testing.assert_array_equal(found, X)


def test_a_function_may_fill_the_same_memory_again():
    buffer = np.empty(2, np.float32)

    def load(item):
        buffer[:] = X[item]
        return buffer, item

    batches = list(source_of(Examples(range(10), load), batch_size=5).batches(0))
    np.testing.assert_array_equal(np.concatenate([b.inputs[0] for b in batches]), X)


@pytest.mark.parametrize(
    "rows",
    [
        [(1.0, 3.0), (2.0, 2.5)],
        [{"x": 1.0, "y": 3.0}, {"x": 2.0, "y": 2.5}],
        [(np.float32(1), 3), (np.float32(2), 2.5)],
        [(1, 3.0), (2, np.float64(2.5))],
    ],
)
def test_examples_of_numbers_of_any_kind(rows):
    for data in (rows, lambda: iter(rows)):
        (batch,) = source_of(data, batch_size=2).batches(0)
        assert batch.inputs[0].tolist() == [1, 2]
        assert batch.targets.tolist() == [3, 2.5]


class Shuffled:
    """Batches by index that Keras's hook shuffles."""

    def __init__(self):
        self._order, self._rng = np.arange(10), np.random.RandomState(0)

    def __len__(self):
        return 5

    def __getitem__(self, index):
        rows = self._order[2 * index : 2 * index + 2]
        return X[rows], Y[rows]

    def on_epoch_end(self):
        self._rng.shuffle(self._order)


def test_what_shuffles_at_the_end_of_an_epoch_is_entered_in_the_middle():
    source = source_of(Shuffled())
    passes = [rows(source, number) for number in range(3)]
    assert passes[0] != passes[1] != passes[2]
    other = source_of(Shuffled())
    assert [b.targets.tolist() for b in other.batches(2, 3)] == passes[2][3:]


def test_what_changes_its_item_leaves_the_arrays_as_they_are():
    x = X.copy()

    def load(item):
        row, label = item
        row += 100
        return row, label

    (batch,) = source_of(Examples((x, Y), load), batch_size=10).batches(0)
    np.testing.assert_array_equal(batch.inputs[0], X + 100)
    np.testing.assert_array_equal(x, X)


# ------------------------------------------------------------------- dataclasses


@flax.struct.dataclass
class Fields:
    """Read by names, as a dict is."""

    label: Any
    x: Any


@dataclasses.dataclass
class Unknown:
    """Of no kind that jax knows."""

    x: Any


@pytest.mark.parametrize(
    "make",
    [
        lambda: [Fields(Y[at : at + 5], X[at : at + 5]) for at in (0, 5)],
        lambda: lambda: (Fields(Y[at : at + 5], X[at : at + 5]) for at in (0, 5)),
        lambda: [Fields(y, x) for x, y in zip(X, Y, strict=True)],
        lambda: Fields(Y, X),
    ],
)
def test_a_dataclass_is_read_by_names(make):
    data = make()
    single = isinstance(data, Fields) or (isinstance(data, list) and len(data) == 10)
    source = source_of(data, batch_size=5 if single else None)
    batches = list(source.batches(0))
    np.testing.assert_array_equal(np.concatenate([b.inputs[0] for b in batches]), X)
    np.testing.assert_array_equal(np.concatenate([b.targets for b in batches]), Y)


def test_a_dataclass_that_jax_does_not_know():
    with pytest.raises(DataError, match=r"give a dict, or.*register_dataclass"):
        source_of([Unknown(X)])


# ------------------------------------------------------------------- what is said


@pytest.mark.parametrize("data", [object(), 5])
def test_what_is_no_data_is_told_what_is(data):
    words = (
        "NumPy", ".npz", "zarr", "HDF5", "pandas", "polars", "pyarrow", "Grain",
        "TensorFlow Datasets", "torch", "Hugging Face", "tf.data", "image_folder",
        "Examples", "Batches", "iterators",
    )  # fmt: skip
    with pytest.raises(TypeError) as caught:
        from_iterable(data)
    assert all(word in str(caught.value) for word in words)


def test_many_lists_are_not_all_named():
    with pytest.raises(DataError, match=r"x/0: 4, x/1: 4.*\.\.\. y: 600\.") as caught:
        source_of(([np.zeros(4)] * 600, np.zeros(600)))
    assert len(str(caught.value)) < 600


def test_single_examples_that_look_like_batches_are_told_a_way_out():
    pairs = [(np.zeros((6, 6, 1)), np.zeros((6, 6), int))] * 4
    with pytest.raises(
        ValueError, match=r"seems to yield batches.*fit\(Examples\(dataset\)\)"
    ):
        source_of(pairs, batch_size=2)
    assert source_of(Examples(pairs), batch_size=2).num_examples == 4
    dataset = iter(pairs)
    with pytest.raises(
        ValueError, match=r"must contain its targets.*np\.asarray\(column\)"
    ):
        as_source(dataset, Y, binding=ONE)


@flax.struct.dataclass
class Inputs:
    """Has no targets, and so is an input."""

    x: Any


def test_a_dataclass_without_targets_is_an_input():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, a, b):
            return nn.Dense(3)(a.x + b.x)

    trainer = Trainer(Two())
    pair = Inputs(X), Inputs(X)
    first = trainer.fit(pair, Y % 3, verbose=0).history
    assert trainer.predict(pair).shape == (10, 3)
    assert Trainer(Two()).fit([*pair], Y % 3, verbose=0).history == first


def test_rows_of_different_length_are_refused_at_once():
    asked = []

    class Counted(np.ndarray):
        def __iter__(self):
            asked.append(1)
            return super().__iter__()

    ragged = np.empty(2, object)
    ragged[:] = [np.zeros(n).view(Counted) for n in (3, 4)]
    with pytest.raises(DataError, match="pad rows of different length"):
        source_of((ragged, np.zeros(2)))
    assert not asked  # no element is looked at


def test_weights_that_a_collate_puts_on_the_device():
    def on_device(examples):
        return tuple(
            jnp.asarray(np.stack(part)) for part in zip(*examples, strict=True)
        )

    items = [(np.ones(3, np.float32), np.float32(i), np.float32(1)) for i in range(3)]
    source = as_source(Examples(items, collate=on_device), binding=ONE, batch_size=2)
    weights = [np.asarray(batch.weights).tolist() for batch in source.batches(0)]
    assert weights == [[1, 1], [1, 0]]
