"""Pictures are scaled on the device, and classes have names."""

import flax.linen as nn
import numpy as np
import pytest
from PIL import Image

from flaxfit import Trainer
from flaxfit._core.errors import DataError
from flaxfit.data import Examples, image_folder

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (12, 8, 8, 1)).astype(np.uint8)
Y = np.arange(12, dtype=np.int32) % 2
FLOATS = X.astype(np.float32) / 255


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x.reshape(len(x), -1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the same pictures, under classes of other names."""
    made = {}
    for names in (("cat", "dog"), ("ant", "cat")):
        root = tmp_path_factory.mktemp("pictures")
        for number, (picture, label) in enumerate(zip(X, Y, strict=True)):
            folder = root / names[label]
            folder.mkdir(exist_ok=True)
            Image.fromarray(picture[..., 0]).save(folder / f"{number:02d}.png")
        made[names] = image_folder(root, (8, 8), channels=1)
    return made


@pytest.fixture
def cats(folders):
    return folders["cat", "dog"]


def fit(data, trainer=None, **options):
    trainer = trainer or Trainer(Net(), learning_rate=0.01)
    options = {"epochs": 2, "batch_size": 4, "verbose": 0} | options
    return trainer, trainer.fit(data, **options).history


def test_scaling_on_the_device_is_that_of_numpy():
    _, scaled = fit((X, Y), Trainer(Net(), scale_images=True, learning_rate=0.01))
    _, floats = fit((FLOATS, Y))
    assert scaled["loss"] == pytest.approx(floats["loss"], rel=1e-5)


def test_bytes_that_are_no_pictures_are_left_alone():
    """Tokens are whole numbers of one byte as well."""

    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.Embed(256, 4)(x).mean(1))

    tokens = X.reshape(12, -1)
    trainer = Trainer(Tokens(), scale_images=True)
    _, found = fit((tokens, Y), trainer)
    _, wide = fit((tokens.astype(np.int32), Y), Trainer(Tokens()))
    assert found == wide


def test_plain_arrays_are_left_alone():
    trainer, raw = fit((X, Y))
    _, as_floats = fit((X.astype(np.float32), Y))
    assert raw == as_floats and trainer.class_names == ()


def test_floats_and_bytes_are_both_understood():
    trainer, _ = fit((X, Y), Trainer(Net(), scale_images=True))
    assert trainer.evaluate(X, Y, verbose=0) == trainer.evaluate(FLOATS, Y, verbose=0)


def test_what_is_validated_on_does_not_decide(cats):
    """Neither whether pictures are scaled, nor what the classes are called."""
    trainer, history = fit(cats, validation_data=(X, Y))
    loss = trainer.evaluate(X, Y, verbose=0)["loss"]
    assert history["val_loss"][-1] == pytest.approx(loss, rel=1e-6)
    assert loss < 5 and trainer.class_names == ("cat", "dog")


def test_classes_of_another_order_are_refused(folders, cats, tmp_path):
    ants = folders["ant", "cat"]
    with pytest.raises(DataError, match=r"classes ant, cat, .* trained on cat, dog"):
        fit(cats, validation_data=ants)
    trainer, _ = fit(cats)
    with pytest.raises(DataError, match="the same label would be another class"):
        trainer.evaluate(ants, verbose=0)
    fit(cats, run_dir=tmp_path / "run")
    with pytest.raises(DataError, match="classes ant, cat"):
        fit(ants, epochs=3, run_dir=tmp_path / "run")


@pytest.mark.parametrize("restored", [False, True])
def test_files_remember_both(restored, cats, tmp_path):
    trainer, _ = fit(cats)
    trainer.save(tmp_path / "a.msgpack")
    if restored:
        other = Trainer(Net())
        other.restore(tmp_path / "a.msgpack")
    else:
        other = Trainer.load(tmp_path / "a.msgpack", Net())
    assert other.class_names == ("cat", "dog")
    expected = trainer.evaluate(X, Y, verbose=0)
    assert other.evaluate(X, Y, verbose=0) == pytest.approx(expected, rel=1e-5)
    assert expected["loss"] < 5


def test_names_can_be_given_and_are_shown(capsys):
    examples = Examples((X, Y), class_names=["dark", "light"])
    trainer, _ = fit(examples, verbose=2)
    assert "classes: dark, light\n" in capsys.readouterr().out
    assert trainer.check(examples).rows["classes"] == "dark, light"
