"""Reports compile times and explains recompilations."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from flaxfit._core.tree_specs import LeafSpec, diff, difference_lines
from flaxfit._core.types import Batch
from flaxfit._programs.chunks import DeviceDataset, Stack, batch_at
from flaxfit._programs.compile import Program
from flaxfit._reporting.display import Display
from flaxfit._reporting.timing import Clock
from flaxfit.data.host.arrays import named_leaves


@dataclass
class CompileReport:
    """Shows each compile on `display`, and adds its time to `clock`."""

    display: Display
    clock: Clock | None = None
    # A data loader may predict in another thread; compiles there are not reported.
    thread: int = field(default_factory=threading.get_ident)

    def compiling(self, program: Program) -> None:
        """Shows that a compile has begun."""
        if threading.get_ident() != self.thread:
            return
        self.display.note(f"compiling {program.name}…")

    def compiled(self, program: Program, seconds: float) -> None:
        """Shows how long a compile took, and the reason if it is not the first one."""
        if threading.get_ident() != self.thread:
            return
        if self.clock is not None:
            self.clock.move(seconds, "compiling")
        reason = recompile_reason(program)
        if program.name != "init":
            text = f"compiling {program.name}{' again' * bool(reason)}… {seconds:.1f} s"
            self.display.say(f"{text}: {reason}" if reason else text)


def recompile_reason(program: Program) -> str | None:
    """Returns what changed since the previous compile, None for the first one."""
    if len(program.signatures) < 2:
        return None
    (before, data_before), (now, data_now) = map(_parts, program.signatures)
    changed = {name for name, one in now.items() if before.get(name) != one}
    if text := _length_change([(before.get(name), now[name]) for name in changed]):
        return text
    specs = ({n: LeafSpec.of(x) for n, x in one.items()} for one in (before, now))
    texts = difference_lines(diff(*specs), "{path} is {given}, was {wanted}")
    if data_now != data_before:
        texts.append(f"the data is {data_now}, was {data_before}")
    return "; ".join(texts) or "the devices or the state changed"


def _length_change(changed: Sequence[tuple[Any, Any]]) -> str | None:
    """Returns a text if only the length of rows changed, equally in several arrays."""
    lengths = set()
    for before, now in changed:
        if before is None or before.dtype != now.dtype:
            return None
        if not len(before.shape) == len(now.shape) > 1:
            return None
        if (before.shape[:1], before.shape[2:]) != (now.shape[:1], now.shape[2:]):
            return None
        lengths.add((before.shape[1], now.shape[1]))
    if len(changed) < 2 or len(lengths) > 1:
        return None
    old, new = lengths.pop()
    return f"rows of length {new}, was {old}"


def _parts(signature: tuple[Any, ...]) -> tuple[dict[str, Any], str]:
    """Returns the arrays of one batch by name, and a text on the form of the data."""
    for argument in signature:
        if isinstance(argument, Batch | Stack | DeviceDataset):
            batch = jax.eval_shape(lambda chunk: batch_at(chunk, 0), argument)
            return dict(named_leaves(batch)), _describe(argument)
    return {}, ""


def _describe(chunk: Batch | Stack | DeviceDataset) -> str:
    if isinstance(chunk, Batch):
        return "one batch"
    rows = jax.tree.leaves(chunk)[0].shape[0]
    if isinstance(chunk, Stack):
        return f"{rows} batches"
    return f"{rows:,} rows on the device"
