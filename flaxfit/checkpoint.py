"""TrainState ↔ bytes ↔ one file, atomic and strict. Knows nothing of models.

The file is a msgpack map `{"meta": ..., "state": ...}` whose `state` is what
`flax.serialization` writes, so Flax alone can read it too.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from flaxfit._errors import CheckpointError
from flaxfit._types import PyTree, TrainState

_KEY_FIELDS = frozenset({"key_data", "key_impl"})
_CHUNKED = "__msgpack_chunked_array__"
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

_Path: TypeAlias = tuple[str, ...]


class _Key(NamedTuple):
    """A typed PRNG key as it lies in a file."""

    data: Any
    impl: str


class _Spec(NamedTuple):
    """What has to agree between a leaf of the file and one of the template."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


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
    content = {"meta": _encode_meta(meta, ("meta",)), "state": _encode(state, ())}
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
    found = dict(_leaves(raw_state, ()))
    wanted, treedef = jax.tree_util.tree_flatten_with_path(template)
    paths = [tuple(_name(entry) for entry in path) for path, _ in wanted]
    expected = {p: leaf for p, (_, leaf) in zip(paths, wanted, strict=True)}
    _compare(found, expected)
    leaves = [_as_jax(found[p], leaf) for p, leaf in expected.items()]
    restored: TrainState = jax.tree_util.tree_unflatten(treedef, leaves)
    return restored


def _is_key(leaf: Any) -> bool:
    """Tells whether `leaf` is an array, real or abstract, of typed PRNG keys."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _joined(path: _Path) -> str:
    return "/".join(path) or "the state"


def _encode(node: PyTree, path: _Path) -> Any:
    """Returns Flax's state dict of `node` with NumPy leaves, keys written out."""
    # Flax knows neither subclasses of dict nor typed keys.
    plain = dict(node) if isinstance(node, dict) else node
    try:
        content: Any = serialization.to_state_dict(plain)
    except ValueError as err:
        # The rest of Flax's message prints the arrays.
        reason, _, _ = str(err).partition(":")
        raise _refused(path, f"a {type(node).__qualname__}", reason) from err
    if isinstance(content, dict):
        if _CHUNKED in content:
            raise _refused(path, "a dict", f"the name {_CHUNKED!r} means a large array")
        return {k: _encode(v, (*path, k)) for k, v in content.items()}
    if _is_key(content):
        return {
            "key_data": np.asarray(jax.random.key_data(content)),
            "key_impl": str(jax.random.key_impl(content)),
        }
    if content is None or type(content) in (bool, int, float, complex):
        return content
    if not isinstance(content, (jax.Array, np.ndarray, np.generic)):
        raise _refused(path, f"a {type(content).__qualname__}", "it is no array")
    return _as_numpy(content, path)


def _as_numpy(array: Any, path: _Path) -> Any:
    """Returns `array` on the host in the machine's byte order."""
    try:
        host = np.asarray(array)
    except (RuntimeError, TypeError) as err:
        raise _refused(path, type(array).__name__, str(err)) from err
    if not (jnp.issubdtype(host.dtype, jnp.number) or host.dtype == np.bool_):
        raise _refused(path, f"an array of dtype {host.dtype}", "it holds no numbers")
    # Flax writes the dtype's name, which does not tell the byte order.
    return host.astype(host.dtype.newbyteorder("="), copy=False)


def _refused(path: _Path, kind: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"Cannot write {_joined(path)}, {kind}: {reason}. A state holds numeric "
        "arrays, scalars and typed PRNG keys; keep anything else outside of it."
    )


def _encode_meta(value: Any, path: _Path) -> Any:
    """Returns `value` in msgpack's own types."""
    if isinstance(value, Mapping):
        return {str(k): _encode_meta(v, (*path, str(k))) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode_meta(v, (*path, str(i))) for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise CheckpointError(
        f"Cannot write {_joined(path)}, a {type(value).__qualname__}: meta holds "
        "dicts, lists, strings, bytes, numbers, bools and None."
    )


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


def _leaves(node: Any, path: _Path) -> Iterator[tuple[_Path, Any]]:
    """Yields every leaf of a file's state with its path; None is no leaf."""
    if isinstance(node, Mapping):
        if node.keys() == _KEY_FIELDS and isinstance(node["key_impl"], str):
            yield path, _Key(node["key_data"], node["key_impl"])
            return
        for name, child in node.items():
            yield from _leaves(child, (*path, str(name)))
    elif node is not None:
        yield path, node


def _name(entry: Any) -> str:
    """Returns the name Flax's state dict gives to one step of a key path."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _spec(leaf: Any) -> _Spec:
    """Returns shape and dtype of an array, a scalar, a key or anything else."""
    if isinstance(leaf, _Key):
        try:
            key = jax.eval_shape(partial(_as_key, impl=leaf.impl), leaf.data)
        except (TypeError, ValueError):
            return _Spec((), f"unreadable key of {leaf.impl}")
        return _Spec(key.shape, str(key.dtype))
    if isinstance(leaf, (bool, int, float, complex)):
        return _Spec((), str(jnp.result_type(leaf)))
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return _Spec(tuple(leaf.shape), leaf.dtype.name)
    return _Spec((), type(leaf).__name__)


def _as_key(data: Any, impl: str) -> jax.Array:
    key: jax.Array = jax.random.wrap_key_data(data, impl=impl)
    return key


def _compare(found: Mapping[_Path, Any], expected: Mapping[_Path, Any]) -> None:
    """Raises one error that lists everything in which the two differ."""
    lines, differing = [], set()
    for path in sorted(found.keys() | expected.keys()):
        saved = _spec(found[path]) if path in found else None
        wanted = _spec(expected[path]) if path in expected else None
        if saved != wanted:
            lines.append(
                f"  {_joined(path)}: {saved or 'nothing'} in the file, "
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


def _as_jax(saved: Any, like: Any) -> jax.Array:
    """Returns a leaf of the file as a jax array with the aval of `like`."""
    if isinstance(saved, _Key):
        return _as_key(jnp.array(saved.data), saved.impl)
    aval = jax.eval_shape(lambda leaf: leaf, like)
    # A copy: a step may be given the buffer for good, the file's bytes it may not.
    array: jax.Array = jnp.array(saved, dtype=aval.dtype)
    if not aval.weak_type:
        return array
    # Setting values keeps the weak type of what they are set into.
    return jax.lax.full(aval.shape, aval.dtype.type(0).item()).at[...].set(array)
