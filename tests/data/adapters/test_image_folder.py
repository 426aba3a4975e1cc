"""Folders of pictures: classes, decoding, and what is refused."""

import sys

import flax.linen as nn
import numpy as np
import pytest
from helpers.sources import as_source
from sklearn.datasets import load_digits

from flaxfit import Trainer
from flaxfit._core.errors import DataError
from flaxfit._core.types import CallSpec
from flaxfit.data import Examples, image_folder
from flaxfit.data.binding.binding import Binding

image_module = pytest.importorskip("PIL.Image")


DIGITS = load_digits()
PIXELS = (DIGITS.images * 15.9375).astype(np.uint8)
CLASSES = ("zero", "one", "two")
BINDING = Binding(CallSpec(("image",), (), ("image",)))


class Net(nn.Module):
    """A dense layer over the pixels."""

    @nn.compact
    def __call__(self, image):
        return nn.Dense(3)(image.reshape(image.shape[0], -1))


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image_module.fromarray(pixels).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Sixty digits in a folder for each class."""
    for number in range(60):
        pixels = PIXELS[number]
        name = CLASSES[number % 3]
        save(tmp_path / "digits" / name / f"{number:02}.png", pixels)
    return tmp_path / "digits"


def arrays_of(folder):
    """`(x, y)` in the order of the items."""
    items = list(folder.items)
    x = [np.asarray(image_module.open(path)) for path, _ in items]
    return np.stack(x)[..., None], np.array([label for _, label in items], np.int32)


def test_classes_are_the_folders_by_name(folder):
    images = image_folder(folder, (8, 8))
    assert isinstance(images, Examples)
    assert images.class_names == ("one", "two", "zero")
    assert len(images) == 60
    path, label = images.items[0]
    assert path.endswith("01.png")
    assert label == 0
    assert [label for _, label in images.items] == [0] * 20 + [1] * 20 + [2] * 20
    pixels, label = images.load(images.items[20])
    assert (pixels.shape, pixels.dtype, label) == ((8, 8, 3), np.uint8, 1)
    assert (pixels == PIXELS[2][..., None]).all()


def test_classes_that_are_named(folder):
    images = image_folder(folder, (8, 8), classes=["zero", "one"])
    assert images.class_names == ("zero", "one")
    assert len(images) == 40
    assert images.items[0][0].endswith("00.png")
    (folder.parent / "test" / "zero").mkdir(parents=True)
    (folder.parent / "test" / "none").mkdir()
    save(folder.parent / "test" / "one" / "a.png", PIXELS[1])
    other = image_folder(folder.parent / "test", (8, 8), classes=images.class_names)
    assert [label for _, label in other.items] == [1]


def test_pictures_train_as_the_arrays_do(folder):
    images = image_folder(folder, (8, 8), channels=1)
    x, y = arrays_of(images)

    def run(*data, **arguments):
        trainer = Trainer(Net(), metrics=["accuracy"])
        history = trainer.fit(*data, epochs=2, batch_size=16, verbose=0, **arguments)
        return history.history, trainer

    got, trainer = run(images, validation_data=image_folder(folder, None, channels=1))
    want, other = run(
        (x / np.float32(255)).astype(np.float32), y, validation_data=(x / 255.0, y)
    )
    assert got.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-5)
    np.testing.assert_allclose(
        trainer.predict(images), other.predict(x / 255.0), atol=1e-5
    )
    again, _ = run(image_folder(folder, (8, 8), channels=1, threads=2))
    assert again["loss"] == got["loss"]


def test_a_folder_without_classes_is_for_predict(folder):
    images = image_folder(folder / "one", (8, 8), channels=1)
    assert images.class_names == ()
    assert [item[-6:] for item in images.items[:3]] == ["01.png", "04.png", "07.png"]
    trainer = Trainer(Net())
    outputs = trainer.predict(images)
    want = trainer.predict(PIXELS[1:60:3, ..., None] / np.float32(255))
    np.testing.assert_allclose(outputs, want, atol=1e-5)
    batches = list(trainer.predict_batches(images, batch_size=8))
    np.testing.assert_array_equal(np.concatenate(batches), outputs)


def test_parts_of_a_dataset_are_no_classes(tmp_path):
    for part in ("test", "train"):
        for name in ("cat", "dog"):
            save(tmp_path / "data" / part / name / "1.png", PIXELS[0])
    with pytest.raises(DataError, match=r"folders test, train.*data/train', size\)"):
        image_folder(tmp_path / "data", (8, 8))
    train = image_folder(tmp_path / "data" / "train", (8, 8))
    assert train.class_names == ("cat", "dog")
    said = image_folder(tmp_path / "data", (8, 8), classes=["train", "test"])
    assert said.class_names == ("train", "test")


def test_augmenting_what_was_decoded(folder):
    def augment(example, rng):
        pixels, label = example
        return (pixels + rng.integers(1, 3)).astype(np.float32), label

    plain = image_folder(folder, (8, 8), channels=1)
    augmented = Examples(plain, augment)
    (before,), (after,) = (
        as_source(data, binding=BINDING, batch_size=len(plain)).batches(0)
        for data in (plain, augmented)
    )
    added = after.inputs[0] - before.inputs[0].astype(np.float32)
    draws = added.reshape(len(added), -1)
    assert (draws == draws[:, :1]).all() and set(draws[:, 0]) == {1.0, 2.0}
    np.testing.assert_array_equal(before.targets, after.targets)


# ------------------------------------------------------------------------- decoding


def pixels_of(tmp_path, name="a.png", size=None, channels=3):
    images = image_folder(tmp_path, size, channels=channels)
    (item,) = [item for item in images.items if item.endswith(name)]
    return images.load(item)


def test_sizes(tmp_path):
    wide = np.arange(32, dtype=np.uint8).reshape(4, 8)
    save(tmp_path / "a.png", wide)
    assert pixels_of(tmp_path).shape == (4, 8, 3)
    small = pixels_of(tmp_path, size=(2, 6), channels=1)
    bilinear = image_module.Resampling.BILINEAR
    want = np.asarray(image_module.fromarray(wide).resize((6, 2), bilinear))
    np.testing.assert_array_equal(small[..., 0], want)
    save(tmp_path / "b.png", wide.T.copy())
    with pytest.raises(
        DataError, match=r"b.png' is 8 x 4 .*a.png' is 4 x 8\. Write size=\(4, 8\)"
    ):
        pixels_of(tmp_path, "b.png")


def test_pictures_are_upright(tmp_path):
    pixels = np.zeros((4, 8), np.uint8)
    pixels[0] = 200
    exif = image_module.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    save(tmp_path / "a.png", pixels, exif=exif)
    got = pixels_of(tmp_path, channels=1)[..., 0]
    np.testing.assert_array_equal(got, np.rot90(pixels, -1))


def test_colours_and_transparency(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 90, [[0, 255], [0, 255]]
    save(tmp_path / "a.png", rgba)
    assert (pixels_of(tmp_path) == rgba[..., :3]).all()
    assert (pixels_of(tmp_path, channels=4) == rgba).all()
    palette = image_module.fromarray(rgba[..., :3]).convert("P")
    palette.save(tmp_path / "a.png", transparency=bytes([10, 20]))
    assert abs(pixels_of(tmp_path).astype(int) - rgba[..., :3]).max() <= 16
    assert pixels_of(tmp_path, channels=1).shape == (2, 2, 1)


def test_sixteen_bits_become_eight(tmp_path):
    wide = np.array([[0, 128], [257, 65535]], np.uint16)
    save(tmp_path / "a.png", wide)
    assert pixels_of(tmp_path, channels=1)[..., 0].tolist() == [[0, 0], [1, 255]]
    save(tmp_path / "a.tiff", np.ones((2, 2), np.float32))
    with pytest.raises(DataError, match=r"a.tiff' holds 32 bits per pixel"):
        pixels_of(tmp_path, "a.tiff")


@pytest.mark.parametrize("damage", ["empty", "text", "cut off"])
def test_a_damaged_picture_is_named(damage, folder):
    path = folder / "one" / "04.png"
    whole = path.read_bytes()
    content = {"empty": b"", "text": b"<html>", "cut off": whole[: len(whole) // 2]}
    path.write_bytes(content[damage])
    with pytest.raises(DataError, match=r"one/04.png' cannot be read as a picture"):
        Trainer(Net()).fit(image_folder(folder, (8, 8)), verbose=0)


# --------------------------------------------------------------------- what is refused


def test_hidden_files_are_passed_over_and_others_warned_of(folder):
    (folder / ".DS_Store").touch()
    (folder / "one" / "Thumbs.db").touch()
    (folder / "one" / ".04.png").touch()
    (folder / ".cache").mkdir()
    assert len(image_folder(folder, (8, 8))) == 60
    (folder / "one" / "notes.txt").touch()
    with pytest.warns(UserWarning, match=r"^left 1 file out of.*notes.txt'$"):
        assert len(image_folder(folder, (8, 8))) == 60


def test_pictures_are_found_at_any_depth(folder):
    save(folder / "one" / "more" / "a.JPEG", PIXELS[0])
    images = image_folder(folder, (8, 8))
    assert len(images) == 61
    assert [label for path, label in images.items if "more" in path] == [0]


@pytest.mark.parametrize(
    ("change", "arguments", "text"),
    [
        (lambda f: save(f / "a.png", PIXELS[0]), {}, "'a.png', next to folders"),
        (
            lambda f: (f / "four").mkdir(),
            {},
            r"no picture in .*four'.*classes=\['one', 'two', 'zero'\]",
        ),
        (None, {"classes": ["one", "twp"]}, "no folder 'twp' .*Did you mean 'two'"),
        (None, {"classes": ["one", "one"]}, "name every class once"),
        (None, {"classes": []}, "name every class once"),
        (None, {"size": 8}, r"size=8: expected \(height, width\)"),
        (None, {"size": (8, 0)}, r"size\[1\]=0"),
        (None, {"channels": 2}, "channels=2: expected 3 for RGB"),
        (None, {"threads": 1, "processes": 1}, "give one of them"),
    ],
)
def test_what_is_refused(change, arguments, text, folder):
    if change is not None:
        change(folder)
    arguments = {"size": (8, 8)} | arguments
    with pytest.raises(ValueError, match=text):
        image_folder(folder, **arguments)


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*gone"):
        image_folder(tmp_path / "gone", (8, 8))
    with pytest.raises(DataError, match=r"no picture in .*\.jpg"):
        image_folder(tmp_path, (8, 8))


def test_without_pillow(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        image_folder(folder, (8, 8))
