"""Builds, caches and rebuilds the compiled programs; checks batches against them."""

import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxfit._core.errors import DataError
from flaxfit._core.tree_specs import (
    LeafSpec,
    add_row,
    describe,
    listed,
    shapes_of,
    specs_of,
)
from flaxfit._core.types import Batch, Inputs, PyTree, TrainState
from flaxfit._models.base import Adapted, ModelFamily
from flaxfit._programs.placement import Placement, has_rows
from flaxfit._programs.resolve import (
    ResolvedTask,
    Settings,
    noted,
    resolve,
    trace_outputs,
)
from flaxfit._programs.steps import make_predict_step
from flaxfit.data.host.checks import check_tokens
from flaxfit.losses.objective import Objective, check_targets, resolve_objective
from flaxfit.metrics.resolve import resolve_metrics
from flaxfit.optimizers.resolve import UNKNOWN_TOTAL_STEPS, needs_total_steps

NO_DATA_YET = (
    "This trainer has seen no data yet, so it has no state: call fit, evaluate or "
    "predict first, or make one with state = trainer.init(batch)."
)

_PHASES = (
    ("train", "train"),
    ("train", "step"),
    ("eval", "evaluate"),
    ("predict", "predict"),
)
# Programs that stay as they are when only the targets, or only the length of the
# training, become known.
_WITHOUT_TARGETS = ("predict", "intermediates")
_WITHOUT_OPTIMIZER = (*_WITHOUT_TARGETS, "evaluate", "gradient")


class Outputs(NamedTuple):
    """What is predicted for a batch.

    Attributes:
      shapes: them, with shapes and dtypes.
      batched: for each leaf whether its first axis is the batch.
      nbytes: the bytes of all leaves.
    """

    shapes: PyTree
    batched: list[bool]
    nbytes: int


class ProgramCache:
    """Owns the parts of one trainer, and makes them when the first data comes."""

    def __init__(
        self, model: Any, family: ModelFamily, settings: Settings, placement: Placement
    ) -> None:
        self._all_devices = placement
        self._placement = placement
        self._model = model
        self._family = family
        self._settings = settings
        self._asked_to_scale = settings.scale_images
        self._resolved: ResolvedTask | None = None
        # The forms of batches that were found to fit: looking again takes traces.
        self._fitting: set[Hashable] = set()
        self._outputs: dict[Hashable, Outputs] = {}
        # Compiles of programs that were replaced since.
        self._past: Counter[str] = Counter()

    @property
    def seed(self) -> int:
        """The trainer's seed."""
        return self._settings.seed

    @property
    def nonfinite(self) -> str:
        """What a loss does that is not finite; see `Trainer`."""
        return self._settings.nonfinite

    @property
    def scaled(self) -> bool:
        """Whether pictures among the inputs are scaled on the device."""
        return self._settings.scale_images is True

    def learn(self, pictures: bool) -> None:
        """Takes over from the first dataset whether it holds pictures to be scaled.

        Args:
          pictures: whether its `uint8` inputs are pictures.
        """
        if self._asked_to_scale == "auto":
            self._settings = replace(self._settings, scale_images=pictures)

    @property
    def is_resolved(self) -> bool:
        """Whether there are parts already."""
        return self._resolved is not None

    @property
    def placement(self) -> Placement:
        """The devices that are used now."""
        return self._placement

    @property
    def spare_devices(self) -> int:
        """How many devices the last batches to train on did not divide among."""
        return len(self._all_devices.devices) - len(self._placement.devices)

    def placement_for(self, rows: int, most: int | None) -> Placement:
        """Returns as many devices as divide batches of `rows`; see `build`.

        Args:
          rows: the batch size.
          most: the examples there are, None if that is unknown.

        Raises:
          ValueError: the devices were chosen, and do not divide them.
        """
        return self._all_devices.for_rows(rows, most)

    @property
    def plans_ahead(self) -> bool:
        """Whether the learning rate depends on the length of the training."""
        return needs_total_steps(self._settings.learning_rate)

    @property
    def resolved(self) -> ResolvedTask:
        """The parts.

        Raises:
          ValueError: there was no data yet to make them from.
        """
        if self._resolved is None:
            raise ValueError(NO_DATA_YET)
        return self._resolved

    @property
    def compiles(self) -> dict[str, int]:
        """How often each phase was compiled so far."""
        counts = {phase: self._past[phase] for phase, _ in _PHASES}
        if self._resolved is not None:
            for phase, name in _PHASES:
                counts[phase] += getattr(self._resolved.programs, name).traces
        return counts

    def build(
        self,
        example: Batch,
        total_steps: int | None = None,
        *,
        allow_rebuild: bool = False,
        placement: Placement | None = None,
    ) -> ResolvedTask:
        """Returns the parts, made anew only where they have to be.

        Args:
          example: a batch like those to come.
          total_steps: the step at which training will end, None if unknown.
          allow_rebuild: whether a batch of another form may replace the current parts,
            as nothing was trained yet.
          placement: the devices to use from here on, None for those used now.

        Raises:
          ValueError: see `build` and `check_batch`.
        """
        resolved = self._resolved
        placement = placement or self._placement
        known: Adapted | None = None
        keep: tuple[str, ...] = ()
        if resolved is not None and self._fits(
            example, allow_rebuild, not resolved.complete
        ):
            known = resolved.adapted
            keep = _WITHOUT_OPTIMIZER if resolved.complete else _WITHOUT_TARGETS
            same = not self.plans_ahead or total_steps in (None, resolved.total_steps)
            if resolved.placement.devices != placement.devices:
                keep = ()
            elif resolved.complete and same:
                return resolved
        self._install(
            resolve(
                self._model,
                self._family,
                self._settings,
                placement,
                example,
                total_steps,
                known=known,
            ),
            keep=keep,
        )
        return self.resolved

    def require_total_steps(self, total_steps: int | None) -> None:
        """Checks that the length of the training is known where it has to be.

        Raises:
          ValueError: it is not, and the learning rate is a function of it.
        """
        if total_steps is None and self.plans_ahead:
            raise ValueError(UNKNOWN_TOTAL_STEPS)

    def build_for_inputs(
        self, example: Batch, *, allow_rebuild: bool = False
    ) -> ResolvedTask:
        """Returns the parts; without a loss if there never were targets."""
        if self._resolved is None or not self._fits(example, allow_rebuild, True):
            settings = replace(self._settings, loss=None, metrics=None)
            self._install(
                resolve(
                    self._model,
                    self._family,
                    settings,
                    self._placement,
                    example,
                    None,
                    complete=False,
                )
            )
        return self.resolved

    def _install(self, resolved: ResolvedTask, *, keep: tuple[str, ...] = ()) -> None:
        """Makes `resolved` the current parts, with the old programs named in `keep`."""
        old = self._resolved
        if (
            old is not None
            and old.programs.one_step_per_call != resolved.programs.one_step_per_call
        ):
            keep = ()  # they would give their outputs in another form
        if old is not None:
            kept = {name: getattr(old.programs, name) for name in keep}
            resolved = resolved._replace(programs=resolved.programs._replace(**kept))
            for phase, name in _PHASES:
                if name not in keep:
                    self._past[phase] += getattr(old.programs, name).traces
        if not keep:
            self._fitting.clear()
            self._outputs.clear()
        self._resolved = resolved
        self._placement = resolved.placement

    def outputs_of(self, inputs: Inputs) -> PyTree:
        """Returns the shapes of what the model makes of inputs; nothing is built.

        None where it raises: whoever builds it for these inputs then says why.
        """
        inputs, resolved, settings = shapes_of(inputs), self._resolved, self._settings
        try:
            adapted = (
                resolved.adapted
                if resolved is not None
                else self._family.adapt(self._model, inputs, settings.overrides)
            )
            key = jax.eval_shape(lambda: jax.random.key(settings.seed))
            return trace_outputs(adapted, key, inputs)
        except Exception:
            return None

    def find_outputs(self, batch: Batch, *, sown: bool) -> Outputs:
        """Returns `find_outputs` of the batch, remembered by its form."""
        form = (sown, *_form_of((batch.inputs, batch.weights)))
        if form not in self._outputs:
            self._outputs[form] = find_outputs(self.resolved, batch, sown=sown)
        return self._outputs[form]

    def _fits(self, batch: Batch, allow_rebuild: bool, inputs_only: bool) -> bool:
        """Returns whether a batch fits the parts; raises unless `allow_rebuild`."""
        if self.resolved.scaled != self.scaled:
            return False
        form = (inputs_only, *_form_of((batch.inputs, batch.targets)))
        if form in self._fitting:
            return True
        try:
            check_batch(self.resolved, self._settings, batch, inputs_only=inputs_only)
        except Exception:
            if not allow_rebuild:
                raise
            return False
        self._fitting.add(form)
        return True

    def fresh_state(self, example: Batch) -> TrainState:
        """Returns a new state at step 0."""
        rng = jax.random.key(self._settings.seed)
        variables = self._placement.put(self.resolved.variables)
        state: TrainState = self.resolved.programs.init(rng, example.inputs, variables)
        return state

    def check_values(self, batch: Batch) -> None:
        """Checks the values of inputs and targets on the host.

        Raises:
          DataError: tokens or labels out of range, NaN in targets, or weights where
            the loss takes none.
        """
        resolved, objective = self.resolved, self.resolved.task.objective
        check_tokens(batch, resolved.adapted.detected.vocabularies)
        if batch.targets is not None:
            check_targets(objective, resolved.outputs, batch.targets, batch.weights)
        if not objective.scalar_loss or batch.weights is None:
            return
        if np.any(batch.weights != 1):
            raise DataError(
                f"The loss {objective.name} returns one number for a whole batch, so "
                "its examples cannot be weighted",
                "Return one value per example, float[batch], or leave sample_weight "
                "and class_weight out",
            )


def check_batch(
    resolved: ResolvedTask,
    settings: Settings,
    batch: Batch,
    *,
    inputs_only: bool = False,
) -> None:
    """Checks that a batch is like the one everything was built from.

    Numbers and integers are two kinds. Where inputs were numbers they may be integers
    now, which the model is called with, and compiled for. Targets may be of either
    kind as long as loss and metrics are the same for both.

    Args:
      resolved: the parts of the trainer.
      settings: what they were built with.
      batch: arrays or shapes; rows and the lengths of axes may differ.
      inputs_only: whether targets do not matter.

    Raises:
      DataError: other inputs or targets, by name, dtype or number of axes.
      ValueError: targets that do not fit the outputs.
      Exception: whatever the model raises for inputs of these shapes.
    """
    batch = shapes_of(batch)
    checked = ["inputs"] if inputs_only else ["inputs", "targets"]
    for name in checked:
        before, after = (
            specs_of(getattr(resolved.example, name)),
            specs_of(getattr(batch, name)),
        )
        if not _alike(name, before, after):
            raise _unlike(name, before, after)
    with noted(batch.inputs):
        outputs = trace_outputs(resolved.adapted, resolved.template.rng, batch.inputs)
        fitting = jax.eval_shape(
            resolved.task.model.init, resolved.template.rng, batch.inputs
        )[0]
    if specs_of(fitting) != specs_of(resolved.template.params):
        raise DataError(
            f"Got inputs {listed(specs_of(batch.inputs))}, which need other "
            f"parameters than {listed(specs_of(resolved.example.inputs))} did, for "
            f"which this trainer was built. Give it such inputs, or make a new Trainer."
        )
    if "targets" in checked:
        objective = _objective_of(resolved, settings, outputs, batch)
        if objective.name != resolved.task.objective.name:
            raise DataError(
                f"Got targets {listed(specs_of(batch.targets))}, for which the "
                f"loss would be {objective.name}; this trainer was built with "
                f"{resolved.task.objective.name}. Name it: Trainer(model, loss=...)."
            )


def find_outputs(resolved: ResolvedTask, batch: Batch, *, sown: bool) -> Outputs:
    """Returns what would be predicted for such a batch.

    A first axis as long as the batch may be something else, time or layers: only
    that it grows with the batch tells.

    Args:
      resolved: the parts of the trainer.
      batch: inputs, and weights of their rows.
      sown: whether `intermediates` are predicted, where others may be among them.

    Raises:
      ValueError: an output has another first axis.
    """
    inputs, rows = shapes_of(batch.inputs), batch.weights.shape[0]
    step = make_predict_step(resolved.task, "intermediates" if sown else None)

    def shapes(inputs: Inputs) -> PyTree:
        index = jax.ShapeDtypeStruct((), jnp.int32)
        return jax.eval_shape(step, resolved.template, inputs, index)

    whole = shapes(inputs)
    outputs = jax.tree.leaves(whole)
    batched = [one.shape[:1] == (rows,) for one in outputs]
    # Not of outputs that are wrong anyhow: a model of one example may not grow.
    # Nor of inputs without rows, of which it is not told how they grow.
    if (sown or all(batched)) and has_rows(batch.replace(targets=None)):
        grown = jax.tree.leaves(shapes(add_row(inputs, rows)))
        batched = [
            fits and more.shape == (rows + 1, *one.shape[1:])
            for fits, one, more in zip(batched, outputs, grown, strict=True)
        ]
    if not sown and not all(batched):
        raise ValueError(
            f"predict joins outputs along their first axis, the batch, and for "
            f"inputs {listed(specs_of(inputs))} the model returns "
            f"{describe(outputs[batched.index(False)])}. For one example write "
            f"x[None]; else let the model return [batch, ...] arrays, or call it "
            f"yourself: module.apply(trainer.variables, x)."
        )
    sizes = (math.prod(one.shape) * one.dtype.itemsize for one in outputs)
    return Outputs(whole, batched, sum(sizes))


def _form_of(tree: PyTree) -> tuple[Hashable, ...]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, x.dtype) for x in leaves)


def _alike(
    name: str, before: Mapping[str, LeafSpec], after: Mapping[str, LeafSpec]
) -> bool:
    either_kind = name == "targets"
    return before.keys() == after.keys() and all(
        len(spec.shape) == len(before[path].shape)
        and (either_kind or before[path].is_inexact or not spec.is_inexact)
        for path, spec in after.items()
    )


def _unlike(
    name: str, before: Mapping[str, LeafSpec], after: Mapping[str, LeafSpec]
) -> DataError:
    return DataError(
        f"Got {name} {listed(after)}; this trainer was built for {listed(before)}. "
        f"{_reshaping(name, before, after)}Give it such {name}, or make a new Trainer."
    )


def _objective_of(
    resolved: ResolvedTask, settings: Settings, outputs: PyTree, batch: Batch
) -> Objective:
    """Returns the objective for a batch's targets.

    Raises:
      DataError: the targets are of another kind, and for such there is no loss or
        not the same one, or a metric is missing.
      ValueError: targets that do not fit the outputs.
    """
    before, after = specs_of(resolved.example.targets), specs_of(batch.targets)
    rows = batch.weights.shape[0]
    same_kinds = all(
        spec.is_inexact == before[path].is_inexact for path, spec in after.items()
    )
    try:
        objective = resolve_objective(
            settings.loss, settings.loss_weights, outputs, batch.targets, rows
        )
        if same_kinds:
            return objective
        resolve_metrics(settings.metrics, objective, outputs, batch.targets, rows)
    except ValueError as error:
        if same_kinds:
            raise
        raise _unlike("targets", before, after) from error
    if objective.name != resolved.task.objective.name:
        raise _unlike("targets", before, after)
    return objective


def _reshaping(
    name: str, before: Mapping[str, LeafSpec], after: Mapping[str, LeafSpec]
) -> str:
    """Returns the line to write where one axis too many or too few may be all."""
    if not after:
        return "Pass (x, y). "
    more = {
        len(spec.shape) - len(before[path].shape)
        for path, spec in after.items()
        if path in before
    }
    lines = {("inputs", -1): "For one example write x[None]. "}
    lines |= {("targets", -1): "Write y[:, None]. ", ("targets", 1): "Write y[:, 0]. "}
    return lines.get((name, more.pop()), "") if len(more) == 1 else ""
