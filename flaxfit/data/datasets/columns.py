"""Remembers how a table's columns were read, so that later tables are read alike."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Name: TypeAlias = str | int
Part: TypeAlias = Name | tuple[Name, ...]
"""One column `[rows]`, or the columns of a matrix `[rows, columns]` in their order."""


@dataclass(frozen=True)
class Columns:
    """The columns that a trainer remembers from the tables it was trained on.

    Attributes:
      inputs: the columns of each input, by position or by the call's parameter. None
        if the inputs were not a table, or a function selects them.
      targets: the columns of the targets, or of each of several outputs. None if the
        targets had no name, or the name of an input.
      target_axis: whether one column of targets is `[rows, 1]`, like the output.
      class_names: the names of the classes 0, 1, … if the targets were a category.
    """

    inputs: tuple[Part, ...] | Mapping[str, Part] | None = None
    targets: Part | Mapping[str, Part] | None = None
    target_axis: bool = False
    class_names: tuple[str, ...] = ()

    @property
    def input_names(self) -> tuple[Name, ...]:
        """The columns that are inputs."""
        return tuple(names_in(self.inputs))

    def to_plain(self) -> dict[str, Any]:
        """Returns the attributes as lists, dicts and plain values."""
        return {name: _plain(value) for name, value in vars(self).items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any] | None) -> "Columns | None":
        """Returns the columns that `to_plain` gave; None for None."""
        if plain is None:
            return None
        return cls(**{name: _frozen(value) for name, value in plain.items()})


def names_in(parts: Any) -> Iterator[Name]:
    """Yields the column names in a nesting of parts, in order."""
    if isinstance(parts, Mapping):
        parts = tuple(parts.values())
    if isinstance(parts, tuple):
        for part in parts:
            yield from names_in(part)
    elif parts is not None:
        yield parts


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _frozen(part) for name, part in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
