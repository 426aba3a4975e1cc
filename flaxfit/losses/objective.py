"""The total loss over all outputs of a model.

`loss` has the loss of one output. Only `check_targets` reads data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxfit._core.errors import UsageError, UsageTypeError
from flaxfit._core.tree_specs import describe, is_array, shapes_of
from flaxfit._core.types import Array, Average, PyTree
from flaxfit.losses.loss import Loss
from flaxfit.losses.matching import (
    LossArgument,
    OutputPath,
    check_known,
    children,
    pair_losses,
    pick,
    pick_targets,
    where,
)
from flaxfit.losses.target_checks import check_shapes, check_values, refuse_pairs


class Term(NamedTuple):
    """The loss of the output at `path`, and its factor in the sum.

    With `scalar_loss`, the loss is one number for a whole batch.
    """

    path: OutputPath
    loss: Loss
    scale: float
    scalar_loss: bool = False


@dataclass(frozen=True)
class Objective:
    """The sum of losses, each of one output, that training minimizes.

    Attributes:
      terms: the losses in the order of the outputs; empty if only sown losses count.
    """

    terms: tuple[Term, ...]

    @property
    def single(self) -> bool:
        """Whether there is exactly one term, which then needs no name."""
        return len(self.terms) == 1

    @property
    def scalar_loss(self) -> bool:
        """Whether any term gives one number for a whole batch."""
        return any(term.scalar_loss for term in self.terms)

    @property
    def name(self) -> str:
        """The losses' names for display, e.g. `"a: squared_error + 0.5 b: ..."`."""
        if self.single:
            return self.terms[0].loss.name
        texts = (
            f"{'' if term.scale == 1 else f'{term.scale:g} '}"
            f"{path_name(term.path)}: {term.loss.name}"
            for term in self.terms
        )
        return " + ".join(texts) or "none"

    @property
    def scales(self) -> dict[str, float]:
        """Name -> factor of every term, with the names of `term_averages`."""
        return {self._term_name(term.path): term.scale for term in self.terms}

    @property
    def log_names(self) -> tuple[str, ...]:
        """The names of the terms in the logs, besides `loss`: `("a_loss", ...)`."""
        if self.single:
            return ()
        return tuple(f"{path_name(term.path)}_loss" for term in self.terms)

    def loss_at(self, path: OutputPath) -> Loss | None:
        """Returns the loss of the output at `path`, if it has one."""
        return next((term.loss for term in self.terms if term.path == path), None)

    def loss_around(self, path: OutputPath) -> Loss | None:
        """Returns the loss at `path`, or of the innermost nesting around it."""
        around = [term for term in self.terms if term.path == path[: len(term.path)]]
        return max(around, key=lambda term: len(term.path)).loss if around else None

    def objective_weights(
        self, path: OutputPath, targets: PyTree, weights: Array
    ) -> Array:
        """Returns `weights` for the output at `path`, 0 for targets its loss ignores.

        `targets` are those of all outputs; see `Loss.weights`.
        """
        loss = self.loss_at(path)
        if loss is None:
            return weights
        return loss.weights(pick_targets(targets, path), weights)

    def term_averages(
        self, outputs: PyTree, targets: PyTree, weights: Array
    ) -> dict[str, Average]:
        """Returns output name -> mean loss, for every term without its scale.

        A single term has the name `""`. `weights` are `float32[batch]` up to
        `float32[batch, ...]`; for a term with `scalar_loss` they must all be 1.

        Raises:
          ValueError: weights have more axes than the values of a loss.
        """
        averages = {}
        for path, loss, _, scalar_loss in self.terms:
            chosen = pick_targets(targets, path)
            values = loss.values(pick(outputs, path), chosen)
            name = self._term_name(path)
            if scalar_loss:
                rows = jnp.full(1, weights.shape[0], jnp.float32)
                averages[name] = Average.of(values.reshape(1), rows)
            else:
                spread = loss.weights(chosen, weights)
                check_weights(values.shape, spread.shape, f"the loss {loss.name}")
                averages[name] = Average.of(values, spread)
        return averages

    def _term_name(self, path: OutputPath) -> str:
        return "" if self.single else path_name(path)


def path_name(path: OutputPath) -> str:
    """Returns the name of an output: `"logits"`, `"0"`."""
    return "_".join(map(str, path))


def check_weights(values: Sequence[int], weights: Sequence[int], of: str) -> None:
    """Checks that weights of one shape can be spread over values of another.

    Raises:
      UsageError: weights have an axis that the values of the loss or metric `of` lack.
    """
    if len(weights) > len(values):
        raise UsageError(
            f"Weights of shape {list(weights)} do not fit {of}, whose values have "
            f"shape {list(values)}",
            write="sample_weight.mean(-1), or return one value per weight",
        )


def resolve_objective(
    loss: LossArgument,
    loss_weights: float | Mapping[Any, Any] | Sequence[Any] | None,
    outputs: PyTree,
    targets: PyTree,
    rows: int,
) -> Objective:
    """Pairs the requested losses with the outputs of a model.

    A custom function takes all outputs and targets as they are. A name takes one
    array; if there are several outputs, it applies to each of them.

    Args:
      loss: see `Trainer`; None in a dict or list is for an output without a loss.
      loss_weights: see `Trainer`.
      outputs: the shapes and dtypes of the model's outputs, for `rows` examples.
      targets: the shapes and dtypes of the targets, or None.
      rows: the number of examples in that batch.

    Raises:
      DetectionError: no rule of "auto" fits.
      ValueError: an unknown name or output, shapes that do not fit, or outputs whose
        losses would share a name in the logs.
      TypeError: a loss weight that is not a number, or a function that takes
        `(targets, outputs)`.
    """
    # Scalars of NumPy and jax are numbers too.
    loss_weights = jax.tree.map(
        lambda x: np.asarray(x).tolist() if is_array(x) else x, loss_weights
    )
    pairs = list(pair_losses(loss, outputs, targets))
    if loss is not None and not pairs:
        raise UsageError(
            f"loss={loss!r} has no loss for any output",
            write="loss='auto', or loss=None for a model that sows its losses",
        )
    _check_scales(loss_weights, outputs, [path for path, _ in pairs])
    terms = []
    for path, one in pairs:
        chosen = pick(outputs, path), pick_targets(targets, path)
        check_shapes(one, *chosen, where(path))
        scalar_loss = _is_scalar(one, *chosen, where(path), rows)
        terms.append(Term(path, one, _scale(loss_weights, path), scalar_loss))
    objective = Objective(tuple(terms))
    _check_log_names(objective.log_names)
    return objective


def check_targets(
    objective: Objective, outputs: PyTree, targets: PyTree, weights: Any = None
) -> None:
    """Checks the values of targets on the host: range of labels, NaN.

    Outputs may be shapes. Without `weights`, `float[batch, ...]`, all targets count.

    Raises:
      DataError: with the wrong value, its row, and the line to write.
    """
    for path, loss, _, _ in objective.terms:
        chosen = pick_targets(targets, path)
        if loss.kind != "custom":
            check_values(loss, pick(outputs, path), chosen, where(path), weights)


def _check_log_names(names: Sequence[str]) -> None:
    for name in names:
        if name.startswith("val_"):
            problem = "a name reserved for validation"
        elif names.count(name) > 1:
            problem = "as would the loss of another output"
        else:
            continue
        output = name.removesuffix("_loss")
        raise UsageError(
            f"The loss of output {output!r} would be logged as {name!r}, {problem}",
            f"Rename the output in the model, e.g. 'my_{output}'",
        )


def _check_scales(loss_weights: Any, outputs: PyTree, paths: list[OutputPath]) -> None:
    entries = children(outputs)
    given = f"Got loss_weights={loss_weights}"
    if loss_weights is None or isinstance(loss_weights, int | float):
        if loss_weights is not None and len(paths) > 1:
            line = "loss_weights={'name': 0.5} or a list"
            raise UsageError(f"{given}, one number for several outputs", write=line)
    elif paths == [()]:
        line = "one number, or loss={'name': ...} with a loss per output"
        raise UsageError(f"{given} for a single loss", write=line)
    elif isinstance(loss_weights, Mapping):
        check_known(loss_weights, entries, "loss weight")
    elif len(loss_weights) != len(entries):
        raise UsageError(
            f"Got {len(loss_weights)} loss_weights for {len(entries)} outputs",
            "Give one number per output",
        )


def _scale(loss_weights: Any, path: OutputPath) -> float:
    if loss_weights is None or isinstance(loss_weights, int | float):
        return 1.0 if loss_weights is None else float(loss_weights)
    if not path:
        line = "a number, e.g. loss_weights={'name': 0.5}"
        given = f"loss_weights holds {loss_weights!r} for one loss"
        raise UsageTypeError(given, write=line)
    return _scale(children(loss_weights).get(path[0]), path[1:])


def _is_scalar(
    loss: Loss, outputs: PyTree, targets: PyTree, place: str, rows: int
) -> bool:
    """Traces the loss abstractly; returns whether it is one number per batch."""
    structs = shapes_of((outputs, targets))
    if loss.ignore_label is not None and not is_array(targets):
        raise UsageError(
            f"ignore_label of {loss.name}{place} needs one array of targets, not "
            f"{describe(targets)}",
            "Ignore targets inside the loss function instead",
        )
    shapes = f"outputs {describe(outputs)} and targets {describe(targets)}"
    try:
        values = jax.eval_shape(loss.values, *structs)
    except Exception as err:
        err.add_note(f"while tracing the loss {loss.name}{place} with {shapes}")
        raise
    returned = f"The loss {loss.name}{place} returned {describe(values)}"
    if not is_array(values) or not jnp.issubdtype(values.dtype, jnp.floating):
        raise UsageError(
            returned, "Return real numbers, float[batch, ...], one per example"
        )
    if values.shape and values.shape[0] != rows:
        raise UsageError(
            f"{returned} for a batch of {rows}",
            "Return one value per example, float[batch], e.g. by .mean(axis=-1)",
        )
    if loss.ignore_label is not None and targets.ndim > len(values.shape):
        raise UsageError(
            f"{returned} for targets {describe(targets)}",
            "With ignore_label it must return one value per target",
        )
    if loss.kind == "custom":
        refuse_pairs(loss.values, structs, values, f"{returned} for {shapes}")
    return not values.shape
