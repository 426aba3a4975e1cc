"""Text reports on checkpoints for the command line. Needs no model."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxfit import checkpoint
from flaxfit._core.errors import CheckpointCorruptError, CheckpointError
from flaxfit._reporting.display import format_bytes
from flaxfit.checkpoint import corruption, file_format
from flaxfit.checkpoint.api import read_bytes
from flaxfit.checkpoint.encoding import DTYPES, Key, joined, leaves_of, spec_of


class _File(NamedTuple):
    """The content of a file of flaxfit or of plain Flax."""

    kind: str
    size: int
    meta: dict[str, Any]
    leaves: dict[str, Any]


def inspect_text(path: str) -> str:
    """Returns a file's kind, versions, position and a table of its leaves.

    Raises:
      CheckpointError: the file cannot be read.
    """
    file = _open(path)
    lines = [path, f"  {file.kind}, {format_bytes(file.size)}"]
    versions = file.meta.get("versions")
    if isinstance(versions, dict):
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines.append(f"  written by {text}")
    if position := _position(file):
        lines.append(f"  {position}")
    rows = [(n, str(spec_of(leaf)), _nbytes(leaf)) for n, leaf in file.leaves.items()]
    parts: dict[str, list[int]] = {}
    for name, _, size in rows:
        parts.setdefault(name.partition("/")[0], []).append(size)
    sums = [*parts.items(), ("total", [size for _, _, size in rows])]
    totals = [(part, _count(sizes), sum(sizes)) for part, sizes in sums]
    width = max(len(name) for name, _, _ in rows + totals)
    middle = max(len(text) for _, text, _ in rows + totals)
    for block in (rows, totals):
        lines.append("")
        lines += [
            f"  {a:<{width}}  {b:<{middle}}  {format_bytes(c):>9}" for a, b, c in block
        ]
    return "\n".join(lines)


def _count(leaves: Sequence[Any]) -> str:
    return f"{len(leaves):,} {'leaf' if len(leaves) == 1 else 'leaves'}"


def verify_text(paths: Sequence[str]) -> tuple[str, bool]:
    """Returns one line for each file, and whether all of them are intact.

    Args:
      paths: files, or folders that hold `*.msgpack` files.
    """
    lines, good = [], True
    for path in _files(paths):
        try:
            checkpoint.verify(path)
            lines.append(f"{path}: ok")
        except CheckpointError as err:
            damaged = isinstance(err, CheckpointCorruptError)
            text = str(err).removeprefix(f"{path!r} ").removeprefix("is damaged: ")
            text = text.removesuffix(f" {corruption.ADVICE}")
            lines.append(f"{path}: {'DAMAGED' if damaged else 'NOT READ'}: {text}")
            good = False
    return "\n".join(lines), good


def diff_text(one: str, other: str) -> tuple[str, bool]:
    """Returns the differences between two files, and whether they are equal.

    Raises:
      CheckpointError: one of them cannot be read.
    """
    a, b = _open(one), _open(other)
    lines = list(_meta_differences(a.meta, b.meta, ()))
    lines += [f"only in {one}: {name}" for name in a.leaves if name not in b.leaves]
    lines += [f"only in {other}: {name}" for name in b.leaves if name not in a.leaves]
    same = [name for name in a.leaves if name in b.leaves]
    width = max(map(len, same), default=0)
    for name in same:
        found = _leaf_difference(a.leaves[name], b.leaves[name])
        lines += [f"{name:<{width}}  {found}"] if found else []
    return "\n".join(lines or ["equal"]), not lines


def _open(path: str) -> _File:
    """Reads a file of flaxfit or of plain Flax."""
    data = read_bytes(path)
    if not corruption.is_checkpoint(data):
        leaves = _named(file_format.read_plain(data, path), ())
        return _File("plain flax.serialization file", len(data), {}, leaves)
    file = file_format.read(data, path)
    kind = f"flaxfit checkpoint, format {file.meta.get('format')}, checksums correct"
    leaves = {**_named(file.state, ()), **_named(file.extra, ("extra",))}
    return _File(kind, len(data), file.meta, leaves)


def _named(tree: Any, path: tuple[str, ...]) -> dict[str, Any]:
    return {joined(where): leaf for where, leaf in leaves_of(tree, path)}


def _position(file: _File) -> str:
    """Returns the step and, in a file of `fit`, the epoch (from 1); may be empty."""
    step, loop = file.leaves.get("step"), file.meta.get("loop")
    texts = [] if step is None or np.size(step) != 1 else [f"step {int(step)}"]
    if isinstance(loop, dict):
        epoch, batch = loop.get("epoch"), loop.get("batch")
        if isinstance(epoch, int) and isinstance(batch, int):
            within = f"epoch {epoch + 1}, batch {batch}"
            texts.append(within if batch else f"end of epoch {epoch}")
    return ", ".join(texts)


def _nbytes(leaf: Any) -> int:
    return int(np.asarray(leaf.data if isinstance(leaf, Key) else leaf).nbytes)


def _files(paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        if os.path.isdir(path):
            yield from map(str, sorted(Path(path).glob("*.msgpack")))
        else:
            yield path


def _meta_differences(one: Any, other: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Yields a line for each part of meta that differs."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in dict.fromkeys([*one, *other]):
            if path or name != "leaves":  # the leaves themselves are compared
                a, b = (side.get(name, "nothing") for side in (one, other))
                yield from _meta_differences(a, b, (*path, name))
    elif repr(one) != repr(other):  # NaN equals NaN here.
        yield f"meta {joined(path)}: {_short(one)} | {_short(other)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 30 else f"{text[:27]}..."


def _leaf_difference(one: Any, other: Any) -> str | None:
    """Returns how two leaves differ, None if they do not."""
    if str(spec_of(one)) != str(spec_of(other)):
        return f"{spec_of(one)} | {spec_of(other)}"
    a, b = (np.asarray(x.data if isinstance(x, Key) else x) for x in (one, other))
    if a.tobytes() == b.tobytes():
        return None
    if a.dtype.name not in DTYPES or isinstance(one, Key):
        return "another value"
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        distance = np.abs(a.astype(wide) - b.astype(wide))
        differing = (a != b) & ~((a != a) & (b != b))
    count = int(differing.sum())
    if not count:
        return None  # 0 and -0, or NaNs of other bits
    real = distance[differing & np.isfinite(distance)]
    most = f", max |difference| {real.max():.3g}" if real.size else ""
    return f"{count:,} of {a.size:,} differ{most}"
