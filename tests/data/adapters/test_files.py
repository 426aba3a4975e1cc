"""`.npy` and `.npz` by path, and arrays that are read by slices."""

import contextlib
import functools
import pickle
import zipfile
from collections import Counter
from pathlib import Path

import flax.linen as nn
import numpy as np
import pytest
from helpers.sources import as_inputs_source, as_source, split_data

from flaxfit import Trainer
from flaxfit._core.errors import DataError
from flaxfit._core.types import CallSpec
from flaxfit.data import Examples
from flaxfit.data.adapters import chunked_arrays, npy_files
from flaxfit.data.adapters.registry import adapt
from flaxfit.data.binding.binding import Binding

ONE = Binding(CallSpec(("x",), (), ("x",)))
TWO = Binding(CallSpec(("a", "b"), (), ("a", "b")))
X = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 100)


class Lazy:
    """An array in a store, which counts the rows that are read."""

    def __init__(self, array, chunk=None):
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype
        self.chunks = chunk and (chunk, *array.shape[1:])
        self.read, self.longest = Counter(), 0

    def __len__(self):
        return len(self._array)

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        self.read.update(range(rows.start, rows.stop))
        self.longest = max(self.longest, rows.stop - rows.start)
        return self._array[rows]

    def __array__(self, *unused, **options):
        raise AssertionError("read as a whole")


@pytest.fixture
def folder(tmp_path):
    np.savez(tmp_path / "plain.npz", x=X, y=Y)
    np.savez(tmp_path / "named.npz", image=X, label=Y)
    np.savez(tmp_path / "positional.npz", X, Y)
    np.savez_compressed(tmp_path / "small.npz", x=X, y=Y)
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    with contextlib.chdir(tmp_path):
        yield tmp_path


def losses(*data, **arguments):
    trainer = Trainer(nn.Dense(3))
    history = trainer.fit(*data, epochs=2, verbose=0, **arguments)
    return history.history["loss"], trainer.predict(X)


@functools.cache
def of_arrays():
    return losses(X, Y)


def same(one, other):
    assert one[0] == other[0]
    np.testing.assert_array_equal(one[1], other[1])


def batches_of(source, index=0, start=0):
    return [batch.targets.tolist() for batch in source.batches(index, start)]


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "data",
    [
        lambda: ("plain.npz",),
        lambda: (Path("named.npz"),),
        lambda: ("positional.npz",),
        lambda: (Path("small.npz").absolute(),),
        lambda: (Path("x.npy"), Y),
        lambda: ("x.npy", "y.npy"),
        lambda: ((Path("x.npy"), Path("y.npy")),),
        lambda: ((X, "y.npy"),),
        lambda: ({"x": "x.npy", "label": Path("y.npy")},),
        lambda: (np.load("small.npz"),),
    ],
)
def test_files_train_as_the_arrays_do(data, folder):
    same(losses(*data()), of_arrays())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_file_that_is_split_stays_on_the_disk(dtype, tmp_path):
    path = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(path[0], X.astype(dtype))
    np.save(path[1], Y.astype(np.int64))
    parts = split_data(path, None, None, 0.25, binding=ONE)
    sizes = []
    for part in parts:
        source = as_source(part, binding=ONE, batch_size=5)
        assert not source.in_memory
        assert source.example.inputs[0].dtype == np.float32
        sizes.append(source.num_examples)
    assert sizes == [75, 25]
    same(losses(path, validation_split=0.25), losses(X, Y, validation_split=0.25))


@pytest.mark.parametrize(
    "nested",
    [
        lambda: ({"x": {"inputs": "x.npy"}, "y": "y.npy"}),
        lambda: ({"x": {"inputs": "x.npy"}, "y": Y}),
        lambda: (({"inputs": Path("x.npy")}, Y)),
    ],
)
def test_paths_in_a_nesting_are_opened(nested, folder):
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x["inputs"])

    given, arrays = Trainer(Named()), Trainer(Named())
    history = given.fit(nested(), verbose=0, validation_data=nested()).history
    want = ({"inputs": X}, Y)
    assert history == arrays.fit(*want, verbose=0, validation_data=want).history


def test_with_weights_validation_and_for_the_other_methods(folder):
    weights = np.linspace(0, 1, 100)
    with np.testing.assert_no_warnings():
        got = losses("plain.npz", sample_weight=weights, validation_split=0.2)
    same(got, losses(X, Y, sample_weight=weights, validation_split=0.2))
    got = losses("x.npy", "y.npy", class_weight={0: 2.0}, validation_data="small.npz")
    same(got, losses(X, Y, class_weight={0: 2.0}, validation_data=(X, Y)))
    trainer = Trainer(nn.Dense(3))
    want = trainer.predict(X)
    np.testing.assert_array_equal(trainer.predict("x.npy"), want)
    np.testing.assert_array_equal(trainer.predict("plain.npz"), want)
    assert trainer.evaluate("plain.npz") == trainer.evaluate(X, Y)


ARRAYS = {
    "f32": X,
    "i64": Y,
    "u8": np.arange(7, dtype=np.uint8),
    "big": X.astype(">f8"),
    "columns": np.asfortranarray(X),
    "ünicode": X[:3],
    "none": np.zeros((0, 3), np.int16),
    "flags": X[:, 0] > 0,
}


def same_array(one, other):
    np.testing.assert_array_equal(one, other)
    assert one.dtype == other.dtype
    assert one.flags.f_contiguous == other.flags.f_contiguous


@pytest.mark.parametrize("name", ARRAYS)
def test_an_npy_is_mapped(name, tmp_path):
    np.save(tmp_path / "a.npy", ARRAYS[name])
    array = adapt(str(tmp_path / "a.npy"))
    same_array(array, ARRAYS[name])
    assert isinstance(array, np.memmap)
    assert not array.flags.writeable


def test_arrays_of_an_npz_keep_names_order_and_dtypes(tmp_path):
    arrays = {name: a for name, a in ARRAYS.items() if len(a) == 100}
    arrays["scalar"] = np.float32(3)
    np.savez(tmp_path / "a.npz", **arrays)
    got = adapt(str(tmp_path / "a.npz"))
    assert list(got) == list(arrays)
    for name, array in got.items():
        same_array(array, np.load(tmp_path / "a.npz")[name])


def test_an_archive_may_hold_other_files(tmp_path):
    """This one is written to what cannot be sought: its sizes come afterwards."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("notes.txt", "no array")
        with archive.open("x.npy", "w", force_zip64=True) as member:
            np.save(member, X)
    got = adapt(str(tmp_path / "a.npz"))
    assert list(got) == ["x"]
    np.testing.assert_array_equal(got["x"], X)


def test_an_npy_is_streamed_and_an_npz_is_in_memory(folder):
    for data, in_memory in (("plain.npz", True), ("small.npz", True), ("x.npy", False)):
        source = as_source(data, binding=ONE)
        assert (source.kind, source.in_memory) == ("arrays", in_memory)


def test_paths_in_a_list_of_examples_are_left_alone(folder):
    """Nor are the names of datasets taken for npy_files."""
    examples = Examples(["x.npy", "y.npy"], lambda path: (len(path), 0))
    assert as_source(examples, binding=ONE).example.inputs[0].tolist() == [5, 5]
    assert not npy_files.matches("mnist")
    assert not npy_files.matches(Path("folder"))


def write_as_npy(path):
    with path.open("wb") as file:
        np.save(file, X)


@pytest.mark.parametrize(
    ("name", "write", "text"),
    [
        ("gone.npz", lambda p: None, "no file 'gone.npz'"),
        ("folder.npy", lambda p: p.mkdir(), "no file 'folder.npy'"),
        ("a.npy", lambda p: p.write_bytes(b""), "cannot be read as a .npy.*np.save"),
        ("a.npy", lambda p: p.write_text("version https://git-lfs"), "as a .npy file"),
        ("a.npz", lambda p: p.write_text("<html>"), "cannot be read as a .npz"),
        ("a.npz", write_as_npy, "is not an archive of arrays"),
        ("a.npz", lambda p: np.savez(p), "holds no array"),
        (
            "a.npy",
            lambda p: np.save(p, np.array([[1], [1, 2]], object)),
            "Python objects.*np.stack",
        ),
        ("a.npz", lambda p: np.savez(p, x=np.array([None])), "Python objects"),
        ("a.npz", lambda p: np.savez_compressed(p, x=np.array([None])), "Python obj"),
        (
            "mnist.npz",
            lambda p: np.savez(p, x_train=X, y_train=Y, x_test=X[:5], y_test=Y[:5]),
            r"x_train: 100, y_train: 100, x_test: 5.*fit\(data\['x_train'\]",
        ),
    ],
)
def test_files_that_cannot_be_read(name, write, text, tmp_path):
    write(tmp_path / name)
    with contextlib.chdir(tmp_path), pytest.raises(DataError, match=text):
        Trainer(nn.Dense(3)).fit(name)


@pytest.mark.parametrize("name", ["x.npy", "plain.npz", "small.npz"])
def test_a_file_that_was_cut_off_or_written_over(name, folder):
    whole = (folder / name).read_bytes()
    for damaged in (whole[:-100], whole[:40], b"\0" * 200 + whole[200:]):
        (folder / name).write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot be read as a \.np"):
            adapt(name)


# ------------------------------------------------------------------- read by slices


@pytest.mark.parametrize("chunk", [None, 1, 7, 100, 1000])
@pytest.mark.parametrize(
    "data",
    [
        lambda x: (x, Y),
        lambda x: ((x, Y),),
        lambda x: ({"x": x, "label": Y},),
        lambda x: (x, list(Y)),
    ],
)
def test_slices_train_as_the_arrays_do(data, chunk):
    same(losses(*data(Lazy(X, chunk))), of_arrays())


def test_slices_with_weights():
    weights = np.linspace(0, 1, 100)
    want = losses(X, Y, sample_weight=weights)
    same(losses(Lazy(X), Lazy(Y), sample_weight=weights), want)
    same(losses((Lazy(X), Y), sample_weight=weights), want)
    same(losses((Lazy(X), Y, weights)), want)
    same(losses({"x": Lazy(X), "y": Y}, sample_weight=Lazy(weights)), want)
    want = losses(X, Y, class_weight={1: 3.0})
    same(losses(Lazy(X), Y, class_weight={1: 3.0}), want)
    for twice in ((Lazy(X), Y, weights), {"x": Lazy(X), "y": Y, "weights": weights}):
        with pytest.raises(ValueError, match="sample_weight is given twice"):
            losses(twice, sample_weight=weights)


def test_slices_for_the_other_methods():
    trainer = Trainer(nn.Dense(3))
    want = trainer.predict(X)
    x = Lazy(X, chunk=8)
    np.testing.assert_array_equal(trainer.predict(x), want)
    np.testing.assert_array_equal(trainer.predict((x, Y)), want)
    assert trainer.evaluate(x, Y) == trainer.evaluate(X, Y)
    split = losses(Lazy(X, 8), Lazy(Y), validation_split=0.2)
    same(split, losses(X, Y, validation_split=0.2))


def test_several_inputs_that_are_read_by_slices():
    b = X[:, :2]
    for given in ((Lazy(X), b), [Lazy(X), b], {"a": Lazy(X), "b": b}):
        inputs = as_inputs_source(given, binding=TWO).example.inputs
        inputs = list(inputs.values()) if isinstance(inputs, dict) else inputs
        for got, want in zip(inputs, (X, b), strict=True):
            np.testing.assert_array_equal(got, want[:32])
    example = as_source([Lazy(X), Lazy(b)], Y, binding=TWO).example
    np.testing.assert_array_equal(example.inputs[1], b[:32])


def test_only_the_rows_of_a_batch_are_read():
    x = Lazy(X)
    source = as_source(x, Y, binding=ONE, batch_size=10)
    assert sorted(x.read) == list(range(10))
    assert (source.num_examples, source.num_batches, source.seeks) == (100, 10, True)
    x.read.clear()
    next(source.batches(0, start=7))
    assert sorted(x.read) == list(range(70, 80))


def test_text_by_name_may_be_there_if_nothing_is_read_of_it():
    names = Lazy(np.array(["a"] * 100))
    x = Lazy(X)
    source = as_source({"x": x, "label": Y, "name": names}, binding=ONE)
    assert source.info.unused == ("name",)
    np.testing.assert_array_equal(source.example.inputs[0], X[:32])
    with pytest.raises(DataError, match=r"x has dtype <U1.*only numbers"):
        as_source({"x": names, "label": Y}, binding=ONE)


def test_lengths_are_checked_without_reading():
    x = Lazy(X)
    with pytest.raises(DataError, match="different length: x: 100, y: 99"):
        as_source(x, Y[:99], binding=ONE)
    with pytest.raises(DataError, match="only numbers"):
        as_source((x, Lazy(np.array(["a"] * 100))), binding=ONE)
    with pytest.raises(DataError, match="no examples"):
        as_source(Lazy(X[:0]), Y[:0], binding=ONE)
    assert not x.read


def small_windows(monkeypatch, block_rows=8, window_rows=32):
    row = X[0].nbytes
    monkeypatch.setattr(chunked_arrays, "_BLOCK_BYTES", block_rows * row)
    monkeypatch.setattr(chunked_arrays, "_WINDOW_BYTES", window_rows * row)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_pass_reads_every_chunk_once(shuffle, monkeypatch):
    small_windows(monkeypatch)
    x = Lazy(X, chunk=8)
    numbers = np.arange(100)
    source = as_source(
        (x, numbers), binding=ONE, batch_size=5, shuffle=shuffle, seed=(3,)
    )
    assert ("32 rows" in source.kind) == (x.shape[0] > 32)
    orders = [np.concatenate(batches_of(source, index)) for index in (0, 1, 0)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(100))
    np.testing.assert_array_equal(orders[0], orders[2])
    assert np.array_equal(orders[0], orders[1]) != shuffle
    source = as_source(
        (x, numbers), binding=ONE, batch_size=10, shuffle=shuffle, seed=(3,)
    )
    x.read.clear()
    for index, batch in enumerate(source.batches(1)):
        np.testing.assert_array_equal(batch.inputs[0], X[batch.targets])
        assert batch.targets.tolist() == batches_of(source, 1, index)[0]
    x.read.clear()
    for _ in source.batches(2):
        pass
    assert max(x.read.values()) == 1
    assert len(x.read) == 100
    assert x.longest == 8


def test_a_window_mixes_several_chunks_and_no_more(monkeypatch):
    small_windows(monkeypatch)
    rows = as_source(
        (Lazy(X[:96], chunk=8), np.arange(96)),
        binding=ONE,
        batch_size=32,
        shuffle=True,
        seed=(0,),
    )
    for window in batches_of(rows):
        assert len({row // 8 for row in window}) == 4
        assert np.abs(np.diff(window)).max() > 8


def test_labels_beside_large_arrays_are_read_once_and_before():
    """Their chunks are longer by far, and would be read for every block."""
    x, y = Lazy(X, chunk=8), Lazy(Y, chunk=100)
    losses(x, y)
    assert set(y.read.values()) == {1}
    assert y.longest == 100


def test_slices_as_items_of_examples():
    def load(item):
        x, y = item
        return x * 2, y

    examples = Examples((Lazy(X, chunk=8), Y), load, threads=2)
    want = (X * 2, Y)
    same(losses(examples), losses(*want))


def test_errors_name_the_rows():
    class Broken(Lazy):
        def __getitem__(self, rows):
            if rows.stop > 50:
                raise OSError("no answer")
            return super().__getitem__(rows)

    source = as_source(Broken(X), Y, binding=ONE, batch_size=10)
    with pytest.raises(OSError, match="no answer") as caught:
        batches_of(source)
    assert any("the rows 50 to 59 of a" in note for note in caught.value.__notes__)

    class Short(Lazy):
        def __getitem__(self, rows):
            return super().__getitem__(rows)[:1]

    with pytest.raises(DataError, match=r"returned float32\[1,4\] for its rows 0 to 9"):
        as_source(Short(X), Y, binding=ONE, batch_size=10)


def test_rows_can_be_pickled_for_processes():
    rows = chunked_arrays.adapt((Lazy(X, chunk=8), Y)).take_batch
    again = pickle.loads(pickle.dumps(rows))
    for got, want in zip(again(np.array([5, 3])), (X, Y), strict=True):
        np.testing.assert_array_equal(got, want[[5, 3]])


def test_arrays_in_memory_are_none_of_them():
    torch = pytest.importorskip("torch")
    pandas = pytest.importorskip("pandas")
    for value in (X, Y.tolist(), torch.ones(3), pandas.Series([1, 2]), "abc", 3.0):
        assert not chunked_arrays.matches(value)
    assert not chunked_arrays.matches([(X, Y), (X, Y)])


@pytest.mark.parametrize("chunk", [1, 16, 100])
def test_zarr(chunk, tmp_path):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "data.zarr", mode="w")
    for name, array in (("x", X), ("y", Y)):
        shape = (min(chunk, 100), *array.shape[1:])
        made = group.create_array(
            name, shape=array.shape, chunks=shape, dtype=array.dtype
        )
        made[:] = array
    want = losses(X, Y)
    same(losses(group["x"], group["y"]), want)
    same(losses(group), want)


def test_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"], file["y"] = X, Y
        file.create_dataset("chunked", data=X, chunks=(16, 4))
        want = losses(X, Y)
        same(losses(file["chunked"], file["y"]), want)
        del file["chunked"]
        same(losses(file), want)


def test_tensorstore(tmp_path):
    tensorstore = pytest.importorskip("tensorstore")
    x = tensorstore.open(
        {"driver": "n5", "kvstore": {"driver": "file", "path": str(tmp_path / "x")}},
        create=True,
        dtype=tensorstore.float32,
        shape=X.shape,
        chunk_layout=tensorstore.ChunkLayout(chunk_shape=[16, 4]),
    ).result()
    x[:] = X
    assert chunked_arrays.rows_of_chunk(x) == 16
    same(losses(x, Y), of_arrays())
