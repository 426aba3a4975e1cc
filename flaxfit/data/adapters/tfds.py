"""Adapters for TFDS: names, builders and data sources, with random access.

Examples are decoded when they are read, without TensorFlow. `tfds_builders` finds and
prepares datasets.
"""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np

from flaxfit._core.errors import (
    DataError,
    UsageError,
    UsageTypeError,
    caller,
    did_you_mean,
)
from flaxfit._core.lazy_types import comes_from
from flaxfit.data.adapters.npy_files import SUFFIXES
from flaxfit.data.adapters.tfds_builders import find_builder, open_source, prepare
from flaxfit.data.binding.binding import TARGET_NAMES
from flaxfit.data.datasets.example_dataset import ExampleSet, take_items
from flaxfit.data.datasets.stream import NO_INFO, DatasetInfo
from flaxfit.data.host.arrays import call_text

# Calls for which the user must name the split.
_NAME_A_SPLIT = ("evaluate", "predict", "validation")


@dataclass(frozen=True)
class NamedDataset:
    """A dataset given by name and folder; see `tfds`."""

    name: str | PurePath
    data_dir: str | os.PathLike[str] | None = None


def tfds(
    name: str | PurePath, *, data_dir: str | os.PathLike[str] | None = None
) -> NamedDataset:
    """Returns a dataset of TensorFlow Datasets by name, stored in any folder.

    Args:
      name: `name[/config][:version][/split]`, e.g. `"mnist/train[:90%]"`, or the
        folder of a prepared dataset.
      data_dir: the folder of all datasets; None for `$TFDS_DATA_DIR`, or
        `~/tensorflow_datasets`.

    Example:
      `trainer.fit(flaxfit.data.tfds("mnist", data_dir="/data"))`

    Raises:
      TypeError: a name or folder of the wrong type.
    """
    folder = isinstance(data_dir, str | os.PathLike | None)
    if not isinstance(name, str | PurePath) or not folder:
        raise UsageTypeError(
            f"Got tfds({name!r}, data_dir={data_dir!r})",
            "Expected a name and the path of a folder",
            'tfds("mnist", data_dir="/data")',
        )
    return NamedDataset(name, data_dir)


def matches(x: Any) -> bool:
    """Whether `x` is a dataset's name or folder, a builder, or a data source.

    A dict of data sources matches too.
    """
    if isinstance(x, NamedDataset):
        return True
    if isinstance(x, str | PurePath):
        return not str(x).endswith(SUFFIXES)
    if isinstance(x, Mapping):
        return bool(x) and all(map(_is_data_source, x.values()))
    return _is_data_source(x) or comes_from(x, "tensorflow_datasets", "DatasetBuilder")


def adapt(x: Any) -> ExampleSet:
    """Returns the examples of one split.

    A dataset that is not prepared yet is prepared first. Without a split, `fit` takes
    `train`.

    Args:
      x: see `matches`; a name is `name[/config][:version][/split]`.

    Raises:
      ValueError: there is no such dataset or split, no split is named and there is no
        `train`, or `x` is a dict.
      DataError: the dataset cannot be prepared or read, or the split is empty.
    """
    if isinstance(x, Mapping):
        counts = {str(split): len(source) for split, source in x.items()}
        split = _suggested(counts)
        raise ValueError(
            f"tfds.data_source(...) without split= is a dict of {_listed(counts)}. "
            f"Write {call_text(f'sources[{split!r}]')}."
        )
    if _is_data_source(x):
        return _example_set(x)
    if isinstance(x, str | PurePath):
        x = NamedDataset(x)
    named = isinstance(x, NamedDataset)
    builder, split = find_builder(x.name, x.data_dir) if named else (x, "")
    given = str(x.name) if named else ""
    prepare(builder)
    source = open_source(builder, _checked_split(builder, split, given))
    examples = _example_set(source)
    if split:
        return examples
    # Only training may use a split that the user has not named.
    text = _unnamed_split(builder.info, given)
    return replace(examples, info=replace(examples.info, assumed_split=text))


def _is_data_source(x: Any) -> bool:
    return comes_from(x, "tensorflow_datasets", "BaseDataSource")


def _checked_split(builder: Any, split: str, given: str) -> str:
    """Returns the split to read.

    Raises:
      ValueError: no split is named and there is no `train`, or there is no such split.
      DataError: the split is empty.
    """
    info = builder.info
    counts = _counts(info)
    has = f"{_title(info)} has {_listed(counts)}"
    stem = given.removesuffix(f"/{split}")
    if not split and "train" not in counts:
        raise UsageError(_unnamed_split(info, given))
    split = split or "train"
    try:
        total = info.splits[split].num_examples
    except ValueError as error:
        reason = str(error).splitlines()[-1]
        raise ValueError(
            f"there is no split {split!r}: {has}.{did_you_mean(split, counts)} Write "
            f"parts as {f'{stem}/train[:90%]'!r} and {f'{stem}/train[90%:]'!r}. "
            f"TFDS says: {reason}"
        ) from error
    if total <= 0:
        raise DataError(f"no examples in the split {split!r}: {has}.")
    return split


def _unnamed_split(info: Any, given: str) -> str:
    counts = _counts(info)
    wanted = _suggested(counts)
    line = repr(f"{given}/{wanted}") if given else f"builder.as_data_source({wanted!r})"
    call = call_text(repr(given) if given else "builder")
    return (
        f"{call} does not say which split: {_title(info)} has {_listed(counts)}. Write "
        f"{call_text(line)}."
    )


def _counts(info: Any) -> dict[str, int]:
    return {name: split.num_examples for name, split in info.splits.items()}


def _suggested(counts: Mapping[str, int]) -> str:
    """Returns the split that the user most likely means, or the first one."""
    wanted = ["test", "validation"] if caller().startswith(_NAME_A_SPLIT) else ["train"]
    if caller() == "validation_data":
        wanted.reverse()
    return next((name for name in (*wanted, *counts) if name in counts), "train")


def _listed(counts: Mapping[str, int]) -> str:
    texts = (
        f"{name} ({count:,}{'' if index else ' examples'})"
        for index, (name, count) in enumerate(counts.items())
    )
    return ", ".join(texts) or "no splits"


def _title(info: Any, split: Any = "") -> str:
    """Returns the title of a dataset in messages: `digits/train 1.0.0`."""
    names = (info.name, info.config_name, str(split))
    return f"{'/'.join(filter(None, names))} {info.version}"


def _example_set(source: Any) -> ExampleSet:
    return ExampleSet(
        f"{_title(source.dataset_info, source.split)} (TFDS)",
        len(source),
        partial(take_items, source),
        info=_info(source),
    )


def _info(source: Any) -> DatasetInfo:
    """Returns the metadata of the dataset, empty if examples are not decoded."""
    features = importlib.import_module("tensorflow_datasets").features
    info = source.dataset_info
    decoded = source.deserialize_method.name == "DESERIALIZE_AND_DECODE"
    if not decoded or not isinstance(info.features, features.FeaturesDict):
        return NO_INFO
    kinds = dict(info.features.items())
    inputs, targets = (_keys(nest) for nest in (info.supervised_keys or ("", ""))[:2])
    labels = targets or next(((key,) for key in TARGET_NAMES if key in kinds), ())
    candidates = inputs or tuple(key for key in kinds if key not in labels)
    label: Any = kinds[labels[0]] if len(labels) == 1 else None
    labelled = isinstance(label, features.ClassLabel) and label.num_classes is not None
    names = tuple(label.names) if labelled else ()
    in_bytes = [kinds[key] for key in candidates if kinds[key].np_dtype == np.uint8]
    # The values of a `LabeledImage` are classes.
    pictures = [
        isinstance(each, features.Image | features.Video)
        and not isinstance(each, features.LabeledImage)
        for each in in_bytes
    ]
    return DatasetInfo(
        keys=tuple(kinds),
        inputs=_one_or_more(inputs),
        targets=_one_or_more(targets),
        class_names=() if names == tuple(map(str, range(len(names)))) else names,
        pictures=bool(pictures) and all(pictures),
    )


def _keys(nest: Any) -> tuple[str, ...]:
    """Returns the keys in a part of `supervised_keys`, in order."""
    if isinstance(nest, str):
        return (nest,) if nest else ()
    parts = nest.values() if isinstance(nest, Mapping) else nest
    return tuple(key for part in parts for key in _keys(part))


def _one_or_more(keys: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return keys[0] if len(keys) == 1 else keys or None
