"""Grain: the same batches as Grain's own, and the same again in mid-pass."""

import json
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

from flaxfit import Trainer
from flaxfit._core.errors import DataError
from flaxfit._core.types import CallSpec
from flaxfit.data import Examples
from flaxfit.data.binding.binding import Binding
from flaxfit.data.open import as_inputs_source, as_source
from flaxfit.data.sources import stream_source

grain = pytest.importorskip("grain")


ONE = Binding(CallSpec(("x",), (), ("x",)))
X = np.arange(22, dtype=np.float32)[:, None]
Y = np.arange(22, dtype=np.int32) % 3


class Pairs:
    """A source of `(x, y)` that counts what is read."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        self.reads += 1
        return X[index], Y[index]


def as_dict(pair):
    return {"x": pair[0], "label": pair[1]}


def jitter(pair, rng):
    return pair[0] + rng.random(dtype=np.float32), pair[1]


def shuffled(pairs=None):
    return grain.MapDataset.source(pairs or Pairs()).seed(5).shuffle()


def in_threads(dataset):
    return dataset.to_iter_dataset(grain.ReadOptions(2, 4))


def loader(pairs=None, *, batch=4, epochs=1):
    return grain.DataLoader(
        data_source=pairs or Pairs(),
        sampler=grain.samplers.IndexSampler(
            22, shuffle=True, seed=3, num_epochs=epochs
        ),
        operations=[grain.transforms.Batch(batch)] if batch else [],
        read_options=grain.ReadOptions(1, 2),
    )


def even(pair):
    return pair[0][0] % 2 == 0


def source_of(data, **arguments):
    return as_source(data, binding=ONE, **arguments)


def rows(batch):
    """The real rows of a batch, by their numbers."""
    return inputs_of(batch)[:, 0].tolist()


def inputs_of(batch):
    (inputs,) = jax.tree.leaves(batch.inputs)
    return inputs[batch.weights > 0]


def passes(source, number=2):
    return [[rows(batch) for batch in source.batches(p)] for p in range(number)]


def chunks(items, size):
    items = [float(item) for item in items]
    return [items[first : first + size] for first in range(0, len(items), size)]


def numbers(dataset, start=0, stop=None):
    """The examples of a MapDataset, as Grain's own repeat() goes on with them."""
    repeated = dataset.repeat(None)
    stop = len(dataset) if stop is None else stop
    return [repeated[index][0][0] for index in range(start, stop)]


# What to make of a source of pairs, and its batches of four in the first two passes.
KINDS = {
    "batches by index": lambda pairs: shuffled(pairs).batch(4),
    "examples by index": lambda pairs: shuffled(pairs),
    "random examples": lambda pairs: shuffled(pairs).random_map(jitter),
    "batches with gaps": lambda pairs: in_threads(shuffled(pairs).filter(even)).batch(
        4
    ),
    "examples with gaps": lambda pairs: shuffled(pairs).filter(even),
    "batches in order": lambda pairs: in_threads(shuffled(pairs)).batch(4),
    "examples in order": lambda pairs: in_threads(shuffled(pairs)),
    "loader of batches": loader,
    "loader of examples": lambda pairs: loader(pairs, batch=0),
    "dicts": lambda pairs: in_threads(shuffled(pairs).map(as_dict)).batch(4),
}


def size_for(kind):
    return {"batch_size": 4} if "examples" in kind else {}


def test_passes_of_a_map_dataset_go_on_as_its_repeat_does():
    every = numbers(shuffled(), 0, 44)
    expected = [chunks(every[:22], 4), chunks(every[22:], 4)]
    assert every[:22] != every[22:]
    for data, size in ((shuffled().batch(4), None), (shuffled(), 4)):
        source = source_of(data, batch_size=size)
        assert passes(source) == expected
        assert (source.num_batches, source.seeks, source.one_shot) == (6, True, False)
        # Evaluations begin anew.
        assert passes(source, 1) == expected[:1]


def test_fit_does_not_shuffle_again():
    source = source_of(shuffled(), batch_size=4, shuffle=True, seed=(3, 0))
    assert passes(source) == passes(source_of(shuffled(), batch_size=4))


def test_examples_get_the_default_batch_size():
    source = source_of(shuffled().repeat(2))
    assert source.batch_size == 32
    assert [len(batch) for batch in passes(source, 1)[0]] == [32, 12]


@pytest.mark.parametrize("kind", [k for k in KINDS if "order" in k or "loader" in k])
def test_passes_of_what_iterates_are_all_the_same(kind):
    source = source_of(KINDS[kind](Pairs()), **size_for(kind))
    first, second = passes(source)
    assert first == second
    assert [len(batch) for batch in first] == [4, 4, 4, 4, 4, 2]
    assert source.num_batches is None


def test_the_first_element_is_not_lost_nor_read_twice():
    pairs = Pairs()
    source = source_of(loader(pairs))
    assert passes(source, 1)[0][0] != []
    assert pairs.reads == 22


def test_what_a_filter_leaves_out():
    dataset = shuffled().filter(even)
    repeated = dataset.repeat(None)
    for number, found in enumerate(passes(source_of(dataset, batch_size=4))):
        part = repeated[number * 22 : (number + 1) * 22]
        left = [pair[0][0] for pair in part if pair is not None]
        assert len(left) == 11
        assert found == chunks(left, 4)


def test_none_in_other_places_is_refused():
    def drop(pair):
        return None if pair[0][0] == 7 else pair

    dataset = grain.MapDataset.source(Pairs()).map(drop)
    for data in (dataset, dataset.map(lambda pair: pair and (X[:4], Y[:4]))):
        with pytest.raises(DataError, match=r"element 7 .* is None.*to_iter_dataset"):
            list(source_of(data).batches(0))


@pytest.mark.parametrize("seconds", [0, 1e9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_source_goes_on_in_mid_pass(kind, seconds, monkeypatch):
    monkeypatch.setattr(stream_source, "_SECONDS_BETWEEN_BOOKMARKS", seconds)

    def batches_from(dataset, start, bookmark):
        source = source_of(dataset, **size_for(kind))
        return list(source.batches(1, start, bookmark))

    source = source_of(KINDS[kind](Pairs()), **size_for(kind))
    whole = list(source.batches(1))
    for _, batch in zip(range(2), source.batches(1), strict=False):
        assert len(batch.weights) == 4
    mark = source.bookmark
    if source.seeks:
        assert mark is None
    else:
        assert mark["number"] == (2 if seconds == 0 else 1)
        if "loader" not in kind:
            json.dumps(mark)  # plain values, for a file; a loader's are bytes

    resumed, skipped = Pairs(), Pairs()
    found = batches_from(KINDS[kind](resumed), 2, mark)
    jax.tree.map(np.testing.assert_array_equal, found, whole[2:])
    expected = batches_from(KINDS[kind](skipped), 2, None)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if not source.seeks and seconds == 0:
        assert resumed.reads < skipped.reads


@pytest.mark.parametrize("how", [{}, {"threads": 2}], ids=str)
def test_examples_in_order_go_on_with_their_own_random_numbers(how, monkeypatch):
    monkeypatch.setattr(stream_source, "_SECONDS_BETWEEN_BOOKMARKS", 0)

    def source():
        examples = Examples(in_threads(shuffled()), jitter, **how)
        return source_of(examples, batch_size=4)

    first = source()
    whole = list(first.batches(0))
    again = first.batches(0)
    for _ in range(3):
        next(again)
    assert first.bookmark["number"] == 3
    found = list(source().batches(0, 3, first.bookmark))
    jax.tree.map(np.testing.assert_array_equal, found, whole[3:])


def test_an_iterator_goes_on_where_another_stood(monkeypatch):
    monkeypatch.setattr(stream_source, "_SECONDS_BETWEEN_BOOKMARKS", 0)
    for make in (lambda: in_threads(shuffled()).batch(4), loader):
        source = source_of(iter(make()), steps=6)
        assert source.one_shot
        taken = source.batches(0)
        first = [rows(next(taken)) for _ in range(3)]
        mark = source.bookmark
        rest = [rows(next(taken)) for _ in range(3)]
        assert [len(batch) for batch in first + rest] == [4, 4, 4, 4, 4, 2]
        resumed = source_of(iter(make()), steps=3).batches(0, 3, mark)
        assert [rows(next(resumed)) for _ in range(3)] == rest
        with pytest.raises(DataError, match="used up"):
            list(source_of(iter(make())).batches(0)), list(source.batches(0))


ENDLESS = {
    "batches by index": lambda: shuffled().batch(4, drop_remainder=True).repeat(),
    "examples by index": lambda: shuffled().repeat(),
    "batches in order": lambda: in_threads(shuffled().repeat()).batch(4),
    "repeated batches": lambda: grain.experimental.RepeatIterDataset(
        in_threads(shuffled()).batch(4)
    ),
    "loader": lambda: loader(epochs=None),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_has_no_end_needs_a_number_of_steps(kind):
    for what, argument in (
        ("fit", "steps_per_epoch"),
        ("validation_data", "validation_steps"),
        ("evaluate", "steps"),
    ):
        with pytest.raises(DataError, match=f"has no end: write {argument}=100"):
            source_of(ENDLESS[kind](), what=what, **size_for(kind))
    with pytest.raises(DataError, match=r"predict has no end: write steps=100"):
        as_inputs_source(ENDLESS[kind](), binding=ONE, **size_for(kind))
    source = source_of(ENDLESS[kind](), steps=3, **size_for(kind))
    taken = source.batches(0)
    found = [row for _ in range(11) for row in rows(next(taken))]
    assert len(set(found[:20])) == 20  # a pass is over before its rows come again
    assert source.num_batches is None


def test_fits_without_an_end():
    def trainer():
        return Trainer(
            nn.Dense(3), loss="softmax_cross_entropy_with_integer_labels", seed=1
        )

    dataset = shuffled()
    repeated = in_threads(dataset.repeat()).batch(4)
    history = trainer().fit(repeated, steps_per_epoch=4, epochs=3, verbose=0)
    rows_taken = [int(number) for number in numbers(dataset, 0, 48)]
    by_hand = trainer().fit(
        [(X[rows_taken[i : i + 4]], Y[rows_taken[i : i + 4]]) for i in range(0, 48, 4)],
        steps_per_epoch=4,
        epochs=3,
        verbose=0,
    )
    assert history.history["loss"] == by_hand.history["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_fit_evaluate_and_predict_are_those_of_the_same_arrays(kind):
    weight = {0: 1.0, 1: 2.0, 2: 0.5}

    def run(data, **options):
        trainer = Trainer(
            nn.Dense(3), loss="softmax_cross_entropy_with_integer_labels", seed=1
        )
        options |= {"epochs": 1, "verbose": 0, "class_weight": weight}
        trainer.fit(data, shuffle=False, **options)
        return trainer

    dataset = KINDS[kind](Pairs())
    source = source_of(dataset, **size_for(kind))
    inputs, targets = [], []
    for batch in source.batches(0):
        inputs.append(inputs_of(batch))
        targets.append(batch.targets[batch.weights > 0])
    x, y = np.concatenate(inputs), np.concatenate(targets)
    own, arrays = run(dataset, **size_for(kind)), run((x, y), batch_size=4)
    jax.tree.map(np.testing.assert_array_equal, own.state.params, arrays.state.params)
    found = own.evaluate(dataset, **size_for(kind), verbose=0)
    expected = arrays.evaluate(x, y, batch_size=4, verbose=0)
    assert found == expected
    outputs = own.predict(dataset, **size_for(kind))
    np.testing.assert_array_equal(outputs, arrays.predict(x, batch_size=4))


def test_a_split_has_no_example_on_both_sides():
    trainer = Trainer(nn.Dense(3), loss="softmax_cross_entropy_with_integer_labels")
    history = trainer.fit(
        shuffled(), validation_split=0.25, epochs=2, batch_size=4, verbose=0
    )
    assert len(history.history["val_loss"]) == 2
    whole = [int(number) for number in numbers(shuffled())]
    from flaxfit.data.adapters.registry import adapt

    examples = adapt(shuffled(), what="fit")
    train, validation = examples.part(0, 16), examples.part(16, 22)
    for pass_index in range(3):
        source = source_of(train, batch_size=4, shuffle=True)
        taken = [row for b in source.batches(pass_index) for row in rows(b)]
        assert sorted(taken) == sorted(whole[:16])
        assert taken != whole[:16]
        held = source_of(validation, batch_size=4).batches(pass_index)
        assert [row for batch in held for row in rows(batch)] == whole[16:]


def test_lengths_of_its_examples():
    def ragged(pair):
        return {"x": np.zeros((int(pair[0][0]) % 6 + 1, 2), np.float32)}

    dataset = shuffled().map(ragged)
    lengths = np.array([len(dataset[index]["x"]) for index in range(22)])
    examples = Examples(dataset, pad_to=[3, 6], lengths=lengths)
    source = as_inputs_source(examples, binding=ONE, batch_size=4)
    for pass_index in range(2):
        assert sum(int(b.weights.sum()) for b in source.batches(pass_index)) == 22


def test_batch_size_beside_batches():
    for data in (shuffled().batch(4), in_threads(shuffled()).batch(4), loader()):
        with pytest.raises(
            ValueError, match="batch_size=8 is given, but your iterable"
        ):
            source_of(data, batch_size=8)


def test_load_of_whole_batches():
    with pytest.raises(
        TypeError, match="grain IterDataset, which yields whole batches"
    ):
        source_of(Examples(in_threads(shuffled()).batch(4), jitter))


def test_nothing_to_read():
    nothing = grain.MapDataset.source([])
    for data in (nothing, in_threads(shuffled().filter(lambda pair: False))):
        with pytest.raises(DataError, match=r"no examples: the grain .* yielded"):
            source_of(data)
        with pytest.raises(DataError, match="no batches: the grain"):
            source_of(data.batch(4))


def test_an_error_inside_names_its_place():
    def fail(pair):
        if pair[0][0] == 9:
            raise OSError("unreadable")
        return pair

    dataset = grain.MapDataset.source(Pairs()).map(fail)
    kinds = {
        "while reading item 9": (dataset, {"batch_size": 4}),
        "while reading batch 2 of pass 0": (dataset.batch(4), {}),
        "while reading the first element of the data": (
            in_threads(grain.MapDataset.source(Pairs()).map(fail)[9:]),
            {},
        ),
    }
    for note, (data, size) in kinds.items():
        with pytest.raises(OSError, match="unreadable") as caught:
            list(source_of(data, **size).batches(0))
        assert note in caught.value.__notes__


class Closing:
    """Looks like an iterator of Grain, and notes when it is closed."""

    closed = 0

    def __init__(self):
        self.number = 0

    def __next__(self):
        self.number += 1
        return X[:4], Y[:4]

    def close(self):
        Closing.closed += 1


def test_iterators_left_early_are_closed(monkeypatch):
    dataset = in_threads(shuffled()).batch(4)
    monkeypatch.setattr(type(dataset), "__iter__", lambda self: Closing())
    monkeypatch.setattr(Closing, "closed", 0)
    source = source_of(dataset)
    taken = source.batches(0)
    next(taken)
    next(taken)
    assert Closing.closed == 0
    taken.close()
    assert Closing.closed == 1
    next(source.batches(1))
    assert Closing.closed == 2
    # An iterator of the user's own is theirs.
    next(source_of(iter(in_threads(shuffled()).batch(4)), steps=1).batches(0))
    assert Closing.closed == 2


def test_processes_decode_what_grain_reads():
    load = Examples(shuffled(), jitter, processes=2)
    here = Examples(shuffled(), jitter)
    found, expected = (
        list(source_of(each, batch_size=4).batches(1)) for each in (load, here)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_sizes_without_end_are_recognized_by_grains_own_number():
    assert len(shuffled().repeat()) == sys.maxsize
    # If these fail, `_is_endless` has to ask in another way.
    assert len(loader(epochs=None)._sampler) == sys.maxsize
    repeated = grain.experimental.RepeatIterDataset(in_threads(shuffled()))
    assert str(repeated) == "RepeatIterDataset(num_epochs=None)"


@pytest.mark.parametrize(
    "endless",
    [
        lambda: shuffled().repeat().batch(4),
        lambda: shuffled().repeat().batch(4)[3:],
        lambda: shuffled().repeat().batch(4).to_iter_dataset(),
    ],
)
def test_an_end_is_asked_for_whatever_follows_the_repeat(endless):
    with pytest.raises(DataError, match="has no end: write steps_per_epoch=100"):
        source_of(endless())
    with pytest.raises(DataError, match="has no end"):
        as_inputs_source(endless(), binding=ONE)
    source = source_of(endless(), steps=3)
    assert source.num_batches is None
    limited = shuffled().repeat().batch(4)[:3]
    assert source_of(limited).num_batches == 3
