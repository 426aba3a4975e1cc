"""Chunks: which batches are in them, how far ahead they are read."""

import threading
import time
from itertools import count
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.data import labeled

import flaxfit._programs.placement
from flaxfit import LambdaCallback, Trainer
from flaxfit._core.types import Batch
from flaxfit._loops.feeder import Execution, _rounded, open_feed, open_pass
from flaxfit._programs.chunks import (
    DeviceDataset,
    Stack,
    batch_at,
    order_capacity,
    stack_capacity,
)
from flaxfit._programs.placement import find_placement
from flaxfit.data.datasets.shuffling import rows_of
from flaxfit.data.sources.array_source import ArraySource

RNG = np.random.default_rng(1)
X, Y = labeled(70)
W = RNG.uniform(0.5, 2, 70).astype(np.float32)
ONE = find_placement(1)


def resolved(single=False):
    """The part of a `ResolvedTask` that a feeder looks at."""
    programs = SimpleNamespace(one_step_per_call=single)
    return SimpleNamespace(placement=ONE, programs=programs)


def threads():
    return [t for t in threading.enumerate() if t.name == "flaxfit"]


def wait_until(condition, seconds=10.0):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "waited in vain"
        time.sleep(0.002)


def source(rows=70, batch_size=16, shuffle=True, x=X):
    data = Batch((x[:rows],), Y[:rows], W[:rows])
    return ArraySource(data, batch_size, shuffle=shuffle, seed=(3, 0))


def feed_of(source, execution, *, epochs=9, steps=None, single=False):
    return open_feed(resolved(single), execution, source, epochs=epochs, steps=steps)


def epochs_of(feed, epochs):
    """Returns the batches of each epoch on the host, and their examples."""
    read = []
    for _ in range(epochs):
        with feed.epoch() as chunks:
            batches, examples = [], []
            for ready in chunks:
                assert len(ready.examples) == ready.batches
                examples += ready.examples
                for index in range(ready.batches):
                    batches.append(jax.device_get(batch_at(ready.chunk, index)))
        read.append((batches, examples))
    assert threads() == []
    return read


def assert_batches(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
        for leaf, like in zip(
            jax.tree.leaves(one), jax.tree.leaves(other), strict=True
        ):
            assert leaf.dtype == like.dtype


# --------------------------------------------- the same batches, however they come


EXECUTIONS = {
    "resident": Execution(),
    "resident by 2": Execution(steps_per_call=2),
    "stream": Execution(device_data=0),
    "stream by 1": Execution(device_data=0, steps_per_call=1),
    "stream by 3": Execution(device_data=0, steps_per_call=3),
    "one ahead": Execution(device_data=0, prefetch=1),
    "no thread": Execution(device_data=0, prefetch=0),
}


@pytest.mark.parametrize("name", EXECUTIONS)
@pytest.mark.parametrize("steps", [None, 3, 7])
def test_a_feed_gives_the_source_s_batches_bit_by_bit(name, steps):
    feed = feed_of(source(), EXECUTIONS[name], steps=steps)
    endless = (batch for index in count() for batch in source().batches(index))
    for batches, examples in epochs_of(feed, 3):
        expected = [next(endless) for _ in range(steps or 5)]
        assert_batches(batches, expected)
        assert examples == [int(np.count_nonzero(b.weights)) for b in expected]


def test_order_says_what_is_in_the_batches():
    for shuffle in (False, True):
        made = source(shuffle=shuffle)
        for index in (0, 1):
            order = made.order(index)
            assert order.shape == (5, 16)
            rows, real = rows_of(order)
            assert real == 70
            assert sorted(rows[order >= 0]) == list(range(70))
            for coded, batch in zip(order, made.batches(index), strict=True):
                rows = np.where(coded < 0, ~coded, coded)
                weights = np.where(coded < 0, 0, W[rows]).astype(np.float32)
                assert_batches([batch], [Batch((X[rows],), Y[rows], weights)])
    assert not np.array_equal(source().order(0), source().order(1))
    np.testing.assert_array_equal(source().order(1), source().order(1))


def test_fill_wraps_around_where_rows_are_fewer_than_the_batch():
    order = source(rows=3, batch_size=8, shuffle=False).order(0)
    np.testing.assert_array_equal(order, [[0, 1, 2, ~0, ~1, ~2, ~0, ~1]])
    feed = feed_of(source(rows=3, batch_size=8), Execution())
    assert_batches(
        epochs_of(feed, 1)[0][0], list(source(rows=3, batch_size=8).batches(0))
    )


def test_single_steps_of_resident_data_need_no_other_segments():
    feed = feed_of(source(), Execution(), single=True)
    with feed.epoch() as chunks:
        (ready,) = chunks
    assert isinstance(ready.chunk, DeviceDataset)


def test_an_epoch_of_resident_data_sends_an_order_and_no_data():
    feed = feed_of(source(), Execution())
    chunks = [next(iter(feed.epoch().__enter__())) for _ in range(2)]
    one, two = (ready.chunk for ready in chunks)
    assert one.data.inputs[0] is two.data.inputs[0]
    assert one.order.dtype == jnp.int32
    assert one.order.shape == (order_capacity(16), 16)
    assert one.data.inputs[0].shape[0] == _rounded(70)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, np.bool_])
@pytest.mark.parametrize("device_data", [0.0, 0.5])
def test_data_stays_in_its_own_dtype(dtype, device_data):
    x = RNG.integers(0, 2, (70, 5)).astype(dtype)
    feed = feed_of(source(x=x), Execution(device_data=device_data))
    with feed.epoch() as chunks:
        chunk = next(iter(chunks)).chunk
    batch = chunk.data if isinstance(chunk, DeviceDataset) else chunk.batches
    assert isinstance(chunk, DeviceDataset if device_data else Stack)
    assert batch.inputs[0].dtype == dtype


def test_what_does_not_fit_or_must_not_be_filled_is_streamed(monkeypatch):
    monkeypatch.setattr(
        flaxfit._programs.placement, "free_memory", lambda devices: 8000
    )

    def first(execution, pad=True, rows=70):
        made = source(rows=rows)
        made.pad = pad
        feed = feed_of(made, execution)
        with feed.epoch() as chunks:
            return type(next(iter(chunks)).chunk)

    assert source().nbytes == 70 * (5 * 4 + 4 + 4)  # 72 rows on the device: 2016
    assert first(Execution(device_data=0.252)) is DeviceDataset
    assert first(Execution(device_data=0.251)) is Stack
    assert first(Execution(device_data=0.251), rows=60) is DeviceDataset
    assert first(Execution(device_data=1.0), pad=False) is Batch


def test_data_mapped_from_a_file_is_streamed(tmp_path):
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    feed = feed_of(source(x=mapped), Execution())
    with feed.epoch() as chunks:
        assert isinstance(next(iter(chunks)).chunk, Stack)
    batches, _ = epochs_of(feed, 1)[0]
    assert_batches(batches, list(source().batches(1)))


# ------------------------------------------------------------------- sizes


def test_rows_are_rounded_up_by_an_eighth_at_most():
    for rows in range(1, 3000):
        wide = _rounded(rows)
        assert rows <= wide <= rows * 1.125
    assert len({_rounded(rows) for rows in range(1024, 2049)}) == 9
    assert all(_rounded(rows) == rows for rows in range(1, 17))


def test_capacities_are_bounded_by_memory_and_by_number():
    assert stack_capacity(10) == 256
    assert stack_capacity(2**20) == 4
    assert stack_capacity(2**30) == 1
    assert stack_capacity(0) == 256
    assert stack_capacity(10, 7) == 7
    assert stack_capacity(10, 1000) == 1000  # who asks for it gets more,
    assert stack_capacity(2**20, 64) == 4  # as far as it fits
    assert order_capacity(8) == 512
    assert order_capacity(2**14) == 4
    assert order_capacity(2**20) == 1
    assert order_capacity(8, 1000) == 1000


# ---------------------------------------------------------- streams of batches


class Batches:
    """A source of the batches given, in the same order in every pass."""

    pad, unused, kind, one_shot = True, (), "iterable", False
    num_batches = num_examples = bookmark = None
    reuses_buffers = False

    def __init__(self, batches, error=None):
        self.given, self.error, self.passes = batches, error, 0
        self.batch_size, self.example = len(batches[0].weights), batches[0]

    def check(self):
        pass

    def batches(self, pass_index, start=0, bookmark=None):
        self.passes += 1
        yield from self.given
        if self.error is not None:
            raise self.error


def batch(rows, width=5):
    return Batch((X[:rows, :width],), Y[:rows], W[:rows])


def test_batches_of_another_shape_begin_a_stack_of_their_own():
    given = [batch(4), batch(4), batch(6), batch(6), batch(6), batch(4)]
    feed = feed_of(Batches(given), Execution(steps_per_call=2))
    with feed.epoch() as chunks:
        sizes = [
            (ready.chunk.batches.weights.shape[1], ready.batches) for ready in chunks
        ]
    # Where the thread was asked for what it had, a stack may come in two.
    assert [rows for rows, number in sizes for _ in range(number)] == [4, 4, 6, 6, 6, 4]
    assert max(number for _, number in sizes) <= 2
    assert_batches(epochs_of(feed, 1)[0][0], given)


def test_batches_on_a_device_go_one_by_one_as_they_are():
    given = [jax.tree.map(jnp.asarray, batch(4)) for _ in range(3)]
    feed = feed_of(Batches(given), Execution())
    with feed.epoch() as chunks:
        ready = list(chunks)
    assert all(isinstance(one.chunk, Batch) and one.batches == 1 for one in ready)
    pointers = [b.inputs[0].unsafe_buffer_pointer() for b in given]
    assert [r.chunk.inputs[0].unsafe_buffer_pointer() for r in ready] == pointers


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
def test_what_came_before_an_error_is_handed_out(prefetch):
    given = [batch(4)] * 5
    feed = feed_of(Batches(given, OSError("disk gone")), Execution(prefetch=prefetch))
    done = 0
    with pytest.raises(OSError, match="disk gone"), feed.epoch() as chunks:
        for ready in chunks:
            done += ready.batches
    assert done == 5
    assert threads() == []


def test_a_waiting_consumer_gets_what_there_is():
    gate = threading.Event()

    class Slow(Batches):
        def batches(self, pass_index, start=0, bookmark=None):
            yield from self.given[:2]
            gate.wait(10)
            yield self.given[2]

    feed = feed_of(Slow([batch(4)] * 3), Execution())
    with feed.epoch() as chunks:
        # Two of a stack of 256 are made, and waited for.
        threading.Timer(0.05, gate.set).start()
        done = [ready.batches for ready in chunks]
    assert sum(done) == 3
    assert max(done) < 256


def test_stacks_share_no_memory_with_each_other():
    """Steps may still read the one before while the next is filled."""
    numbers = [
        Batch((np.full((4, 5), i, np.float32),), Y[:4], W[:4]) for i in range(40)
    ]
    feed = feed_of(Batches(numbers), Execution(steps_per_call=4))
    with feed.epoch() as chunks:
        kept = list(chunks)
    seen = [
        float(batch_at(ready.chunk, index).inputs[0][0, 0])
        for ready in kept
        for index in range(ready.batches)
    ]
    assert seen == list(range(40))


# --------------------------------------------------------------- evaluation


@pytest.mark.parametrize("steps", [None, 2])
def test_a_pass_is_in_order_and_begins_anew(steps):
    feed = open_pass(resolved(), Execution(), source(shuffle=False), steps=steps)
    for batches, _ in epochs_of(feed, 3):
        assert_batches(batches, list(source(shuffle=False).batches(0))[:steps])


class Counted(ArraySource):
    """Counts the batches that are copied."""

    copied = 0

    def stack(self, first, count, capacity, **how):
        self.copied += count
        return super().stack(first, count, capacity, **how)


@pytest.mark.parametrize(
    ("keep", "device_data", "passes"),
    [(True, 0.25, 1), (True, 0.0, 3), (False, 1.0, 3)],
)
def test_validation_data_stays_on_the_device_where_it_fits(keep, device_data, passes):
    made = Counted(Batch((X,), Y, W), 16)
    feed = open_pass(
        resolved(), Execution(device_data=device_data), made, steps=None, keep=keep
    )
    for batches, _ in epochs_of(feed, 3):
        assert_batches(batches, list(source(shuffle=False).batches(0)))
    assert made.copied == 5 * passes


def test_what_was_read_in_part_is_not_kept():
    made = Counted(Batch((X,), Y, W), 16)
    feed = open_pass(
        resolved(), Execution(steps_per_call=1), made, steps=None, keep=True
    )
    with feed.epoch() as chunks:
        next(iter(chunks))
    assert len(epochs_of(feed, 1)[0][0]) == 5
    assert len(epochs_of(feed, 1)[0][0]) == 5
    assert made.copied == 1 + 5


def test_what_a_prediction_leaves_bounds_the_stack():
    feed = open_pass(
        resolved(),
        Execution(),
        source(shuffle=False),
        steps=None,
        bytes_per_output=2**21,
    )
    with feed.epoch() as chunks:
        assert next(iter(chunks)).chunk.batches.weights.shape == (2, 16)


# -------------------------------------------------------------- whole fits


@pytest.fixture(scope="module")
def make_trainer():
    """Returns a trainer that runs as asked, compiled once for each form of data."""
    trainer = Trainer(nn.Dense(3))

    def make(**execution):
        trainer._execution = Execution(**execution)
        return trainer

    return make


class Loader:
    """A loader that counts what was asked of it."""

    def __init__(self, batches=40, rows=4):
        self.count, self.rows = batches, rows
        self.read, self.opened, self.ended = 0, 0, 0

    def __iter__(self):
        self.opened += 1
        try:
            for _ in range(self.count):
                self.read += 1
                yield X[: self.rows], Y[: self.rows]
        finally:
            self.ended += 1


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
@pytest.mark.parametrize("per_call", [1, 3])
def test_a_loader_is_read_so_far_ahead_and_no_further(make_trainer, prefetch, per_call):
    loader, ahead = Loader(), []
    trainer = make_trainer(prefetch=prefetch, steps_per_call=per_call)

    def begin(loop):
        time.sleep(0.01)  # long enough for the thread to read what it may
        ahead.append(loader.read - loop.batch)

    trainer.fit(loader, verbose=0, callbacks=LambdaCallback(on_train_batch_begin=begin))
    # The call that begins, those that wait, and the one in the thread's hand.
    most = 1 if prefetch == 0 else per_call * (prefetch + 2)
    assert max(ahead) <= most
    assert max(ahead) >= most - per_call
    assert len(ahead) == loader.read == 40
    assert (loader.opened, loader.ended) == (1, 1)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_pass_is_not_opened_before_its_epoch_begins(make_trainer, prefetch):
    loader, opened = Loader(batches=4), []
    make_trainer(prefetch=prefetch).fit(
        loader,
        epochs=4,
        verbose=0,
        callbacks=LambdaCallback(
            on_epoch_begin=lambda loop: opened.append((loader.opened, loader.read)),
            on_epoch_end=lambda loop: time.sleep(0.01),
        ),
    )
    # The first batch was read before, to see what there is.
    assert opened == [(1, 1), (1, 4), (2, 8), (3, 12)]
    assert (loader.opened, loader.read, loader.ended) == (4, 16, 4)


@pytest.mark.parametrize("prefetch", [0, 1, 5])
@pytest.mark.parametrize("per_call", [None, 1, 3])
def test_an_iterator_is_read_for_the_steps_asked_and_no_further(
    make_trainer, prefetch, per_call
):
    train, validation = Loader(batches=100), Loader(batches=100)
    iterator, validations = iter(train), iter(validation)
    trainer = make_trainer(prefetch=prefetch, steps_per_call=per_call)
    for _ in range(2):
        trainer.fit(
            iterator,
            epochs=3,
            steps_per_epoch=5,
            validation_data=validations,
            validation_steps=2,
            verbose=0,
        )
        time.sleep(0.02)
    assert train.read == 2 * 3 * 5
    assert validation.read == 2 * 3 * 2
    trainer.evaluate(iterator, steps=3)
    trainer.predict(iterator, steps=4)
    assert train.read == 30 + 3 + 4


def test_no_thread_is_left_and_the_loader_is_closed(make_trainer):
    trainer = make_trainer(prefetch=2, steps_per_call=1)

    class MineError(Exception):
        pass

    def fail(loop):
        raise MineError

    def stop(loop):
        loop.stop("enough")

    loaders = []
    for hook in (fail, stop):
        loaders.append(Loader(batches=10_000))
        try:
            trainer.fit(
                loaders[-1],
                verbose=0,
                callbacks=LambdaCallback(on_train_batch_end=hook),
            )
        except MineError:
            pass
        assert threads() == []
    loaders.append(Loader(batches=3))
    trainer.fit(loaders[-1], validation_data=Loader(batches=3), verbose=0)
    trainer.evaluate(Loader(batches=3))
    trainer.predict(Loader(batches=3))
    trainer.predict(Loader(batches=10_000), steps=2)
    assert threads() == []
    assert [loader.ended for loader in loaders] == [1, 1, 1]


def test_an_error_in_the_thread_reaches_the_caller_with_its_frames(make_trainer):
    def my_own_loader():
        yield X[:4], Y[:4]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone") as caught:
        make_trainer().fit(my_own_loader, verbose=0)
    assert "my_own_loader" in [entry.name for entry in caught.traceback]
    assert any("prefetch=0" in note for note in caught.value.__notes__)
    assert any("batch 1 of pass 0" in note for note in caught.value.__notes__)
    with pytest.raises(OSError, match="disk gone") as caught:
        make_trainer(prefetch=0).fit(my_own_loader, verbose=0)
    assert not any("prefetch=0" in note for note in caught.value.__notes__)
    assert threads() == []


def test_a_prediction_of_batches_on_a_device_leaves_the_fill_out(make_trainer):
    def batches():
        yield jnp.asarray(X[:8]), jnp.asarray(Y[:8])
        yield jnp.asarray(X[8:11]), jnp.asarray(Y[8:11])

    trainer = make_trainer()
    trainer.evaluate(X[:8], Y[:8])
    expected = nn.Dense(3).apply(trainer.variables, X[:11])
    np.testing.assert_allclose(trainer.predict(batches), expected, atol=1e-6)
    assert trainer.predict(batches).shape == (11, 3)


@pytest.mark.parametrize("on_device", [False, True])
def test_examples_are_counted_without_fill(make_trainer, on_device):
    convert = jnp.asarray if on_device else np.asarray

    def batches():
        yield convert(X[:8]), convert(Y[:8])
        yield convert(X[8:11]), convert(Y[8:11])

    assert make_trainer().fit(batches, verbose=0).timing.examples == [11]


def test_examples_of_weight_0_are_examples_wherever_the_data_lies(make_trainer):
    weights = np.ones(16, np.float32)
    weights[:5] = 0
    counts = [
        make_trainer(device_data=share)
        .fit(X[:16], Y[:16], sample_weight=weights, batch_size=8, verbose=0)
        .timing.examples
        for share in (0.25, 0.0)
    ]
    assert counts[0] == counts[1]
