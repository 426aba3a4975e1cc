"""Predictions of anything: batch by batch, into arrays of the user's, all at once."""

import gc
import itertools
import threading
import time
import tracemalloc
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from flaxfit import Trainer
from flaxfit._core import state_store
from flaxfit._core.arrays import empty_array
from flaxfit._core.errors import DataError
from flaxfit.data import Batches, Examples

ROOT = Path(__file__).parents[2]
X = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 50).astype(np.int32)


class Two(nn.Module):
    """Two outputs in a dict."""

    @nn.compact
    def __call__(self, x):
        return {"a": nn.Dense(3)(x), "b": (nn.Dense(1)(x)[:, 0],)}


def make_trainer(model=None, **arguments):
    trainer = Trainer(nn.Dense(3) if model is None else model, **arguments)
    trainer.predict(X[:4])
    return trainer


def make_batches(sizes=(8, 8, 5)):
    start = 0
    for size in sizes:
        yield X[start : start + size], Y[start : start + size]
        start += size


def expected(trainer, x=X):
    return np.asarray(nn.Dense(3).apply(trainer.variables, x))


def threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("flaxfit")]


def wait_for_threads():
    """A thread that was given up ends as soon as it comes to it."""
    end = time.monotonic() + 10
    while threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert threads() == []


# ----------------------------------------------------------------- batch by batch


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        (lambda: X[:21], [8, 8, 5]),
        (lambda: make_batches, [8, 8, 5]),
        (lambda: make_batches(), [8, 8, 5]),
        (lambda: list(make_batches((8, 3, 8))), [8, 3, 8]),
        (lambda: Examples(list(zip(X[:21], Y[:21], strict=True))), [8, 8, 5]),
        (lambda: lambda: (x for x, _ in make_batches()), [8, 8, 5]),
    ],
    ids=["arrays", "function", "generator", "list", "examples", "inputs alone"],
)
def test_batches_of_anything(data, sizes, prefetch):
    trainer = make_trainer(prefetch=prefetch)
    given = data()
    size = 8 if isinstance(given, np.ndarray | Examples) else None
    batches = list(trainer.predict_batches(given, batch_size=size))
    assert [len(batch) for batch in batches] == sizes
    joined = np.concatenate(batches)
    np.testing.assert_allclose(joined, expected(trainer, X[: len(joined)]), atol=1e-6)
    if not hasattr(given, "__next__"):
        np.testing.assert_array_equal(trainer.predict(given, batch_size=size), joined)


def test_batches_are_nested_as_the_outputs_and_belong_to_the_caller():
    trainer = make_trainer(Two())
    whole = trainer.predict(X[:21], batch_size=8)
    batches = list(trainer.predict_batches(X[:21], batch_size=8, steps=2))
    assert [len(batch["b"][0]) for batch in batches] == [8, 8]
    np.testing.assert_array_equal(batches[1]["a"], whole["a"][8:16])
    np.testing.assert_array_equal(batches[1]["b"][0], whole["b"][0][8:16])
    assert batches[0]["a"].flags.owndata
    batches[0]["a"][:] = 0


def test_an_endless_iterator_is_read_only_a_little_ahead():
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield X[number % 40 : number % 40 + 8]

    trainer = make_trainer(steps_per_call=2)
    batches = trainer.predict_batches(endless())
    for number, outputs in enumerate(itertools.islice(batches, 20)):
        inputs = X[number : number + 8]
        np.testing.assert_allclose(outputs, expected(trainer, inputs), atol=1e-6)
    assert len(read) < 40
    batches.close()
    wait_for_threads()
    assert next(batches, None) is None


def test_steps_read_no_further():
    iterator = iter(make_batches((8,) * 6))
    trainer = make_trainer()
    assert len(list(trainer.predict_batches(iterator, steps=4))) == 4
    assert next(iterator)[1].tolist() == Y[32:40].tolist()


def test_the_thread_ends_with_the_iterator():
    trainer = make_trainer()
    started = trainer.predict_batches(itertools.repeat(X[:8]))
    next(started)
    assert threads()
    del started
    gc.collect()
    wait_for_threads()
    trainer.predict_batches(itertools.repeat(X[:8]))  # never asked for a batch
    assert threads() == []

    def fail():
        yield X[:8]
        raise OSError("disk gone")

    got = trainer.predict_batches(fail)
    assert len(next(got)) == 8
    with pytest.raises(OSError, match="disk gone"):
        next(got)
    wait_for_threads()


def test_a_fit_in_between_changes_nothing_and_copies_the_state_once(monkeypatch):
    trainer = make_trainer(steps_per_call=1)
    trainer.fit(X, Y, verbose=0)
    before = expected(trainer)
    copies = []
    copy = state_store.copy_state
    monkeypatch.setattr(
        state_store, "copy_state", lambda state: copies.append(1) or copy(state)
    )
    batches = trainer.predict_batches(lambda: iter(X.reshape(5, 10, 4)))
    got = [next(batches)]
    trainer.fit(X, Y, epochs=3, verbose=0)
    got += batches
    assert len(copies) == 1
    np.testing.assert_allclose(np.concatenate(got), before, atol=1e-6)
    assert not np.allclose(trainer.predict(X), before, atol=1e-4)


def test_what_is_written_into_the_arrays_meanwhile_is_not_in_what_was_read():
    """A whole stack of batches lies as the device wants it, and is taken as it is."""
    trainer = make_trainer()
    x = empty_array((256, 4), np.float32)
    x[:] = np.resize(X, x.shape)
    before = expected(trainer, x)
    batches = trainer.predict_batches(x, batch_size=1)
    got = [next(batches)]
    x[:] = np.nan
    got += batches
    np.testing.assert_allclose(np.concatenate(got), before, atol=1e-6)


def test_outputs_come_while_the_data_is_waited_for():
    """Else whoever makes the next inputs of the outputs would wait for ever."""
    gate, waited = threading.Event(), []

    def loop():
        yield X[:8]
        waited.append(gate.wait(20))
        yield X[8:16]

    batches = make_trainer().predict_batches(loop)
    next(batches)
    gate.set()
    assert len(next(batches)) == 8
    assert waited == [True]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda t: t.predict_batches(make_batches, batch_size=4), "batch_size=4"),
        (lambda t: t.predict_batches(X[:, :3]), "need other parameters"),
        (lambda t: t.predict_batches(X, steps=0), "steps=0"),
        (lambda t: t.predict_batches(lambda: iter([])), "yielded nothing"),
    ],
)
def test_what_cannot_work_is_said_at_once(call, text):
    trainer = make_trainer()
    trainer.fit(X, Y, verbose=0)
    with pytest.raises(ValueError, match=text):
        call(trainer)


def test_one_batch_is_no_dataset():
    trainer = make_trainer()
    np.testing.assert_allclose(
        trainer.predict_on_batch(X[:5]), expected(trainer, X[:5]), atol=1e-6
    )
    with pytest.raises(
        ValueError, match=r"one batch, but the given iterator may.*next\(iter"
    ):
        trainer.predict_on_batch(make_batches())


# ----------------------------------------------------------------------------- out


def test_out_is_written_and_returned(tmp_path):
    trainer = make_trainer()
    want = trainer.predict(X)
    out = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", np.float32, (50, 3))
    for data in (X, lambda: iter(X.reshape(5, 10, 4)), list(make_batches((40, 10)))):
        out[:] = 0
        assert trainer.predict(data, out=out) is out
        np.testing.assert_allclose(out, want, atol=1e-6)
    out.flush()
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), want, atol=1e-6)


def test_out_is_nested_as_the_outputs():
    trainer = make_trainer(Two())
    want = trainer.predict(X)
    out = {"a": np.zeros((50, 3), np.float64), "b": (np.zeros(50, np.float32),)}
    trainer.predict(X, out=out, batch_size=8)
    np.testing.assert_array_equal(out["a"], want["a"])
    np.testing.assert_array_equal(out["b"][0], want["b"][0])
    with pytest.raises(ValueError, match=r"out is nested as .*'a'.* the outputs as"):
        trainer.predict(X, out={"a": out["a"]})


def test_out_may_be_anything_that_is_written_by_slices():
    class Slices:
        shape, dtype = (50, 3), np.float32

        def __init__(self):
            self.rows = {}

        def __setitem__(self, where, values):
            assert where.step is None
            self.rows |= dict(
                zip(range(where.start, where.stop), values.tolist(), strict=True)
            )

    trainer, out = make_trainer(), Slices()
    trainer.predict(X, out=out, batch_size=8)
    want = trainer.predict(X, batch_size=8)
    assert list(out.rows) == list(range(50))
    np.testing.assert_array_equal(list(out.rows.values()), want)


def test_out_of_zarr():
    zarr = pytest.importorskip("zarr")
    out = zarr.create_array({}, shape=(50, 3), chunks=(16, 3), dtype="float32")
    trainer = make_trainer()
    assert trainer.predict(X, out=out) is out
    np.testing.assert_array_equal(out[:], trainer.predict(X))


def test_a_part_into_a_part():
    trainer = make_trainer()
    out = np.zeros((50, 3), np.float32)
    trainer.predict(X, out=out[:16], steps=2, batch_size=8)
    np.testing.assert_array_equal(out[:16], trainer.predict(X[:16], batch_size=8))
    assert not out[16:].any()


def test_the_inputs_themselves_may_be_written_over():
    trainer = make_trainer(nn.Dense(4), steps_per_call=1)
    x = X.copy()
    want = trainer.predict(x, batch_size=8)
    trainer.predict(x, out=x, batch_size=8)
    np.testing.assert_array_equal(x, want)


def read_only(shape):
    array = np.zeros(shape, np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("out", "error", "text"),
    [
        (np.zeros((49, 3), np.float32), ValueError, "49 rows.*50 examples.*more rows"),
        (np.zeros((51, 3), np.float32), ValueError, r"51 rows.*50.*Give out\[:50\]"),
        (np.zeros((50, 4), np.float32), ValueError, r"shape \(50, 4\).*float32\[exam"),
        (np.zeros((50,), np.float32), ValueError, r"shape \(50,\).*open_memmap"),
        (np.zeros((50, 3), np.int32), ValueError, "out is int32.*are float32"),
        (np.zeros((), np.float32), ValueError, r"shape \(\)"),
        (read_only((50, 3)), ValueError, "read-only"),
        (jax.numpy.zeros((50, 3)), TypeError, "cannot be written into"),
        ([[0.0] * 3] * 50, TypeError, "out is a list, which cannot be written into"),
        ("out.npy", TypeError, r"out is a str.*\(50, 3\)"),
    ],
)
def test_an_out_that_does_not_fit_is_refused_before_anything_runs(out, error, text):
    trainer = make_trainer()
    before = trainer.compiles
    with pytest.raises(error, match=text):
        trainer.predict(X, out=out)
    assert trainer.compiles == before


def test_an_out_of_no_dtype_of_numpys():
    torch = pytest.importorskip("torch")
    out = torch.zeros(50, 3)
    trainer = make_trainer()
    with pytest.raises(TypeError, match=r"out=out\.numpy\(\)"):
        trainer.predict(X, out=out)
    trainer.predict(X, out=out.numpy())
    np.testing.assert_array_equal(out.numpy(), trainer.predict(X))


@pytest.mark.parametrize(
    ("rows", "text", "written"),
    [(15, "15 rows, but there are more", 8), (30, "30 rows, but there were 21", 21)],
)
def test_where_only_reading_tells_the_length(rows, text, written):
    trainer = make_trainer(steps_per_call=1, prefetch=0)
    out = np.full((rows, 3), 7, np.float32)
    with pytest.raises(ValueError, match=text) as caught:
        trainer.predict(make_batches, out=out)
    assert caught.value.__notes__ == [f"the first {written} rows of out are written"]
    want = expected(trainer, X[:written])
    np.testing.assert_allclose(out[:written], want, atol=1e-6)
    assert (out[written:] == 7).all()


def test_an_error_of_the_loader_says_how_much_is_written():
    def fail():
        yield from make_batches((8, 8))
        raise OSError("disk gone")

    trainer, out = make_trainer(), np.zeros((50, 3), np.float32)
    with pytest.raises(OSError, match="disk gone") as caught:
        trainer.predict(fail, out=out)
    assert "the first 16 rows of out are written" in caught.value.__notes__


def test_rows_of_other_shapes_are_not_joined():
    trainer = Trainer(nn.Embed(8, 4))
    batches = [np.ones((2, length), np.int32) for length in (3, 4)]
    data = Batches(batches, pad_to=[3, 4])
    shapes = [outputs.shape for outputs in trainer.predict_batches(data)]
    assert shapes == [(2, 3, 4), (2, 4, 4)]
    with pytest.raises(DataError, match=r"shape: \[3, 4\] and \[4, 4\]") as kept:
        trainer.predict(data)
    # Whoever keeps the error keeps no thread.
    assert kept.traceback
    assert not [t for t in threading.enumerate() if t.name == "flaxfit"]
    padded = Batches(batches, pad_to=4)
    assert trainer.predict(padded).shape == (4, 4, 4)


def test_whole_numbers_are_not_cut_off():
    class Counts(nn.Module):
        @nn.compact
        def __call__(self, x):
            return (x[:, 0] * nn.Dense(1)(x)[:, 0] * 0 + x[:, 0]).astype(np.int32)

    trainer = Trainer(Counts(), loss=None)
    numbers = np.array([[1], [127], [128], [300]], np.float32)
    with pytest.raises(
        ValueError, match="out is int8, which cannot hold the outputs: they are int32"
    ):
        trainer.predict(numbers, out=np.zeros(4, np.int8))
    for dtype in (np.int32, np.int64, np.float32):
        out = trainer.predict(numbers, out=np.zeros(4, dtype))
        assert out.tolist() == [1, 127, 128, 300]


def test_all_of_out_has_the_same_length():
    trainer = make_trainer(Two())
    out = {"a": np.zeros((50, 3), np.float32), "b": (np.zeros(51, np.float32),)}
    with pytest.raises(ValueError, match="arrays of out have 50, 51 rows"):
        trainer.predict(lambda: iter([X]), out=out)


def test_nothing_is_held_but_what_is_under_way():
    """Neither by jax nor by NumPy: of 64 MB of outputs a few calls are alive."""
    wide, batches = 4096, 256
    trainer = Trainer(nn.Dense(wide))
    inputs = X[:16]
    trainer.predict(inputs)
    alive = []

    class Sink:
        shape, dtype = (16 * batches, wide), np.float32

        def __setitem__(self, where, values):
            arrays = [a for a in jax.live_arrays() if a.shape[-2:] == (16, wide)]
            alive.append(sum(array.nbytes for array in arrays))

    def data():
        return iter([inputs] * batches)

    total = 16 * batches * wide * 4
    for consume in (
        lambda: trainer.predict(data, out=Sink()),
        lambda: [alive.append(o.nbytes) for o in trainer.predict_batches(data)],
    ):
        consume()  # once to compile
        alive.clear()
        tracemalloc.start()
        consume()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert alive
        assert max(alive) + peak < total * 0.75


def test_errors_of_the_data_are_data_errors():
    trainer = make_trainer()
    trainer.fit(X, Y, verbose=0)
    with pytest.raises(DataError, match="batch 1 of pass 0"):
        list(trainer.predict_batches(lambda: iter([X[:8], X[:8, :2]])))


class OneInATuple(nn.Module):
    @nn.compact
    def __call__(self, x):
        return (nn.Dense(1)(x),)


def test_one_output_in_a_tuple_before_anything_is_trained():
    trainer = Trainer(OneInATuple())
    (outputs,) = trainer.predict(X)
    expected = OneInATuple().apply({"params": trainer.state.params}, X)[0]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
