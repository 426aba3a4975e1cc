"""The state of a training as plain nested dicts of NumPy arrays, and back.

What `flax.serialization` cannot write is turned into what it can. Knows no files.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from flaxfit._errors import CheckpointError
from flaxfit._types import PyTree

_KEY_FIELDS = frozenset({"key_data", "key_impl"})
_CHUNKED = "__msgpack_chunked_array__"

Path: TypeAlias = tuple[str, ...]


class Key(NamedTuple):
    """A typed PRNG key as it lies in a file."""

    data: Any
    impl: str


class Spec(NamedTuple):
    """What has to agree between a leaf of the file and one of the template."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def _is_key(leaf: Any) -> bool:
    """Tells whether `leaf` is an array, real or abstract, of typed PRNG keys."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def joined(path: Path) -> str:
    return "/".join(path) or "the state"


def encode_state(node: PyTree, path: Path) -> Any:
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
        return {k: encode_state(v, (*path, k)) for k, v in content.items()}
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


def _as_numpy(array: Any, path: Path) -> Any:
    """Returns `array` on the host in the machine's byte order."""
    try:
        host = np.asarray(array)
    except (RuntimeError, TypeError) as err:
        raise _refused(path, type(array).__name__, str(err)) from err
    if not (jnp.issubdtype(host.dtype, jnp.number) or host.dtype == np.bool_):
        raise _refused(path, f"an array of dtype {host.dtype}", "it holds no numbers")
    # Flax writes the dtype's name, which does not tell the byte order.
    return host.astype(host.dtype.newbyteorder("="), copy=False)


def _refused(path: Path, kind: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"Cannot write {joined(path)}, {kind}: {reason}. A state holds numeric "
        "arrays, scalars and typed PRNG keys; keep anything else outside of it."
    )


def encode_meta(value: Any, path: Path) -> Any:
    """Returns `value` in msgpack's own types."""
    if isinstance(value, Mapping):
        return {str(k): encode_meta(v, (*path, str(k))) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode_meta(v, (*path, str(i))) for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise CheckpointError(
        f"Cannot write {joined(path)}, a {type(value).__qualname__}: meta holds "
        "dicts, lists, strings, bytes, numbers, bools and None."
    )


def leaves_of(node: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yields every leaf of a file's state with its path; None is no leaf."""
    if isinstance(node, Mapping):
        if node.keys() == _KEY_FIELDS and isinstance(node["key_impl"], str):
            yield path, Key(node["key_data"], node["key_impl"])
            return
        for name, child in node.items():
            yield from leaves_of(child, (*path, str(name)))
    elif node is not None:
        yield path, node


def path_of(key_path: tuple[Any, ...]) -> Path:
    """Returns the names Flax's state dict gives to the steps of jax's key path."""

    def name(step: Any) -> str:
        for attribute in ("key", "name", "idx"):
            if hasattr(step, attribute):
                return str(getattr(step, attribute))
        return str(step)

    return tuple(name(step) for step in key_path)


def spec_of(leaf: Any) -> Spec:
    """Returns shape and dtype of an array, a scalar, a key or anything else."""
    if isinstance(leaf, Key):
        try:
            key = jax.eval_shape(partial(_as_key, impl=leaf.impl), leaf.data)
        except (TypeError, ValueError):
            return Spec((), f"unreadable key of {leaf.impl}")
        return Spec(key.shape, str(key.dtype))
    if isinstance(leaf, (bool, int, float, complex)):
        return Spec((), str(jnp.result_type(leaf)))
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return Spec(tuple(leaf.shape), leaf.dtype.name)
    return Spec((), type(leaf).__name__)


def _as_key(data: Any, impl: str) -> jax.Array:
    key: jax.Array = jax.random.wrap_key_data(data, impl=impl)
    return key


def as_jax(saved: Any, like: Any) -> jax.Array:
    """Returns a leaf of the file as a jax array with the aval of `like`."""
    if isinstance(saved, Key):
        return _as_key(jnp.array(saved.data), saved.impl)
    # A copy: a step may be given the buffer for good, the file's bytes it may not.
    array: jax.Array = jnp.array(saved, dtype=jnp.result_type(saved))
    if not getattr(like, "weak_type", type(like) in (int, float, complex)):
        return array
    # Setting values keeps the weak type of what they are set into.
    return jax.lax.full(array.shape, array.dtype.type(0).item()).at[...].set(array)
