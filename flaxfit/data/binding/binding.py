"""Binds parts of a raw batch to inputs, targets and weights.

This reads structure and names only, never values, so it also works on tracers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from flaxfit._core.errors import DataError, did_you_mean
from flaxfit._core.types import Batch, CallSpec, Inputs, PyTree
from flaxfit.data.datasets.columns import Columns
from flaxfit.data.datasets.stream import NO_INFO, DatasetInfo
from flaxfit.data.host.arrays import as_host
from flaxfit.data.host.fields import parts_of

TARGET_NAMES = ("label", "labels", "target", "targets", "y")
WEIGHT_NAMES = ("weights", "sample_weight", "sample_weights")

_Keys: TypeAlias = tuple[str, ...] | dict[str, str]
"""The keys of the inputs, by position or by parameter of the call."""


class _Plan(NamedTuple):
    """The keys of a dict batch by their role."""

    inputs: _Keys
    targets: str | tuple[str, ...] | None
    weights: str | None
    unused: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class InMemoryData:
    """All examples of arrays or a table, bound to inputs and targets.

    `batch.weights` may be None.
    """

    batch: Batch
    info: DatasetInfo = NO_INFO

    @property
    def example(self) -> Batch:
        """The batch, under the name that sources have for their first batch."""
        return self.batch

    def check(self, check_values: Callable[[Batch], None]) -> None:
        """Checks the values, as `BatchSource.check` does."""
        check_values(self.batch)


@dataclasses.dataclass(frozen=True)
class Binding:
    """How a raw batch is read.

    A tuple or list is `(x,)`, `(x, y)` or `(x, y, weights)`. In a dict, inputs are the
    keys named like the parameters of the model's call; targets are the first of
    `label`, `labels`, `target`, `targets`, `y`; weights are the first of `weights`,
    `sample_weight`, `sample_weights`. If one input is missing and one key is left over,
    they are matched whatever their names.

    Attributes:
      call: the inputs of the model's call.
      inputs: the user's choice of inputs: a key of a dict batch, several keys, a dict
        from parameter of the call to key, or a function of the raw batch that
        returns a tuple (inputs by position), a dict (by name) or one input.
      targets: the user's choice of targets in a dict batch: a key or several keys.
      columns: how earlier tables were read; see `table_binding`.
      outputs: inputs -> the shapes of the model's outputs, None if unknown.
    """

    call: CallSpec
    inputs: str | Sequence[str] | Mapping[str, str] | Callable[[Any], Any] | None = None
    targets: str | Sequence[str] | None = None
    columns: Columns | None = None
    outputs: Callable[[Inputs], PyTree] | None = None

    def __post_init__(self) -> None:
        """Checks the parameters named in `inputs`.

        Raises:
          ValueError: the model's call does not have one of them.
        """
        if not isinstance(self.inputs, Mapping) or self.call.var_keyword:
            return
        for name in self.inputs:
            if name not in self.call.names:
                raise ValueError(
                    f"inputs={dict(self.inputs)!r} names the parameter {name!r}, but "
                    f"the model's call takes {listed(self.call.names)}."
                    f"{did_you_mean(name, self.call.names)} Write "
                    "Trainer(model, inputs={parameter: key of the batch})."
                )

    def guided_by(self, info: DatasetInfo) -> "Binding":
        """Returns the binding with a dataset's inputs and targets, unless already set.

        Its inputs are not used if it has all keys that the model's call requires.
        """
        inputs, targets = self.inputs, self.targets
        if inputs is None and info.inputs is not None:
            keys = (info.inputs,) if isinstance(info.inputs, str) else info.inputs
            wanted = self.call.required  # empty for nn.Sequential
            named = bool(wanted) and all(name in info.keys for name in wanted)
            inputs = None if named else keys
        if targets is None:
            targets = info.targets
        return dataclasses.replace(self, inputs=inputs, targets=targets)

    def split(self, raw: Any) -> Batch:
        """Splits a raw batch into a `Batch`; missing targets and weights are None.

        Raises:
          DataError: an input that the call requires is missing, a key does not exist,
            or the tuple has the wrong length.
        """
        if isinstance(raw, Batch):
            return raw
        if has_fields(raw):
            fields = _fields(raw)
            plan = self._plan(fields)
            weights = None if plan.weights is None else fields[plan.weights]
            if callable(self.inputs):
                inputs = self.bind(raw)
            else:
                inputs = self._picked(fields, plan.inputs)
            return Batch(inputs, _pick(fields, plan.targets), weights)
        x, y, weights = _unpacked(raw)
        if isinstance(y, Mapping) and self.targets is not None:
            y = _pick(y, _known_keys("targets", self.targets, y))
        return Batch(self.bind(raw if callable(self.inputs) else x), y, weights)

    def targets_of(self, raw: Any) -> PyTree:
        """Returns the part of a raw batch that is in the place of the targets."""
        return dataclasses.replace(self, inputs=lambda raw: ()).split(raw).targets

    def bind(self, x: Any) -> Inputs:
        """Returns the model's inputs for `x` alone, without targets.

        A tuple or list is several inputs by position if the call takes several. A dict
        is inputs by name if it has the names of the call. Otherwise `x` is one input.
        Unlike a whole batch, a dict of inputs may not have other keys.

        Raises:
          DataError: parts that the call requires are missing, or `x` has others.
        """
        if callable(self.inputs):
            # The user's function may return anything: lists, tensors.
            return _called(as_host(self.inputs(x), but_device=True), self.call)
        if _is_sequence(x):
            return self.by_position(tuple(x) if self.takes_several else (tuple(x),))
        if not isinstance(x, Mapping):
            return self.by_position((x,))
        if self.inputs is not None:
            return self._picked(x, self._chosen(self.inputs, x))
        names = list(x) if self.call.var_keyword else self.call.names
        named = {name: x[name] for name in names if name in x}
        if named and all(name in named for name in self.call.required):
            if len(named) < len(x):
                raise self._unknown(x, named)
            return tuple(named.values()) if self._lone(named) else named
        if self.takes_several:
            raise self._missing(x, tuple(x))
        return self.by_position((dict(x),))

    def unused(self, raw: Any) -> tuple[str, ...]:
        """Returns the keys of a raw batch that are not read."""
        if isinstance(raw, Batch) or not has_fields(raw):
            return ()
        return self._plan(_fields(raw)).unused

    @property
    def takes_several(self) -> bool:
        """Whether the call takes more than one input."""
        call = self.call
        return call.var_positional or len(call.positional or call.keyword_only) > 1

    def _lone(self, names: Mapping[str, Any]) -> bool:
        """Whether these names are the only input of the call: it is then positional."""
        return not self.takes_several and tuple(names) == self.call.positional

    def _plan(self, fields: Mapping[str, Any]) -> _Plan:
        names = self.call.names
        weight_names = (k for k in WEIGHT_NAMES if k in fields and k not in names)
        weights = next(weight_names, None)
        targets: str | tuple[str, ...] | None
        if self.targets is not None:
            targets = _known_keys("targets", self.targets, fields)
        else:
            targets = next((key for key in TARGET_NAMES if key in fields), None)
        taken = {weights, *((targets,) if isinstance(targets, str) else targets or ())}
        if callable(self.inputs):
            return _Plan((), targets, weights, ())
        if self.inputs is not None:
            inputs = self._chosen(self.inputs, fields)
        else:
            inputs = self._matched(fields, taken)
        used = set(inputs.values() if isinstance(inputs, dict) else inputs)
        unused = tuple(key for key in fields if key not in taken | used)
        return _Plan(inputs, targets, weights, unused)

    def _matched(self, fields: Mapping[str, Any], taken: set[str | None]) -> _Keys:
        """Finds the call's inputs among the keys that are not `taken`."""
        call = self.call
        free = [key for key in fields if key not in taken]
        if not call.names and call.var_positional and len(free) == 1:
            return (free[0],)  # nn.Sequential, whose inputs have no names
        # A target that the call also requires, as in a decoder, is both.
        found = {
            name: name
            for name in (*call.names, *(free if call.var_keyword else ()))
            if name in free or (name in call.required and name in fields)
        }
        missing = [name for name in call.required if name not in found]
        left = [key for key in free if key not in call.names]
        if not missing and found:
            return tuple(found) if self._lone(found) else found
        if len(missing) <= 1 and len(left) == 1:
            if not set(found) - set(left):
                return (left[0],)
            return {**{k: k for k in found if k not in left}, missing[0]: left[0]}
        raise self._missing(fields, tuple(free))

    def _chosen(self, inputs: Any, fields: Mapping[str, Any]) -> _Keys:
        """Returns the keys that the user's `inputs` name."""
        keys = tuple(inputs.values()) if isinstance(inputs, Mapping) else inputs
        known = _known_keys("inputs", keys, fields)
        if isinstance(known, str):
            return (known,)
        if isinstance(inputs, Mapping):
            return dict(zip(inputs, known, strict=True))
        if all(key in self.call.names for key in known):
            return {key: key for key in known}
        return known

    def _picked(self, fields: Mapping[str, Any], keys: _Keys) -> Inputs:
        if isinstance(keys, dict):
            return {name: fields[key] for name, key in keys.items()}
        return self.by_position(tuple(fields[key] for key in keys))

    def by_position(self, values: tuple[Any, ...]) -> Inputs:
        """Returns `values` as positional inputs, checked against the call."""
        call = self.call
        by_name = not call.positional and not call.var_positional
        names = (call.required or call.keyword_only) if by_name else call.positional
        fewest = len(names) if by_name else len(call.required)
        most = len(values) if call.var_positional else len(names)
        if not fewest <= len(values) <= most:
            example = ", ".join(call.required or names)
            raise DataError(
                f"x has {len(values)} part{'s' * (len(values) != 1)}, but the model's "
                f"call takes {listed(call.names)} and requires "
                f"{listed(call.required)}. Give x as a tuple ({example},), or as a "
                "dict with these names."
            )
        return dict(zip(names, values, strict=True)) if by_name else values

    def _unknown(self, x: Mapping[str, Any], named: Mapping[str, Any]) -> DataError:
        unknown = [key for key in x if key not in named]
        absent = [name for name in self.call.names if name not in named]
        return DataError(
            f"x has the keys {listed(x)}, but the model's call takes "
            f"{listed(self.call.names)} and has no {unknown[0]!r}."
            f"{did_you_mean(str(unknown[0]), absent)} Rename it or leave it out, or "
            f"name the inputs: Trainer(model, inputs={list(named)!r})."
        )

    def _missing(self, fields: Mapping[str, Any], free: tuple[str, ...]) -> DataError:
        lacking = [name for name in self.call.required if name not in fields]
        name = (*lacking, *self.call.names, "x")[0]
        spare = [key for key in free if key not in self.call.names]
        first = (*spare, *free, "key")[0]
        return DataError(
            f"the batch has the keys {listed(fields)}; the model's call takes "
            f"{listed(self.call.names)} and requires {listed(self.call.required)}. Say "
            f"which key is which input: Trainer(model, inputs={{{name!r}: {first!r}}})."
        )


def _called(inputs: Any, call: CallSpec) -> Inputs:
    """Returns the result of the function `inputs` as inputs of the call."""
    if isinstance(inputs, tuple) and not hasattr(inputs, "_fields"):
        return inputs
    by_name = isinstance(inputs, Mapping) and (
        call.var_keyword or all(name in call.names for name in inputs)
    )
    return dict(inputs) if by_name else (inputs,)


def _unpacked(raw: Any) -> tuple[Any, Any, Any]:
    """Returns `(x, y, weights)`, with None for missing parts."""
    if not _is_sequence(raw):
        return raw, None, None
    if not 1 <= len(raw) <= 3:
        raise DataError(
            f"a {type(raw).__name__} of {len(raw)} items: a batch is x, (x,), (x, y) "
            "or (x, y, weights). Write several inputs as one tuple, ((a, b), y); a "
            "list of examples as one array, np.stack(x)."
        )
    x, y, weights = (*raw, None, None)[:3]
    return x, y, weights


def _is_sequence(value: object) -> bool:
    return isinstance(value, tuple | list) and not hasattr(value, "_fields")


def has_fields(raw: object) -> bool:
    """Whether a raw batch is read by names: a mapping or named tuple.

    So is a dataclass that has a field for targets; any other dataclass is an input.
    """
    if isinstance(raw, Mapping) or hasattr(raw, "_asdict"):
        return True
    if not dataclasses.is_dataclass(raw) or isinstance(raw, type | Batch):
        return False
    return any(field.name in TARGET_NAMES for field in dataclasses.fields(raw))


def _fields(raw: Any) -> dict[str, Any]:
    if isinstance(raw, Mapping) or hasattr(raw, "_asdict"):
        return parts_of(raw)
    return {field.name: getattr(raw, field.name) for field in dataclasses.fields(raw)}


def _known_keys(
    argument: str, keys: str | Sequence[str], fields: Mapping[str, Any]
) -> str | tuple[str, ...]:
    for key in (keys,) if isinstance(keys, str) else keys:
        if key not in fields:
            raise DataError(
                f"{argument}={keys!r}, but the batch has the keys {listed(fields)}."
                f"{did_you_mean(str(key), map(str, fields))} Write "
                f"Trainer(model, {argument}=...) with keys of the batch."
            )
    return keys if isinstance(keys, str) else tuple(keys)


def _pick(fields: Mapping[str, Any], keys: str | tuple[str, ...] | None) -> PyTree:
    if keys is None:
        return None
    if isinstance(keys, str):
        return fields[keys]
    return {key: fields[key] for key in keys}


def listed(names: Any) -> str:
    """Returns names as text for a message."""
    return ", ".join(map(str, names)) or "nothing"
