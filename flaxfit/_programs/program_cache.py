"""Builds, caches and rebuilds the compiled programs; checks batches against them."""

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxfit._core.errors import DataError, UsageError
from flaxfit._core.tree_specs import (
    add_row,
    describe,
    form_of,
    listed,
    shapes_of,
    specs_of,
)
from flaxfit._core.types import Batch, Inputs, PyTree, TrainState
from flaxfit._models.base import Adapted, ModelFamily
from flaxfit._programs.batch_checks import check_batch
from flaxfit._programs.placement import Placement, has_rows
from flaxfit._programs.resolve import ResolvedTask, Settings, resolve, trace_outputs
from flaxfit._programs.steps import make_predict_step
from flaxfit.data.host.checks import check_tokens
from flaxfit.losses.objective import check_targets
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
# Programs to keep when only targets become known, or only the length of the training
# changes.
_WITHOUT_TARGETS = ("predict", "intermediates")
_WITHOUT_OPTIMIZER = (*_WITHOUT_TARGETS, "evaluate", "gradient")


class Outputs(NamedTuple):
    """The outputs of a prediction for one batch.

    Attributes:
      shapes: their shapes and dtypes.
      batched: for each leaf, whether its first axis is the batch.
      nbytes: the bytes of all leaves.
    """

    shapes: PyTree
    batched: list[bool]
    nbytes: int


class ProgramCache:
    """Owns the resolved task of one trainer, and resolves it from the first data.

    Args:
      family: adapts the user's model.
      settings: the arguments of the trainer.
      placement: all devices that may be used.

    Attributes:
      settings: as given, with `scale_images="auto"` decided by the first data.
      all_devices: all devices that may be used.
      placement: the devices that are used now.
    """

    def __init__(
        self, family: ModelFamily, settings: Settings, placement: Placement
    ) -> None:
        self.settings = settings
        self.all_devices = placement
        self.placement = placement
        self._family = family
        self._asked_to_scale = settings.scale_images
        self._resolved: ResolvedTask | None = None
        # Signatures already validated: checking again would trace the model again.
        self._fitting: set[Hashable] = set()
        self._outputs: dict[Hashable, Outputs] = {}
        # Phase -> the number of compiles of programs that were replaced.
        self._past: Counter[str] = Counter()

    @property
    def scaled(self) -> bool:
        """Whether image inputs are scaled on the device."""
        return self.settings.scale_images is True

    def learn(self, images: bool) -> None:
        """Decides `scale_images="auto"`: scales if the `uint8` inputs are `images`."""
        if self._asked_to_scale == "auto":
            self.settings = replace(self.settings, scale_images=images)

    @property
    def is_resolved(self) -> bool:
        """Whether a task was resolved."""
        return self._resolved is not None

    @property
    def spare_devices(self) -> int:
        """How many devices are idle because not all of them divide the batch size."""
        return len(self.all_devices.devices) - len(self.placement.devices)

    @property
    def plans_ahead(self) -> bool:
        """Whether the learning rate depends on the length of the training."""
        return needs_total_steps(self.settings.learning_rate)

    @property
    def resolved(self) -> ResolvedTask:
        """The resolved task.

        Raises:
          UsageError: there was no data yet to resolve the task from.
        """
        if self._resolved is None:
            raise UsageError(NO_DATA_YET)
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
        """Returns the task for batches like `example`, rebuilt only if necessary.

        Args:
          example: one of the batches.
          total_steps: the step at which training will end, if known.
          allow_rebuild: whether an example that does not fit the current task may
            replace it; allowed until something was trained.
          placement: the devices to use from now on, None for the current ones.

        Raises:
          ValueError: see `resolve` and `check_batch`.
        """
        resolved = self._resolved
        placement = placement or self.placement
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
                self._family,
                self.settings,
                placement,
                example,
                total_steps,
                known=known,
            ),
            keep=keep,
        )
        return self.resolved

    def require_total_steps(self, total_steps: int | None) -> None:
        """Checks that the length of the training is known if it is needed.

        Raises:
          UsageError: the length is unknown, and the learning rate depends on it.
        """
        if total_steps is None and self.plans_ahead:
            raise UsageError(UNKNOWN_TOTAL_STEPS)

    def build_for_inputs(
        self, example: Batch, *, allow_rebuild: bool = False
    ) -> ResolvedTask:
        """Returns the resolved task, without a loss if no targets were seen yet."""
        if self._resolved is None or not self._fits(example, allow_rebuild, True):
            settings = replace(self.settings, loss=None, metrics=None)
            self._install(
                resolve(
                    self._family,
                    settings,
                    self.placement,
                    example,
                    None,
                    complete=False,
                )
            )
        return self.resolved

    def _install(self, resolved: ResolvedTask, *, keep: tuple[str, ...] = ()) -> None:
        """Makes `resolved` the current task, with the old programs named in `keep`."""
        old = self._resolved
        if old is not None:
            if old.programs.one_step_per_call != resolved.programs.one_step_per_call:
                keep = ()  # old programs return outputs of other shapes
            kept = {name: getattr(old.programs, name) for name in keep}
            resolved = resolved._replace(programs=resolved.programs._replace(**kept))
            for phase, name in _PHASES:
                if name not in keep:
                    self._past[phase] += getattr(old.programs, name).traces
        if not keep:
            self._fitting.clear()
            self._outputs.clear()
        self._resolved = resolved
        self.placement = resolved.placement

    def outputs_of(self, inputs: Inputs) -> PyTree:
        """Returns the shapes of the model's outputs for `inputs`; nothing is built.

        Returns None if the model raises: a build for these inputs raises the same error
        later, and explains it.
        """
        inputs, resolved = shapes_of(inputs), self._resolved
        try:
            if resolved is not None:
                adapted = resolved.adapted
            else:
                adapted = self._family.adapt(inputs, self.settings.overrides)
            return trace_outputs(adapted, inputs)
        except Exception:
            return None

    def find_outputs(self, batch: Batch, *, sown: bool) -> Outputs:
        """Returns the outputs for batches like `batch`; see `_predicted_outputs`."""
        key = (sown, *form_of((batch.inputs, batch.weights)))
        if key not in self._outputs:
            self._outputs[key] = _predicted_outputs(self.resolved, batch, sown=sown)
        return self._outputs[key]

    def _fits(self, batch: Batch, allow_rebuild: bool, inputs_only: bool) -> bool:
        """Returns whether a batch fits the task; raises unless `allow_rebuild`."""
        if self.resolved.scaled != self.scaled:
            return False
        key = (inputs_only, *form_of((batch.inputs, batch.targets)))
        if key in self._fitting:
            return True
        try:
            check_batch(self.resolved, self.settings, batch, inputs_only=inputs_only)
        except Exception:
            if not allow_rebuild:
                raise
            return False
        self._fitting.add(key)
        return True

    def fresh_state(self, example: Batch) -> TrainState:
        """Returns a new state at step 0."""
        rng = jax.random.key(self.settings.seed)
        variables = self.placement.put(self.resolved.variables)
        return self.resolved.programs.init(rng, example.inputs, variables)

    def check_values(self, batch: Batch) -> None:
        """Checks the values of inputs and targets on the host.

        Raises:
          DataError: tokens or labels are out of range, targets are NaN, or weights are
            given to a loss that takes none.
        """
        resolved, objective = self.resolved, self.resolved.task.objective
        check_tokens(batch, resolved.adapted.detected.vocabularies)
        if batch.targets is not None:
            check_targets(objective, resolved.outputs, batch.targets, batch.weights)
        weighted = batch.weights is not None and np.any(batch.weights != 1)
        if objective.scalar_loss and weighted:
            raise DataError(
                f"The loss {objective.name} returns one number for a whole batch, so "
                "its examples cannot be weighted",
                "Return one value per example, float[batch], or leave sample_weight "
                "and class_weight out",
            )


def _predicted_outputs(resolved: ResolvedTask, batch: Batch, *, sown: bool) -> Outputs:
    """Returns the outputs for batches like `batch`.

    An axis as long as the batch may also be time or layers. So a batch with one more
    row is traced as well: only the batch axis grows with it. With `sown`, the outputs
    are `intermediates`, which may lack a batch axis; without it, that is an error.
    """
    inputs, rows = shapes_of(batch.inputs), batch.weights.shape[0]
    step = make_predict_step(resolved.task, "intermediates" if sown else None)

    def shapes(inputs: Inputs) -> PyTree:
        index = jax.ShapeDtypeStruct((), jnp.int32)
        return jax.eval_shape(step, resolved.template, inputs, index)

    whole = shapes(inputs)
    outputs = jax.tree.leaves(whole)
    batched = [one.shape[:1] == (rows,) for one in outputs]
    # Skipped if the outputs are invalid anyway: a model for one example may fail on
    # more rows. And inputs without rows, such as graphs, cannot get one more.
    if (sown or all(batched)) and has_rows(batch.replace(targets=None)):
        grown = jax.tree.leaves(shapes(add_row(inputs, rows)))
        batched = [
            fits and more.shape == (rows + 1, *one.shape[1:])
            for fits, one, more in zip(batched, outputs, grown, strict=True)
        ]
    if not sown and not all(batched):
        raise UsageError(
            f"For inputs {listed(specs_of(inputs))} the model returns "
            f"{describe(outputs[batched.index(False)])}",
            "predict joins outputs along their first axis, so the model has to return "
            "[batch, ...] arrays",
            "predict(x[None]) for one example, or module.apply(trainer.variables, x)",
        )
    sizes = (math.prod(one.shape) * one.dtype.itemsize for one in outputs)
    return Outputs(whole, batched, sum(sizes))
