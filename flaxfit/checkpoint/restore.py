"""Matches a file's raw state to a `TrainState`: strict, lenient, or renamed.

Works on the content of files, and opens none.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from flaxfit._core.errors import CheckpointError, UsageError, did_you_mean
from flaxfit._core.tree_specs import Difference, diff, difference_lines
from flaxfit._core.types import HostArray, TrainState
from flaxfit.checkpoint.encoding import (
    Key,
    KeyPath,
    is_weak,
    joined,
    leaves_of,
    path_of,
    spec_of,
)

_SMALL = 2**16
_ALIGNMENT = 64  # bytes; XLA copies host memory with a smaller alignment
_LINE = "{path}: {given} in the file, {wanted} here"
FIELDS = tuple(TrainState.__dataclass_fields__)

Put: TypeAlias = Callable[[HostArray, Any], jax.Array]
"""Moves a host array to the devices of a leaf of the template."""


@dataclass(frozen=True, repr=False)
class RestoreReport:
    """Lists which leaves of a file were loaded into a model, and which were not.

    Attributes:
      loaded: paths in the model whose values come from the file.
      renamed: path in the file -> path in the model, if they differ.
      missing: paths in the model that the file does not have.
      unexpected: paths in the file that the model does not have.
      mismatched: path in the model -> `(saved, here)`, e.g.
        `("float32[2]", "float32[3]")`.
      skipped: paths in the file that `rename` leaves out.
    """

    loaded: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[str, str]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    skipped: tuple[str, ...] = ()

    def __repr__(self) -> str:
        rows = {
            "loaded": list(self.loaded),
            "renamed": [f"{old} -> {new}" for old, new in self.renamed.items()],
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "mismatched": [
                _LINE.format(path=path, given=saved, wanted=here)
                for path, (saved, here) in self.mismatched.items()
            ],
            "skipped": list(self.skipped),
        }
        lines = ["RestoreReport"]
        for name, items in rows.items():
            shown = items[:1] if name == "loaded" else items[:5]
            shown += ["..."] if len(items) > len(shown) else []
            start = f"  {name:<10} {len(items):>6}"
            lines.append(f"{start}  {shown[0]}" if shown else start)
            lines += [" " * 21 + item for item in shown[1:]]
        return "\n".join(lines)


class _Match(NamedTuple):
    """The leaves of both sides by their paths in the model.

    Attributes:
      found: the leaves of the file.
      wanted: the leaves of the template that the file has to have.
      renamed: path in the file -> path in the model.
      skipped: paths in the file that `rename` leaves out.
    """

    found: dict[KeyPath, Any]
    wanted: dict[KeyPath, Any]
    renamed: dict[KeyPath, KeyPath]
    skipped: list[KeyPath]


def restore(
    raw_state: Mapping[str, Any],
    template: TrainState,
    *,
    put: Put | None = None,
    strict: bool = True,
    rename: Mapping[str, str | None] | None = None,
    parts: tuple[str, ...] | None = None,
    current: TrainState | None = None,
) -> tuple[TrainState, RestoreReport]:
    """Puts the state of a file into the structure of `template`.

    Args:
      raw_state: `load(path).state`.
      template: a `TrainState` of arrays or `jax.ShapeDtypeStruct`s.
      put: moves a NumPy array to the devices of the template's leaf; if None, arrays
        go to the default device.
      strict: whether everything has to fit; otherwise a leaf that does not fit keeps
        its value in `current`, and the report lists it.
      rename: prefix of a path in the file -> prefix in the model, such as
        `{"encoder": "backbone"}`. It applies to the parameters, every collection and,
        where the names first occur in a path, the optimizer's state. A new prefix of
        None leaves that part of the file out and keeps the one of `current`.
      parts: the fields to take, such as `("params", "collections")`; None for all.
      current: the state with the leaves that are not taken from the file.

    Returns:
      A state of jax arrays with the template's dtypes and weak types, so that a step
      compiled for the template takes it without another compile, and a report.

    Raises:
      CheckpointError: paths, shapes or dtypes differ, all of them listed; or `rename`
        does not fit the file.
      ValueError: `current` is needed and not given.
    """
    chosen = FIELDS if parts is None else parts
    found = dict(leaves_of(raw_state, ()))
    expected, treedef = _by_path(template), jax.tree.structure(template)
    match = _match(found, expected, dict(rename or {}), chosen)
    wanted, given = (
        {path: spec_of(leaf) for path, leaf in side.items()}
        for side in (match.wanted, match.found)
    )
    differences = diff(wanted, given)
    if strict and differences:
        raise _does_not_fit(differences, raw_state)
    differing = {path for path, _, _ in differences}
    fitting = [p for p in match.wanted if p in match.found and p not in differing]
    if current is None and len(fitting) < len(expected):
        raise UsageError(
            "restore(...) does not take every leaf from the file",
            write="restore(..., current=state), with a state that has the others",
        )
    values = {} if current is None else _by_path(current)
    for path in fitting:
        values[path] = _as_jax(match.found[path], expected[path], put)
    in_order = [values[path] for path in expected]
    restored: TrainState = jax.tree_util.tree_unflatten(treedef, in_order)
    return restored, _report(match, fitting, differences)


def _by_path(state: TrainState) -> dict[KeyPath, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {path_of(path): leaf for path, leaf in leaves}


def _match(
    found: Mapping[KeyPath, Any],
    expected: Mapping[KeyPath, Any],
    rename: Mapping[str, str | None],
    chosen: Collection[str],
) -> _Match:
    """Renames the file's leaves and drops the unwanted ones."""
    rules = sorted(
        ((_parts(key), value) for key, value in rename.items()),
        key=lambda rule: -len(rule[0]),
    )
    targets = {path: _renamed(path, rules) for path in found}
    sources: dict[KeyPath, KeyPath] = {}
    skipped: list[KeyPath] = []
    for path, (new, _) in targets.items():
        if path and path[0] not in chosen:
            continue
        if new is None:
            skipped.append(path)
        elif new in sources:
            raise CheckpointError(
                f"rename= puts both {joined(sources[new])} and {joined(path)} of the "
                f"file at {joined(new)}"
            )
        else:
            sources[new] = path
    used = {rule for _, rule in targets.values()}
    for key in rename:
        if _parts(key) not in used:
            known = {"/".join(p[i:j]) for p in found for i, j in _prefixes(p)}
            raise CheckpointError(
                f"rename={{{key!r}: ...}} matches nothing in the file."
                f"{did_you_mean(key, known)}"
            )
    dropped = [rule for rule in rules if rule[1] is None]
    wanted = {
        path: leaf
        for path, leaf in expected.items()
        if path[0] in chosen and (path in sources or not _renamed(path, dropped)[1])
    }
    return _Match(
        found={new: found[path] for new, path in sources.items()},
        wanted=wanted,
        renamed={path: new for new, path in sources.items() if new != path},
        skipped=skipped,
    )


def _parts(text: str) -> KeyPath:
    """Returns the components of a prefix, without "params" before others."""
    path = tuple(part for part in text.split("/") if part)
    return path[1:] if len(path) > 1 and path[0] == "params" else path


def _prefixes(path: KeyPath) -> list[tuple[int, int]]:
    """Returns the start and end of each part of a path that could be renamed."""
    start = {"params": 1, "collections": 2}.get(path[0], len(path))
    return [(start, end) for end in range(start + 1, len(path) + 1)]


def _renamed(
    path: KeyPath, rules: list[tuple[KeyPath, str | None]]
) -> tuple[KeyPath | None, KeyPath | None]:
    """Returns the new path (None to leave it out) and the rule that matched, if any."""
    for old, new in rules:
        at = _position(path, old)
        if at is None:
            continue
        if new is None:
            return None, old
        target = tuple(part for part in new.split("/") if part)
        if old[:1] and old[0] not in FIELDS and target[:1] == ("params",):
            target = target[1:]
        return (*path[:at], *target, *path[at + len(old) :]), old
    return path, None


def _position(path: KeyPath, old: KeyPath) -> int | None:
    """Returns the index in `path` at which to replace `old`, None for no match."""
    if old[:1] and old[0] in FIELDS:
        return 0 if path[: len(old)] == old else None
    start = {"params": 1, "collections": 2}.get(path[0] if path else "")
    if start is not None:
        return start if path[start : start + len(old)] == old else None
    if path[:1] == ("opt_state",) and old:
        ends = range(1, len(path) - len(old) + 1)
        return next((i for i in ends if path[i : i + len(old)] == old), None)
    return None


def _report(
    match: _Match, fitting: Collection[KeyPath], differences: Sequence[Difference]
) -> RestoreReport:
    renamed = {joined(old): joined(new) for old, new in match.renamed.items()}
    both = {
        joined(path): (str(saved), str(here))
        for path, here, saved in differences
        if here is not None and saved is not None
    }
    return RestoreReport(
        loaded=tuple(map(joined, fitting)),
        renamed=MappingProxyType(renamed),
        missing=tuple(joined(path) for path, _, saved in differences if saved is None),
        unexpected=tuple(joined(path) for path, here, _ in differences if here is None),
        mismatched=MappingProxyType(both),
        skipped=tuple(map(joined, match.skipped)),
    )


def _does_not_fit(
    differences: Sequence[Difference], raw_state: Mapping[str, Any]
) -> CheckpointError:
    """Returns the error that lists all differences."""
    named = [one._replace(path=joined(one.path)) for one in differences]
    named.sort(key=lambda one: str(one.path))
    lines = difference_lines(named, f"  {_LINE}", absent="nothing")
    advice = "Build the model as it was when the file was saved."
    fields = {path.partition("/")[0] for path, _, _ in named}
    if fields == {"opt_state"} and "opt_state" in raw_state:
        advice = (
            "Only the optimizer's state differs: give the Trainer the optimizer and "
            "the options (clip_norm, freeze, ...) it had when the file was saved, or "
            "take the weights alone: load(path, ..., params_only=True)."
        )
    elif fields.isdisjoint({"params", "collections"} | raw_state.keys()):
        advice = "The file holds weights only: load(path, ..., params_only=True)."
    return CheckpointError(
        "\n".join(["The file does not fit this trainer:", *lines, advice])
    )


def _as_jax(saved: Any, like: Any, put: Put | None) -> jax.Array:
    """Returns a leaf of the file as a jax array with the aval of `like`."""
    if isinstance(saved, Key):
        key = jax.random.wrap_key_data(_put(saved.data), impl=saved.impl)
        # `put` moves plain arrays only.
        sharding = getattr(like, "sharding", None) if put is not None else None
        return key if sharding is None else jax.device_put(key, sharding)
    host = saved
    if type(host) is not np.ndarray or host.dtype.itemsize > 4:
        # A scalar has no dtype yet, and 64 bits become 32 unless jax_enable_x64 is set.
        host = np.asarray(saved, dtype=jnp.result_type(saved))
    array: jax.Array = _put(host) if put is None else put(_unaliased(host), like)
    if not is_weak(like):
        return array
    # `at[...].set` keeps the weak type of the array it sets values in.
    weak = jax.lax.full(array.shape, array.dtype.type(0).item()).at[...].set(array)
    return weak if put is None else jax.device_put(weak, array.sharding)


def _put(host: Any) -> jax.Array:
    """Returns `host` on the default device, uncommitted, in memory that jax owns."""
    owned = _unaliased(np.asarray(host))
    # `asarray` has less overhead per array, `device_put` copies a large one only once.
    return jnp.asarray(owned) if owned.nbytes <= _SMALL else jax.device_put(owned)


def _unaliased(host: HostArray) -> HostArray:
    """Returns `host`, copied if jax on a CPU would use its memory without a copy.

    A step may overwrite a buffer donated to it; the file's bytes must stay as they are.
    """
    # jax copies misaligned memory itself; copying a small array is faster than checking
    # its alignment.
    free = host.nbytes > _SMALL and host.ctypes.data % _ALIGNMENT
    return host if free else host.copy()
