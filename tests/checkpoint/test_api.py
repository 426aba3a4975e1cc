"""Files: exact round trips, strict reading, nothing lost on the way."""

import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

from flaxfit import checkpoint
from flaxfit._core.errors import CheckpointError
from flaxfit._core.types import TrainState

META = {
    "history": {"loss": [0.5, float("inf")]},
    "name": "é",
    "best": None,
}


def make_state(params=None, opt_state=(), collections=None, rng=None):
    return TrainState(
        step=jnp.int32(7),
        params={"w": jnp.arange(6.0).reshape(2, 3)} if params is None else params,
        collections=collections or {},
        opt_state=opt_state,
        rng=jax.random.key(3) if rng is None else rng,
    )


def abstract(state):
    return jax.eval_shape(lambda state: state, state)


def plain(meta):
    """Meta without what the writer adds."""
    return {k: v for k, v in meta.items() if k not in ("format", "leaves")}


def read_meta(path):
    return plain(checkpoint.load(path).meta)


def round_trip(path, state, meta=META):
    checkpoint.save(path, state, meta)
    read = checkpoint.load(path)
    assert plain(read.meta) == meta
    return checkpoint.restore(read.state, abstract(state))[0]


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(y, jax.Array)
        assert jax.typeof(x) == jax.typeof(y)
        if jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


STATES = {
    "dtypes": lambda: make_state(
        {
            name: jnp.asarray([[0, 1, 3]], name)
            for name in ("bfloat16", "float16", "int8", "bool", "complex64", "int4")
        }
    ),
    "shapes": lambda: make_state(
        {
            "empty": jnp.zeros((0, 3)),
            "scalar": jnp.float32(2),
            "nan": jnp.full(2, jnp.nan),
        }
    ),
    "nesting": lambda: make_state(
        {"list": [jnp.ones(1) * i for i in range(11)], "none": None, "of": ({}, [])}
    ),
    "frozen dict": lambda: make_state(flax.core.freeze({"a": {"b": jnp.ones(2)}})),
    "names": lambda: make_state(
        {"a/b": jnp.ones(1), "a": {"b": jnp.zeros(1)}, "": {3: jnp.ones(2)}}
    ),
    "boxes": lambda: make_state({"w": nn.Partitioned(jnp.ones(2), names=("data",))}),
    "collections": lambda: make_state(
        collections={"batch_stats": {"bn": {"mean": jnp.ones(3)}}}
    ),
    "ordered dict": lambda: make_state(
        opt_state=OrderedDict(
            z=optax.adam(1e-3).init({"w": jnp.ones(2)}), a=optax.EmptyState()
        )
    ),
    "keys": lambda: make_state(
        opt_state=optax.add_noise(0.1, 0.5, key=jax.random.key(1)).init(jnp.ones(1)),
        rng=jax.random.split(jax.random.key(5, impl="rbg"), 3),
    ),
    "old keys": lambda: make_state(rng=jax.random.PRNGKey(1)),
    "named_chain": lambda: make_state(
        opt_state=optax.named_chain(
            ("a", optax.adam(1e-3)), ("b", optax.sgd(0.1))
        ).init({"w": jnp.ones(2)})
    ),
    "masked": lambda: make_state(
        opt_state=optax.MultiSteps(
            optax.partition(
                {"a": optax.adamw(1e-3), "b": optax.set_to_zero()}, {"w": "a", "v": "b"}
            ),
            2,
        ).init({"w": jnp.ones(2), "v": jnp.ones(1)})
    ),
    "lbfgs": lambda: make_state(opt_state=optax.lbfgs().init({"w": jnp.ones(2)})),
    "weak": lambda: make_state(
        {
            "w": jnp.asarray(1.5),
            "i": jnp.asarray(2),
            "v": jnp.broadcast_to(1.5, (2,)),
            "c": jnp.asarray(1j),
        }
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_comes_back_to_the_bit(name, tmp_path):
    state = STATES[name]()
    assert_identical(state, round_trip(tmp_path / "run.msgpack", state))


def test_a_restored_state_compiles_nothing_and_can_be_donated(tmp_path):
    state = STATES["weak"]()
    restored = round_trip(tmp_path / "run", state)
    step = jax.jit(lambda state: state.replace(step=state.step + 1), donate_argnums=0)
    assert step(restored).step == 8
    assert step(state).step == 8
    assert step._cache_size() == 1


def test_scalars_and_numpy_arrays_come_back_as_jax_arrays(tmp_path):
    params = {
        "int": 3,
        "float": 0.5,
        "complex": 1 + 2j,
        "bool": True,
        "numpy": np.float32(2.5),
        "big-endian": np.arange(3, dtype=">f4"),
        "transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    }
    path = tmp_path / "run"
    checkpoint.save(path, make_state(params), {})
    restored = checkpoint.restore(checkpoint.load(path).state, make_state(params))[0]
    expected = jax.tree.map(
        lambda x: jax.jit(lambda y: y)(x),
        {**params, "big-endian": np.arange(3, dtype="f4")},
    )
    for name, value in restored.params.items():
        assert isinstance(value, jax.Array)
        assert value.aval == expected[name].aval
        np.testing.assert_array_equal(value, params[name])


def test_meta_comes_back_in_plain_types(tmp_path):
    path = tmp_path / "run"
    checkpoint.save(path, make_state(), {"t": (1, 2), 3: np.float32(0.5), "b": b"x"})
    assert read_meta(path) == {"t": [1, 2], "3": 0.5, "b": b"x"}


def test_flax_reads_the_file_without_flaxfit(tmp_path):
    state = make_state(opt_state=optax.adam(1e-3).init({"w": jnp.ones(2)}))
    path = tmp_path / "run"
    checkpoint.save(path, state, META)
    read = serialization.from_bytes({"state": state}, path.read_bytes())["state"]
    np.testing.assert_array_equal(read.params["w"], state.params["w"])
    np.testing.assert_array_equal(read.opt_state[0].mu["w"], np.zeros(2))
    assert read.rng["key_impl"] == "threefry2x32"
    # Without keys the bytes of the state are exactly those of Flax.
    checkpoint.save(path, state.replace(rng=jnp.zeros(2, jnp.uint32)), {})
    flax_state = state.replace(rng=np.zeros(2, np.uint32))
    assert serialization.to_bytes(flax_state) in path.read_bytes()


# Writing


def test_a_path_may_be_text_in_folders_yet_to_be_made(tmp_path):
    path = os.path.join(tmp_path, "a", "b", "run")
    checkpoint.save(path, make_state(), {})
    assert os.listdir(os.path.dirname(path)) == ["run"]
    assert read_meta(path) == {}


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    checkpoint.save(tmp_path / "link", make_state(), {})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "run").is_file()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    call, error, tmp_path, monkeypatch
):
    path = tmp_path / "run"
    checkpoint.save(path, make_state(), META)

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(type(error)):
            checkpoint.save(path, make_state(), {})
    assert os.listdir(tmp_path) == ["run"]
    assert read_meta(path) == META


def test_file_and_folder_are_on_the_disk_before_save_returns(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        calls.append(
            "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        )
        fsync(descriptor)

    def record_replace(source, target):
        assert Path(source).parent == Path(target).parent
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    checkpoint.save(tmp_path / "run", make_state(), {})
    assert calls == ["file", "replace", "folder"]


def deleted_array():
    array = jnp.ones(3)
    array.delete()
    return array


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        (np.array([object()]), "params/a/0, an array of dtype object"),
        (np.array(["x"]), "params/a/0, an array of dtype <U1"),
        (np.zeros(1, "M8[s]"), r"params/a/0, an array of dtype datetime64"),
        ({1, 2}, "params/a/0, a set: it is not an array"),
        ("text", "params/a/0, a str: it is not an array"),
        (
            {1: jnp.ones(1), "1": jnp.ones(1)},
            "params/a/0, a dict: Dict keys do not have a unique string representation",
        ),
        ({"__msgpack_chunked_array__": jnp.ones(1)}, "params/a/0, a dict: the name"),
        (2**70, "an integer of more than 64 bits"),
    ],
)
def test_what_cannot_be_written_is_named(leaf, text, tmp_path):
    path = tmp_path / "run"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointError, match=text):
        checkpoint.save(path, make_state({"a": [leaf]}), {})
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["run"]


def test_a_deleted_array_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"params/w, .*has been deleted"):
        checkpoint.save(tmp_path / "run", make_state({"w": deleted_array()}), {})


def test_meta_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="meta/a/1, a set: meta holds dicts"):
        checkpoint.save(tmp_path / "run", make_state(), {"a": [1, {2}]})


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"is a folder; give the file.*run\.msgp"):
        checkpoint.save(tmp_path, make_state(), {})
    with pytest.raises(CheckpointError, match="is a folder; give the file"):
        checkpoint.load(tmp_path)


# Reading


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"There is no file .*nothing"):
        checkpoint.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "its 0 bytes are not a whole msgpack"),
        (b"<!DOCTYPE html>", "looks like an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"PK\x03\x04rest", "looks like a zip file"),
        (b"\x89HDF\r\n", "looks like an HDF5 file"),
        (b'{"a": 1}', "looks like a JSON file"),
        (pickle.dumps({"a": 1}), "looks like a Python pickle"),
        (b"\x91" * 3000, "holds a list"),
        (serialization.msgpack_serialize([1]), "holds a list, not a map"),
        (
            serialization.to_bytes({"params": {"w": np.ones(2)}, "step": 1}),
            r"holds \['params', 'step'\], as a file of plain flax.serialization.to_by",
        ),
        (serialization.msgpack_serialize({"state": {}}), r"holds \['state'\]"),
    ],
)
def test_a_file_of_something_else_says_what_it_is(data, text, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=text):
        checkpoint.load(path)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "run"
    checkpoint.save(path, make_state(), META)
    data = path.read_bytes()
    for length in range(1, len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoint.load(path)


def read_into(path, state, template):
    checkpoint.save(path, state, {})
    return checkpoint.restore(checkpoint.load(path).state, template)[0]


def test_all_differences_are_listed_at_once(tmp_path):
    saved = make_state(
        {
            "same": jnp.ones(1),
            "old": jnp.ones(3),
            "shape": jnp.ones((2, 3)),
            "dtype": jnp.ones(2),
            "gone": None,
        }
    )
    template = make_state(
        {
            "same": jnp.ones(1),
            "new": jnp.ones((), jnp.int32),
            "shape": jnp.ones((3, 2)),
            "dtype": jnp.ones(2, jnp.bfloat16),
            "gone": jnp.ones(1),
        },
        rng=jax.random.key(0, impl="rbg"),
    )
    with pytest.raises(CheckpointError) as caught:
        read_into(tmp_path / "run", saved, abstract(template))
    assert str(caught.value).splitlines() == [
        "The file does not fit this trainer:",
        "  params/dtype: float32[2] in the file, bfloat16[2] here",
        "  params/gone: nothing in the file, float32[1] here",
        "  params/new: nothing in the file, int32[] here",
        "  params/old: float32[3] in the file, nothing here",
        "  params/shape: float32[2,3] in the file, float32[3,2] here",
        "  rng: key<fry>[] in the file, key<rbg>[] here",
        "Build the model as it was when the file was saved.",
    ]


def test_long_lists_are_cut(tmp_path):
    many = make_state({f"layer_{i:02}": jnp.ones(1) for i in range(25)})
    with pytest.raises(
        CheckpointError, match=r"layer_19: .*\n  ... and 5 more\n"
    ) as err:
        read_into(tmp_path / "run", many, make_state({}))
    assert "layer_20" not in str(err.value)


def test_another_optimizer_is_called_that(tmp_path):
    params = {"w": jnp.ones(2)}
    saved = make_state(opt_state=optax.adam(1e-3).init(params))
    template = make_state(opt_state=optax.sgd(1e-3, momentum=0.9).init(params))
    with pytest.raises(
        CheckpointError, match=r"opt_state/0/trace/w.*\n.*Only the optim"
    ):
        read_into(tmp_path / "run", saved, template)


def test_leaves_a_state_cannot_hold_do_not_fit(tmp_path):
    path = tmp_path / "run"
    checkpoint.save(path, make_state({"w": jnp.ones(1), "v": 1.0}), {})
    raw = checkpoint.load(path).state
    raw["params"] = {"w": "text", "v": 1}
    raw["rng"] = {"key_data": np.zeros(3, np.uint32), "key_impl": "threefry2x32"}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(raw, make_state({"w": jnp.ones(1), "v": 1.0}))
    assert "params/w: str[] in the file, float32[1] here" in str(caught.value)
    assert "params/v: int32[] in the file, float32[] here" in str(caught.value)
    assert "rng: unreadable key of threefry2x32[] in the file" in str(caught.value)


def test_rng_of_another_implementation_with_data_of_the_same_shape(tmp_path):
    saved = make_state(rng=jax.random.key(0, impl="unsafe_rbg"))
    with pytest.raises(
        CheckpointError, match=r"rng: key<urbg>\[\] .*key<rbg>\[\] here"
    ):
        read_into(
            tmp_path / "run", saved, make_state(rng=jax.random.key(0, impl="rbg"))
        )


# Snapshots


def test_a_copied_snapshot_outlives_its_state(tmp_path):
    state = make_state()
    taken = checkpoint.snapshot(state, {"best": {"w": jnp.ones(2)}}, copy=True)
    assert taken.leaves == (
        "int32[] step",
        "float32[2,3] params/w",
        "key<threefry2x32>[] rng",
        "float32[2] extra/best/w",
    )
    assert taken.nbytes == 4 + 24 + 8 + 8
    pointer = state.params["w"].unsafe_buffer_pointer()
    assert taken.state["params"]["w"].ctypes.data != pointer
    jax.tree.map(lambda leaf: leaf.delete(), state)
    checkpoint.write(tmp_path / "run", taken, META)
    read = checkpoint.load(tmp_path / "run")
    np.testing.assert_array_equal(
        read.state["params"]["w"], np.arange(6.0).reshape(2, 3)
    )
    np.testing.assert_array_equal(read.extra["best"]["w"], [1, 1])
    assert read.meta["leaves"] == list(taken.leaves)


def test_sharded_arrays_come_to_the_host_whole(tmp_path, eight_devices):
    mesh = jax.make_mesh((8,), ("data",))
    for spec in (jax.P("data"), jax.P()):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        array = jax.device_put(jnp.arange(16.0), sharding)
        taken = checkpoint.snapshot({"params": {"w": array}}, copy=True)
        host = taken.state["params"]["w"]
        np.testing.assert_array_equal(host, np.arange(16.0))
        shards = [s.data.unsafe_buffer_pointer() for s in array.addressable_shards]
        assert host.ctypes.data not in shards


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "complex64"])
def test_the_first_leaf_that_training_has_broken(dtype):
    def leaf(value, at=300_000):
        return jnp.zeros(400_000, dtype).at[at].set(value)

    def found(**fields):
        return checkpoint.nonfinite_leaf(checkpoint.snapshot(fields, copy=False))

    good = leaf(1)
    assert found(params={"a": good}, opt_state={"m": good}, collections={}) is None
    assert found(params={"a": good, "b": leaf(jnp.nan)}) == "params/b"
    assert found(params={"a": good}, opt_state=[leaf(jnp.nan)]) == "opt_state/0"
    if dtype != "float8_e4m3fn":  # It has no infinity.
        assert found(params={"a": leaf(jnp.inf)}) == "params/a"
        assert found(params={"a": good}, opt_state=[leaf(jnp.inf)]) is None


def test_a_sum_that_overflows_is_not_taken_for_an_infinity():
    params = {"w": jnp.full(2000, 1e38), "h": jnp.full(2000, 6e4, jnp.float16)}
    taken = checkpoint.snapshot({"params": params}, copy=False)
    assert checkpoint.nonfinite_leaf(taken) is None


class Trap(NamedTuple):
    name: jax.Array
    fields: jax.Array
    values: jax.Array


def test_what_could_not_come_back_is_found_without_values():
    good = make_state(opt_state=optax.adam(1e-3).init({"w": jnp.ones(2)}))
    checkpoint.check_writable(abstract(good))
    trap = Trap(*[jnp.ones(1)] * 3)
    with pytest.raises(CheckpointError, match=r"opt_state/0, a Trap: Flax cannot read"):
        checkpoint.check_writable(abstract(make_state(opt_state=(trap,))))
    partial = jax.tree_util.Partial(jnp.sum, jnp.ones(1))
    with pytest.raises(CheckpointError, match="Cannot write opt_state/"):
        checkpoint.check_writable(abstract(make_state(opt_state=partial)))


# Restoring in part


def encoder(name, head=2, *, value=0.0):
    params = {
        name: {"kernel": jnp.full((2, 2), value)},
        "head": {"kernel": jnp.full((2, head), value)},
    }
    stats = {"batch_stats": {name: {"mean": jnp.full(2, value)}}}
    tx = optax.adam(1e-3)
    _, opt_state = tx.update(
        jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params), tx.init(params)
    )
    return make_state(params, opt_state, stats)


def read_state(tmp_path, state):
    checkpoint.save(tmp_path / "run", state, {})
    return checkpoint.load(tmp_path / "run").state


@pytest.mark.parametrize("old", ["encoder", "params/encoder", "encoder/"])
def test_a_renamed_layer_takes_its_statistics_and_moments_along(old, tmp_path):
    raw = read_state(tmp_path, encoder("encoder", value=2.0))
    template = encoder("backbone")
    restored, report = checkpoint.restore(raw, template, rename={old: "backbone"})
    assert_identical(encoder("backbone", value=2.0), restored)
    assert dict(report.renamed) == {
        "params/encoder/kernel": "params/backbone/kernel",
        "collections/batch_stats/encoder/mean": "collections/batch_stats/backbone/mean",
        "opt_state/0/mu/encoder/kernel": "opt_state/0/mu/backbone/kernel",
        "opt_state/0/nu/encoder/kernel": "opt_state/0/nu/backbone/kernel",
    }
    assert len(report.loaded) == len(jax.tree.leaves(template))


def test_a_part_renamed_to_none_is_left_as_it_is(tmp_path):
    raw = read_state(tmp_path, encoder("encoder", head=5, value=2.0))
    here = encoder("encoder", head=3, value=1.0)
    rename = {"head": None}
    restored, report = checkpoint.restore(raw, here, rename=rename, current=here)
    assert restored.params["head"] is not None
    np.testing.assert_array_equal(restored.params["head"]["kernel"], np.ones((2, 3)))
    np.testing.assert_array_equal(
        restored.params["encoder"]["kernel"], np.full((2, 2), 2.0)
    )
    assert report.skipped == (
        "params/head/kernel",
        "opt_state/0/mu/head/kernel",
        "opt_state/0/nu/head/kernel",
    )
    with pytest.raises(ValueError, match=r"Write restore\(\.\.\., current=state\)"):
        checkpoint.restore(raw, here, rename=rename)


def test_only_some_fields(tmp_path):
    saved = encoder("encoder", value=2.0)
    raw = read_state(tmp_path, {"params": saved.params, "collections": {}})
    here = encoder("encoder", value=1.0).replace(collections={})
    restored, _ = checkpoint.restore(
        raw, here, parts=("params", "collections"), current=here
    )
    assert_identical(here.replace(params=saved.params), restored)
    with pytest.raises(CheckpointError, match=r"holds weights only.*params_only=True"):
        checkpoint.restore(raw, here)


def test_what_fits_is_loaded_and_the_rest_is_reported(tmp_path):
    raw = read_state(tmp_path, encoder("encoder", head=5, value=2.0))
    here = encoder("backbone", head=3, value=1.0)
    restored, report = checkpoint.restore(raw, here, strict=False, current=here)
    np.testing.assert_array_equal(restored.params["head"]["kernel"], np.ones((2, 3)))
    assert report.loaded == ("step", "opt_state/0/count", "rng")
    assert report.mismatched["params/head/kernel"] == ("float32[2,5]", "float32[2,3]")
    assert "params/backbone/kernel" in report.missing
    assert "params/encoder/kernel" in report.unexpected
    assert "  mismatched      3  params/head/kernel: float32[2,5] in" in repr(report)
    with pytest.raises(ValueError, match=r"Write restore\(\.\.\., current=state\)"):
        checkpoint.restore(raw, here, strict=False)


def test_a_rename_that_does_not_fit_the_file(tmp_path):
    raw = read_state(tmp_path, encoder("encoder"))
    here = encoder("encoder")
    with pytest.raises(
        CheckpointError, match=r"matches nothing.*Did you mean 'encoder"
    ):
        checkpoint.restore(raw, here, rename={"encodr": "x"})
    with pytest.raises(CheckpointError, match="puts both params/encoder/kernel and"):
        checkpoint.restore(raw, here, rename={"encoder": "x", "head": "x"})
    with pytest.raises(CheckpointError, match=r"matches nothing"):
        checkpoint.restore(raw, here, rename={"enc": "x"})


def test_put_brings_leaves_to_their_place(tmp_path, eight_devices):
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    state = STATES["weak"]()
    template = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), state)
    raw = read_state(tmp_path, state)
    restored, _ = checkpoint.restore(
        raw, template, put=lambda host, like: jax.device_put(host, like.sharding)
    )
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
        assert a.sharding == b.sharding
        assert a.aval.weak_type == b.aval.weak_type


def test_no_leaf_keeps_the_bytes_of_the_file(tmp_path):
    sizes = [*range(16, 80), *range(2**15, 2**15 + 64)]
    state = make_state({f"{size}": jnp.ones(size) for size in sizes})
    raw = read_state(tmp_path, state)
    restored, _ = checkpoint.restore(raw, abstract(state))
    for name, leaf in restored.params.items():
        assert leaf.unsafe_buffer_pointer() != raw["params"][name].ctypes.data


# Parameters alone


@pytest.mark.parametrize(
    "kind", ["ours", "params", "variables", "TrainState", "nested"]
)
def test_parameters_of_any_file(kind, tmp_path):
    params = {"Dense_0": {"kernel": np.ones((2, 3), np.float32)}}
    variables = {"params": params, "batch_stats": {"mean": np.ones(2)}}
    path = tmp_path / "file"
    if kind == "ours":
        checkpoint.save(path, make_state(params), META)
    else:
        tree = {
            "params": params,
            "variables": variables,
            "TrainState": {"step": 3, "params": params, "opt_state": {}},
            "nested": {"step": 3, "params": variables, "opt_state": {}},
        }[kind]
        path.write_bytes(serialization.to_bytes(tree))
    loaded = checkpoint.load_params(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    np.testing.assert_array_equal(loaded["Dense_0"]["kernel"], np.ones((2, 3)))
    assert loaded["Dense_0"]["kernel"].flags.writeable


@pytest.mark.parametrize("tree", [{}, {"a": 3}, {"params": {"a": "text"}}])
def test_a_file_without_parameters(tree, tmp_path):
    (tmp_path / "file").write_bytes(serialization.to_bytes(tree))
    with pytest.raises(CheckpointError, match="holds no parameters"):
        checkpoint.load_params(tmp_path / "file")


@pytest.mark.slow
def test_a_save_needs_little_memory_beyond_the_state(tmp_path):
    code = (
        "import sys, resource, numpy as np; from flaxfit import checkpoint\n"
        "state = {'params': {str(i): np.ones(2**22, 'f4') for i in range(16)}}\n"
        "checkpoint.save(sys.argv[1], {'params': {'a': np.ones(9)}}, {})\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); checkpoint.save(sys.argv[1], state, {})\n"
        "print(peak() - before)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024
