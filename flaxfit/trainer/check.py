"""Reports what was detected: the first lines of `fit`, and `Trainer.check`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flaxfit._core.tree_specs import listed, specs_of
from flaxfit._core.types import Batch, PyTree, TrainState
from flaxfit._loops.host_reads import read
from flaxfit._models.image_scaling import has_images
from flaxfit._programs.placement import even_size
from flaxfit._programs.resolve import ResolvedTask
from flaxfit._reporting.display import (
    format_bytes,
    format_count,
    format_table,
    format_value,
)
from flaxfit.data.sources.base import BatchSource
from flaxfit.losses.matching import pick, where

_MOST_CLASSES = 10
_TIMES = "\N{MULTIPLICATION SIGN}"


class Text(str):
    """A text that a notebook or prompt shows as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, repr=False)
class CheckReport:
    """What `Trainer.check` found; `print` it, or look things up.

    Attributes:
      rows: what is shown, by name.
      initial_loss: the loss of the first batch before training.
      chance_loss: what guessing would give (log C for C classes), None if unknown.
      zero_gradients: the paths of parameters whose gradient is 0 on that batch.
      flops: floating point operations of one training step, None if unknown.
      step_bytes: device memory of one training step: state, batch and temporaries.
      compiles: how often each phase will be compiled.
    """

    rows: Mapping[str, str]
    initial_loss: float
    chance_loss: float | None
    zero_gradients: tuple[str, ...]
    flops: float | None
    step_bytes: float | None
    compiles: Mapping[str, int]

    def __repr__(self) -> str:
        return format_table(self.rows)

    def __str__(self) -> str:
        return format_table(self.rows)


def first_lines(
    resolved: ResolvedTask,
    state: TrainState,
    source: BatchSource,
    spare_devices: int = 0,
    class_names: Sequence[str] = (),
) -> list[str]:
    """Returns the lines a `fit` begins with: two, more if there is more to say.

    Args:
      resolved: the parts of the trainer.
      state: the state before the first step.
      source: the data.
      spare_devices: how many devices have nothing to do.
      class_names: the names of the classes.
    """
    detected = resolved.adapted.detected
    parts = [
        detected.name,
        f"{_size(state.params)[0]:,} params",
        f"collections: {_listed(detected.carried)}",
        f"rngs: {_listed(detected.rngs)}",
        f"train flag: {detected.train_flag}",
    ]
    if detected.sown:
        parts.insert(3, f"sown: {_listed(detected.sown)}")
    targets = resolved.example.targets
    about = f" ({_targets_text(resolved)})" if targets is not None else ""
    lines = [
        " · ".join(parts),
        " · ".join(
            [
                f"loss: {_loss_text(resolved)}{about}",
                _optimizer_text(resolved, state),
                _device_text(state),
            ]
        ),
    ]
    if source.kind != "arrays":
        lines.append(f"data: {_data_text(source)}")
    if source.info.table:
        lines.append(f"columns: {source.info.table}")
    if class_names:
        lines.append(f"classes: {listed_classes(class_names)}")
    if resolved.scaled and has_images(source.example.inputs):
        lines.append("pictures: uint8, divided by 255 on the device")
    if isinstance(resolved.example.inputs, dict) or len(resolved.example.inputs) > 1:
        lines.append(_inputs_text(resolved.example))
    if spare_devices:
        used = len(resolved.placement.devices)
        everything = used + spare_devices
        size = even_size(source.batch_size, everything, source.num_examples)
        lines.append(
            f"{used} of {everything} devices are used, as they divide batches of "
            f"{source.batch_size}"
            + (f"; all would with batch_size={size}" if size else "")
        )
    if source.info.unused:
        lines.append(f"unused: {_listed(map(str, source.info.unused))}")
    if resolved.task.objective.scalar_loss and _has_tail(source):
        lines.append(
            "the loss returns one number per batch: the last, shorter batch is not "
            "filled up but compiled for separately"
        )
    return lines


def listed_classes(names: Sequence[str]) -> str:
    """Returns the names of classes, the first of them if they are many."""
    shown = ", ".join(names[:_MOST_CLASSES])
    return shown if len(names) <= _MOST_CLASSES else f"{shown}, … ({len(names)})"


def make_report(
    resolved: ResolvedTask,
    state: TrainState,
    source: BatchSource,
    class_names: Sequence[str] = (),
) -> CheckReport:
    """Computes the report on the first batch; the state is only read."""
    example = source.example
    loss, gradients = read(resolved.programs.gradient(state, example))
    zero = tuple(
        _path(path)
        for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]
        if not np.any(leaf)
    )
    cost = resolved.programs.train.analyze(state, resolved.empty(), example, 0, 1)
    flops = cost.get("flops")
    step_bytes = cost.get("bytes")
    chance = _chance(resolved)
    tail = resolved.task.objective.scalar_loss and _has_tail(source)
    steps = (2 if tail else 1) * source.shapes
    compiles = {"train": steps, "eval": steps, "predict": source.shapes}
    rows = {
        **_model_rows(resolved, state),
        **_data_rows(resolved, source, example),
        **({"classes": listed_classes(class_names)} if class_names else {}),
        "loss": _loss_text(resolved),
        "loss now" if int(read(state.step)) else "initial loss": format_value(
            float(loss)
        )
        + ("" if chance is None else f" (by chance {format_value(chance)})"),
        "metrics": _listed(resolved.task.metrics),
        "optimizer": _optimizer_text(resolved, state),
        "zero gradient": _listed(zero),
        **_warning_rows(resolved, state, example),
        "one step": _step_text(flops, step_bytes),
        "compiles": ", ".join(f"{n} {_TIMES} {phase}" for phase, n in compiles.items()),
    }
    return CheckReport(rows, float(loss), chance, zero, flops, step_bytes, compiles)


def _model_rows(resolved: ResolvedTask, state: TrainState) -> dict[str, str]:
    detected = resolved.adapted.detected
    why = dict(detected.reasons or {})
    count, size = _size(state.params)
    rows = {
        "model": f"{detected.name}: {count:,} params, {format_bytes(size)}",
        "collections": _listed(detected.carried),
        "sown": _listed(detected.sown),
        "rngs": _listed(detected.rngs),
        "train flag": detected.train_flag,
    }
    if detected.axis_names:
        rows["axis names"] = f"{_listed(detected.axis_names)} (bound to an axis of 1)"
    return {n: f"{v} ({why[n]})" if n in why else v for n, v in rows.items()}


def _warning_rows(
    resolved: ResolvedTask, state: TrainState, example: Batch
) -> dict[str, str]:
    """Says where outputs look like probabilities though their loss takes logits."""
    terms = [
        term for term in resolved.task.objective.terms if term.loss.spec.takes_logits
    ]
    if not terms:
        return {}
    with resolved.programs.predict.uncounted():
        outputs = read(resolved.programs.predict(state, example, 0, 1, 0))
    warnings = []
    for term in terms:
        values = np.asarray(pick(outputs, term.path), np.float32)
        several = term.loss.num_classes(values.shape) is not None
        inside = values.min() >= 0 and values.max() <= 1 and values.any()
        if inside and (not several or np.allclose(values.sum(-1), 1, atol=1e-2)):
            warnings.append(
                f"outputs{where(term.path)} look like probabilities, and "
                f"{term.loss.name} takes logits: let the model return them without "
                f"the last {'softmax' if several else 'sigmoid'}"
            )
    return {"warning": "; ".join(warnings)} if warnings else {}


def _data_rows(
    resolved: ResolvedTask, source: BatchSource, example: Batch
) -> dict[str, str]:
    rows = {
        "data": _data_text(source),
        "inputs": _inputs_text(example).removeprefix("inputs: "),
        "outputs": _shapes(resolved.outputs),
        "targets": _shapes(example.targets),
    }
    if source.info.table:
        rows["columns"] = source.info.table
    if source.info.unused:
        rows["unused"] = _listed(map(str, source.info.unused))
    labels = [
        leaf for leaf in jax.tree.leaves(example.targets) if leaf.dtype.kind in "iu"
    ]
    if labels:
        low, high = min(map(np.min, labels)), max(map(np.max, labels))
        rows["labels"] = f"{low}..{high} in the first batch"
    return rows


def _data_text(source: BatchSource) -> str:
    size = "" if source.num_examples is None else f"{source.num_examples:,} examples, "
    batches = "unknown number of" if source.num_batches is None else source.num_batches
    return f"{source.kind}: {size}{batches} batches of {source.batch_size}"


def _chance(resolved: ResolvedTask) -> float | None:
    objective = resolved.task.objective
    if not objective.single or objective.terms[0].path:
        return None
    shape = getattr(resolved.outputs, "shape", None)
    return None if shape is None else objective.terms[0].loss.chance_loss(shape)


def _loss_text(resolved: ResolvedTask) -> str:
    sown = "losses" in resolved.adapted.detected.sown
    names = [resolved.task.objective.name] if resolved.task.objective.terms else []
    return " + ".join([*names, *(["sown losses"] if sown else [])])


def _targets_text(resolved: ResolvedTask) -> str:
    targets = jax.tree.leaves(resolved.example.targets)
    outputs = jax.tree.leaves(resolved.outputs)
    if len(targets) != 1 or len(outputs) != 1:
        return f"{len(targets)} targets, {len(outputs)} outputs"
    width = outputs[0].shape[-1] if len(outputs[0].shape) > 1 else 1
    return f"{targets[0].dtype} targets, {width} output{'s' if width != 1 else ''}"


def _optimizer_text(resolved: ResolvedTask, state: TrainState) -> str:
    optimizer = resolved.task.optimizer
    rate = optimizer.learning_rate(state.opt_state)
    if rate is None:
        return optimizer.name
    return f"{optimizer.name} {float(np.real(read(rate))):g}"


def _device_text(state: TrainState) -> str:
    devices = state.step.devices()
    return f"{len(devices)} {_TIMES} {next(iter(devices)).platform}"


def _inputs_text(example: Batch) -> str:
    if isinstance(example.inputs, dict):
        named = example.inputs.items()
        return "inputs: " + ", ".join(f"{n} {_shapes(v)}" for n, v in named)
    return "inputs: " + ", ".join(_shapes(value) for value in example.inputs)


def _step_text(flops: float | None, step_bytes: float | None) -> str:
    texts = []
    if flops is not None:
        texts.append(f"{format_count(flops)}FLOP")
    if step_bytes is not None:
        texts.append(f"{format_bytes(step_bytes)} on the device")
    return ", ".join(texts) or "unknown on this backend"


def _has_tail(source: BatchSource) -> bool:
    if source.num_examples is None or not source.batch_size:
        return True
    return source.num_examples % source.batch_size != 0


def _size(tree: PyTree) -> tuple[int, int]:
    leaves = jax.tree.leaves(tree)
    return sum(x.size for x in leaves), sum(x.nbytes for x in leaves)


def _shapes(tree: PyTree) -> str:
    return listed(specs_of(tree))


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"
