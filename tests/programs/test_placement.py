"""Which devices are used, what lies where on them, and that it changes no result."""

import inspect
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.asserts import count_reads, moved, same
from helpers.data import labeled
from helpers.models import Net
from jax.sharding import AxisType, Mesh, PartitionSpec

import flaxfit._programs.placement
from flaxfit import LambdaCallback, Trainer
from flaxfit._core.types import Batch, copy_state
from flaxfit._programs.chunks import DeviceDataset, Stack
from flaxfit._programs.placement import Placement, find_placement, free_memory

X, Y = labeled(64)
DEVICES = jax.local_devices()


def make(model=None, **arguments):
    # Adam would blow up the rounding of gradients that are zero, such as that of the
    # bias before a BatchNorm.
    given = {"optimizer": "sgd", "learning_rate": 0.1, **arguments}
    return Trainer(model or Net(), **given)


def close(a, b, atol=2e-6):
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol),
        jax.device_get(a),
        jax.device_get(b),
    )


# --------------------------------------------------------------- placements


def test_all_devices_by_default(eight_devices):
    placement = find_placement()
    assert placement.devices == tuple(eight_devices)
    assert placement.mesh.axis_names == ("data",)
    assert not placement.chosen


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, DEVICES[:1]),
        (3, DEVICES[:3]),
        (8, DEVICES),
        (np.int64(2), DEVICES[:2]),
        (DEVICES[2:5], DEVICES[2:5]),
        ((DEVICES[7], DEVICES[1]), [DEVICES[7], DEVICES[1]]),
        (Mesh(np.array(DEVICES[:4]), ("x",)), DEVICES[:4]),
        (Mesh(np.array(DEVICES).reshape(4, 2), ("a", "b")), DEVICES),
    ],
)
def test_devices_can_be_chosen(given, expected):
    placement = find_placement(given)
    assert placement.devices == tuple(expected)
    assert placement.chosen
    if placement.mesh is None:
        assert expected == DEVICES[:1]
    else:
        assert list(placement.mesh.devices.flat) == list(expected)
        assert set(placement.mesh.axis_types) == {AxisType.Auto}
        assert placement.replicated.spec == PartitionSpec()


def test_axes_of_a_mesh_are_made_automatic():
    explicit = Mesh(
        np.array(DEVICES[:4]).reshape(2, 2), ("a", "b"), (AxisType.Explicit,) * 2
    )
    placement = find_placement(explicit)
    assert placement.mesh.axis_names == ("a", "b")
    assert placement.mesh.axis_types == (AxisType.Auto,) * 2


@pytest.mark.parametrize("count", [0, -1, 9])
def test_a_number_there_is_not(count):
    with pytest.raises(
        ValueError,
        match=rf"devices={count}, but there are 8 cpu devices. Write devices=8",
    ):
        Trainer(Net(), devices=count)


@pytest.mark.parametrize(
    "wrong", ["cpu", True, 1.5, [], (), [0, 1], {"a": 1}, DEVICES[0]]
)
def test_what_is_no_devices(wrong):
    with pytest.raises(TypeError, match=r"devices=.*write a number, devices=1"):
        Trainer(Net(), devices=wrong)


def test_a_device_named_twice():
    with pytest.raises(ValueError, match=r"devices=.*list every device only once"):
        Trainer(Net(), devices=[DEVICES[0], DEVICES[0]])


@pytest.mark.parametrize(
    ("rows", "used"), [(32, 8), (8, 8), (30, 6), (20, 5), (7, 7), (11, 1), (1, 1)]
)
def test_as_many_devices_as_divide_the_batch(rows, used):
    placement = find_placement(DEVICES)._replace(chosen=False)
    assert placement.for_rows(rows).devices == tuple(DEVICES[:used])


def test_devices_that_were_chosen_have_to_divide_the_batch():
    with pytest.raises(
        ValueError,
        match=r"batch_size=30 cannot be split evenly over 8 devices. Write "
        r"batch_size=32, or Trainer\(model, devices=6\)",
    ):
        find_placement(8).for_rows(30)
    assert find_placement(8).for_rows(32).devices == tuple(DEVICES)


def test_rows_round_up_to_what_devices_divide():
    assert [find_placement(n).rounded(30) for n in (1, 4, 8)] == [30, 32, 32]


def batch(rows):
    return Batch((X[:rows],), Y[:rows], np.ones(rows, np.float32))


def shard_rows(leaf, axis):
    return {shard.data.shape[axis] for shard in leaf.addressable_shards}


def test_rows_of_batches_are_divided_and_odd_ones_go_whole():
    placement = find_placement(8)
    assert shard_rows(placement.put_chunk(batch(16)).inputs[0], 0) == {2}
    assert shard_rows(placement.put_chunk(batch(7)).inputs[0], 0) == {7}
    stack = Stack(jax.tree.map(lambda leaf: np.stack([leaf] * 3), batch(16)))
    placed = placement.put_chunk(stack).batches
    assert [shard_rows(leaf, 1) for leaf in jax.tree.leaves(placed)] == [{2}] * 3
    assert shard_rows(placed.targets, 0) == {3}
    order = np.zeros((5, 16), np.int32)
    whole = placement.put_data(batch(64), "whole")
    resident = placement.put_chunk(DeviceDataset(whole, order))
    assert shard_rows(resident.order, 1) == {2}
    assert shard_rows(resident.data.inputs[0], 0) == {64}
    divided = placement.put_data(batch(64), "divided")
    assert shard_rows(divided.inputs[0], 0) == {8}


def test_all_axes_of_a_mesh_divide_the_rows():
    mesh = Mesh(np.array(DEVICES).reshape(4, 2), ("a", "b"))
    placed = find_placement(mesh).put_chunk(batch(16))
    assert shard_rows(placed.inputs[0], 0) == {2}
    rows = {shard.index[0].start for shard in placed.inputs[0].addressable_shards}
    assert rows == set(range(0, 16, 2))


def pointers(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return {s.data.unsafe_buffer_pointer() for s in leaf.addressable_shards}


@pytest.mark.parametrize(("before", "after"), [(1, 1), (8, 8), (1, 8), (8, 6), (8, 1)])
def test_put_makes_buffers_of_its_own(before, after):
    """What is put here will be donated, and the one given must not die with it."""
    for leaf in (jnp.ones(1000), jax.random.key(0)):
        given = find_placement(before).put(leaf)
        placed = find_placement(after).put(given)
        assert placed.devices() == set(DEVICES[:after])
        assert len(pointers(placed)) == after
        assert not pointers(given) & pointers(placed)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_copied_state_is_one_in_its_place_and_in_buffers_of_its_own(devices):
    tree = {"kernel": jnp.ones(1000), "rng": jax.random.key(0)}
    tree = find_placement(devices).put(tree)
    copy = copy_state(tree)
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(copy), strict=True):
        assert other.sharding == leaf.sharding
        assert other.committed == leaf.committed
        assert other.aval == leaf.aval
        assert not pointers(leaf) & pointers(other)


def test_room_is_a_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr(
        flaxfit._programs.placement, "free_memory", lambda devices: 1000
    )
    eight, one = find_placement(8), find_placement(1)
    assert eight.room_for(250, 0.25) == "whole"
    assert eight.room_for(251, 0.25) == "divided"
    assert eight.room_for(2000, 0.25) == "divided"
    assert eight.room_for(2001, 0.25) is None
    assert one.room_for(250, 0.25) == "whole"
    assert one.room_for(251, 0.25) is None
    assert eight.room_for(1, 0.0) is None


class Chip:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_free_memory_is_that_of_the_fullest_device():
    chips = [
        Chip({"bytes_limit": 100, "bytes_in_use": used, "other": 1})
        for used in (10, 60)
    ]
    assert free_memory(chips) == 40
    host = free_memory([Chip(None)])
    assert 2**20 < host
    # A CPU's devices share the host's.
    assert free_memory([Chip({})] * 4) == pytest.approx(host / 4, rel=0.5)


def test_free_memory_where_nobody_tells(monkeypatch):
    def unknown(name):
        raise ValueError(name)

    monkeypatch.setattr(flaxfit._programs.placement.os, "sysconf", unknown)
    assert free_memory([Chip(None)] * 2) == 2**30


# ----------------------------------------------------- results do not depend on it


@pytest.fixture(scope="module")
def on_one():
    """A trainer of one device after a fit with ragged tails and weights."""
    trainer = make(devices=1, metrics=["accuracy"])
    history = fit(trainer)
    return trainer, history, moved(trainer._store.peek())


def fit(trainer, **arguments):
    given = {
        "sample_weight": np.linspace(0.5, 1.5, 60, dtype=np.float32),
        "batch_size": 16,
        "epochs": 2,
        "validation_data": (X[:33], Y[:33]),
        "verbose": 0,
        **arguments,
    }
    return trainer.fit(X[:60], Y[:60], **given).history


TWO_AXES = Mesh(np.array(DEVICES).reshape(4, 2), ("a", "b"))
EXPLICIT = Mesh(np.array(DEVICES[:4]), ("x",), (AxisType.Explicit,))


@pytest.mark.parametrize(
    ("devices", "execution", "used"),
    [
        (8, {"device_data": 0, "prefetch": 0}, DEVICES),
        ([DEVICES[3], DEVICES[1]], {"device_data": 0}, [DEVICES[3], DEVICES[1]]),
        (TWO_AXES, {}, DEVICES),
        (EXPLICIT, {"steps_per_call": 3}, DEVICES[:4]),
    ],
)
def test_results_are_those_of_one_device(devices, execution, used, on_one):
    trainer = make(devices=devices, metrics=["accuracy"], **execution)
    history = fit(trainer, validation_data=None)
    close(moved(trainer.state), on_one[2])
    for name, numbers in history.items():
        np.testing.assert_allclose(numbers, on_one[1][name], rtol=1e-5)
    for leaf in jax.tree.leaves(trainer.state):
        assert leaf.devices() == set(used)
        assert leaf.is_fully_replicated
    assert trainer.compiles == {"train": 1, "eval": 0, "predict": 0}


# -------------------------------------------------------------- whole trainers


@pytest.fixture(scope="module")
def run_on_eight():
    """A trainer of all devices after whole runs; what it held and counted then."""
    with jax.default_device(None):
        trainer = make(metrics=["accuracy"])
    history = fit(trainer)
    state = moved(trainer._store.peek())
    for rows in (33, 64, 3):
        trainer.evaluate(X[:rows], Y[:rows])
        trainer.predict(X[:rows])
    trainer.fit(X, Y, batch_size=16, validation_split=0.07, verbose=0)
    return trainer, state, history, trainer.compiles


@pytest.fixture(scope="module")
def on_eight(run_on_eight):
    return run_on_eight[0]


def test_all_devices_give_the_results_of_one(run_on_eight, on_one):
    trainer, state, history, _ = run_on_eight
    close(state, on_one[2])
    assert list(history) == list(on_one[1])
    for name, numbers in history.items():
        np.testing.assert_allclose(numbers, on_one[1][name], rtol=1e-5)
    for leaf in jax.tree.leaves(trainer.state):
        assert leaf.devices() == set(DEVICES)
        assert leaf.is_fully_replicated


def test_one_compile_per_phase_whatever_the_rows(run_on_eight):
    """With ragged tails, validation, and fewer rows than a batch."""
    assert run_on_eight[3] == {"train": 1, "eval": 1, "predict": 1}


def test_data_that_fits_by_rows_only_gives_the_same_bits(monkeypatch, run_on_eight):
    how = []
    original = Placement.put_data

    def put_data(self, data, kind):
        placed = original(self, data, kind)
        how.append((kind, shard_rows(placed.inputs[0], 0)))
        return placed

    monkeypatch.setattr(Placement, "put_data", put_data)
    # 60 rows of 28 bytes, on 8 devices 64 of them.
    monkeypatch.setattr(
        flaxfit._programs.placement, "free_memory", lambda devices: 1000
    )
    trainer = make(devices=8, metrics=["accuracy"])
    history = fit(trainer, validation_data=None)
    assert how == [("divided", {8})]
    same(moved(trainer.state), run_on_eight[1])
    assert history["loss"] == run_on_eight[2]["loss"]
    assert history["accuracy"] == run_on_eight[2]["accuracy"]


def test_training_by_hand_is_the_same(on_eight, on_one):
    first = (X[:16], Y[:16])
    state, logs = on_eight.train_step(on_eight.init(first), first)
    other, other_logs = on_one[0].train_step(on_one[0].init(first), first)
    assert state.step.devices() == set(DEVICES)
    close(moved(state), moved(other))
    assert float(logs["loss"].compute()) == pytest.approx(
        float(other_logs["loss"].compute()), rel=1e-6
    )


def test_a_second_round_compiles_nothing_at_all(on_eight):
    names = []

    def listen(event, duration, **labels):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(labels.get("fun_name"))

    fit(on_eight)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        fit(on_eight, batch_size=16)
        on_eight.evaluate(X[:37], Y[:37])
        on_eight.predict(X[:19])
        quiet = list(names)
        on_eight.predict(X[:19], batch_size=40)
    finally:
        jax.monitoring.clear_event_listeners()
    assert quiet == []
    assert names  # the listener does hear compiles


@pytest.mark.parametrize("rows", [1, 7, 8, 30, 33])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_any_number_of_rows_can_be_evaluated_and_predicted(rows, batch_size, on_eight):
    x, y = X[:rows], Y[:rows]
    outputs = Net().apply(on_eight.variables, x, train=False)
    predicted = on_eight.predict(x, batch_size=batch_size)
    assert predicted.shape == (rows, 3)
    np.testing.assert_allclose(predicted, outputs, atol=1e-6)
    found = on_eight.evaluate(x, y, batch_size=batch_size)
    loss = -jax.nn.log_softmax(outputs)[np.arange(rows), y].mean()
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean(np.argmax(outputs, -1) == y))
    np.testing.assert_allclose(on_eight.predict_on_batch(x), outputs, atol=1e-6)


def test_a_batch_of_seven_rows_can_be_trained_on():
    eight, one = make(nn.Dense(3), devices=8), make(nn.Dense(3), devices=1)
    for step in range(2):
        rows = slice(step, step + 7)
        logs = [trainer.train_on_batch(X[rows], Y[rows]) for trainer in (eight, one)]
        assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    close(moved(eight.state), moved(one.state))
    assert eight.state.step.devices() == set(DEVICES)
    assert eight.test_on_batch(X[:7], Y[:7]) == pytest.approx(
        one.test_on_batch(X[:7], Y[:7]), rel=1e-5
    )
    assert eight.compiles == one.compiles


def test_a_state_can_be_assigned_and_goes_on_all_devices(on_eight):
    before = on_eight.compiles
    start = moved(on_eight.state)
    zeros = jax.tree.map(np.zeros_like, start[0])
    on_eight.state = on_eight.state.replace(params=zeros)
    for leaf in jax.tree.leaves(on_eight.state):
        assert leaf.devices() == set(DEVICES)
    assert not np.any(on_eight.predict(X[:9]))
    seen = []

    def again(loop):
        loop.state = loop.state.replace(params=zeros)
        seen.append(loop.state.step.devices())

    fit(on_eight, callbacks=LambdaCallback(on_epoch_end=again))
    assert seen == [set(DEVICES)] * 2
    assert not np.any(on_eight.state.params["Dense_0"]["kernel"])
    on_eight.state = on_eight.state.replace(params=start[0])
    assert on_eight.compiles == before


def test_a_state_that_was_read_stays_alive_and_costs_no_compile():
    trainer = make(nn.Dense(3), devices=8)
    trainer.fit(X, Y, batch_size=16, verbose=0)
    kept = []
    trainer.fit(
        X,
        Y,
        batch_size=16,
        epochs=2,
        verbose=0,
        callbacks=LambdaCallback(
            on_train_batch_end=lambda loop: kept.append(loop.state)
        ),
    )
    kept.append(trainer.state)
    trainer.train_on_batch(X[:16], Y[:16])
    for state in kept:
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert [int(state.step) for state in kept] == [*range(5, 13), 12]
    trainer.fit(X, Y, batch_size=16, verbose=0)
    # One for the segments of `fit`, and one for the batch.
    assert trainer.compiles["train"] == 2


def test_a_state_given_to_another_trainer_moves_and_stays_alive():
    eight, one = make(nn.Dense(3), devices=8), make(nn.Dense(3), devices=1)
    for trainer in (eight, one):
        trainer.train_on_batch(X[:16], Y[:16])
    given = eight.state
    one.state = given
    one.train_on_batch(X[:16], Y[:16])
    assert one.state.step.devices() == {DEVICES[0]}
    eight.state = one.state
    eight.train_on_batch(X[:16], Y[:16])
    assert eight.state.step.devices() == set(DEVICES)
    for state in (given, one._store.peek(), eight._store.peek()):
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert (int(given.step), one.step, eight.step) == (1, 2, 3)
    assert one.compiles == eight.compiles == {"train": 1, "eval": 0, "predict": 0}


def test_a_state_moves_from_all_devices_to_one_and_back(eight_devices):
    trainer = make(nn.Dense(3))
    trainer.evaluate(X, Y)
    kept = [trainer.state]
    for rows, batch_size in ((33, 11), (64, 16)):
        trainer.fit(X[:rows], Y[:rows], batch_size=batch_size, verbose=0)
        kept.append(trainer.state)
    trainer.train_on_batch(X[:16], Y[:16])
    used = [state.step.devices() for state in kept]
    assert used == [set(DEVICES), {DEVICES[0]}, set(DEVICES)]
    # What was read on the way has not died with what was donated.
    for state in kept:
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert [int(state.step) for state in kept] == [0, 3, 7]
    one = make(nn.Dense(3), devices=1)
    one.fit(X[:33], Y[:33], batch_size=11, verbose=0)
    one.fit(X, Y, batch_size=16, verbose=0)
    close(moved(kept[-1]), moved(one.state))


def test_the_loop_reads_as_seldom_as_on_one_device(monkeypatch):
    trainer = make(nn.Dense(3), devices=8)
    fit(trainer)
    fit(trainer, batch_size=8)
    reads = count_reads(monkeypatch)
    counts = []
    for batch_size in (16, 8):
        reads.clear()
        fit(trainer, epochs=3, batch_size=batch_size)
        counts.append(reads.count("get"))
    # One for an epoch, one for its validation, and the step number at the start.
    assert counts == [3 * 2 + 1, 3 * 2 + 1]


def test_a_batch_that_devices_do_not_divide_uses_fewer_and_says_so(
    capsys, eight_devices
):
    trainer = make(nn.Dense(3))
    trainer.fit(X[:60], Y[:60], batch_size=30, verbose=2)
    assert len(trainer.state.step.devices()) == 6
    out = capsys.readouterr().out
    assert " · 6 \N{MULTIPLICATION SIGN} cpu" in out
    assert (
        "6 of 8 devices are used, to divide batches of 30 evenly; batch_size=32 would "
        "use all" in out
    )
    one = make(nn.Dense(3), devices=1)
    one.fit(X[:60], Y[:60], batch_size=30, verbose=0)
    close(moved(trainer.state), moved(one.state))
    # The next one may divide among all again, and takes the state along.
    trainer.fit(X, Y, batch_size=16, verbose=2)
    assert len(trainer.state.step.devices()) == 8
    assert "devices are used" not in capsys.readouterr().out
    one.fit(X, Y, batch_size=16, verbose=0)
    close(moved(trainer.state), moved(one.state))


def test_chosen_devices_do_not_divide_the_batch():
    trainer = make(nn.Dense(3), devices=8)
    line = r"Write batch_size=32, or Trainer\(model, devices=6\)\."
    with pytest.raises(ValueError, match=r"batch_size=30 .* over 8 devices\. " + line):
        trainer.fit(X, Y, batch_size=30, verbose=0)
    assert trainer.step == 0
    trainer.fit(X, Y, batch_size=32, verbose=0)
    assert trainer.step == 2


def test_the_line_to_write_works_where_there_are_few_examples():
    """A batch is never more than there are: 24 would become 20 again."""
    trainer = make(nn.Dense(3), devices=8)
    with pytest.raises(ValueError, match="over 8 devices") as caught:
        trainer.fit(X[:20], Y[:20], verbose=0)
    advised = re.search(r"batch_size=(\d+), or", str(caught.value))
    trainer.fit(X[:20], Y[:20], batch_size=int(advised[1]), verbose=0)
    assert trainer.step > 0


def test_the_first_lines_advise_nothing_that_cannot_be(capsys, eight_devices):
    make(nn.Dense(3)).fit(X[:20], Y[:20], verbose=2)
    out = capsys.readouterr().out
    assert "5 of 8 devices are used, to divide batches of 20 evenly" in out
    advised = int(re.search(r"batch_size=(\d+) would use all", out)[1])
    assert advised <= 20
    assert advised % 8 == 0


def test_a_trainer_is_saved_on_eight_and_loaded_on_one_and_back(tmp_path):
    saved = make(nn.Dense(3), devices=8)
    saved.train_on_batch(X[:16], Y[:16])
    saved.save(tmp_path / "eight")
    one = Trainer.load(tmp_path / "eight", nn.Dense(3), devices=1)
    assert one.state.step.devices() == {DEVICES[0]}
    same(moved(one.state), moved(saved.state))
    logs = one.train_on_batch(X[16:32], Y[16:32])
    one.save(tmp_path / "one")
    eight = Trainer.load(tmp_path / "one", nn.Dense(3), devices=8)
    assert eight.state.step.devices() == set(DEVICES)
    same(moved(eight.state), moved(one.state))
    # And what went on on one goes on on eight.
    assert saved.train_on_batch(X[16:32], Y[16:32]) == pytest.approx(logs, rel=1e-5)
    close(moved(saved.state), moved(one.state))
    assert eight.train_on_batch(X[:16], Y[:16]) == pytest.approx(
        one.train_on_batch(X[:16], Y[:16]), rel=1e-5
    )


# -------------------------------------------------------- jax_default_device


@pytest.mark.parametrize("inside", [True, False])
def test_the_default_device_is_honoured(inside, eight_devices):
    """Whether or not it is still set when the trainer is used."""
    with jax.default_device(DEVICES[3]):
        trainer = make(nn.Dense(3))
        if inside:
            trainer.fit(X, Y, batch_size=16, verbose=0)
            trainer.evaluate(X, Y)
    if not inside:
        trainer.fit(X, Y, batch_size=16, verbose=0)
        trainer.evaluate(X, Y)
    assert trainer.state.step.devices() == {DEVICES[3]}
    assert trainer.compiles == {"train": 1, "eval": 1, "predict": 0}


def test_devices_that_were_chosen_win_over_the_default_device():
    with jax.default_device(DEVICES[3]):
        trainer = make(nn.Dense(3), devices=1)
        trainer.fit(X, Y, batch_size=16, verbose=0)
    assert trainer.state.step.devices() == {DEVICES[0]}


def test_a_default_platform_is_a_default_device():
    with jax.default_device("cpu"):
        assert find_placement().devices == (DEVICES[0],)


def test_execution_is_not_saved_and_can_be_given_on_load(tmp_path):
    trainer = make(nn.Dense(3), devices=2, steps_per_call=3, prefetch=1, device_data=0)
    trainer.fit(X, Y, batch_size=16, verbose=0)
    trainer.save(tmp_path / "run.msgpack")
    plain = Trainer.load(tmp_path / "run.msgpack", nn.Dense(3))
    assert plain._execution == make(nn.Dense(3))._execution
    assert len(plain.state.step.devices()) == 1
    asked = Trainer.load(
        tmp_path / "run.msgpack", nn.Dense(3), devices=4, steps_per_call=5
    )
    assert asked._execution.steps_per_call == 5
    assert len(asked.state.step.devices()) == 4
    names = inspect.signature(Trainer).parameters
    assert {"devices", "steps_per_call", "device_data", "prefetch"} < set(names)
