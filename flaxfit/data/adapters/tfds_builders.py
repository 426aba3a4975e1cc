"""Finds, prepares and opens TFDS builders by name or folder.

TFDS reads without TensorFlow, but preparing needs it for some datasets: those whose
images are arrays, which it writes as PNG.
"""

import importlib
import os
import re
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any, NoReturn

from flaxfit._core.errors import DataError, UsageError, did_you_mean

_HUGGING_FACE = "huggingface:"
_INFO_FILE = "dataset_info.json"
_USUAL_SPLITS = frozenset(("all", "dev", "test", "train", "val", "valid", "validation"))
_NAMES_TO_LIST = 20


def find_builder(
    given: str | PurePath, data_dir: str | os.PathLike[str] | None
) -> tuple[Any, str]:
    """Returns the builder of a dataset, and the split written after its name.

    Args:
      given: `name[/config][:version][/split]`, or the path of a folder that holds a
        prepared dataset, with or without a split after it.
      data_dir: the folder of all datasets; None for the default of TFDS.

    Raises:
      UsageError: there is no such dataset, folder, version or config.
    """
    tfds = _tfds()
    path = Path(given).expanduser()
    if isinstance(given, PurePath) or os.sep in given:
        for folder, split in ((path, ""), (path.parent, path.name)):
            if (folder / _INFO_FILE).is_file():
                return tfds.builder_from_directory(folder), split
    if isinstance(given, PurePath) or given.startswith(("/", ".", "~")):
        raise _folder_error(path, given)
    if given.startswith(_HUGGING_FACE):
        name = given.removeprefix(_HUGGING_FACE)
        raise UsageError(
            f"{given!r} is a dataset of Hugging Face",
            write=f"datasets.load_dataset({name!r}, split='train')",
        )
    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)
    # The last part is read as a config before it is read as a split, as in TFDS.
    head, _, last = given.rpartition("/")
    for name, split in [(given, ""), (head, last)][: 2 if head else 1]:
        try:
            builder = tfds.builder(name, data_dir=data_dir)
        except (ValueError, AssertionError) as error:
            failure = error
            continue
        if split and "/" not in name:
            _check_is_split(builder, split)
        return builder, split
    if given and path.exists():
        raise _folder_error(path, given)
    _raise_unknown(given, data_dir, failure)


def prepare(builder: Any) -> None:
    """Downloads and prepares a dataset as array_record, unless it is prepared already.

    Raises:
      DataError: TFDS failed to prepare it; a note has the command to run.
    """
    if _is_prepared(builder):
        return
    name, root = name_of(builder.info), builder.data_dir_root
    print(f"{name} is not prepared in {root}: TFDS prepares it now, once.", flush=True)
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        failure = DataError(
            f"TFDS failed to prepare {name} in {root}: {type(error).__name__}: "
            f"{reason}",
            "Preparing may need more packages than reading (pip install tensorflow).",
        )
        failure.add_note(
            "Run this on a machine that can prepare it, and copy "
            f"{builder.data_dir} here:\n"
            f'    python -c "{_line_to_prepare(builder)}"'
        )
        raise failure from error
    if not _is_prepared(builder):  # TFDS assumes that any existing folder is prepared
        raise DataError(
            f"{builder.data_dir} holds no prepared dataset",
            "Delete the folder, and make the call again.",
        )


def open_source(builder: Any, split: str) -> Any:
    """Returns the data source of a split, which reads without TensorFlow.

    Raises:
      DataError: the dataset is stored in a format without random access.
    """
    try:
        return builder.as_data_source(split)
    except NotImplementedError as error:
        stored = getattr(builder.info.file_format, "value", "an unknown format")
        failure = DataError(
            f"{name_of(builder.info)} in {builder.data_dir} is stored as {stored}, "
            "which only TensorFlow reads, and only in order",
            "Expected array_record; or pass the tf.data.Dataset of tfds.load(...).",
        )
        failure.add_note(
            "To store it as array_record too, run this where TensorFlow is installed:\n"
            "    pip install tensorflow apache_beam mlcroissant\n"
            f"    tfds convert_format --dataset_version_dir={builder.data_dir} "
            "--out_file_format=array_record"
        )
        raise failure from error


def name_of(info: Any) -> str:
    """Returns the full TFDS name of a dataset: `"glue/sst2:2.0.0"`."""
    config = f"/{info.config_name}" if info.config_name else ""
    return f"{info.name}{config}:{info.version}"


def _tfds() -> ModuleType:
    return importlib.import_module("tensorflow_datasets")


def _is_prepared(builder: Any) -> bool:
    return bool((builder.data_path / _INFO_FILE).exists())


def _check_is_split(builder: Any, split: str) -> None:
    """Refuses a mistyped config, instead of preparing the default one.

    Raises:
      UsageError: `split` does not look like a split, and the dataset has configs.
    """
    configs = list(builder.builder_configs)
    splits = _USUAL_SPLITS | {*builder.info.splits}
    if not configs or re.split(r"\W", split)[0] in splits:
        return
    name = builder.info.name
    raise UsageError(
        f"{f'{name}/{split}'!r}: {split!r} is not a config of {name}, which has "
        f"{', '.join(configs)}.{did_you_mean(split, configs)}",
        "Write the config before a split.",
        repr(f"{name}/{configs[0]}/{split}"),
    )


def _folder_error(path: Path, given: str | PurePath) -> UsageError:
    if path.is_file():
        return UsageError(f"{str(given)!r} is a file. Give the arrays or table in it")
    if not path.is_dir():
        return UsageError(f"{str(given)!r} does not exist")
    return UsageError(
        f"{str(given)!r} is a folder without {_INFO_FILE}, so not a prepared TFDS "
        "dataset",
        "For pictures write flaxfit.data.image_folder(path, (128, 128)), for a zarr "
        "array zarr.open(path).",
    )


def _raise_unknown(
    given: str, data_dir: str | os.PathLike[str] | None, failure: Exception
) -> NoReturn:
    """Raises UsageError for a name that TFDS has no builder for."""
    tfds = _tfds()
    root = Path(data_dir or tfds.core.constants.DATA_DIR)
    stored = sorted(
        {each.relative_to(root).parts[0] for each in root.glob("*/*/")} - {"downloads"}
    )
    name = re.split("[/:]", given)[0]
    builders = tfds.list_builders(with_community_datasets=False)
    known = {*builders, *stored}
    if name in known:
        # TFDS writes the arguments of the builder before the reason, `"{…}": `.
        reason = str(failure).strip().splitlines()[0].rsplit('}": ', 1)[-1]
        reason = reason.partition(" Here are")[0]
        has_class = name in builders
        configs = list(tfds.builder_cls(name).builder_configs) if has_class else []
        raise UsageError(
            f"TFDS has no {given!r}: {reason}",
            f"Its configs are {', '.join(configs)}." if configs else "",
        ) from failure
    advice = did_you_mean(name, known)
    if name in _USUAL_SPLITS:
        advice = f" Write a split after the name of its dataset: {f'mnist/{name}'!r}."
    # Without the failure, which lists hundreds of names.
    raise UsageError(
        f"no dataset {given!r}: neither TFDS nor {root} has {name!r}.{advice}",
        f"Stored in {root}: {', '.join(stored[:_NAMES_TO_LIST]) or 'nothing'}. "
        "A str is the name of a dataset, 'name/split', or the path of a prepared one.",
    ) from None


def _line_to_prepare(builder: Any) -> str:
    root, module = str(builder.data_dir_root), type(builder).__module__
    if module.split(".")[0] == "tensorflow_datasets":
        made = f"tfds.builder({name_of(builder.info)!r}, data_dir={root!r})"
        line = f"import tensorflow_datasets as tfds; {made}"
    else:
        name = type(builder).__name__
        line = f"from {module} import {name}; {name}(data_dir={root!r})"
    return f"{line}.download_and_prepare(file_format='array_record')"
