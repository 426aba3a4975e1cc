"""Examples of different length: buckets, masks, weights, and how often is compiled."""

import re
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sources import as_inputs_source, as_source, split_data

from flaxfit import DataError, Loss, Trainer
from flaxfit._core.types import CallSpec
from flaxfit.data import Examples
from flaxfit.data.binding.binding import Binding
from flaxfit.data.datasets.example_dataset import ExampleSet, take_items
from flaxfit.data.datasets.stream import DatasetInfo
from flaxfit.data.host.padding import plan_buckets
from flaxfit.data.host.padding_arguments import as_padding

BINDING = Binding(CallSpec(("x",), (), ("x",)))
LENGTHS = np.random.default_rng(0).integers(1, 21, 60)
BUCKETS = [8, 16, 24]


def tagged(number, length):
    rng = np.random.default_rng(int(number))
    tokens = rng.integers(0, 11, length).astype(np.int32)
    return tokens, (tokens % 3).astype(np.int32)


ITEMS = [tagged(*pair) for pair in enumerate(LENGTHS)]


def load(number):
    return ITEMS[number]


class Tagger(nn.Module):
    """Tags every token by itself: padding changes no other output."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Embed(11, 4)(x))


class Classifier(nn.Module):
    """Classifies the mean over the tokens that are real."""

    @nn.compact
    def __call__(self, tokens, mask=None):
        x = nn.Embed(11, 4)(tokens)
        if mask is None:
            return nn.Dense(3)(x.mean(1))
        assert mask.dtype == jnp.bool_
        total = (x * mask[..., None]).sum(1)
        return nn.Dense(3)(total / mask.sum(1, keepdims=True))


def source_of(data, **arguments):
    return as_source(data, **arguments, binding=BINDING)


def logits_of(trainer, tokens):
    """The logits of `Tagger`, in NumPy: every length would be compiled for in jax."""
    params = jax.device_get(trainer.variables["params"])
    hidden = params["Embed_0"]["embedding"][tokens]
    return hidden @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]


def mean_loss(trainer, items=ITEMS, weigh=lambda row, labels: np.ones(len(labels))):
    """The mean over all tokens, example by example, in NumPy."""
    total, count = 0.0, 0.0
    for row, (tokens, labels) in enumerate(items):
        logits = logits_of(trainer, tokens)
        scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        weights = weigh(row, labels)
        total -= (weights * scores[np.arange(len(labels)), labels]).sum()
        count += weights.sum()
    return total / count


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------ whole fits


def test_as_many_compiles_as_buckets_and_the_loss_of_what_is_real(capsys):
    data = Examples(ITEMS, pad_to=BUCKETS)
    trainer = Trainer(Tagger(), metrics=["accuracy"])
    history = trainer.fit(data, batch_size=8, epochs=3, verbose=2, validation_data=data)
    said = [line for line in capsys.readouterr().out.splitlines() if "again" in line]
    assert len(said) == 4
    assert all(re.search(r": rows of length \d+, was \d+$", line) for line in said)
    values = trainer.evaluate(data, batch_size=8)
    assert trainer.check(data).compiles == {"train": 3, "eval": 3, "predict": 3}
    assert trainer.compiles == {"train": 3, "eval": 3, "predict": 0}
    assert values["loss"] == pytest.approx(mean_loss(trainer), rel=1e-5)
    assert history.history["val_loss"][-1] == values["loss"]
    tokens = [logits_of(trainer, x).argmax(-1) == y for x, y in ITEMS]
    assert values["accuracy"] == pytest.approx(np.concatenate(tokens).mean(), rel=1e-5)


def test_only_the_buckets_that_are_met_are_compiled_for():
    short = [item for item in ITEMS if len(item[0]) <= 8]
    trainer = Trainer(Tagger())
    trainer.fit(Examples(short, pad_to=BUCKETS), batch_size=8, epochs=2, verbose=0)
    assert trainer.compiles["train"] == 1


@pytest.mark.parametrize("options", [{"threads": 2}, {"lengths": LENGTHS}])
def test_however_it_is_loaded_the_training_is_the_same(options):
    def fit(data):
        trainer = Trainer(Tagger())
        trainer.fit(data, batch_size=8, epochs=2, verbose=0)
        return trainer.variables

    known = fit(Examples(ITEMS, pad_to=BUCKETS))
    equal(known, fit(Examples(range(60), load, pad_to=BUCKETS, **options)))


def test_one_length_is_the_same_as_arrays():
    data = Examples(ITEMS, pad_to=24)
    x, y = (
        np.stack([np.pad(i[k], (0, 24 - len(i[k]))) for i in ITEMS]) for k in (0, 1)
    )
    weights = (np.arange(24) < LENGTHS[:, None]).astype(np.float32)
    states = []
    for given in ((data,), (x, y)):
        trainer = Trainer(Tagger())
        weighed = {"sample_weight": weights} if len(given) == 2 else {}
        trainer.fit(*given, **weighed, batch_size=8, epochs=2, verbose=0)
        assert trainer.compiles["train"] == 1
        states.append(trainer.variables)
    equal(*states)


def test_labels_of_sequences_and_a_mask_for_the_model():
    items = [{"tokens": x, "label": y[0]} for x, y in ITEMS]
    data = Examples(items, pad_to={"tokens": BUCKETS}, mask="mask")
    trainer = Trainer(Classifier())
    trainer.fit(data, batch_size=8, verbose=0)
    logits = [Classifier().apply(trainer.variables, x[None])[0] for x, _ in ITEMS]
    np.testing.assert_allclose(trainer.predict(data), logits, atol=1e-6)
    scores = jax.nn.log_softmax(np.stack(logits))
    labels = np.array([y[0] for _, y in ITEMS])
    loss = -float(np.mean(scores[np.arange(60), labels]))
    assert trainer.evaluate(data)["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("load", [None, lambda item: item])
def test_outputs_come_in_the_order_of_the_data(load):
    data = Examples(ITEMS, load, pad_to=24)
    trainer = Trainer(Tagger())
    outputs = trainer.predict(data, batch_size=8)
    for (tokens, _), rows in zip(ITEMS, outputs, strict=True):
        expected = Tagger().apply(trainer.variables, tokens)
        np.testing.assert_allclose(rows[: len(tokens)], expected, atol=1e-6)
    several = Examples(ITEMS, load, pad_to=BUCKETS)
    with pytest.raises(DataError, match=r"\[24, 3\] and \[16, 3\].*predict_batches"):
        trainer.predict(several, batch_size=8)


def test_validation_split_keeps_the_buckets():
    train, held = split_data(
        Examples(range(60), load, pad_to=BUCKETS, lengths=LENGTHS),
        None,
        None,
        0.25,
        binding=BINDING,
    )
    assert (len(train.bucketing.buckets), len(held.bucketing.buckets)) == (45, 15)
    held = source_of(held, batch_size=4)
    assert sum(b.weights.sum() for b in held.batches(0)) == LENGTHS[45:].sum()


# --------------------------------------------------------------------- batches


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_a_batch_holds_one_bucket_and_every_pass_all_examples(lengths):
    data = Examples(range(60), load, pad_to=BUCKETS, lengths=lengths)
    source = source_of(data, batch_size=8, shuffle=True, seed=(1,))
    assert source.num_examples == 60
    assert (source.num_batches, source.seeks) == (
        (None, False) if lengths is None else (9, True)
    )
    passes = [list(source.batches(index)) for index in (0, 1, 0)]
    equal(passes[0], passes[2])
    for batches in passes:
        assert len(batches) == 9
        seen = []
        for batch in batches:
            (x,), length = batch.inputs, batch.inputs[0].shape[1]
            counts = batch.weights.sum(1).astype(int)
            real = counts[counts > 0]
            ends = np.array([0, *BUCKETS])
            assert all(ends[np.searchsorted(ends, real) - 1] < real)
            assert set(ends[np.searchsorted(ends, real)]) == {length}
            assert x.shape == batch.targets.shape == batch.weights.shape
            seen += [tuple(row[:n]) for row, n in zip(x, counts, strict=True) if n]
        assert sorted(seen) == sorted(tuple(x) for x, _ in ITEMS)
    assert [b.inputs[0].shape for b in passes[0]] != [
        b.inputs[0].shape for b in passes[1]
    ]
    equal(passes[1][4:], list(source.batches(1, 4)))


def test_planned_batches_are_those_that_are_sorted_as_they_come():
    planned, sorted_ = (
        source_of(
            Examples(range(60), load, pad_to=BUCKETS, lengths=lengths),
            batch_size=8,
            shuffle=True,
        )
        for lengths in (LENGTHS, None)
    )
    for index in (0, 1):
        equal(list(planned.batches(index)), list(sorted_.batches(index)))


def test_plan_emits_what_is_full_and_then_the_rest():
    plan = plan_buckets(np.arange(7), np.array([1, 0, 1, 1, 0, 0, 1]), 2)
    assert [rows.tolist() for rows in plan] == [[0, 2], [1, 4], [3, 6], [5]]


def test_examples_one_after_the_other():
    def items():
        yield from ITEMS

    data = Examples(items, pad_to=BUCKETS)
    source = source_of(data, batch_size=8)
    ahead = source_of(Examples(ITEMS, pad_to=BUCKETS), batch_size=8)
    assert (source.num_batches, source.num_examples) == (None, None)
    equal(list(source.batches(0)), list(ahead.batches(0)))


def test_the_rows_of_a_batch_do_not_depend_on_the_first():
    few = [tagged(0, 20), *(tagged(n, 3) for n in range(1, 9))]
    source = source_of(Examples(few, pad_to=BUCKETS), batch_size=4)
    assert source.example.inputs[0].shape == (4, 8)
    shapes = [b.inputs[0].shape for b in source.batches(0)]
    assert shapes == [(4, 8), (4, 8), (4, 24)]
    # Never more than the largest bucket has: BatchNorm would count rows twice.
    assert source_of(Examples(few, pad_to=BUCKETS)).batch_size == 8


def test_for_predict_a_batch_is_padded_for_its_longest():
    data = Examples(ITEMS, pad_to=BUCKETS)
    source = as_inputs_source(data, binding=BINDING, batch_size=8)
    batches = list(source.batches(0))
    longest = LENGTHS[:56].reshape(7, 8).max(1)
    assert [b.inputs[0].shape[1] for b in batches[:7]] == [
        int(BUCKETS[np.searchsorted(BUCKETS, n)]) for n in longest
    ]
    assert all((b.weights == 1).all() and b.weights.ndim == 1 for b in batches[:7])
    first = [tuple(r[:n]) for r, n in zip(batches[0].inputs[0], LENGTHS, strict=False)]
    assert first == [tuple(x) for x, _ in ITEMS[:8]]


# --------------------------------------------------------------------- weights


def test_weights_of_examples_multiply_in():
    items = [(x, y, np.float32(1 + row % 3)) for row, (x, y) in enumerate(ITEMS)]
    trainer = Trainer(Tagger())
    value = trainer.evaluate(Examples(items, pad_to=BUCKETS), batch_size=8)["loss"]
    expected = mean_loss(trainer, weigh=lambda row, y: np.full(len(y), 1 + row % 3))
    assert value == pytest.approx(expected, rel=1e-5)


def test_weights_of_tokens_are_padded_too():
    items = [(x, y, (y == 1).astype(np.float32)) for x, y in ITEMS]
    data = Examples(items, pad_to=BUCKETS, pad_value={2: 5})
    trainer = Trainer(Tagger())
    value = trainer.evaluate(data, batch_size=8)["loss"]
    expected = mean_loss(trainer, weigh=lambda row, y: y == 1)
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("one_hot", [False, True])
def test_class_weight_looks_at_real_targets_only(one_hot):
    items = [(x, np.eye(3, dtype=np.float32)[y] if one_hot else y) for x, y in ITEMS]
    data = Examples(items, pad_to=BUCKETS)
    source = source_of(data, batch_size=8, class_weight={1: 5.0})
    total = sum(batch.weights.sum() for batch in source.batches(0))
    assert total == sum((1 + 4 * (y == 1)).sum() for _, y in ITEMS)


def test_targets_padded_with_what_is_no_class():
    data = Examples(ITEMS, pad_to=BUCKETS, pad_value={1: -1})
    with pytest.raises(DataError, match="ignore_label=-1"):
        Trainer(Tagger()).fit(data, verbose=0)
    name = "softmax_cross_entropy_with_integer_labels"
    trainer = Trainer(Tagger(), loss=Loss(name, ignore_label=-1))
    trainer.fit(data, batch_size=8, verbose=0)
    value = trainer.evaluate(data, batch_size=8)["loss"]
    assert value == pytest.approx(mean_loss(trainer), rel=1e-5)


def test_targets_of_both_kinds_are_refused():
    items = [{"tokens": x, "label": y[0], "tags": y} for x, y in ITEMS]
    binding = Binding(CallSpec(("tokens",), (), ("tokens",)), targets=("label", "tags"))
    with pytest.raises(DataError, match=r"batch 0 .*the targets are not all padded"):
        as_source(Examples(items, pad_to=BUCKETS), binding=binding)


def test_a_loss_of_one_number_is_refused():
    def loss(outputs, targets):
        return ((outputs.sum(-1) - targets) ** 2).mean()

    with pytest.raises(DataError, match="cannot be weighted"):
        Trainer(Tagger(), loss=loss).fit(Examples(ITEMS, pad_to=24), verbose=0)


# --------------------------------------------------------------- kinds of parts


class Pair(NamedTuple):
    x: Any
    y: Any


@pytest.mark.parametrize(
    ("nested", "pad_to"),
    [
        (lambda x, y: {"x": x, "y": y}, 24),
        (lambda x, y: {"x": x.tolist(), "y": y.tolist()}, [20, 24]),
        (lambda x, y: {"x": x, "y": y, "name": "a", "n": 3}, {"x": 24, "y": 24}),
        (lambda x, y: [x, y], {0: 24, 1: [20, 24]}),
        (Pair, 24),
        (lambda x, y: {"x": x, "y": jnp.asarray(y)}, 24),
    ],
)
def test_examples_of_any_nesting(nested, pad_to):
    items = [nested(*item) for item in ITEMS]
    source = source_of(Examples(items, pad_to=pad_to), batch_size=60)
    batch = source.example
    (x,) = batch.inputs.values() if isinstance(batch.inputs, dict) else batch.inputs
    assert x.dtype == batch.targets.dtype == np.int32
    longest = x.shape[1]
    expected = [np.pad(t, (0, longest - len(t))) for t, _ in ITEMS]
    np.testing.assert_array_equal(x, expected)
    assert batch.weights.sum() == LENGTHS.sum()


def test_parts_of_other_lengths_share_a_bucket():
    items = [
        {"source": np.ones((n, 2), np.float32), "target": np.ones(m, np.int32)}
        for n, m in [(3, 9), (5, 4), (1, 1), (10, 2)]
    ]
    padding = as_padding({"source": [4, 12], "target": [5, 10]})
    assert [padding.bucket_of(*pair) for pair in enumerate(items)] == [1, 1, 0, 1]
    known = {"source": np.array([3, 5, 1, 10]), "target": np.array([9, 4, 1, 2])}
    assert padding.buckets_of(known, 4).tolist() == [1, 1, 0, 1]
    padded = padding.collate(items, range(4))
    assert padded.raw["source"].shape == (4, 12, 2)
    assert padded.real["target"].sum(1).tolist() == [9, 4, 1, 2]
    assert padded.raw["target"][1].tolist() == [1] * 4 + [0] * 6
    named = as_padding({"source": 12, "target": 10}, mask={"m": "target"})
    equal(named.collate(items, range(4)).raw["m"], padded.real["target"])


def test_what_is_too_long_is_cut_off():
    source = source_of(Examples(ITEMS, pad_to=[4, 8], truncate=True), batch_size=60)
    assert sum(b.weights.sum() for b in source.batches(0)) == (
        np.minimum(LENGTHS, 8).sum()
    )


def test_no_rows_at_all():
    items = [(np.zeros(0, np.int32), np.int32(1)), ([5], np.int32(1))]
    padded = as_padding({0: 2}, -1).collate([(list(x), y) for x, y in items], [0, 1])
    assert padded.raw[0].tolist() == [[-1, -1], [5, -1]]
    with pytest.raises(DataError, match="no "):
        source_of(Examples([], pad_to=[4, 8]))


def test_inputs_that_a_dataset_names_do_not_leave_the_mask_out():
    items = [{"tokens": x, "label": y[0]} for x, y in ITEMS]
    info = DatasetInfo(("tokens", "label"), inputs="tokens", targets="label")
    made = ExampleSet("made", 60, partial(take_items, items), info=info)
    examples = Examples(items, pad_to={"tokens": 24}, mask="mask")
    binding = Binding(CallSpec(("tokens", "mask"), (), ("tokens",)))
    source = as_source(examples.applied_to(made), binding=binding)
    assert source.example.inputs.keys() == {"tokens", "mask"}


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"pad_to": 16}, DataError, r"item \d+ has the length \d+.*pad_to=\d+, or"),
        ({"pad_to": [8, 16]}, DataError, r"pad_to=\[8, 16, \d+\], or truncate=True"),
        ({"pad_to": {0: 24, 2: 24}}, DataError, "names the part 2, but item 0 has 0"),
        ({"pad_to": {"a": 24}}, DataError, "names the part 'a'"),
        ({"pad_to": 24, "mask": "m"}, DataError, "needs dicts to put the mask into"),
        ({"pad_to": 24, "pad_value": 0.5}, DataError, "0.5, which int32 cannot hold"),
        (
            {"pad_to": 24, "pad_value": np.nan},
            DataError,
            "nan, which int32 cannot hold",
        ),
        ({"pad_to": []}, ValueError, "Expected a length"),
        ({"pad_to": [8, 4]}, ValueError, "ascending"),
        ({"pad_to": 0}, ValueError, "at least 1"),
        ({"pad_to": "max"}, ValueError, "Expected a length"),
        ({"pad_to": {0: [4, 8], 1: [4, 8, 9]}}, ValueError, "same number of lengths"),
        ({"pad_to": {}}, ValueError, "same number of lengths"),
        ({"pad_to": 24, "mask": 3}, TypeError, "attention_mask"),
        ({"pad_to": {0: 24}, "mask": {"m": 1}}, ValueError, "1 is not padded"),
        ({"pad_to": 24, "truncate": 1}, TypeError, "True or False"),
        ({"truncate": True}, ValueError, "no effect without padding"),
        ({"mask": "m"}, ValueError, "no effect without padding"),
        ({"lengths": LENGTHS}, ValueError, "without pad_to"),
        ({"pad_to": 24, "collate": list}, ValueError, "leave one of them"),
        ({"pad_to": 24, "lengths": LENGTHS[:9]}, ValueError, "int64.9. for 60 items"),
        ({"pad_to": 24, "lengths": LENGTHS / 1}, ValueError, "float64.60. for 60"),
        ({"pad_to": {0: 24}, "lengths": {1: LENGTHS}}, ValueError, "the same parts"),
        ({"pad_to": 16, "lengths": LENGTHS}, DataError, r"item \d+ has the length"),
    ],
)
def test_errors_say_what_to_write(options, error, match):
    with pytest.raises(error, match=match):
        source = source_of(Examples(ITEMS, **options), batch_size=8)
        list(source.batches(0))


@pytest.mark.parametrize(
    ("item", "pad_to", "match"),
    [
        ((np.ones(3), np.ones(4)), 8, r"0: 3, 1: 4.*pad_to={0: 8}"),
        ({"x": np.ones(3), "y": np.ones(4)}, [8, 9], r"pad_to={'x': \[8, 9\]}"),
        ((1.0, 2.0), 8, "nothing to pad"),
        ({"x": 1.0}, {"x": 8}, "'x' of item 0 has no axis"),
        ({"x": (np.ones(3), np.ones(4))}, {"x": 8}, "lengths 3, 4"),
        ({"x": np.ones(3), "mask": 1}, 8, "a key 'mask' already"),
    ],
)
def test_examples_that_cannot_be_padded(item, pad_to, match):
    mask = "mask" if isinstance(item, dict) else None
    with pytest.raises(DataError, match=match):
        as_padding(pad_to, mask=mask).collate([item, item], [0, 1])


def test_examples_that_differ():
    padding = as_padding(8)
    with pytest.raises(DataError, match=r"only the first axis"):
        padding.collate([np.ones((3, 2)), np.ones((3, 4))], [0, 1])
    with pytest.raises(DataError, match="differ in type"):
        padding.collate([(np.ones(3),), [np.ones(3)]], [0, 1])
    with pytest.raises(DataError, match="differ in their keys"):
        padding.collate([{"a": np.ones(3)}, {"b": np.ones(3)}], [0, 1])
    with pytest.raises(DataError, match=r"mask={'m': 'a'}"):
        both = {"a": np.ones(3), "b": np.ones(2)}
        as_padding({"a": 8, "b": 8}, mask="m").collate([both], [0])


def test_lengths_of_items_without_index():
    with pytest.raises(ValueError, match="needs items with random access"):
        source_of(Examples(lambda: iter(ITEMS), pad_to=24, lengths=LENGTHS))


def test_the_item_that_is_too_long_is_named_whatever_the_order():
    lengths = np.array([3, 4, 9, 4])
    data = Examples(range(4), lambda row: np.ones(lengths[row]), pad_to=8)
    with pytest.raises(DataError, match="item 2 has the length 9"):
        list(source_of(data, batch_size=2, shuffle=True).batches(0))


def test_processes_load_as_one_does():
    """What processes send back is the batch that this one would have made."""
    pytest.importorskip("loky")
    numbers = list(range(60))
    items = [(x.tolist(), y.tolist()) for x, y in ITEMS]

    def load(number):
        return items[number]

    for lengths in (None, LENGTHS):
        one, other = (
            source_of(
                Examples(numbers, load, pad_to=BUCKETS, lengths=lengths, **options),
                batch_size=8,
            )
            for options in ({}, {"processes": 2})
        )
        equal(list(one.batches(0)), list(other.batches(0)))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_weights_of_any_number_of_axes_count_nothing_where_targets_are_padded(axes):
    items = [
        (np.ones((n, 2)), np.zeros((n, 2)), np.ones((n, 2)[: axes - 1])) for n in (1, 3)
    ]
    source = source_of(Examples(items, pad_to=4, pad_value=7.0), batch_size=2)
    want = (np.arange(4) < np.array([[1], [3]])).astype(np.float32)
    weights = source.example.weights
    np.testing.assert_array_equal(
        weights,
        np.broadcast_to(want[(...,) + (None,) * (weights.ndim - 2)], weights.shape),
    )
    assert weights.ndim == max(2, axes)
