"""TrainState ↔ bytes ↔ one file, atomic and strict. Knows nothing of models.

The file is a msgpack map `{"meta": ..., "state": ...}` whose `state` is what
`flax.serialization` writes, so Flax alone can read it too.
"""

import contextlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from flax import serialization

from flaxfit import _codec
from flaxfit._errors import CheckpointError
from flaxfit._types import TrainState

_MOST_LINES = 20
_FOREIGN = MappingProxyType(
    {
        b"\x80\x02": "a Python pickle",
        b"\x80\x03": "a Python pickle",
        b"\x80\x04": "a Python pickle",
        b"\x80\x05": "a Python pickle",
        b"PK\x03\x04": "a zip file (as .keras, .npz and PyTorch's files are)",
        b"\x89HDF": "an HDF5 file",
        b"\x93NUMPY": "a .npy file",
        b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
        b"<": "an HTML or XML page: a download that failed",
        b"{": "a JSON file",
    }
)


def save(
    path: str | os.PathLike[str], state: TrainState, meta: Mapping[str, Any]
) -> None:
    """Writes `state` and `meta` into one file, all of it or nothing.

    Args:
      path: the file; missing folders above it are made, an old file is replaced
        only once the new one is safe on the disk.
      state: its leaves must be numeric arrays, scalars or typed PRNG keys.
      meta: `dict`, `list`, `str`, `bytes`, numbers, `bool` and `None`, in any
        nesting. A tuple comes back as a list.

    Raises:
      CheckpointError: something cannot be written, named by its path, or `path`
        is a folder.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise CheckpointError(
            f"{os.fspath(path)!r} is a folder; give the file to write, for example "
            f"{os.path.join(os.fspath(path), 'run.msgpack')!r}."
        )
    content = {
        "meta": _codec.encode_meta(meta, ("meta",)),
        "state": _codec.encode_state(state, ()),
    }
    try:
        data = serialization.msgpack_serialize(content, in_place=True)
    except OverflowError as err:
        raise CheckpointError(
            "Cannot write an integer of more than 64 bits; write it as a string."
        ) from err
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, data)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a file `save` has written; `restore` makes a state of the second part.

    Returns:
      `(meta, raw_state)`, plain nested dicts with NumPy arrays.

    Raises:
      CheckpointError: there is no such file, it is cut off, or it is something
        else; the message says what it looks like.
    """
    name = repr(os.fspath(path))
    file = Path(path)
    if file.is_dir():
        raise CheckpointError(f"{name} is a folder; give the file that was saved.")
    if not file.exists():
        raise CheckpointError(f"There is no file {name}.")
    data = file.read_bytes()
    for start, kind in _FOREIGN.items():
        if data.startswith(start):
            raise CheckpointError(
                f"{name} is no checkpoint; it looks like {kind}. Expected a file "
                "written by trainer.save(path)."
            )
    try:
        content = serialization.msgpack_restore(data)
    except Exception as err:  # The codec raises whatever damaged bytes lead it to.
        raise CheckpointError(
            f"{name} cannot be read: {len(data)} bytes that are no whole msgpack "
            f"file ({err or type(err).__name__}). It is cut off, damaged, or was not "
            "written by trainer.save(path)."
        ) from err
    return _split(content, name)


def restore(raw_state: Mapping[str, Any], template: TrainState) -> TrainState:
    """Puts what `load` returned into the structure of `template`.

    Args:
      raw_state: the second part of what `load` returned.
      template: a `TrainState` of arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A state of jax arrays with the template's dtypes and weak types, so a step
      compiled for the template takes it without being compiled again.

    Raises:
      CheckpointError: paths, shapes or dtypes differ; all of them are listed.
    """
    found = dict(_codec.leaves_of(raw_state, ()))
    wanted, treedef = jax.tree_util.tree_flatten_with_path(template)
    paths = [_codec.path_of(path) for path, _ in wanted]
    expected = {p: leaf for p, (_, leaf) in zip(paths, wanted, strict=True)}
    _compare(found, expected)
    leaves = [_codec.as_jax(found[p], leaf) for p, leaf in expected.items()]
    restored: TrainState = jax.tree_util.tree_unflatten(treedef, leaves)
    return restored


def _write(target: Path, data: bytes) -> None:
    """Writes beside `target`, makes it safe on the disk, then renames."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _split(content: object, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns `meta` and `state` of a file's content, or says what it is."""
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{name} is no checkpoint: it holds a {type(content).__name__}, not a map "
            "with 'meta' and 'state'."
        )
    meta, state = content.get("meta"), content.get("state")
    if isinstance(meta, dict) and isinstance(state, dict):
        return meta, state
    raise CheckpointError(
        f"{name} was not written by trainer.save(path): it holds "
        f"{sorted(map(str, content))}, as a file of plain flax.serialization.to_bytes "
        "does. Read it with flax.serialization.from_bytes(target, data) and assign "
        "trainer.state."
    )


def _compare(
    found: Mapping[_codec.Path, Any], expected: Mapping[_codec.Path, Any]
) -> None:
    """Raises one error that lists everything in which the two differ."""
    lines, differing = [], set()
    for path in sorted(found.keys() | expected.keys()):
        saved = _codec.spec_of(found[path]) if path in found else None
        wanted = _codec.spec_of(expected[path]) if path in expected else None
        if saved != wanted:
            lines.append(
                f"  {_codec.joined(path)}: {saved or 'nothing'} in the file, "
                f"{wanted or 'nothing'} here"
            )
            differing.add(path[0] if path else "")
    if not lines:
        return
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"  ... and {len(lines) - _MOST_LINES} more"]
    advice = "Build the model as it was when the file was saved."
    if differing == {"opt_state"}:
        advice = (
            "Only the optimizer's state differs: give the Trainer the optimizer and "
            "the options (clip_norm, freeze, ...) it had when the file was saved."
        )
    raise CheckpointError(
        "\n".join(["The file does not fit this trainer:", *lines, advice])
    )
