"""Finds, prepares and opens TFDS builders by name or folder.

TFDS reads without TensorFlow. Some datasets take it to be prepared: those whose
pictures come as arrays, which it writes as PNG.
"""

import importlib
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any, NoReturn
from urllib.parse import urlsplit

from flaxfit._core.errors import DataError, did_you_mean

_HUGGING_FACE = "huggingface:"
_INFO_FILE = "dataset_info.json"
_USUAL_SPLITS = frozenset(("all", "dev", "test", "train", "val", "valid", "validation"))
# TFDS itself tries for three minutes before it says that there is no network.
_SECONDS_TO_CONNECT = 5.0
_HOSTS_TO_TRY = 3
_NAMES_TO_LIST = 20


def find_builder(
    given: str | PurePath, data_dir: str | os.PathLike[str] | None
) -> tuple[Any, str]:
    """Returns the builder of a dataset, and the split written behind its name.

    Args:
      given: `name[/config][:version][/split]`, or the path of a folder that holds a
        prepared dataset, with or without a split behind it.
      data_dir: where datasets by name lie; None for TFDS's own folder.

    Raises:
      ValueError: there is no such dataset, version or config.
    """
    tfds = _tfds()
    path = Path(given).expanduser()
    if isinstance(given, PurePath) or os.sep in given:
        for folder, split in ((path, ""), (path.parent, path.name)):
            if (folder / _INFO_FILE).is_file():
                return tfds.builder_from_directory(folder), split
    if isinstance(given, PurePath) or given.startswith(("/", ".", "~")):
        raise ValueError(_no_folder(path, given))
    if given.startswith(_HUGGING_FACE):
        name = given.removeprefix(_HUGGING_FACE)
        raise ValueError(
            f"{given!r} is a dataset of Hugging Face. Give what "
            f"datasets.load_dataset({name!r}, split='train') returns."
        )
    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)
    # A config goes before a split of the same name, as in TFDS itself.
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
        raise ValueError(_no_folder(path, given))
    _raise_unknown(given, data_dir, failure)


def prepare(builder: Any) -> None:
    """Downloads and prepares a dataset as array_record, unless it is prepared already.

    Raises:
      DataError: it cannot be; the message holds the line that does it.
    """
    if _is_prepared(builder):
        return
    name, root = name_of(builder.info), builder.data_dir_root
    hosts = _unreachable(builder)
    if hosts:
        raise DataError(
            f"{name} is not prepared in {root}, and cannot be downloaded from here: no "
            f"connection to {', '.join(hosts)}. {_by_hand(builder, None)}"
        )
    print(f"{name} is not prepared in {root}: TFDS does so now, once.", flush=True)
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{name} is not prepared in {root}, and TFDS failed to do so: "
            f"{type(error).__name__}: {reason} {_by_hand(builder, error)}"
        ) from error
    if not _is_prepared(builder):  # TFDS takes any folder there for a prepared one
        raise DataError(
            f"{builder.data_dir} is there, but holds no prepared dataset. Delete the "
            "folder, and call this again."
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
        raise DataError(
            f"{name_of(builder.info)} in {builder.data_dir} is stored as {stored}, "
            "which only TensorFlow reads, and only in order. Store it as array_record "
            "too, in any environment with TensorFlow:\n\n"
            "    pip install tensorflow apache_beam mlcroissant\n"
            f"    tfds convert_format --dataset_version_dir={builder.data_dir} "
            "--out_file_format=array_record\n\n"
            "or give what tfds.load(...) returns, a tf.data.Dataset."
        ) from error


def name_of(info: Any) -> str:
    """Returns the name TFDS finds a dataset by: `"glue/sst2:2.0.0"`."""
    config = f"/{info.config_name}" if info.config_name else ""
    return f"{info.name}{config}:{info.version}"


def _tfds() -> ModuleType:
    return importlib.import_module("tensorflow_datasets")


def _is_prepared(builder: Any) -> bool:
    return bool((builder.data_path / _INFO_FILE).exists())


def _check_is_split(builder: Any, split: str) -> None:
    """Sees to it that a mistyped config does not prepare the default one.

    Raises:
      ValueError: it looks like no split, and the dataset has configs.
    """
    configs = list(builder.builder_configs)
    splits = _USUAL_SPLITS | {*builder.info.splits}
    if not configs or re.split(r"\W", split)[0] in splits:
        return
    name = builder.info.name
    raise ValueError(
        f"{f'{name}/{split}'!r}: {split!r} is no config of {name}, which has "
        f"{', '.join(configs)}.{did_you_mean(split, configs)} If it is a split, name "
        f"the config too: {f'{name}/{configs[0]}/{split}'!r}."
    )


def _no_folder(path: Path, given: str | PurePath) -> str:
    if path.is_file():
        problem = "is a file. Read it, and give the arrays or the table in it."
    elif path.is_dir():
        problem = (
            f"is a folder without {_INFO_FILE}, so no prepared TFDS dataset. For one "
            "by name write the name, and data_dir= for where it lies; for a folder of "
            "pictures flaxfit.data.image_folder(path, (128, 128)), for a zarr "
            "array zarr.open(path)."
        )
    else:
        problem = "does not exist."
    return f"{str(given)!r} {problem}"


def _raise_unknown(
    given: str, data_dir: str | os.PathLike[str] | None, failure: Exception
) -> NoReturn:
    """Raises what is wrong with a name that TFDS knows no builder for."""
    tfds = _tfds()
    root = Path(data_dir or tfds.core.constants.DATA_DIR)
    prepared = _prepared_in(root)
    listed = ", ".join(prepared[:_NAMES_TO_LIST]) or "nothing"
    more = ", …" if len(prepared) > _NAMES_TO_LIST else ""
    stored = f" Prepared in {root}: {listed}{more}."
    name = re.split("[/:]", given)[0]
    known = {
        *tfds.list_builders(with_community_datasets=False),
        *(re.split("[/:]", each)[0] for each in prepared),
    }
    if name in known:
        reason = str(failure).strip().splitlines()[0].rsplit('}": ', 1)[-1]
        reason = reason.partition(" Here are")[0]
        configs = list(getattr(_class_of(name), "builder_configs", ()))
        choice = f" Its configs are {', '.join(configs)}." if configs else ""
        raise ValueError(
            f"{given!r} is nothing that TFDS has of {name}: {reason}{choice}{stored}"
        ) from failure
    advice = did_you_mean(name, known)
    if name in _USUAL_SPLITS:
        advice = f" A split goes behind the name of its dataset: {f'mnist/{name}'!r}."
    # Not from the failure, which lists hundreds of names.
    raise ValueError(
        f"no dataset {given!r}: neither TFDS nor its folder has {name!r}."
        f"{advice}{stored} A str is the name of a dataset, "
        "'name/split', or the path of a prepared one; data_dir= says where those by "
        "name lie."
    ) from None


def _class_of(name: str) -> Any:
    tfds = _tfds()
    names = tfds.list_builders(with_community_datasets=False)
    return tfds.builder_cls(name) if name in names else None


def _prepared_in(root: Path) -> list[str]:
    """Returns the datasets of a folder by the names TFDS finds them by."""
    found = []
    for depth in ("*/*", "*/*/*"):
        for file in sorted(root.glob(f"{depth}/{_INFO_FILE}")):
            *names, version = file.parent.relative_to(root).parts
            found.append(f"{'/'.join(names)}:{version}")
    return found


def _unreachable(builder: Any) -> tuple[str, ...]:
    """Returns the hosts a dataset is downloaded from, if none of them answers.

    Nothing where no hosts are known, where what lies on the disk may do, or where
    another machine connects.
    """
    # Not above: it brings all of http and ssl, for what is hardly ever called.
    from urllib.request import getproxies

    urls: Mapping[str, Any] = builder.url_infos or {}
    if getproxies() or _has_downloads(builder, urls):
        return ()
    places = {}
    for url in urls:
        parts = urlsplit(url)
        if parts.hostname:
            places[parts.hostname] = 80 if parts.scheme == "http" else 443
    tried = list(places.items())[:_HOSTS_TO_TRY]
    for place in tried:
        try:
            socket.create_connection(place, _SECONDS_TO_CONNECT).close()
        except OSError:
            continue
        return ()
    return tuple(host for host, _ in tried)


def _has_downloads(builder: Any, urls: Mapping[str, Any]) -> bool:
    file_name = _tfds().core.download.resource.get_dl_fname
    names = {file_name(url, info.checksum) for url, info in urls.items()}
    downloads = Path(builder.data_dir_root) / "downloads"
    return any(path.name in names for path in downloads.rglob("*"))


def _by_hand(builder: Any, error: BaseException | None) -> str:
    """Returns the line that prepares a dataset, and where to run it."""
    root, module = str(builder.data_dir_root), type(builder).__module__
    if module.split(".")[0] == "tensorflow_datasets":
        made = f"tfds.builder({name_of(builder.info)!r}, data_dir={root!r})"
        line = f"import tensorflow_datasets as tfds; {made}"
    else:
        name = type(builder).__name__
        line = f"from {module} import {name}; {name}(data_dir={root!r})"
    missing = _missing_module(error)
    needs = missing or "tensorflow"
    return (
        f"To prepare it {'takes' if missing else 'may take'} {needs} (pip install "
        f"{needs}), to read it does not. Run this where it can be done, and if that is "
        f"another machine copy {builder.data_dir} here from there:\n\n"
        f"    python -c \"{line}.download_and_prepare(file_format='array_record')\"\n"
    )


def _missing_module(error: BaseException | None) -> str:
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name
        error = error.__cause__ or error.__context__
    return ""
