"""`trainer.restore` and `Trainer.load`: whole, in part, under other names."""

import re

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training import train_state
from helpers.asserts import same
from helpers.data import labeled

from flaxfit import CheckpointError, ModelCheckpoint, Trainer, load_params

X, Y = labeled(16, 4)
SEVEN = labeled(16, 4, classes=7)[1]


class Net(nn.Module):
    classes: int = 3
    body: str = "body"

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(5, name=self.body)(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(self.classes, name="head")(x)


@pytest.fixture(scope="module")
def trained():
    trainer = Trainer(Net(), metrics=["accuracy"])
    trainer.fit(X, Y, batch_size=8, epochs=2, verbose=0)
    return trainer


@pytest.fixture
def file(trained, tmp_path):
    trained.save(tmp_path / "run.msgpack")
    return tmp_path / "run.msgpack"


def test_a_new_trainer_takes_the_whole_state(trained, file):
    trainer = Trainer(Net(), metrics=["accuracy"])
    report = trainer.restore(file)
    assert trainer.step == 4 and not report.missing and not report.unexpected
    assert "params/head/kernel" in report.loaded
    same(trainer.variables, trained.variables)
    trainer.fit(X, Y, batch_size=8, verbose=0)
    assert trainer.compiles["train"] == 1


def test_a_trained_trainer_goes_back(trained, file):
    trainer = Trainer.load(file, Net())
    trainer.fit(X, Y, batch_size=8, verbose=0)
    kept = trainer.state
    trainer.restore(file)
    same(trainer.variables, trained.variables)
    assert trainer.step == 4 and kept.step == 6
    trainer.fit(X, Y, batch_size=8, verbose=0)
    assert trainer.compiles["train"] == 1  # the state is of the same form


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "learning_rate": optax.cosine_decay_schedule(0.1, 100)},
        {"learning_rate": optax.cosine_decay_schedule(0.1, 100)},
        {"clip_norm": 1.0},
        {"optimizer": "lion"},
        {"optimizer": "rmsprop"},
        {"accumulate_steps": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_another_optimizer_begins_anew_with_the_weights(options, trained, file):
    trainer = Trainer(Net(), metrics=["accuracy"], **options)
    trainer.init((X, Y))
    with pytest.raises(CheckpointError, match="params_only=True"):
        trainer.restore(file)
    assert trainer.step == 0
    trainer.restore(file, params_only=True)
    same(trainer.variables, trained.variables)
    assert trainer.step == 0
    fresh = trainer.init((X, Y)).opt_state
    assert jax.tree.structure(trainer.state.opt_state) == jax.tree.structure(fresh)
    with pytest.raises(CheckpointError, match="params_only=True"):
        Trainer.load(file, Net(), **options)
    loaded = Trainer.load(file, Net(), params_only=True, **options)
    same(loaded.variables, trained.variables)


def test_a_head_of_its_own_and_a_body_under_another_name(trained, file):
    trainer = Trainer(Net(classes=7, body="trunk"))
    trainer.init((X, SEVEN))
    with pytest.raises(CheckpointError) as raised:
        trainer.restore(file, params_only=True)
    for path in ("body/kernel", "trunk/kernel", "head/kernel", "head/bias"):
        assert f"params/{path}" in str(raised.value)
    report = trainer.restore(
        file, params_only=True, rename={"body": "trunk", "head": None}
    )
    params = trainer.variables["params"]
    same(params["trunk"], trained.variables["params"]["body"])
    same(trainer.variables["batch_stats"], trained.variables["batch_stats"])
    assert params["head"]["kernel"].shape == (5, 7)
    assert report.renamed["params/body/kernel"] == "params/trunk/kernel"
    assert sorted(report.skipped) == ["params/head/bias", "params/head/kernel"]


def test_a_renamed_layer_keeps_its_moments(trained, file):
    trainer = Trainer(Net(body="trunk"), metrics=["accuracy"])
    trainer.restore(file, rename={"body": "trunk"})
    old, new = (
        {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(t.state.opt_state)
        }
        for t in (trained, trainer)
    )
    assert {path.replace("body", "trunk") for path in old} == set(new)
    for path, leaf in old.items():
        np.testing.assert_array_equal(leaf, new[path.replace("body", "trunk")])


def test_what_fits_is_taken_and_the_rest_reported(trained, file):
    trainer = Trainer(Net(classes=7))
    trainer.init((X, SEVEN))
    report = trainer.restore(file, params_only=True, strict=False)
    assert report.mismatched["params/head/kernel"] == ("float32[5,3]", "float32[5,7]")
    assert "mismatched" in repr(report)
    same(trainer.variables["params"]["body"], trained.variables["params"]["body"])


@pytest.mark.parametrize("kind", ["params", "variables", "train_state"])
def test_files_of_plain_flax(kind, trained, tmp_path):
    variables = jax.tree.map(np.asarray, trained.variables)
    state = train_state.TrainState.create(
        apply_fn=None, params=variables["params"], tx=optax.adam(1e-3)
    )
    content = {
        "params": variables["params"],
        "variables": variables,
        "train_state": state,
    }[kind]
    path = tmp_path / "flax.msgpack"
    path.write_bytes(serialization.to_bytes(content))
    same(load_params(path), variables["params"])
    trainer = Trainer(Net())
    with pytest.raises(ValueError, match=re.escape("trainer.init((x, y))")):
        trainer.restore(path, params_only=True)
    trainer.init((X, Y))
    if kind == "variables":
        trainer.restore(path, params_only=True)
        same(trainer.variables, trained.variables)
    else:
        with pytest.raises(CheckpointError, match="batch_stats/norm/mean"):
            trainer.restore(path, params_only=True)
        report = trainer.restore(path, params_only=True, strict=False)
        assert "collections/batch_stats/norm/mean" in report.missing
        same(trainer.variables["params"], trained.variables["params"])
    with pytest.raises(CheckpointError):
        trainer.restore(path)


def test_a_file_of_weights_is_a_trainer_whose_optimizer_begins_anew(tmp_path):
    path = tmp_path / "weights.msgpack"
    trainer = Trainer(Net())
    trainer.fit(
        X,
        Y,
        verbose=0,
        callbacks=ModelCheckpoint(path, save_weights_only=True),
    )
    loaded = Trainer.load(path, Net())
    same(loaded.variables, trainer.variables)
    assert loaded.step == 0
    with pytest.raises(CheckpointError, match="holds no training to go on with"):
        Trainer(Net()).fit(X, Y, resume=path, verbose=0)


def test_a_state_of_another_number_of_devices(trained, file, eight_devices):
    trainer = Trainer(Net(), metrics=["accuracy"])
    trainer.restore(file)
    same(trainer.variables, trained.variables)
    trainer.fit(X, Y, batch_size=16, verbose=0)
    assert len(trainer.state.rng.devices()) == 8
