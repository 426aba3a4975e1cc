"""Files: exact round trips, strict reading, nothing lost on the way."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

from flaxfit import checkpoint
from flaxfit._errors import CheckpointError
from flaxfit._types import TrainState

META = {
    "format": 1,
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


def round_trip(path, state, meta=META):
    checkpoint.save(path, state, meta)
    read, raw = checkpoint.load(path)
    assert read == meta
    return checkpoint.restore(raw, abstract(state))


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
    restored = checkpoint.restore(checkpoint.load(path)[1], make_state(params))
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
    assert checkpoint.load(path)[0] == {"t": [1, 2], "3": 0.5, "b": b"x"}


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
    plain = state.replace(rng=np.zeros(2, np.uint32))
    assert path.read_bytes().endswith(serialization.to_bytes(plain))


# Writing


def test_a_path_may_be_text_in_folders_yet_to_be_made(tmp_path):
    path = os.path.join(tmp_path, "a", "b", "run")
    checkpoint.save(path, make_state(), {})
    assert os.listdir(os.path.dirname(path)) == ["run"]
    assert checkpoint.load(path)[0] == {}


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
    assert checkpoint.load(path)[0] == META


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
        ({1, 2}, "params/a/0, a set: it is no array"),
        ("text", "params/a/0, a str: it is no array"),
        (
            {1: jnp.ones(1), "1": jnp.ones(1)},
            "a TrainState: Dict keys do not have a unique string representation. A",
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
        (b"", "0 bytes that are no whole msgpack"),
        (b"<!DOCTYPE html>", "looks like an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"PK\x03\x04rest", "looks like a zip file"),
        (b"\x89HDF\r\n", "looks like an HDF5 file"),
        (b'{"a": 1}', "looks like a JSON file"),
        (pickle.dumps({"a": 1}), "looks like a Python pickle"),
        (b"\x91" * 3000, "no whole msgpack file"),
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
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="cut off, damaged"):
            checkpoint.load(path)


def read_into(path, state, template):
    checkpoint.save(path, state, {})
    return checkpoint.restore(checkpoint.load(path)[1], template)


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
    _, raw = checkpoint.load(path)
    raw["params"] = {"w": "text", "v": 1}
    raw["rng"] = {"key_data": np.zeros(3, np.uint32), "key_impl": "threefry2x32"}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(raw, make_state({"w": jnp.ones(1), "v": 1.0}))
    assert "params/w: str[] in the file, float32[1] here" in str(caught.value)
    assert "params/v: int32[] in the file, float32[] here" in str(caught.value)
    assert "rng: unreadable key of threefry2x32[] in the file" in str(caught.value)
