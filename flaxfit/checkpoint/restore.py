"""Matches a file's raw state to a `TrainState`: strict, lenient, or renamed.

Knows no files, only what lay in one.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from flaxfit._core.errors import CheckpointError, did_you_mean
from flaxfit._core.tree_specs import Difference, diff, difference_lines
from flaxfit._core.types import HostArray, TrainState
from flaxfit.checkpoint.encoding import (
    Key,
    Path,
    as_key,
    is_weak,
    joined,
    leaves_of,
    path_of,
    spec_of,
)

_SMALL = 2**16
_ALIGNMENT = 64  # What XLA asks of memory that it takes as it is.
FIELDS = tuple(TrainState.__dataclass_fields__)

Put: TypeAlias = Callable[[HostArray, Any], jax.Array]
"""Brings a host's array to where a leaf of the template lies."""


@dataclass(frozen=True, repr=False)
class RestoreReport:
    """What became of each leaf of a file and of the model it was loaded into.

    Attributes:
      loaded: paths in the model whose values come from the file.
      renamed: path in the file -> path in the model, where they differ.
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
                f"{path}: {saved} in the file, {here} here"
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
    """The leaves of both sides, each by its path in the model."""

    found: dict[Path, Any]
    wanted: dict[Path, Any]
    renamed: dict[Path, Path]
    skipped: list[Path]
    exempt: set[Path]


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
      raw_state: what `load(path).state` is.
      template: a `TrainState` of arrays or `jax.ShapeDtypeStruct`s.
      put: brings a NumPy array to where the template's leaf lies; without it, arrays
        come to the default device.
      strict: whether everything has to fit; else what does not is left as it is in
        `current`, and the report says so.
      rename: prefix of a path in the file -> the one in the model, such as
        `{"encoder": "backbone"}`, in parameters, in every collection and, where these
        names follow each other first, in the optimizer's state. None for the latter
        leaves that part of the file out and keeps what `current` has.
      parts: the fields to take, such as `("params", "collections")`; None for all.
      current: the state that has what is not taken from the file.

    Returns:
      A state of jax arrays with the template's dtypes and weak types, so a step
      compiled for the template takes it without being compiled again, and a report.

    Raises:
      CheckpointError: paths, shapes or dtypes differ, all of them listed; or `rename`
        does not fit the file.
      ValueError: `current` is needed and not given.
    """
    chosen = FIELDS if parts is None else parts
    found = dict(leaves_of(raw_state, ()))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    expected = {path_of(path): leaf for path, leaf in leaves}
    match = _match(found, expected, dict(rename or {}), chosen)
    differences = _compare(match)
    report, fitting = _report(match, differences)
    if strict and differences:
        raise _misfit(differences, raw_state)
    if current is None and len(fitting) < len(expected):
        raise ValueError(
            "restore(...) does not take every leaf from the file: give current=, the "
            "state that has the others."
        )
    kept = {} if current is None else _by_path(current)
    values = [
        _as_jax(match.found[path], like, put) if path in fitting else kept[path]
        for path, like in expected.items()
    ]
    restored: TrainState = jax.tree_util.tree_unflatten(treedef, values)
    return restored, report


def _by_path(state: TrainState) -> dict[Path, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {path_of(path): leaf for path, leaf in leaves}


def _match(
    found: Mapping[Path, Any],
    expected: Mapping[Path, Any],
    rename: Mapping[str, str | None],
    chosen: Collection[str],
) -> _Match:
    """Renames the file's leaves and leaves out what is not wanted."""
    rules = sorted(
        ((_parts(key), value) for key, value in rename.items()),
        key=lambda rule: -len(rule[0]),
    )
    used: set[Path] = set()
    match = _Match({}, {}, {}, [], set())
    sources: dict[Path, Path] = {}
    for path, leaf in found.items():
        new, rule = _renamed(path, rules)
        used |= {rule} if rule is not None else set()
        if path[:1] and path[0] not in chosen:
            continue
        if new is None:
            match.skipped.append(path)
            continue
        if new in sources:
            raise CheckpointError(
                f"rename= puts both {joined(sources[new])} and {joined(path)} of the "
                f"file at {joined(new)}."
            )
        sources[new] = path
        match.found[new] = leaf
        if new != path:
            match.renamed[path] = new
    for key in rename:
        if _parts(key) not in used:
            known = {"/".join(p[i:j]) for p in found for i, j in _prefixes(p)}
            raise CheckpointError(
                f"rename={{{key!r}: ...}} matches nothing in the file."
                f"{did_you_mean(key, known)}"
            )
    dropped = [rule for rule in rules if rule[1] is None]
    for path, leaf in expected.items():
        if path[:1] and path[0] in chosen:
            match.wanted[path] = leaf
            if dropped and path not in match.found:
                match.exempt.update({path} if _renamed(path, dropped)[1] else ())
    return match


def _parts(text: str) -> Path:
    """Returns the components of a prefix; "params" before others says nothing."""
    path = tuple(part for part in text.split("/") if part)
    return path[1:] if len(path) > 1 and path[0] == "params" else path


def _prefixes(path: Path) -> list[tuple[int, int]]:
    """Returns the start and end of each part of a path that could be renamed."""
    start = {"params": 1, "collections": 2}.get(path[0], len(path))
    return [(start, end) for end in range(start + 1, len(path) + 1)]


def _renamed(
    path: Path, rules: list[tuple[Path, str | None]]
) -> tuple[Path | None, Path | None]:
    """Returns the new path, None to leave it out, and the rule that matched."""
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


def _position(path: Path, old: Path) -> int | None:
    """Returns where in `path` the components `old` are to be replaced."""
    if old[:1] and old[0] in FIELDS:
        return 0 if path[: len(old)] == old else None
    start = {"params": 1, "collections": 2}.get(path[0] if path else "")
    if start is not None:
        return start if path[start : start + len(old)] == old else None
    if path[:1] == ("opt_state",) and old:
        ends = range(1, len(path) - len(old) + 1)
        return next((i for i in ends if path[i : i + len(old)] == old), None)
    return None


def _compare(match: _Match) -> list[Difference]:
    """Returns the paths at which the model and the file differ."""
    exempt = match.exempt
    wanted = {p: spec_of(x) for p, x in match.wanted.items() if p not in exempt}
    return diff(wanted, {path: spec_of(leaf) for path, leaf in match.found.items()})


def _report(
    match: _Match, differences: list[Difference]
) -> tuple[RestoreReport, set[Path]]:
    """Returns the report, and the paths whose values can be taken from the file."""
    differing = {path for path, _, _ in differences}
    fitting = [p for p in match.wanted if p in match.found and p not in differing]
    report = RestoreReport(
        loaded=tuple(map(joined, fitting)),
        renamed=MappingProxyType(
            {joined(old): joined(new) for old, new in match.renamed.items()}
        ),
        missing=tuple(joined(path) for path, _, saved in differences if saved is None),
        unexpected=tuple(joined(path) for path, here, _ in differences if here is None),
        mismatched=MappingProxyType(
            {
                joined(path): (str(saved), str(here))
                for path, here, saved in differences
                if here is not None and saved is not None
            }
        ),
        skipped=tuple(map(joined, match.skipped)),
    )
    return report, set(fitting)


def _misfit(
    differences: list[Difference], raw_state: Mapping[str, Any]
) -> CheckpointError:
    """Returns one error that lists everything in which the two differ."""
    named = sorted(one._replace(path=joined(one.path)) for one in differences)
    lines = difference_lines(named, "  {path}: {given} in the file, {wanted} here")
    advice = "Build the model as it was when the file was saved."
    fields = {path.partition("/")[0] for path, _, _ in named}
    if fields == {"opt_state"} and "opt_state" in raw_state:
        advice = (
            "Only the optimizer's state differs: give the Trainer the optimizer and "
            "the options (clip_norm, freeze, ...) it had when the file was saved, or "
            "take the weights and start the optimizer anew: load(path, ..., "
            "params_only=True)."
        )
    elif fields.isdisjoint({"params", "collections"} | raw_state.keys()):
        advice = "The file holds weights only: load(path, ..., params_only=True)."
    return CheckpointError(
        "\n".join(["The file does not fit this trainer:", *lines, advice])
    )


def _as_jax(saved: Any, like: Any, put: Put | None) -> jax.Array:
    """Returns a leaf of the file as a jax array with the aval of `like`."""
    if isinstance(saved, Key):
        key = as_key(_put(saved.data), saved.impl)
        # What brings an array to its place knows no keys, only their sharding does.
        sharding = getattr(like, "sharding", None) if put is not None else None
        return key if sharding is None else jax.device_put(key, sharding)
    host = saved
    if type(host) is not np.ndarray or host.dtype.itemsize > 4:
        # Scalars have no dtype yet; 64 bits are 32 unless jax is told otherwise.
        host = np.asarray(saved, dtype=jnp.result_type(saved))
    array: jax.Array = _put(host) if put is None else put(_own(host), like)
    if not is_weak(like):
        return array
    # Setting values keeps the weak type of what they are set into.
    weak = jax.lax.full(array.shape, array.dtype.type(0).item()).at[...].set(array)
    return weak if put is None else jax.device_put(weak, array.sharding)


def _put(host: Any) -> jax.Array:
    """Returns `host` on the default device, uncommitted, in memory of jax's own."""
    owned = _own(np.asarray(host))
    # The one has less to do for each array, the other copies large ones once only.
    return jnp.asarray(owned) if owned.nbytes <= _SMALL else jax.device_put(owned)


def _own(host: HostArray) -> HostArray:
    """Returns `host`, copied if jax on a CPU would take its memory as it is.

    A step may be given the buffer for good, the file's bytes it may not.
    """
    # Whatever is not aligned so is copied by jax, and need not be copied twice; for
    # a small array it takes longer to ask than to copy.
    free = host.nbytes > _SMALL and host.ctypes.data % _ALIGNMENT
    return host if free else host.copy()
