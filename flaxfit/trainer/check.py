"""Describes what a trainer detected: the first lines of `fit`, and `Trainer.check`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from flaxfit._core.tree_specs import listed, path_text, specs_of
from flaxfit._core.types import Batch, PyTree, TrainState
from flaxfit._loops.host_reads import read
from flaxfit._models.base import Detected
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
    """A string that a notebook or a prompt shows as `print` does, without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, repr=False)
class CheckReport:
    """The result of `Trainer.check`: `print` it, or read its attributes.

    Attributes:
      rows: the printed table, name -> text.
      initial_loss: the loss of the first batch, before training.
      chance_loss: the loss of a model that guesses (log C for C classes), None if
        unknown.
      zero_gradients: the paths of parameters whose gradient is 0 for that batch.
      flops: floating point operations of one training step, None if unknown.
      step_bytes: device memory for one training step: the state, the batch and
        temporary arrays; None if unknown.
      compiles: how many times each phase will be compiled.
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


def first_lines(
    resolved: ResolvedTask,
    state: TrainState,
    source: BatchSource,
    spare_devices: int,
    class_names: Sequence[str],
) -> list[str]:
    """Returns the lines that `fit` begins with: model, training, unusual data.

    `state` is the state before the first step; `spare_devices` is the number of idle
    devices.
    """
    detected, inputs = resolved.adapted.detected, resolved.example.inputs
    about_model = _detected_texts(detected)
    if not detected.sown:
        del about_model["sown"]
    loss = _loss_text(resolved)
    if resolved.example.targets is not None:
        loss += f" ({_targets_text(resolved)})"
    model = [detected.name, f"{_size(state.params)[0]:,} params"]
    training = [_optimizer_text(resolved, state), _device_text(state)]
    pictures = resolved.scaled and has_images(source.example.inputs)
    several = isinstance(inputs, dict) or len(inputs) > 1
    about_data = {
        "data": "" if source.kind == "arrays" else _data_text(source),
        "columns": source.info.table,
        "classes": listed_classes(class_names),
        "pictures": "uint8, divided by 255 on the device" if pictures else "",
        "inputs": _inputs_text(resolved.example) if several else "",
        "unused": ", ".join(map(str, source.info.unused)),
    }
    lines = [
        " · ".join([*model, *_named(about_model)]),
        " · ".join([f"loss: {loss}", *training]),
        *_named(about_data),
    ]
    if spare_devices:
        used = len(resolved.placement.devices)
        everything = used + spare_devices
        size = even_size(source.batch_size, everything, source.num_examples)
        lines.append(
            f"{used} of {everything} devices are used, to divide batches of "
            f"{source.batch_size} evenly"
            + (f"; batch_size={size} would use all" if size else "")
        )
    if resolved.task.objective.scalar_loss and _has_tail(source):
        lines.append(
            "the loss returns one number per batch, so the last, shorter batch is not "
            "padded, and a second program is compiled for it"
        )
    return lines


def listed_classes(names: Sequence[str]) -> str:
    """Returns the names of the classes, or the first ones if there are many."""
    shown = ", ".join(names[:_MOST_CLASSES])
    return shown if len(names) <= _MOST_CLASSES else f"{shown}, … ({len(names)})"


def make_report(
    resolved: ResolvedTask,
    state: TrainState,
    source: BatchSource,
    class_names: Sequence[str],
) -> CheckReport:
    """Makes a report from the first batch; does not change the state."""
    detected, task, example = resolved.adapted.detected, resolved.task, source.example
    loss, gradients = read(resolved.programs.gradient(state, example))
    zero = tuple(
        path_text(path)
        for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]
        if not np.any(leaf)
    )
    cost = resolved.programs.train.analyze(state, resolved.empty(), example, 0, 1)
    flops, step_bytes = cost.get("flops"), cost.get("bytes")
    tail = task.objective.scalar_loss and _has_tail(source)
    steps = (2 if tail else 1) * source.shapes
    compiles = {"train": steps, "eval": steps, "predict": source.shapes}
    count, size = _size(state.params)
    why, axes = detected.reasons, ", ".join(detected.axis_names)
    chance = _chance(resolved)
    guessing = "" if chance is None else f" (guessing gives {format_value(chance)})"
    rows = {
        "model": f"{detected.name}: {count:,} params, {format_bytes(size)}",
        **{
            name: f"{text} ({why[name]})" if name in why else text
            for name, text in _detected_texts(detected).items()
        },
        "axis names": f"{axes} (bound to an axis of size 1)" if axes else "",
        "data": _data_text(source),
        "inputs": _inputs_text(example),
        "outputs": _shapes(resolved.outputs),
        "targets": _shapes(example.targets),
        "columns": source.info.table,
        "unused": ", ".join(map(str, source.info.unused)),
        "labels": _labels_text(example),
        "classes": listed_classes(class_names),
        "loss": _loss_text(resolved),
        "loss now" if int(read(state.step)) else "initial loss": (
            format_value(float(loss)) + guessing
        ),
        "metrics": _listed(task.metrics),
        "optimizer": _optimizer_text(resolved, state),
        "zero gradient": _listed(zero),
        "warning": _probability_warning(resolved, state, example),
        "one step": _step_text(flops, step_bytes),
        "compiles": ", ".join(f"{n} {_TIMES} {phase}" for phase, n in compiles.items()),
    }
    rows = {name: text for name, text in rows.items() if text}
    return CheckReport(rows, float(loss), chance, zero, flops, step_bytes, compiles)


def _detected_texts(detected: Detected) -> dict[str, str]:
    return {
        "collections": _listed(detected.carried),
        "sown": _listed(detected.sown),
        "rngs": _listed(detected.rngs),
        "train flag": detected.train_flag,
    }


def _named(texts: Mapping[str, str]) -> list[str]:
    return [f"{name}: {text}" for name, text in texts.items() if text]


def _probability_warning(
    resolved: ResolvedTask, state: TrainState, example: Batch
) -> str:
    """Returns a warning if outputs for a loss of logits look like probabilities."""
    terms = [
        term for term in resolved.task.objective.terms if term.loss.spec.takes_logits
    ]
    if not terms:
        return ""
    with resolved.programs.predict.uncounted():
        outputs = read(resolved.programs.predict(state, example, 0, 1, 0))
    warnings = []
    for term in terms:
        values = np.asarray(pick(outputs, term.path), np.float32)
        several = term.loss.num_classes(values.shape) is not None
        inside = values.min() >= 0 and values.max() <= 1 and values.any()
        if inside and (not several or np.allclose(values.sum(-1), 1, atol=1e-2)):
            warnings.append(
                f"outputs{where(term.path)} look like probabilities, but "
                f"{term.loss.name} takes logits: let the model return them without "
                f"the last {'softmax' if several else 'sigmoid'}"
            )
    return "; ".join(warnings)


def _labels_text(example: Batch) -> str:
    leaves = jax.tree.leaves(example.targets)
    labels = [leaf for leaf in leaves if leaf.dtype.kind in "iu"]
    if not labels:
        return ""
    low, high = min(map(np.min, labels)), max(map(np.max, labels))
    return f"{low}..{high} in the first batch"


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
        return ", ".join(f"{n} {_shapes(v)}" for n, v in named)
    return ", ".join(map(_shapes, example.inputs))


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


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
