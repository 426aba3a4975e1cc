"""Every kind of dataset does what the same data does as arrays, whatever is asked."""

import functools
import os
import signal
from typing import NamedTuple

import jax
import numpy as np
import pytest
from helpers.models import Linear

from flaxfit import Callback, Trainer
from flaxfit._core.errors import DataError
from flaxfit._core.types import CallSpec
from flaxfit.data import Examples
from flaxfit.data.binding.binding import Binding
from flaxfit.data.open import as_inputs_source, as_source

RNG = np.random.default_rng(0)
ROWS, SIZE = 10, 4
COLUMNS = {
    "x": RNG.normal(size=(ROWS, 3)).astype(np.float32),
    "label": RNG.integers(0, 3, ROWS).astype(np.int32),
    "weights": RNG.uniform(0.5, 2, ROWS).astype(np.float32),
}
BINDING = Binding(CallSpec(("x",), (), ("x",)))
FORMS = ("tuple", "dict", "weighted tuple", "weighted dict")


# ---------------------------------------------------------------- the kinds of data


def columns_of(form, rows=ROWS):
    chosen = {
        name: column[:rows]
        for name, column in COLUMNS.items()
        if name != "weights" or "weighted" in form
    }
    return chosen if "dict" in form else tuple(chosen.values())


def cut(columns, rows):
    return jax.tree.map(lambda column: column[rows], columns)


class Data(NamedTuple):
    """What a dataset is made of.

    Attributes:
      columns: a dict or tuple of arrays.
      fails: the item that cannot be read, None for none.
    """

    columns: object
    fails: int | None = None

    @property
    def rows(self):
        return len(jax.tree.leaves(self.columns)[0])

    def item(self, index):
        if index == self.fails:
            raise OSError(f"item {index} is broken")
        return cut(self.columns, index)

    def items(self):
        return (self.item(index) for index in range(self.rows))

    def batch(self, index):
        rows = range(index * SIZE, min((index + 1) * SIZE, self.rows))
        if self.fails in rows:
            raise OSError(f"item {self.fails} is broken")
        return cut(self.columns, slice(rows.start, rows.stop))

    @property
    def num_batches(self):
        return -(-self.rows // SIZE)

    def batches(self):
        return (self.batch(index) for index in range(self.num_batches))


class ByIndex:
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return self.data.rows

    def __getitem__(self, index):
        return self.data.item(index)


class BatchesByIndex(ByIndex):
    def __len__(self):
        return self.data.num_batches

    def __getitem__(self, index):
        return self.data.batch(index)


class Loader:
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return self.data.batches()


def arrays(data, folder):
    return data.columns


def array_files(data, folder):
    path = folder / f"{data.rows}.npz"
    if isinstance(data.columns, dict):
        np.savez(path, **data.columns)
    else:
        np.savez(path, *data.columns)
    return path


def pandas_table(data, folder):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(data.columns["x"], columns=["a", "b", "c"])
    for name in ("label", "weights"):
        if name in data.columns:
            table[name] = data.columns[name]
    return table


def polars_table(data, folder):
    return pytest.importorskip("polars").from_pandas(pandas_table(data, folder))


def arrow_table(data, folder):
    arrow = pytest.importorskip("pyarrow")
    return arrow.Table.from_pandas(pandas_table(data, folder))


def torch_dataset(data, base="Dataset"):
    torch = pytest.importorskip("torch.utils.data")
    if base == "IterableDataset":
        members = {"__iter__": lambda self: data.items()}
    else:
        members = {
            "__len__": lambda self: data.rows,
            "__getitem__": lambda self, index: data.item(index),
        }
    return type("Mine", (getattr(torch, base),), members)()


def torch_loader(data, folder):
    torch = pytest.importorskip("torch.utils.data")
    return torch.DataLoader(torch_dataset(data), batch_size=SIZE)


def hugging_face(data, folder):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict(dict(data.columns))


def hugging_face_stream(data, folder):
    datasets = pytest.importorskip("datasets")
    return datasets.IterableDataset.from_generator(data.items)


def grain_map(data, folder):
    grain = pytest.importorskip("grain")
    return grain.MapDataset.source(ByIndex(data)).batch(SIZE)


def grain_iter(data, folder):
    return grain_map(data, folder).to_iter_dataset()


def grain_examples(data, folder):
    return pytest.importorskip("grain").MapDataset.source(ByIndex(data))


def grain_loader(data, folder):
    grain = pytest.importorskip("grain")
    return grain.DataLoader(
        data_source=ByIndex(data),
        sampler=grain.samplers.IndexSampler(data.rows, shuffle=False, num_epochs=1),
        operations=[grain.transforms.Batch(SIZE)],
        worker_count=0,
    )


class Kind(NamedTuple):
    """A kind of dataset.

    Attributes:
      make: (data, folder) -> the dataset.
      batched: whether it comes in batches; else `batch_size` is given to `fit`.
      resumes: `"seeks"`, `"state"`, or `"reads past"` what was trained on.
      forms: the forms its batches can have.
      fails: whether an item of it can be broken.
      once: whether it can be read only once.
    """

    make: object
    batched: bool = True
    resumes: str = "reads past"
    forms: tuple = FORMS
    fails: bool = True
    once: bool = False


DICTS = ("dict", "weighted dict")
KINDS = {
    "arrays": Kind(arrays, False, "seeks", fails=False),
    "npz": Kind(array_files, False, "seeks", fails=False),
    "pandas": Kind(pandas_table, False, "seeks", DICTS, fails=False),
    "polars": Kind(polars_table, False, "seeks", DICTS, fails=False),
    "pyarrow": Kind(arrow_table, False, "seeks", DICTS, fails=False),
    "list of batches": Kind(
        lambda d, _: list(d.batches()), resumes="seeks", fails=False
    ),
    "batches by index": Kind(lambda d, _: BatchesByIndex(d), resumes="seeks"),
    "iterable": Kind(lambda d, _: Loader(d)),
    "function": Kind(lambda d, _: d.batches),
    "iterator": Kind(lambda d, _: d.batches(), once=True),
    "examples by index": Kind(lambda d, _: ByIndex(d), False, "seeks"),
    "list of examples": Kind(lambda d, _: list(d.items()), False, "seeks", fails=False),
    "Examples": Kind(lambda d, _: Examples(ByIndex(d), threads=2), False, "seeks"),
    "Examples of a function": Kind(lambda d, _: Examples(d.items, threads=2), False),
    "function of examples": Kind(lambda d, _: d.items, False),
    "torch DataLoader": Kind(torch_loader),
    "torch Dataset": Kind(lambda d, _: torch_dataset(d), False, "seeks"),
    "torch IterableDataset": Kind(
        lambda d, _: torch_dataset(d, "IterableDataset"), False
    ),
    "Hugging Face": Kind(hugging_face, False, "seeks", DICTS, fails=False),
    "Hugging Face stream": Kind(hugging_face_stream, False, "state", DICTS),
    "Grain MapDataset": Kind(grain_map, resumes="seeks"),
    "Grain IterDataset": Kind(grain_iter, resumes="state"),
    "Grain of examples": Kind(grain_examples, False, "seeks"),
    "Grain DataLoader": Kind(grain_loader, resumes="state"),
}
EVERY_KIND = pytest.mark.parametrize("name", KINDS)
AGAIN = pytest.mark.parametrize("name", [n for n, k in KINDS.items() if not k.once])
EVERY_FORM = pytest.mark.parametrize(
    ("name", "form"), [(n, f) for n, k in KINDS.items() for f in k.forms]
)


def made(name, folder, form=None, **changes):
    kind = KINDS[name]
    columns = changes.pop("columns", None)
    if columns is None:
        columns = columns_of(form or kind.forms[0], changes.pop("rows", ROWS))
    return kind.make(Data(columns, **changes), folder)


def options(name):
    return {} if KINDS[name].batched else {"batch_size": SIZE}


def source_of(name, folder, form=None, what=as_source, **changes):
    data = made(name, folder, form, **changes)
    return what(data, **options(name), binding=BINDING)


def on_host(batches):
    return jax.tree.map(np.asarray, list(batches))


def assert_same(given, expected):
    assert len(given) == len(expected)
    for one, other in zip(given, expected, strict=True):
        # By their leaves: a table's one input goes in by position, a dict's by name.
        jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, (one, other)))
        assert [leaf.dtype for leaf in jax.tree.leaves(one)] == [
            leaf.dtype for leaf in jax.tree.leaves(other)
        ]


def like(name):
    """Whose batches a kind has: what has no indices is filled up with its own rows."""
    by_index = KINDS[name].resumes == "seeks" and not KINDS[name].batched
    return "arrays" if by_index else "list of batches"


def expected(name, form=None, what=as_source, **changes):
    form = form or KINDS[name].forms[0]
    source = source_of(like(name), None, form, what, **changes)
    return on_host(source.batches(0))


# -------------------------------------------------------------------- the batches


@EVERY_FORM
def test_batches_are_those_of_the_arrays(name, form, tmp_path):
    """Tuples and dicts, with weights and without, a ragged tail among them."""
    given = on_host(source_of(name, tmp_path, form).batches(0))
    assert_same(given, expected(name, form))
    assert given[-1].weights[2:].tolist() == [0, 0]


@AGAIN
def test_every_pass_is_the_same(name, tmp_path):
    source = source_of(name, tmp_path)
    first = on_host(source.batches(0))
    for number in (1, 2):
        assert_same(on_host(source.batches(number)), first)


@EVERY_KIND
def test_without_a_tail(name, tmp_path):
    given = on_host(source_of(name, tmp_path, rows=8).batches(0))
    assert_same(given, expected(name, rows=8))
    assert all(batch.weights.all() for batch in given)


@EVERY_KIND
def test_inputs_alone(name, tmp_path):
    given = on_host(source_of(name, tmp_path, what=as_inputs_source).batches(0))
    assert_same(given, expected(name, what=as_inputs_source))


@EVERY_KIND
def test_going_on_in_the_middle(name, tmp_path):
    """By seeking, by a state, or by reading past; and always with the same batches."""
    kind = KINDS[name]
    source = source_of(name, tmp_path)
    batches = source.batches(0)
    before = [next(batches) for _ in range(2)]
    bookmark = source.bookmark
    assert source.seeks is (kind.resumes == "seeks")
    assert (bookmark is not None) is (kind.resumes == "state")
    after = on_host(source_of(name, tmp_path).batches(0, 2, bookmark))
    assert_same(on_host(before) + after, expected(name))


@pytest.mark.parametrize("name", [n for n, k in KINDS.items() if k.fails])
def test_an_error_inside_is_the_users(name, tmp_path):
    """What comes before it is trained on, and it says which item it was."""
    batches = source_of(name, tmp_path, fails=5).batches(0)
    assert_same(on_host([next(batches)]), expected(name)[:1])
    with pytest.raises(OSError, match="item 5 is broken") as caught:
        list(batches)
    notes = "\n".join(getattr(caught.value, "__notes__", ()))
    assert "while reading batch 1 of pass 0" in notes


@EVERY_KIND
def test_empty(name, tmp_path):
    texts = r"no batches|no examples|number of records must be greater"  # of Grain
    with pytest.raises((DataError, ValueError), match=texts):
        source_of(name, tmp_path, rows=0)


# --------------------------------------------------------------------- whole trainings


class InterruptAt(Callback):
    def __init__(self, step):
        self._step = step

    def on_train_batch_end(self, loop):
        if loop.step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


def trained(name, folder, form, run=None, callbacks=(), epochs=2):
    trainer = Trainer(Linear(), metrics=["accuracy"])
    history = trainer.fit(
        made(name, folder, form),
        **options(name),
        shuffle=False,
        epochs=1 if KINDS[name].once else epochs,
        validation_data=made(name, folder, form, rows=7),
        callbacks=list(callbacks),
        run_dir=run,
        verbose=0,
    )
    return trainer, history.history


def leaves(trainer):
    state = trainer.state
    return jax.tree.leaves(state.replace(rng=jax.random.key_data(state.rng)))


@functools.cache
def trained_like(name, form, **changes):
    """The logs and the state of a training on data that is known to be right."""
    trainer, history = trained(name, None, form, **changes)
    return history, leaves(trainer)


@EVERY_KIND
def test_training_is_that_on_arrays(name, tmp_path):
    """To the last bit, with weights, and a validation of the same kind."""
    form = KINDS[name].forms[-1]
    trainer, history = trained(name, tmp_path, form)
    once = {"epochs": 1} if KINDS[name].once else {}
    expected_history, expected_leaves = trained_like(like(name), form, **once)
    assert history == expected_history
    jax.tree.map(np.testing.assert_array_equal, leaves(trainer), expected_leaves)
    outputs = trainer.predict(made(name, tmp_path, form), **options(name), verbose=0)
    assert outputs.shape == (ROWS, 3)


@AGAIN
def test_a_run_goes_on_in_the_middle_of_an_epoch(name, tmp_path, capsys):
    form = KINDS[name].forms[0]
    whole, history = trained(name, tmp_path, form, tmp_path / "whole")
    trained(name, tmp_path, form, tmp_path / "run", [InterruptAt(5)])
    resumed, resumed_history = trained(name, tmp_path, form, tmp_path / "run")
    assert resumed_history == history
    jax.tree.map(np.testing.assert_array_equal, leaves(resumed), leaves(whole))
