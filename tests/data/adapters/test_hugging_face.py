"""Hugging Face's datasets: the same as arrays, in the dtypes they are stored in."""

import pickle

import jax
import numpy as np
import pytest
from helpers.models import Linear
from PIL import Image

datasets = pytest.importorskip("datasets")

from helpers.sources import as_inputs_source, as_source, split_data  # noqa: E402

from flaxfit import Trainer  # noqa: E402
from flaxfit._core.errors import DataError  # noqa: E402
from flaxfit._core.types import CallSpec  # noqa: E402
from flaxfit.data import Examples  # noqa: E402
from flaxfit.data.adapters.hugging_face import (  # noqa: E402
    _is_shuffled,
    adapt,
    matches,
)
from flaxfit.data.binding.binding import Binding  # noqa: E402

pytestmark = pytest.mark.usefixtures("offline")

BINDING = Binding(CallSpec(("x",), (), ("x",)))
ROWS = 10
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
Y = np.arange(ROWS) % 3
PICTURES = np.random.default_rng(1).integers(0, 255, (ROWS, 4, 5), np.uint8)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


def table(**columns):
    features = datasets.Features(
        {
            "x": datasets.List(datasets.Value("float32"), length=3),
            "label": datasets.ClassLabel(names=["a", "b", "c"]),
            "name": datasets.Value("string"),
        }
    )
    names = [f"row {i}" if i % 2 else None for i in range(ROWS)]
    columns = {"x": X, "label": Y, "name": names} | columns
    return datasets.Dataset.from_dict(columns, features=features)


def pictures(**others):
    features = {"image": datasets.Image(), "digit": datasets.ClassLabel(num_classes=3)}
    columns = {"image": [Image.fromarray(each) for each in PICTURES], "digit": Y}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def source_of(x, **arguments):
    return as_source(x, binding=BINDING, **arguments)


def rows(source, index=0):
    """The first number of every example of a pass, batch by batch, without fill."""
    return [
        batch.inputs[0][batch.weights > 0, 0].tolist()
        for batch in source.batches(index)
    ]


def fit(x, y=None, **arguments):
    trainer = Trainer(Linear(), seed=1)
    history = trainer.fit(x, y, epochs=2, verbose=0, batch_size=4, **arguments)
    return history.history, jax.tree.map(np.asarray, trainer.state.params)


def raw_of(dataset, *indices):
    return adapt(dataset).take_batch(np.array(indices))


def test_a_dataset_trains_as_arrays_do():
    ours, theirs = fit(table()), fit(X, Y)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    source = source_of(table(), batch_size=4, shuffle=True, seed=(3,))
    arrays = source_of({"x": X, "label": Y}, batch_size=4, shuffle=True, seed=(3,))
    assert (source.kind, source.num_examples) == ("Hugging Face Dataset", ROWS)
    assert (source.seeks, source.info.unused) == (True, ("name",))
    for index in range(2):
        for mine, other in zip(
            source.batches(index), arrays.batches(index), strict=True
        ):
            jax.tree.map(np.testing.assert_array_equal, mine, other)
    start = source.batches(1, 2)
    np.testing.assert_array_equal(
        next(start).targets, list(arrays.batches(1))[2].targets
    )


def test_validation_and_prediction():
    trainer = Trainer(Linear())
    history = trainer.fit(table(), validation_data=table(), verbose=0)
    assert "val_loss" in history.history
    np.testing.assert_array_equal(
        trainer.predict(table(), verbose=0), trainer.predict({"x": X}, verbose=0)
    )
    assert trainer.evaluate(table(), verbose=0) == trainer.evaluate(
        {"x": X}, Y, verbose=0
    )
    source = as_inputs_source(table(), binding=BINDING)
    np.testing.assert_array_equal(source.example.inputs[0], X)


@pytest.mark.filterwarnings("ignore:validation_split takes the last")
def test_a_part_held_out():
    train, held_out = split_data(table(), None, None, 0.3, binding=BINDING)
    assert (train.length, held_out.length) == (7, 3)
    np.testing.assert_array_equal(source_of(held_out).example.inputs[0], X[7:])


@pytest.mark.parametrize("change", ["shuffle", "select", "filter", "slice"])
def test_a_dataset_that_was_changed(change):
    order = np.arange(ROWS)
    dataset = table()
    if change == "shuffle":
        dataset = dataset.add_column("row", order).shuffle(seed=0)
        order = np.array(dataset["row"])
        dataset = dataset.remove_columns("row")
    elif change == "select":
        order = np.array([8, 1, 1, 5])
        dataset = dataset.select(order)
    elif change == "filter":
        order = np.flatnonzero(Y == 1)
        dataset = dataset.filter(lambda row: row["label"] == 1)
    else:
        order = order[3:7]
        dataset = dataset.select(range(3, 7))
    np.testing.assert_array_equal(source_of(dataset).example.inputs[0], X[order])


def test_numbers_keep_their_dtypes():
    features = datasets.Features(
        {
            "byte": datasets.Value("uint8"),
            "half": datasets.Value("float16"),
            "wide": datasets.Value("float64"),
            "truth": datasets.Value("bool"),
            "cube": datasets.Array3D((2, 1, 3), "uint8"),
            "lists": datasets.List(datasets.List(datasets.Value("int16"), length=2)),
            "ragged": datasets.List(datasets.Value("int32")),
            "text": datasets.Value("string"),
        }
    )
    cube = np.random.default_rng(0).integers(0, 255, (4, 2, 1, 3), np.uint8)
    columns = {
        "byte": [1, 2, 3, 255],
        "half": [0.5, 1, 2, 3],
        "wide": [0.1, 0.2, 0.3, 0.4],
        "truth": [True, False, True, True],
        "cube": cube,
        "lists": [[[i, 1], [2, 3]] for i in range(4)],
        "ragged": [[7] * i for i in range(4)],
        "text": ["a", None, "c", "d"],
    }
    dataset = datasets.Dataset.from_dict(columns, features=features)
    raw = raw_of(dataset, 3, 1, 1)
    assert list(raw) == list(columns)
    dtypes = {name: str(array.dtype) for name, array in raw.items()}
    assert dtypes == {
        "byte": "uint8",
        "half": "float16",
        "wide": "float64",
        "truth": "bool",
        "cube": "uint8",
        "lists": "int16",
        "ragged": "object",
        "text": "object",
    }
    for name in ("byte", "half", "wide", "truth", "lists", "cube"):
        expected = np.asarray(columns[name], raw[name].dtype)[[3, 1, 1]]
        np.testing.assert_array_equal(raw[name], expected)
    assert [each.tolist() for each in raw["ragged"]] == [[7, 7, 7], [7], [7]]
    assert raw["text"].tolist() == ["d", None, None]


@pytest.mark.parametrize("row", [0, 9, 7])
@pytest.mark.parametrize("name", ["x", "label"])
@pytest.mark.parametrize("inside", [True, False])
def test_numbers_that_are_missing_are_an_error(row, name, inside):
    """In the first batch and in others, of floats, of classes, and within a list."""
    values = X.tolist() if name == "x" else [int(label) for label in Y]
    values[row] = [1.0, None, *values[row][2:]] if inside and name == "x" else None
    dataset = datasets.Dataset.from_dict({"x": X.tolist(), "label": Y, name: values})
    wrong = rf"{'y' if name == 'label' else 'x'} has no value at row {row % 4} "
    with pytest.raises(DataError, match=wrong):
        list(source_of(dataset, batch_size=4).batches(0))


def test_a_column_without_values_may_be_there_if_nothing_is_read_of_it():
    extra = [None, *range(1, len(X))]
    dataset = table().add_column("extra", extra)
    source = source_of(dataset, batch_size=4)
    assert "extra" in source.info.unused
    assert sum(len(batch.targets) for batch in source.batches(0)) >= len(X)


def test_pictures_and_class_names():
    source = source_of(pictures(), batch_size=4)
    assert source.info.pictures
    assert source.info.keys == ("image", "digit")
    assert (source.info.targets, source.info.class_names) == (
        "digit",
        ("0", "1", "2"),
    )
    assert source.example.inputs[0].dtype == np.uint8
    np.testing.assert_array_equal(source.example.inputs[0], PICTURES[:4])
    np.testing.assert_array_equal(source.example.targets, Y[:4])
    info = source_of(table()).info
    assert (info.pictures, info.targets, info.class_names) == (
        False,
        None,
        ("a", "b", "c"),
    )
    two = table().add_column("coarse", Y).class_encode_column("coarse")
    assert adapt(two).info.class_names == ("a", "b", "c")
    both = two.rename_column("label", "fine")
    info = adapt(both).info
    assert (info.targets, info.class_names) == (None, ())


def test_a_format_or_transform_of_the_user_stays():
    torch = pytest.importorskip("torch")
    chosen = table().with_format("numpy", columns=["label", "x"])
    assert adapt(chosen).info.keys == ("label", "x")
    assert set(raw_of(chosen, 0)) == {"label", "x"}
    tensors = table().remove_columns("name").with_format("torch")
    assert isinstance(raw_of(tensors, 0)["x"], torch.Tensor)
    narrow = table().with_format(None, columns=["x", "label"])
    assert list(raw_of(narrow, 0)) == ["x", "label"]
    doubled = table().with_transform(
        lambda rows: {"x": 2 * np.array(rows["x"]), "label": rows["label"]}
    )
    for dataset, factor in (
        (chosen, 1),
        (tensors, 1),
        (narrow, 1),
        (doubled, 2),
        (table().with_format("arrow"), 1),
        (table().with_format("pandas", columns=["x", "label"]), 1),
    ):
        source = source_of(dataset, batch_size=4)
        np.testing.assert_array_equal(source.example.inputs[0], factor * X[:4])
        np.testing.assert_array_equal(source.example.targets, Y[:4])
        examples = Examples(dataset, lambda row: (np.float32(row["x"]), row["label"]))
        source = source_of(examples, batch_size=4)
        np.testing.assert_array_equal(source.example.inputs[0], factor * X[:4])


def test_a_function_for_each_item_is_given_what_indexing_gives():
    def load(row, rng):
        assert isinstance(row["image"], Image.Image)
        return np.asarray(row["image"].rotate(180)) / 255, row["digit"]

    batch = source_of(Examples(pictures(), load), batch_size=4).example
    np.testing.assert_allclose(
        batch.inputs[0], PICTURES[:4, ::-1, ::-1] / 255, rtol=1e-6
    )


def test_what_reads_rows_can_be_sent_to_a_process():
    examples = adapt(pictures())
    again = pickle.loads(pickle.dumps(examples))
    np.testing.assert_array_equal(
        again.take_batch(np.array([3, 1]))["image"], PICTURES[[3, 1]]
    )


def test_several_splits_are_refused():
    splits = datasets.DatasetDict(test=table(), train=table(), extra=table())
    text = (
        r"DatasetDict given to fit holds several datasets: test, train, extra. Write "
        r'fit\(ds\["train"\], validation_data=ds\["test"\]\)'
    )
    with pytest.raises(TypeError, match=text):
        source_of(splits)
    with pytest.raises(TypeError, match=r'evaluate\(ds\["test"\]\)'):
        source_of(splits, name="evaluate")
    with pytest.raises(TypeError, match=r'validation_data=ds\["test"\]'):
        source_of(splits, name="validation_data")
    with pytest.raises(TypeError, match=r'fit\(ds\["all"\]\)'):
        source_of(datasets.IterableDatasetDict(all=table().to_iterable_dataset()))


def test_an_empty_dataset():
    with pytest.raises(DataError, match="no examples: the Hugging Face Dataset given"):
        source_of(table().select([]))
    stream = table().to_iterable_dataset().filter(lambda row: False)
    with pytest.raises(DataError, match="no batches: the Hugging Face IterableDataset"):
        source_of(stream)


# ------------------------------------------------------------------------- streams


def test_a_stream_yields_the_same_batches_in_every_pass():
    stream = table().to_iterable_dataset(num_shards=2)
    source = source_of(stream, batch_size=4)
    assert source.kind == "Hugging Face IterableDataset"
    assert source.num_batches is None
    assert source.info.class_names == ("a", "b", "c")
    expected = [X[:4, 0].tolist(), X[4:8, 0].tolist(), X[8:, 0].tolist()]
    assert rows(source) == rows(source, 1) == rows(source, 2) == expected
    ours = fit(stream)
    theirs = fit(X, Y, shuffle=False)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def batched(rows):
    return {"x": [np.add(x, 1).tolist() for x in rows["x"]], "label": rows["label"]}


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s,
        lambda s: s.map(lambda row: {"x": row["x"][:2], "label": row["label"]}),
        lambda s: s.map(batched, batched=True, batch_size=3),
        lambda s: s.filter(lambda row: row["label"] != 1),
        lambda s: s.skip(1).take(8),
        lambda s: datasets.interleave_datasets([s, s.skip(2)], seed=3),
        lambda s: datasets.interleave_datasets(
            [s, s.skip(2)], probabilities=[0.3, 0.7], seed=3
        ),
        lambda s: s.with_format("numpy"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_stream_is_entered_in_the_middle(change, size, monkeypatch):
    monkeypatch.setattr("flaxfit.data.sources.position._SECONDS_BETWEEN_MARKS", 0.0)

    def source():
        stream = change(table().to_iterable_dataset(num_shards=2))
        return source_of(stream, batch_size=size)

    first, again = source(), source()
    expected = rows(first)
    batches = first.batches(1)
    for number in (1, 2):
        next(batches)
        bookmark = pickle.loads(pickle.dumps(first.bookmark))
        assert (bookmark["pass"], bookmark["number"]) == (1, number)
        rest = [b.inputs[0][b.weights > 0, 0] for b in again.batches(1, 2, bookmark)]
        assert [each.tolist() for each in rest] == expected[2:]
        assert rows(again, 2) == expected


def test_a_stream_that_two_read_is_read_past(monkeypatch):
    monkeypatch.setattr("flaxfit.data.sources.position._SECONDS_BETWEEN_MARKS", 0.0)
    stream = table().to_iterable_dataset()
    first, second = (source_of(stream, batch_size=4) for _ in range(2))
    batches = first.batches(1)
    next(batches)
    assert first.bookmark["pass"] == 1
    mark = first.bookmark
    next(second.batches(1))
    next(batches)
    assert first.bookmark is mark


def test_the_private_field_that_tells_of_a_shuffle():
    """If this fails, look for what `datasets` has in its place: see `_is_shuffled`."""
    stream = table().to_iterable_dataset(num_shards=2)
    mapped = stream.map(lambda row: row)
    assert not _is_shuffled(stream)
    assert not _is_shuffled(mapped)
    assert _is_shuffled(mapped.shuffle(seed=1).take(3).map(lambda row: row))
    assert _is_shuffled(datasets.interleave_datasets([stream, stream.shuffle(seed=1)]))


def test_nothing_is_written_onto_a_stream():
    stream = table().to_iterable_dataset()
    names = set(vars(stream))
    list(source_of(stream, batch_size=4).batches(0))
    assert set(vars(stream)) == names


@pytest.mark.parametrize("after", [lambda s: s, lambda s: s.map(lambda row: row)])
def test_a_shuffled_stream_has_an_order_for_each_pass(after):
    def source():
        stream = table().to_iterable_dataset(num_shards=2)
        return source_of(after(stream.shuffle(seed=4, buffer_size=5)), batch_size=4)

    first, again = source(), source()
    passes = [rows(first, index) for index in range(3)]
    assert len({str(order) for order in passes}) == 3
    for order in passes:
        assert sorted(np.concatenate(order)) == sorted(X[:, 0])
    # Of another process, which begins with another pass.
    assert rows(again, 2) == passes[2]
    assert rows(again, 0) == passes[0]


def test_a_stream_of_pictures_and_of_a_generator():
    stream = pictures().to_iterable_dataset()
    source = source_of(stream, batch_size=4)
    assert source.info.pictures
    np.testing.assert_array_equal(source.example.inputs[0], PICTURES[:4])

    def examples():
        for x, y in zip(X, Y, strict=True):
            yield {"x": x, "label": y, "note": None if y else "zero"}

    source = source_of(datasets.IterableDataset.from_generator(examples), batch_size=4)
    np.testing.assert_array_equal(source.example.inputs[0], X[:4])
    assert source.info.unused == ("note",)


def test_only_their_classes_are_recognized():
    class Dataset:
        """Of a file of one's own that is called datasets.py."""

    Dataset.__module__ = "datasets"
    assert not matches(Dataset())
    Dataset.__module__ = "datasets.mine"
    assert not matches(Dataset())
    assert matches(table())
