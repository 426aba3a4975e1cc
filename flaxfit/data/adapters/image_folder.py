"""Folders of images, with one subfolder per class, decoded by Pillow when read.

Items are paths and labels; only the list of files is kept in memory.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from flaxfit._core.errors import DataError, UsageError, did_you_mean
from flaxfit._core.types import HostArray
from flaxfit._core.validation import integer
from flaxfit.data.datasets.example_dataset import ExampleSet, take_items
from flaxfit.data.datasets.examples import Examples
from flaxfit.data.datasets.stream import DatasetInfo

_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
_MODES = ((1, "L"), (3, "RGB"), (4, "RGBA"))  # channels -> mode of Pillow
_SIDECARS = frozenset(("desktop.ini", "thumbs.db"))
_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
# 0..65535 -> 0..255
_WIDE_TO_BYTE = 257


@dataclass(frozen=True)
class ImageFiles(Sequence[Any]):
    """The files of a folder of images.

    Attributes:
      items: `(path, label)` of each file, or its path if there are no classes.
      class_names: the names of the classes 0, 1, …
    """

    items: tuple[Any, ...]
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Returns the number of files."""
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        """Returns one item, or a slice of the items."""
        return self.items[index]


def image_folder(
    path: str | os.PathLike[str],
    size: tuple[int, int] | None,
    *,
    channels: int = 3,
    classes: Sequence[str] | None = None,
    threads: int = 0,
    processes: int = 0,
) -> Examples:
    """Returns the pictures of a folder as examples for `fit`, `evaluate`, `predict`.

    `path/cat/1.jpg`, `path/dog/2.jpg`, …: every subfolder is a class with all pictures
    in it, at any depth. Classes are numbered in the order of their names. A folder
    without subfolders has no classes, for `predict`. Hidden files are ignored; other
    files that are not named as pictures cause a warning.

    A picture becomes `uint8[height, width, channels]`, rotated by its EXIF data; 16
    bits per channel become 8. It is resized to `size` bilinearly, with antialiasing,
    and without keeping its proportions. Transparency is dropped unless `channels` is 4.
    The model receives `float32` from 0 to 1.

    Args:
      path: the folder.
      size: `(height, width)`, or None if all pictures have the same size.
      channels: 3 for RGB, 1 for gray, 4 for RGB and transparency.
      classes: the subfolders to use as classes 0, 1, …
        `image_folder(test, size, classes=image_folder(train, size).class_names)` gives
        two folders the same numbers.
      threads: the number of decoding threads. Two or more pay off for photos.
      processes: the number of decoding processes, instead of threads.

    Returns:
      `Examples` whose items are `(path, label)`. `Examples(image_folder(...), augment)`
      augments decoded pictures: `augment((image, label), rng)`.

    Raises:
      DataError: there is no such folder, or no picture in it or in one of its classes;
        pictures next to folders of classes; folders of splits, such as `train` and
        `test`, instead of classes; with `size=None`, an unreadable first picture.
      ImportError: Pillow is not installed.
      UsageError: an impossible size or number of channels.

    Example:
      `trainer.fit(image_folder("flowers/train", (128, 128), threads=4))`
    """
    if channels not in dict(_MODES):
        raise UsageError(
            f"channels={channels!r}: expected 3 for RGB, 1 for gray, or 4 for RGB and "
            "transparency"
        )
    decode = _Decode(_as_size(size), channels)
    _import_pillow()
    files = _find_files(Path(path), classes)
    if size is None:
        first = files[0]
        name = first[0] if isinstance(first, tuple) else first
        decode = _Decode(decode.pixels(name).shape[:2], channels, like=name)
    return Examples(
        files,
        decode,
        threads=threads,
        processes=processes,
        class_names=files.class_names,
    )


def open_image_files(x: ImageFiles) -> ExampleSet:
    """Returns the files as the items of a dataset of pictures."""
    info = DatasetInfo(class_names=x.class_names, pictures=True)
    return ExampleSet("image folder", len(x), partial(take_items, x), info=info)


@dataclass(frozen=True)
class _Decode:
    """A function item -> example.

    Attributes:
      size: `(height, width)` of the result.
      channels: the number of channels of the result.
      like: the picture whose size all others must have; None to resize them.
    """

    size: Any
    channels: int
    like: str | None = None

    def __call__(self, item: Any) -> Any:
        """Returns `(pixels, label)`, or only the pixels if there are no classes."""
        if isinstance(item, tuple):
            path, label = item
            return self.pixels(path), np.int32(label)
        return self.pixels(item)

    def pixels(self, path: str) -> HostArray:
        """Returns a picture as `uint8[height, width, channels]`.

        Raises:
          DataError: the file is not a picture, is damaged, or has the wrong size.
        """
        try:
            found = self._decoded(path)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{path!r} cannot be read as a picture: {error}",
                "Remove or replace the file.",
            ) from error
        if self.like is not None and found.shape[:2] != self.size:
            one, other = (f"{h} x {w}" for h, w in (found.shape[:2], self.size))
            raise DataError(
                f"{path!r} is {one} pixels (height x width), {self.like!r} is {other}",
                write=f"size={self.size} to resize all pictures to one size",
            )
        return found

    def _decoded(self, path: str) -> HostArray:
        image_module, operations = _import_pillow()
        with image_module.open(path) as file:
            image = _in_eight_bits(operations.exif_transpose(file), path)
            if "transparency" in image.info:
                image = image.convert("RGBA")
            image = image.convert(dict(_MODES)[self.channels])
            if self.size is not None and self.like is None:
                height, width = self.size
                image = image.resize((width, height), image_module.Resampling.BILINEAR)
        pixels = np.array(image)
        return pixels.reshape(*pixels.shape[:2], self.channels)


def _in_eight_bits(image: Any, path: str) -> Any:
    """Returns a picture that Pillow converts without clipping values."""
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        narrow = (wide + _WIDE_TO_BYTE // 2) // _WIDE_TO_BYTE
        return _import_pillow()[0].fromarray(narrow.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(
            f"{path!r} holds 32 bits per pixel, whose range of values is unknown",
            "Decode these files with your own load that returns (pixels, label).",
            "flaxfit.data.Examples(paths, load)",
        )
    return image


def _refuse_splits(path: Path, names: Sequence[str]) -> None:
    """Refuses a folder whose subfolders are splits that have folders of classes."""
    parts = [name for name in names if name.lower() in _SPLITS]
    deeper = [each for name in parts for each in (path / name).iterdir()]
    if parts and len(parts) == len(names) and any(each.is_dir() for each in deeper):
        train = next((name for name in parts if name.lower() == "train"), parts[0])
        raise DataError(
            f"{str(path)!r} holds the folders {', '.join(names)}, which are splits of "
            "a dataset, not classes",
            write=f"image_folder({str(path / train)!r}, size), or classes=[...] if "
            "they are classes",
        )


def _find_files(path: Path, classes: Sequence[str] | None) -> ImageFiles:
    if not path.is_dir():
        raise DataError(
            f"there is no folder {str(path)!r} (the working directory is {os.getcwd()})"
        )
    inside = sorted(each for each in path.iterdir() if not _is_hidden(each.name))
    folders = [each.name for each in inside if each.is_dir()]
    others = [each for each in inside if not each.is_dir()]
    pictures = [str(each) for each in others if _is_picture(each.name)]
    names = _class_names(path, folders, classes)
    if classes is None:
        _refuse_splits(path, names)
    if pictures and names:
        raise DataError(
            f"{str(path)!r} holds pictures, such as {Path(pictures[0]).name!r}, next "
            f"to folders of classes, such as {names[0]!r}",
            "Move the pictures into the folder of a class.",
        )
    left_out = [str(each) for each in others if not _is_picture(each.name)]
    items: list[Any] = list(pictures)
    for label, name in enumerate(names):
        files = _files_below(path / name)
        found = [file for file in files if _is_picture(file)]
        if not found and classes is None:
            raise DataError(
                f"there is no picture in {str(path / name)!r}, the folder of a class",
                write=f"classes={[n for n in names if n != name]!r}",
            )
        items += [(file, label) for file in found]
        left_out += [file for file in files if not _is_picture(file)]
    if not items:
        raise DataError(
            f"there is no picture in {str(path)!r}, nor in its folders",
            f"Names of pictures end with {', '.join(sorted(_SUFFIXES))}.",
        )
    if left_out:
        several = len(left_out) > 1
        warnings.warn(
            f"left {len(left_out)} file{'s' if several else ''} out of {str(path)!r}, "
            f"not named as pictures: {left_out[0]!r}{', …' if several else ''}",
            UserWarning,
            stacklevel=3,
        )
    return ImageFiles(tuple(items), tuple(names))


def _class_names(
    path: Path, folders: list[str], classes: Sequence[str] | None
) -> list[str]:
    if classes is None:
        return folders
    names = [classes] if isinstance(classes, str) else list(classes)
    for name in names:
        if name not in folders:
            raise DataError(
                f"classes={names!r}, but there is no folder {name!r} in "
                f"{str(path)!r}.{did_you_mean(name, folders)}",
                "A class without pictures needs an empty folder.",
            )
    if not names or len(set(names)) < len(names):
        raise DataError(f"classes={names!r}: name every class once, at least one")
    return names


def _files_below(folder: Path) -> list[str]:
    files: list[str] = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        shown = sorted(name for name in names if not _is_hidden(name))
        files += [os.path.join(where, name) for name in shown]
    return files


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SIDECARS


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _SUFFIXES


def _as_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise UsageError(
            f"size={size!r}: expected (height, width), or None if all pictures have "
            "one size",
            write="size=(128, 128)",
        )
    height, width = size
    return integer("size[0]", height), integer("size[1]", width)


def _import_pillow() -> tuple[Any, Any]:
    """Returns Pillow's modules `Image` and `ImageOps`."""
    try:
        return import_module("PIL.Image"), import_module("PIL.ImageOps")
    except ImportError as error:
        raise ImportError("image_folder needs Pillow: pip install pillow") from error
