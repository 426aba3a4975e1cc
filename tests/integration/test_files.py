"""save and load of a whole trainer: what comes back, and what has to be said again."""

from typing import NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import numpy as np
import optax
import pytest

from flaxfit import CheckpointError, Loss, Trainer
from flaxfit._core.types import Batch
from flaxfit._runs.trainer_metadata import from_meta, to_meta

X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 16).astype(np.int32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    trainer = Trainer(nn.Dense(3), seed=5, metrics=["accuracy"], clip_norm=1.0)
    trainer.fit(X, Y, batch_size=8, verbose=0)
    path = tmp_path_factory.mktemp("files") / "run.msgpack"
    trainer.save(path)
    return trainer, path


def test_plain_flax_reads_the_file(saved):
    trainer, path = saved
    params = trainer.state.params
    zeros = {"state": {"params": jax.tree.map(np.zeros_like, params)}}
    read = flax.serialization.msgpack_restore(path.read_bytes())
    restored = flax.serialization.from_state_dict(
        zeros, {"state": {"params": read["state"]["params"]}}
    )
    jax.tree.map(np.testing.assert_array_equal, restored["state"]["params"], params)


def test_the_whole_state_comes_back(saved):
    trainer, path = saved
    loaded = Trainer.load(str(path), nn.Dense(3))
    assert loaded.step == 2
    before, after = trainer.state, loaded.state
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert a.dtype == b.dtype
        if not jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert a.weak_type == b.weak_type
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(*map(jax.random.key_data, (before.rng, after.rng)))
    assert loaded.evaluate(X, Y) == trainer.evaluate(X, Y)


def test_arguments_can_be_changed_on_load(saved):
    _, path = saved
    loaded = Trainer.load(path, nn.Dense(3), learning_rate=0.5, metrics=["f1"])
    history = loaded.fit(X, Y, batch_size=8, verbose=0).history
    assert list(history) == ["loss", "f1", "learning_rate"]
    assert history["learning_rate"] == [0.5]
    with pytest.raises(TypeError, match="Did you mean 'metrics'"):
        Trainer.load(path, nn.Dense(3), metrcs=["f1"])


def test_another_model_or_optimizer_is_named_path_by_path(saved):
    _, path = saved
    with pytest.raises(CheckpointError, match=r"kernel.*4,3.*4,5"):
        Trainer.load(path, nn.Dense(5), metrics=None)
    with pytest.raises(CheckpointError, match="opt_state"):
        Trainer.load(path, nn.Dense(3), optimizer="sgd")

    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Embed(3, 3)(ids)

    with pytest.raises(CheckpointError, match="that Tokens cannot take"):
        Trainer.load(path, Tokens())


def test_functions_and_objects_have_to_be_given_again(tmp_path):
    def loss(outputs, targets):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)

    path = tmp_path / "run.msgpack"
    trainer = Trainer(
        nn.Dense(3), loss=loss, optimizer=optax.sgd(0.1), metrics={"mine": loss}
    )
    trainer.fit(X, Y, verbose=0)
    trainer.save(path)
    with pytest.raises(CheckpointError, match=r"loss=loss, optimizer=.*, metrics="):
        Trainer.load(path, nn.Dense(3))
    loaded = Trainer.load(
        path, nn.Dense(3), loss=loss, optimizer=optax.sgd(0.1), metrics={"mine": loss}
    )
    assert loaded.evaluate(X, Y) == trainer.evaluate(X, Y)


def test_meta_holds_every_nesting_of_a_batch():
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, np.dtype("bfloat16"))

    example = Batch(
        inputs={"a": (array(8, 2), [array(8)]), "b": array(8, 1, 1)},
        targets=None,
        weights=jax.ShapeDtypeStruct((8,), np.float32),
    )
    config = {"seed": np.int64(3), "metrics": ["a", "b"], "loss": {"a": "mse"}}
    meta = to_meta(config, example, batch_size=8, opt_state=(optax.EmptyState(),))
    assert from_meta(meta, {}, "file") == (
        {"seed": 3, "metrics": ["a", "b"], "loss": {"a": "mse"}},
        example,
        8,
    )
    assert meta["versions"]["jax"] == jax.__version__
    with pytest.raises(CheckpointError, match="'config' is missing"):
        from_meta({}, {}, "file")
    config = {"loss": Loss("mse"), "rngs": {"a": len}}
    packed = to_meta(config, example, batch_size=8, opt_state=())
    with pytest.raises(CheckpointError, match=r"loss=<Loss>, rngs=<dict>"):
        from_meta(packed, {}, "file")


def test_nothing_to_save():
    with pytest.raises(ValueError, match="has seen no data yet"):
        Trainer(nn.Dense(3)).save("unused.msgpack")


def test_a_trainer_that_only_predicted(tmp_path):
    trainer = Trainer(nn.Dense(3))
    before = trainer.predict(X)
    trainer.save(tmp_path / "run.msgpack")
    loaded = Trainer.load(tmp_path / "run.msgpack", nn.Dense(3))
    np.testing.assert_array_equal(loaded.predict(X), before)
    loaded.fit(X, Y, verbose=0)
    assert loaded.step == 1


class Pair(NamedTuple):
    a: np.ndarray
    b: np.ndarray


def test_inputs_of_a_structure_that_a_file_cannot_hold(tmp_path):
    class Takes(nn.Module):
        @nn.compact
        def __call__(self, pair):
            return nn.Dense(3)(pair.a) + nn.Dense(3)(pair.b)

    batches = [(Pair(X, X), Y)]
    trainer = Trainer(Takes())
    trainer.fit(batches, verbose=0)
    trainer.save(tmp_path / "run.msgpack")
    loaded = Trainer.load(tmp_path / "run.msgpack", Takes())
    with pytest.raises(ValueError, match="has seen no data yet"):
        loaded.state
    assert loaded.evaluate(batches) == trainer.evaluate(batches)
    assert loaded.predict(Pair(X, X)).shape == (16, 3)
    assert loaded.step == 1


def test_a_state_assigned_after_load_is_not_taken_back(tmp_path):
    class Takes(nn.Module):
        @nn.compact
        def __call__(self, pair):
            return nn.Dense(3)(pair.a)

    batches = [(Pair(X, X), Y)]
    trainer = Trainer(Takes())
    trainer.fit(batches, verbose=0)
    trainer.save(tmp_path / "run.msgpack")
    loaded = Trainer.load(tmp_path / "run.msgpack", Takes())
    fresh = loaded.init(batches[0])
    assert loaded.step == 1
    ones = jax.tree.map(np.ones_like, fresh.params)
    loaded.state = fresh.replace(params=ones)
    loaded.evaluate(batches)
    jax.tree.map(np.testing.assert_array_equal, loaded.state.params, ones)
