"""Encodes training state as nested dicts of NumPy arrays, and describes its leaves.

A leaf that `flax.serialization` cannot write is replaced by leaves that it can write.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from flaxfit._core.errors import CheckpointError
from flaxfit._core.tree_specs import LeafSpec, path_text
from flaxfit._core.types import HostArray, PyTree

MAX_DEPTH = 64
"""How deeply a state or meta may be nested."""

CHUNKED = "__msgpack_chunked_array__"
_KEY_FIELDS = frozenset({"key_data", "key_impl"})
# Flax once wrote namedtuples as dicts with these keys, and still reads such dicts so.
_OLD_NAMEDTUPLE = frozenset({"name", "fields", "values"})
_DTYPE_NAMES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"),
    *("uint64", "float16", "float32", "float64", "complex64", "complex128"),
    *("bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    *("float8_e8m0fnu", "float4_e2m1fn", "int2", "int4", "uint2", "uint4"),
)
DTYPES = MappingProxyType({name: np.dtype(name) for name in _DTYPE_NAMES})
"""The dtypes a file may hold, by their canonical names."""

# `dtype.name` computes the name at every access; this is faster.
NAMES = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})

KeyPath: TypeAlias = tuple[str, ...]
"""The path of a leaf: `("params", "Dense_0", "kernel")`."""


class Key(NamedTuple):
    """A typed PRNG key as a file stores it."""

    data: Any
    impl: str


def joined(path: KeyPath) -> str:
    """Returns `"params/Dense_0/kernel"`."""
    return "/".join(path) or "the state"


def is_key_node(node: Mapping[str, Any]) -> bool:
    """Whether a dict in a file stores a typed key."""
    return node.keys() == _KEY_FIELDS and isinstance(node["key_impl"], str)


@dataclass
class Encoder:
    """Converts a tree to Flax's state dict, and describes its leaves.

    Args:
      copy: whether to copy every array.
      abstract: whether leaves may be `jax.ShapeDtypeStruct`s, which stay as they are.

    Attributes:
      leaves: a line for every leaf so far.
      nbytes: the total size of their data.
    """

    copy: bool = False
    abstract: bool = False
    leaves: list[str] = field(default_factory=list)
    nbytes: int = 0

    def encode(self, node: PyTree, path: KeyPath) -> Any:
        """Returns nested dicts with NumPy arrays, scalars and None in them.

        Raises:
          CheckpointError: something cannot be written or read back.
        """
        content = _children(node, path)
        if isinstance(content, dict):
            # A split array or a key nests up to three levels more.
            if len(path) > (most := MAX_DEPTH - 4):
                raise _refused(path, "a dict", f"nested more than {most} deep")
            if CHUNKED in content:
                reason = f"the name {CHUNKED!r} stands for a split array"
                raise _refused(path, "a dict", reason)
            return {k: self.encode(v, (*path, k)) for k, v in content.items()}
        return None if content is None else self._leaf(content, path)

    def _leaf(self, leaf: Any, path: KeyPath) -> Any:
        if type(leaf) in (bool, int, float, complex):
            if isinstance(leaf, int) and not -(2**63) <= leaf < 2**64:
                raise _refused(path, "an int", "an integer of more than 64 bits")
            limits = jnp.iinfo(jnp.result_type(int))
            if type(leaf) is int and not limits.min <= leaf <= limits.max:
                raise _refused(path, "an int", f"{limits.dtype} cannot hold {leaf}")
            self._describe(spec_of(leaf), path, is_weak(leaf), 16)
            return leaf
        abstract = self.abstract and isinstance(leaf, jax.ShapeDtypeStruct)
        if not abstract and not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise _refused(path, f"a {type(leaf).__qualname__}", "it is not an array")
        if _is_key(leaf):
            return self._key(leaf, path)
        if leaf.dtype not in NAMES and leaf.dtype.newbyteorder("=") not in NAMES:
            reason = "jax has no such dtype"
            raise _refused(path, f"an array of dtype {leaf.dtype}", reason)
        if not abstract:
            weak = is_weak(leaf)
            leaf = _on_host(leaf, path, copy=self.copy)
            self._describe(spec_of(leaf), path, weak, leaf.nbytes)
        return leaf

    def _key(self, key: Any, path: KeyPath) -> Any:
        if isinstance(key, jax.ShapeDtypeStruct):
            return key
        impl = str(jax.random.key_impl(key))
        data = _on_host(jax.random.key_data(_usable(key, path)), path, copy=self.copy)
        self._describe(LeafSpec(key.shape, f"key<{impl}>"), path, False, data.nbytes)
        return {"key_data": data, "key_impl": impl}

    def _describe(self, spec: LeafSpec, path: KeyPath, weak: bool, nbytes: int) -> None:
        self.leaves.append(f"{'~' if weak else ''}{spec} {joined(path)}")
        self.nbytes += nbytes


def _children(node: Any, path: KeyPath) -> Any:
    """Returns the children of `node` by the names Flax gives them, or a leaf."""
    kind = type(node)
    if isinstance(node, dict):  # Flax takes a subclass for a leaf
        content = {str(k): v for k, v in node.items()}
        if len(content) != len(node):
            reason = "Dict keys do not have a unique string representation"
            raise _refused(path, f"a {kind.__qualname__}", reason)
        return content
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        if set(node._fields) == _OLD_NAMEDTUPLE:
            reason = "Flax cannot read a tuple with the fields name, fields and values"
            raise _refused(path, f"a {kind.__qualname__}", reason)
        return {name: getattr(node, name) for name in node._fields}
    if kind in (list, tuple):
        return {str(i): child for i, child in enumerate(node)}
    if isinstance(node, (jax.Array, np.ndarray)):
        return node
    try:
        return serialization.to_state_dict(node)
    except ValueError as err:
        # The rest of Flax's message prints the arrays.
        reason, _, _ = str(err).partition(":")
        raise _refused(path, f"a {kind.__qualname__}", reason) from err


def start_copies(tree: PyTree) -> None:
    """Starts copying all arrays of an accelerator to the host at the same time."""
    try:
        leaves: list[Any] = jax.tree.leaves(tree)
    except ValueError:  # jax cannot sort the keys of a dict; the encoder reports it
        return
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not _is_key(leaf) and not leaf.is_deleted():
            devices: Any = leaf.devices()
            local = leaf.is_fully_addressable
            if local and next(iter(devices)).platform != "cpu":
                leaf.copy_to_host_async()


def _usable(array: Any, path: KeyPath) -> Any:
    """Returns `array`; raises if its values are gone or on another host."""
    if isinstance(array, jax.Array):
        kind = f"a {type(array).__name__}"
        if isinstance(array, jax.core.Tracer):
            raise _refused(path, kind, "it is traced, inside jax.jit or the like")
        if array.is_deleted():
            reason = "it has been deleted, as a step's donated input is"
            raise _refused(path, kind, reason)
        if not (array.is_fully_addressable or array.is_fully_replicated):
            reason = "its parts are on several hosts; use orbax-checkpoint there"
            raise _refused(path, kind, reason)
    return array


def _on_host(array: Any, path: KeyPath, *, copy: bool) -> HostArray:
    """Returns `array` on the host in the machine's byte order."""
    if isinstance(array, np.ma.MaskedArray):
        raise _refused(path, "a masked array", "its mask would be lost")
    try:
        host = np.asarray(_usable(array, path))
    except (RuntimeError, TypeError) as err:
        raise _refused(path, f"a {type(array).__name__}", str(err)) from err
    if not host.dtype.isnative:  # Flax writes a dtype's name, which has no byte order
        return host.astype(host.dtype.newbyteorder("="))
    # On a CPU `host` shares the device's buffer, which a step may overwrite if donated.
    return np.array(host) if copy and _may_alias(array) else host


def _may_alias(array: Any) -> bool:
    """Whether the values of the host's view of `array` may change later."""
    if not isinstance(array, jax.Array):
        return True
    sharding = array.sharding
    if len(sharding.device_set) > 1 and not array.is_fully_replicated:
        return False  # its parts have just been joined in new memory
    device: Any = next(iter(sharding.device_set))
    platform = device.platform
    return platform == "cpu" or sharding.memory_kind not in (None, "device")


def _refused(path: KeyPath, kind: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"Cannot write {joined(path)}, {kind}: {reason}",
        "A state holds numeric arrays, scalars and typed PRNG keys",
    )


def encode_meta(value: Any, path: KeyPath) -> Any:
    """Returns `value` in msgpack's own types."""
    kind = type(value).__qualname__
    if len(path) > MAX_DEPTH:
        raise _refused_meta(path, f"{kind} nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        content = {str(k): encode_meta(v, (*path, str(k))) for k, v in value.items()}
        if len(content) != len(value):
            raise _refused_meta(path, f"{kind} with two keys of the same text")
        return content
    if isinstance(value, (list, tuple)):
        return [encode_meta(v, (*path, str(i))) for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) is int and not -(2**63) <= value < 2**64:
        raise _refused_meta(path, "integer of more than 64 bits")
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise _refused_meta(path, kind)


def _refused_meta(path: KeyPath, kind: str) -> CheckpointError:
    article = "an" if kind[0] in "aeiou" else "a"
    return CheckpointError(
        f"Cannot write {joined(path)}, {article} {kind}: meta holds dicts, lists, "
        "strings, bytes, numbers of at most 64 bits, bools and None"
    )


def leaves_of(node: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Yields every leaf of a file's state with its path; None is not a leaf."""
    if isinstance(node, Mapping):
        if is_key_node(node):
            yield path, Key(node["key_data"], node["key_impl"])
            return
        for name, child in node.items():
            yield from leaves_of(child, (*path, str(name)))
    elif node is not None:
        yield path, node


def path_of(key_path: tuple[Any, ...]) -> KeyPath:
    """Converts jax's key path to the names in Flax's state dict."""
    return tuple(path_text((step,)) for step in key_path)


def _is_key(leaf: Any) -> bool:
    """Whether `leaf` is an array, real or abstract, of typed PRNG keys."""
    dtype: Any = getattr(leaf, "dtype", None)
    # Most dtypes are NumPy's; asking jax about each of them would be slower.
    known = dtype is None or isinstance(dtype, np.dtype)
    return not known and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def is_weak(leaf: Any) -> bool:
    """Whether `leaf` has a weak type, which yields to other dtypes."""
    return bool(getattr(leaf, "weak_type", type(leaf) in (int, float, complex)))


def spec_of(leaf: Any) -> LeafSpec:
    """Returns shape and dtype of an array, a scalar, a key or anything else."""
    if isinstance(leaf, Key):
        try:
            wrap = partial(jax.random.wrap_key_data, impl=leaf.impl)
            key = jax.eval_shape(wrap, leaf.data)
        except (TypeError, ValueError):
            return LeafSpec((), f"unreadable key of {leaf.impl}")
        return LeafSpec(key.shape, str(key.dtype))
    if isinstance(leaf, (bool, int, float, complex)):
        dtype = jnp.result_type(leaf)
        if dtype.kind == "i" and abs(int(leaf.real)) > jnp.iinfo(dtype).max:
            return LeafSpec((), "int64")
        return LeafSpec((), dtype.name)
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return LeafSpec(tuple(leaf.shape), NAMES.get(leaf.dtype) or leaf.dtype.name)
    return LeafSpec((), type(leaf).__name__)
