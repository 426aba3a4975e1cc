"""`History`, the return value of `fit`: logs per epoch, and a plot of them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flaxfit._reporting.timing import Timing

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_PANELS_PER_ROW = 3
_EPOCHS_WITH_MARKERS = 50  # more markers would hide the line


class History:
    """The record of one `fit`, in Keras's form.

    Attributes:
      history: log name -> one float per epoch (per validated epoch for `val_…`),
        in the order `loss`, metrics, `val_…`, `learning_rate`.
      epoch: the epoch numbers, from 0, of the training entries.
      val_epoch: the epoch numbers of the `val_…` entries.
      params: `epochs`, `steps` (per epoch, None if unknown) and `verbose`.
      trainer: the trainer that was fitted.
      timing: how the time was spent in each epoch; see `Timing`.
      stop_reason: why `fit` ended before its last epoch, or None.
    """

    def __init__(
        self,
        trainer: Any = None,
        params: Mapping[str, Any] | None = None,
        timing: Timing | None = None,
    ) -> None:
        self.history: dict[str, list[Any]] = {}
        self.epoch: list[int] = []
        self.val_epoch: list[int] = []
        self.params = dict(params or {})
        self.trainer = trainer
        self.timing = timing or Timing()
        self.stop_reason: str | None = None
        self._epochs: dict[str, list[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # The trainer has functions that cannot be pickled, and a pickle must not name
        # the class of a private module.
        timing = self.timing.__getstate__()
        return {**vars(self), "trainer": None, "timing": timing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, timing=Timing())
        vars(self.timing).update(state["timing"])

    def state_dict(self) -> dict[str, Any]:
        """Returns the record as plain values, for `load_state_dict`."""
        return {
            "epoch": list(self.epoch),
            "values": {name: list(values) for name, values in self.history.items()},
            "epochs": {name: list(epochs) for name, epochs in self._epochs.items()},
            "val_epoch": list(self.val_epoch),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the record that `state_dict` returned."""
        self.epoch, self.val_epoch = list(state["epoch"]), list(state["val_epoch"])
        self.history = {name: list(v) for name, v in state["values"].items()}
        self._epochs = {name: list(v) for name, v in state["epochs"].items()}

    def append(self, epoch: int, logs: Mapping[str, Any]) -> None:
        """Adds an epoch's values."""
        self.epoch.append(epoch)
        if any(name.startswith("val_") for name in logs):
            self.val_epoch.append(epoch)
        self.amend(logs)

    def amend(self, logs: Mapping[str, Any]) -> None:
        """Sets values of the last epoch, including those that callbacks have added."""
        for name, value in logs.items():
            epochs = self._epochs.setdefault(name, [])
            values = self.history.setdefault(name, [])
            if epochs[-1:] == self.epoch[-1:]:
                values[-1] = value
            else:
                epochs.append(self.epoch[-1])
                values.append(value)

    def to_pandas(self) -> "pandas.DataFrame":
        """Returns one row per epoch, NaN where an epoch has no such value."""
        import pandas

        columns = {
            name: pandas.Series(values, index=self._epochs[name], dtype=object)
            for name, values in self.history.items()
        }
        frame = pandas.DataFrame(columns, index=self.epoch)
        frame.index.name = "epoch"
        return frame.infer_objects()

    def plot(self) -> "Figure":
        """Plots each value over the epochs, training and validation in one panel.

        A constant learning rate is not plotted. Requires matplotlib
        (`pip install flaxfit[plot]`).

        Returns:
          The figure; `history.plot().savefig("history.png")`.

        Raises:
          ValueError: no epoch was finished, so there is nothing to plot.
        """
        names = [name for name in self.history if self._is_worth_a_panel(name)]
        if not names:
            raise ValueError("This history is empty: no epoch was finished.")
        from matplotlib import pyplot
        from matplotlib.ticker import MaxNLocator

        columns = min(len(names), _PANELS_PER_ROW)
        rows = -(-len(names) // columns)
        figure, axes = pyplot.subplots(
            rows,
            columns,
            figsize=(4.5 * columns, 3.2 * rows),
            squeeze=False,
            layout="constrained",
        )
        for axis in axes.flat[len(names) :]:
            axis.remove()
        for axis, name in zip(axes.flat, names, strict=False):
            for label, log in (("training", name), ("validation", f"val_{name}")):
                if log in self.history:
                    epochs = [epoch + 1 for epoch in self._epochs[log]]
                    marker = "o" if len(epochs) <= _EPOCHS_WITH_MARKERS else None
                    axis.plot(
                        epochs, self.history[log], marker=marker, ms=3, label=label
                    )
            axis.set(title=name.replace("_", " "), xlabel="epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            if f"val_{name}" in self.history:
                axis.legend(frameon=False)
        pyplot.close(figure)  # otherwise a notebook shows it twice
        return figure

    def _is_worth_a_panel(self, name: str) -> bool:
        """Whether a log is plotted in a panel of its own.

        False if it is not a number, is plotted beside the training value, or is a
        constant learning rate.
        """
        values = self.history[name]
        if not values or not all(map(_is_number, values)):
            return False
        if name.startswith("val_") and name.removeprefix("val_") in self.history:
            return False
        return name != "learning_rate" or len(set(values)) > 1

    def __repr__(self) -> str:
        last = {n: v[-1] for n, v in self.history.items() if v}
        values = ", ".join(f"{n}={v:.4g}" for n, v in last.items() if _is_number(v))
        return f"History({len(self.epoch)} epochs{': ' + values if values else ''})"

    def _repr_html_(self) -> str:
        names = list(self.history)
        head = "".join(f"<th>{name}</th>" for name in ["epoch", *names])
        columns = {
            name: dict(zip(self._epochs[name], self.history[name], strict=True))
            for name in names
        }
        rows = "".join(
            f"<tr><td>{epoch + 1}</td>"
            + "".join(f"<td>{_cell(columns[n].get(epoch))}</td>" for n in names)
            + "</tr>"
            for epoch in self.epoch
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if _is_number(value) else str(value)
