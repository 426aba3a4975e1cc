"""A state that is not what the model wants, or no state at all (F13, F14, F15)."""

import collections
import enum
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from content import digest_of
from harness import HERE, Outcome, Tally, fresh
from make_golden import golden_state

import flaxfit
from flaxfit import checkpoint
from flaxfit._core.types import TrainState

GOLDEN = HERE / "golden"
_PARAMS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, "f4")}


def _state(params: Any, opt_state: Any = (), **collections: Any) -> TrainState:
    rng = np.arange(2, dtype=np.uint32)
    return TrainState(np.int32(3), params, collections, opt_state, rng)


def _read(folder: Path, state: TrainState) -> dict[str, Any]:
    path = folder / "run.msgpack"
    checkpoint.save(path, state, {"step": 3})
    return checkpoint.load(path).state


# F13: what was saved does not fit


class _Drift(NamedTuple):
    """A saved state, a template, and what the error must say of each difference.

    Attributes:
      label: for people.
      saved: the params saved.
      wanted: the params of the template.
      texts: parts of the error's text; none where it may load.
    """

    label: str
    saved: Any
    wanted: Any
    texts: tuple[str, ...]


def _drifts() -> Iterator[_Drift]:
    f32, f16 = np.float32, jnp.bfloat16

    def drift(label: str, saved: Any, wanted: Any, *texts: str) -> _Drift:
        return _Drift(label, saved, wanted, texts)

    def ones(*shape: int, dtype: Any = f32) -> np.ndarray:
        return np.ones(shape, dtype)

    yield drift("shape", {"w": ones(2, 3)}, {"w": ones(3, 2)},
                "params/w", "float32[2,3]", "float32[3,2]")  # fmt: skip
    yield drift("rank", {"w": ones(2, 3)}, {"w": ones(5)},
                "params/w", "float32[2,3]", "float32[5]")  # fmt: skip
    yield drift("f32 to bf16", {"w": ones(2)}, {"w": ones(2, dtype=f16)},
                "params/w", "float32[2]", "bfloat16[2]")  # fmt: skip
    yield drift("f32 to int32", {"w": ones(2)}, {"w": ones(2, dtype=np.int32)},
                "params/w", "float32[2]", "int32[2]")  # fmt: skip
    yield drift("extra", {"w": ones(2), "x": ones(1)}, {"w": ones(2)},
                "params/x", "float32[1]")  # fmt: skip
    yield drift("a whole subtree", {"w": {"a": ones(2), "b": ones(1)}}, {},
                "params/w/a", "float32[2]", "params/w/b", "float32[1]")  # fmt: skip
    yield drift("an array for None", {"w": ones(2)}, {"w": None},
                "params/w", "float32[2]")  # fmt: skip
    yield drift("None for an array", {"w": None}, {"w": ones(2)},
                "params/w", "float32[2]")  # fmt: skip
    yield drift("a dict for an array", {"w": {"a": ones(2)}}, {"w": ones(2)},
                "params/w/a", "params/w:", "float32[2]")  # fmt: skip
    yield drift("a string for an array", "text", {"w": ones(2)},
                "params/w", "str", "float32[2]")  # fmt: skip
    # A list is a dict in Flax's files: these two are the same.
    yield drift("a dict for a list", {"w": {"0": ones(1), "1": ones(2)}},
                {"w": [ones(1), ones(2)]})  # fmt: skip
    yield drift("an int for a float", {"w": 1}, {"w": 1.0},
                "params/w", "int32[]", "float32[]")  # fmt: skip
    yield drift("missing", {"w": ones(2)}, {"w": ones(2), "x": ones(1)},
                "params/x", "float32[1]")  # fmt: skip
    yield drift("length of a list", {"w": [ones(1)]}, {"w": [ones(1), ones(2)]},
                "params/w/1", "float32[2]")  # fmt: skip
    yield drift("a renamed layer", {"old": {"w": ones(2)}}, {"new": {"w": ones(2)}},
                "params/old/w", "params/new/w", "float32[2]")  # fmt: skip
    yield drift("an array for a dict", {"w": ones(2)}, {"w": {"a": ones(2)}},
                "params/w:", "params/w/a", "float32[2]")  # fmt: skip
    layers = {f"layer_{i}": {"kernel": ones(i, 2)} for i in range(1, 6)}
    wider = {f"layer_{i}": {"kernel": ones(i, 3)} for i in range(1, 6)}
    texts = [f"params/layer_{i}/kernel" for i in range(1, 6)]
    yield drift("every layer", layers, wider, *texts, "float32[5,2]", "float32[5,3]")
    yield drift("added layers", layers, {**layers, "x": ones(1), "y": ones(2)},
                "params/x", "params/y")  # fmt: skip
    yield drift("several kinds at once",
                {"a": ones(2), "b": ones(2), "c": ones(2)},
                {"a": ones(3), "b": ones(2, dtype=f16), "d": ones(4)},
                "params/a", "params/b", "params/c", "params/d")  # fmt: skip


def _optimizers() -> dict[str, optax.GradientTransformation]:
    return {
        "sgd": optax.sgd(0.1),
        "sgd with momentum": optax.sgd(0.1, momentum=0.9),
        "adamw": optax.adamw(0.1),
        "clip and adam": optax.chain(optax.clip(1.0), optax.adam(0.1)),
        "adam with a schedule": optax.adam(optax.cosine_decay_schedule(0.1, 9)),
        "lion": optax.lion(0.1),
        "rmsprop": optax.rmsprop(0.1),
    }


def f13_drift(trials: int, seed: int, folder: Path) -> Outcome:
    """16 mismatches, 7 other optimizers, renamed and added layers."""
    del trials, seed
    return fresh(_f13_drift, folder)


def _f13_drift(folder: Path) -> Outcome:
    tally = Tally()
    for drift in _drifts():
        with tally.trial(drift.label):
            _assert_refused(folder, drift)
        with tally.trial(f"{drift.label}, not strict"):
            _assert_intersection(folder, drift)
    adam = _state(_PARAMS, optax.adam(0.1).init(_PARAMS))
    for name, optimizer in _optimizers().items():
        with tally.trial(f"adam for {name}"):
            raw = _read(folder, adam)
            template = _state(_PARAMS, optimizer.init(_PARAMS))
            message = _refusal(raw, template)
            # AdamW keeps what Adam keeps.
            assert (message is None) == (name == "adamw"), message
            assert message is None or "opt_state/" in message, message
    with tally.trial("a collection that is not there any more"):
        raw = _read(folder, _state(_PARAMS, batch_stats={"mean": np.ones(2, "f4")}))
        message = _refusal(raw, _state(_PARAMS))
        assert message and "collections/batch_stats/mean" in message, message
    return tally.outcome()


def _raw_of(folder: Path, drift: _Drift) -> dict[str, Any]:
    if isinstance(drift.saved, str):  # No state holds text, a strange file might.
        raw = _read(folder, _state(drift.wanted))
        raw["params"] = {"w": drift.saved}
        return raw
    return _read(folder, _state(drift.saved))


def _assert_refused(folder: Path, drift: _Drift) -> None:
    message = _refusal(_raw_of(folder, drift), _state(drift.wanted))
    if message is None:
        assert not drift.texts, "it was loaded"
    for text in drift.texts:
        assert message is not None and text in message, (text, message)


def _refusal(raw: Any, template: TrainState) -> str | None:
    """Returns why `template` does not fit; None where it was restored."""
    try:
        restored, _ = checkpoint.restore(raw, template)
    except flaxfit.CheckpointError as err:
        return str(err)
    assert digest_of(restored) == digest_of(raw)
    return None


def _assert_intersection(folder: Path, drift: _Drift) -> None:
    """What fits is taken, the rest stays as it is, and a report says which."""
    raw = _raw_of(folder, drift)
    current = jax.tree.map(lambda x: jnp.asarray(x) * 0 + 7, _state(drift.wanted))
    restored, report = checkpoint.restore(
        raw, _state(drift.wanted), strict=False, current=current
    )
    saved = _flat(raw["params"])
    for path, now in _flat(restored.params).items():
        was, here = saved.get(path), _flat(current.params)[path]
        fits = was is not None and _spec(was) == _spec(here)
        np.testing.assert_array_equal(
            np.asarray(now), np.asarray(was if fits else here)
        )
    assert int(restored.step) == 3
    for text in drift.texts:
        if text.startswith("params/"):
            assert text.rstrip(":") in str(report), (text, str(report))


def _spec(leaf: Any) -> Any:
    dtype = jnp.result_type(leaf) if not isinstance(leaf, str) else "str"
    return np.shape(leaf), dtype


def _flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): leaf
        for path, leaf in leaves
    }


# F14: what may not be possible to save


class _Colour(enum.IntEnum):
    RED = 1


class _Odd(NamedTuple):
    """Flax takes a dict with these names for a namedtuple of 2022."""

    name: Any
    fields: Any
    values: Any


def _strange() -> dict[str, Callable[[], Any]]:
    array = np.arange(3, dtype=np.float32)
    return {
        "a set": lambda: {1, 2},
        "an OrderedDict": lambda: collections.OrderedDict(z=array, a=array + 1),
        "a defaultdict": lambda: collections.defaultdict(list, z=array),
        "an enum": lambda: _Colour.RED,
        "an array of str": lambda: np.array(["a", "bc"]),
        "an array of bytes": lambda: np.array([b"a", b"bc"]),
        "a typed key": lambda: jax.random.key(5),
        "typed keys of rbg": lambda: jax.random.split(jax.random.key(5, impl="rbg"), 3),
        "an old key": lambda: jax.random.PRNGKey(5),
        "an object": object,
        "an array of objects": lambda: np.array([object()]),
        "a function": lambda: len,
        "text": lambda: "text",
        "bytes": lambda: b"text",
        "a path": lambda: Path("x"),
        "big-endian": lambda: np.arange(3, dtype=">f4"),
        "big-endian int": lambda: np.arange(3, dtype=">i2"),
        "datetime": lambda: np.zeros(1, "M8[s]"),
        "timedelta": lambda: np.zeros(1, "m8[s]"),
        "a structured array": lambda: np.zeros(2, [("a", "i4"), ("b", "f4")]),
        "a namedtuple (name, fields, values)": lambda: _Odd(array, array, array),
        "a dict {name, fields, values}": lambda: {
            "name": array, "fields": array, "values": array
        },
        "2**63": lambda: 2**63,
        "2**64": lambda: 2**64,
        "2**70": lambda: 2**70,
        "-2**63": lambda: -(2**63),
        "a masked array": lambda: np.ma.array([1.0, 2.0], mask=[0, 1]),
        "Fortran order": lambda: np.asfortranarray(np.eye(3, dtype=np.float32)[:, :2]),
        "strides": lambda: np.arange(12, dtype=np.int32)[::-2],
        "float128": lambda: np.ones(2, np.longdouble),
        "float64": lambda: np.ones(2, np.float64),
        "no elements": lambda: np.zeros((0, 3), np.float16),
        "float8": lambda: jnp.ones(3, jnp.float8_e4m3fn),
        "int4": lambda: jnp.asarray([1, -3], jnp.int4),
        "a python complex": lambda: 1 + 2j,
        "nan": lambda: float("nan"),
        "empty containers": lambda: {"a": {}, "b": [], "c": ()},
        "a dict with int keys": lambda: {1: array, 2: array + 1},
        "keys that are the same as text": lambda: {1: array, "1": array},
        "a name with a slash": lambda: {"a/b": array, "a": {"b": array + 1}},
        "an empty name": lambda: {"": array},
        "the name of a split array": lambda: {"__msgpack_chunked_array__": array},
        "the names of a key": lambda: {"key_data": array, "key_impl": array},
        "a shape": lambda: jax.ShapeDtypeStruct((2,), jnp.float32),
        "a deleted array": lambda: _deleted(),
        "70 levels": lambda: _nested(70),
        "a thousand levels": lambda: _nested(900),
    }  # fmt: skip


def _deleted() -> jax.Array:
    array = jnp.ones(2)
    array.delete()
    return array


def _nested(depth: int) -> Any:
    node: Any = np.ones(1, np.float32)
    for _ in range(depth):
        node = {"a": node}
    return node


def f14_strange_states(trials: int, seed: int, folder: Path) -> Outcome:
    """A state with something strange comes back to the bit, or is refused by name."""
    del trials, seed
    return fresh(_f14_strange_states, folder)


def _f14_strange_states(folder: Path) -> Outcome:
    tally = Tally()
    for label, make in _strange().items():
        with tally.trial(label):
            state = _state({"good": np.ones(2, "f4"), "strange": [make()]})
            path = folder / "run.msgpack"
            path.unlink(missing_ok=True)
            refused = _refused_by(checkpoint.save, path, state, {"step": 3})
            if hasattr(checkpoint, "check_writable"):
                early = _refused_by(checkpoint.check_writable, state)
                # A deleted array is one to come; a shape stands for an array.
                differs = label in ("a deleted array", "a shape")
                found = f"check_writable: {early}; save: {refused}"
                assert bool(early) == bool(refused) or differs, found
            if refused:
                assert "params/strange/0" in refused, refused
                assert not list(folder.iterdir())
            else:
                _assert_comes_back(path, state)
    return tally.outcome()


def _refused_by(call: Callable[..., Any], *args: Any) -> str:
    try:
        call(*args)
    except flaxfit.CheckpointError as err:
        return str(err)
    return ""


def _assert_comes_back(path: Path, state: TrainState) -> None:
    restored, _ = checkpoint.restore(checkpoint.load(path).state, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for was, now in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        if _is_key(was):
            assert now.dtype == was.dtype
            was, now = jax.random.key_data(was), jax.random.key_data(now)
        # jax has float64 as float32, unless it is told otherwise.
        native = np.asarray(was).astype(np.asarray(was).dtype.newbyteorder("="))
        expected = np.asarray(jnp.asarray(was if _is_scalar(was) else native))
        assert np.asarray(now).dtype == expected.dtype, (now.dtype, expected.dtype)
        assert np.shape(now) == np.shape(was)
        assert np.asarray(now).tobytes() == expected.tobytes()


def _is_scalar(leaf: Any) -> bool:
    return type(leaf) in (bool, int, float, complex)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)


# F15: files of other versions


def f15_golden(trials: int, seed: int, folder: Path) -> Outcome:
    """Files of every released format, and one of a later one."""
    del trials, seed
    return fresh(_f15_golden, folder)


def _f15_golden(folder: Path) -> Outcome:
    tally = Tally()
    files = sorted(GOLDEN.glob("*.golden"))
    with tally.trial("there are golden files"):
        assert files
    for file in files:
        with tally.trial(file.name):
            found = checkpoint.load(file)
            state = golden_state()
            restored, _ = checkpoint.restore(found.state, state)
            assert found.meta["step"] == 7
            assert found.meta["history"] == {"loss": [0.5, 0.25, None]}
            for was, now in zip(
                jax.tree.leaves(state), jax.tree.leaves(restored), strict=True
            ):
                if _is_key(was):
                    was, now = jax.random.key_data(was), jax.random.key_data(now)
                assert np.asarray(was).tobytes() == np.asarray(now).tobytes()
        with tally.trial(f"{file.name} is written the same today"):
            again = folder / "again"
            checkpoint.save(again, golden_state(), dict(found.meta))
            assert checkpoint.load(again).meta.keys() == found.meta.keys()
        with tally.trial(f"{file.name} from the future"):
            future = folder / "future.msgpack"
            future.write_bytes(_from_the_future(file.read_bytes()))
            message = _refused_by(checkpoint.load, future)
            assert "format" in message and "2" in message, message
            assert "newer" in message or "later" in message, message
    return tally.outcome()


def _from_the_future(data: bytes) -> bytes:
    """The same file as format 2, with a checksum that is right."""
    one = b"\xa6format\x01"
    assert data.count(one) == 1
    data = data.replace(one, b"\xa6format\x02")
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "big")
