"""The facade: checks arguments and connects data, programs, state and loops."""

import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Self

import jax
import numpy as np

from flaxfit import checkpoint
from flaxfit._core.errors import CheckpointError, UsageError, UsageTypeError, calling
from flaxfit._core.keras_hints import compile_without_data, refuse_list
from flaxfit._core.state_store import TrainStateStore
from flaxfit._core.types import Batch, Logs, PyTree, TrainState
from flaxfit._core.validation import (
    fraction,
    integer,
    integer_or_auto,
    optional_integer,
)
from flaxfit._loops.context import FitContext, FitData
from flaxfit._loops.eval_loop import make_evaluation
from flaxfit._loops.feeder import Execution
from flaxfit._loops.fit_loop import fit_loop
from flaxfit._loops.host_reads import read, read_logs
from flaxfit._loops.interrupt import Interrupt
from flaxfit._loops.output_writer import OutputWriter
from flaxfit._loops.predict_loop import Prediction, join_batches, split_batches
from flaxfit._models import model_family
from flaxfit._programs.compile import listening
from flaxfit._programs.placement import Placement, find_placement, has_rows
from flaxfit._programs.program_cache import NO_DATA_YET, ProgramCache
from flaxfit._programs.resolve import ResolvedTask
from flaxfit._programs.steps import Task, TrainStep
from flaxfit._reporting.display import Display, make_display, make_progress
from flaxfit._reporting.history import History
from flaxfit._reporting.timing import Clock, Timing
from flaxfit._runs.resume import ResumePoint
from flaxfit._runs.session import RunRecord, RunSession, describe_data, locked_run
from flaxfit._runs.trainer_metadata import example_of, from_meta, to_meta
from flaxfit.callbacks.base import Callback, LoopState, own_state
from flaxfit.checkpoint import RestoreReport
from flaxfit.data.binding.binding import Binding, InMemoryData
from flaxfit.data.binding.in_memory import Arrays
from flaxfit.data.open import (
    BatchOptions,
    Dataset,
    batch_source,
    one_batch,
    open_dataset,
    open_inputs,
)
from flaxfit.data.sources.base import BatchSource
from flaxfit.trainer.arguments import checked_settings
from flaxfit.trainer.check import CheckReport, Text, first_lines, make_report
from flaxfit.trainer.compilation_cache import use_compilation_cache
from flaxfit.trainer.compile_ahead import compile_ahead
from flaxfit.trainer.compile_report import CompileReport
from flaxfit.trainer.data import (
    DataAdapter,
    check_passes,
    refuse_assumed_split,
    refuse_to_use_up,
    warn_of_order,
)
from flaxfit.trainer.fit_options import FitOptions
from flaxfit.trainer.state import (
    RestoreRequest,
    as_state,
    ensure_state,
    open_checkpoint,
    open_variables,
    restored_state,
    resumed_state,
    with_new_rate,
)

# Arguments that depend on the machine; they are not saved.
_EXECUTION = (
    "devices",
    "steps_per_call",
    "device_data",
    "prefetch",
    "compilation_cache",
)

_LAST_EXAMPLES = (
    "in the examples held out by validation_split; row 0 is the first of them"
)


class Trainer:
    """Trains, evaluates and runs a Flax module.

    All arguments but the model are detected from the model and the data, or have a
    default. `trainer.check(data)` shows what was detected and why.

    Args:
      model: a `flax.linen` module, or `flaxfit.Model(init, apply)`.
      loss: `"auto"`, a name (`"softmax_cross_entropy"`, `"mse"`, …), a function
        `(outputs, targets) -> float[batch]`, a `Loss`, a dict or list of these for
        several outputs, or None for a model that sows its `losses`.
      loss_weights: a factor per output, nested like `loss`.
      optimizer: a name in `optax` or `optax.contrib`, a function of the learning
        rate such as `optax.adamw`, or an optax transformation.
      learning_rate: a float, a schedule `step -> float`, or a function of
        `total_steps` that returns either; None for the optimizer's own default, or
        0.001 if it has none.
      metrics: names, functions `(outputs, targets) -> float[batch]`, objects of clu
        or metrax; a list, or a dict with your own names as keys.
      seed: determines the parameters, dropout and the order of the data.
      weight_decay: passed to the optimizer.
      clip_norm: clips gradients to this global norm.
      accumulate_steps: averages the gradients of this many steps into one update.
      freeze: patterns of the paths of parameters not to train, e.g. `"encoder/*"`.
      variables: variables to start from, e.g. `{"params": …, "batch_stats": …}`;
        collections left out are initialized.
      train_flag: how the model distinguishes training from evaluation: the name of an
        argument or attribute, `"not <name>"` if True means evaluation, `"layers"` to
        set every BatchNorm and Dropout that leaves it unset, None if both modes are
        the same, or a function `(module, train) -> module`.
      collections: the names of the mutable collections to carry.
      rngs: the names of the RNG streams to supply.
      inputs: which parts of a dict batch or table the model is called with: a key, a
        list of keys, a dict argument -> key, or a function of the batch. For a model
        with one input, a list of columns becomes one matrix.
      targets: the key or keys of a dict batch, or columns, that hold the targets.
      make_train_step: `(task) -> train_step` in place of
        `flaxfit.make_train_step`, for a custom training step.
      nonfinite: what `fit` does if the loss of a batch is NaN or infinite: `"stop"`
        ends the fit, and restores the last checkpoint of the `run_dir` if there is one;
        `"rollback"` restores it and continues with the next batch; `"skip"` leaves the
        batch out, and also a batch that makes a parameter NaN or infinite, which takes
        a pass over the state in every step; `"ignore"` continues.
      scale_images: whether pictures, inputs of `uint8[batch, height, width, ...]`, are
        divided by 255 on the device before the model is called. `"auto"` does so if
        the first data is known to be pictures: from TFDS, Hugging Face and image
        folders, but not plain arrays.
      devices: the devices to train on, data-parallel. None for as many local devices
        as divide the batch (or only `jax_default_device`, if it is set). A number or
        list of devices, or a `jax.sharding.Mesh`: all of them must divide the batch.
      steps_per_call: the number of steps in one call of the compiled program, limited
        to 4 MiB of batches. `"auto"` tunes it by measured times and the needs of
        callbacks. Convolutions on a CPU always run one step per call.
      device_data: the share of the free device memory that arrays may take; arrays
        that fit stay there for the whole `fit`. 0 for none.
      prefetch: how many calls ahead of the steps a background thread reads and
        transfers data that is not on the device. 0 reads in your thread, each batch
        only when it is needed.
      compilation_cache: a folder in which jax keeps compiled programs for the next
        process, True for `~/.cache/flaxfit`; `$FLAXFIT_COMPILATION_CACHE` if None.
        This setting applies to the whole process.

    The last five arguments affect speed, and no result beyond rounding; they are not
    saved with the trainer.

    Example:
      >>> import flax.linen as nn, numpy as np
      >>> from flaxfit import Trainer
      >>> x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
      >>> trainer = Trainer(nn.Dense(1), learning_rate=0.1)
      >>> history = trainer.fit(x, x.sum(1, keepdims=True), epochs=20, verbose=0)
      >>> history.history["loss"][-1] < 0.1
      True
    """

    def __init__(
        self,
        model: Any,
        *,
        loss: Any = "auto",
        loss_weights: Any = None,
        optimizer: Any = "adam",
        learning_rate: Any = None,
        metrics: Any = None,
        seed: int = 0,
        weight_decay: float | None = None,
        clip_norm: float | None = None,
        accumulate_steps: int | None = None,
        freeze: str | Sequence[str] | None = None,
        variables: Mapping[str, PyTree] | None = None,
        train_flag: str | Callable[[Any, bool], Any] | None = "auto",
        collections: str | Iterable[str] = "auto",
        rngs: str | Iterable[str] = "auto",
        inputs: Any = None,
        targets: Any = None,
        make_train_step: Callable[[Task], TrainStep] | None = None,
        nonfinite: Literal["stop", "skip", "rollback", "ignore"] = "stop",
        scale_images: bool | Literal["auto"] = "auto",
        devices: Any = None,
        steps_per_call: int | str = "auto",
        device_data: float = 0.25,
        prefetch: int = 2,
        compilation_cache: bool | str | os.PathLike[str] | None = None,
    ) -> None:
        given = dict(locals())
        unsaved = ("self", "model", "variables", *_EXECUTION)
        self._config = {n: given[n] for n in given if n not in unsaved}
        settings = checked_settings(given)
        family = model_family(model)
        self._name = type(model).__name__
        self._programs = ProgramCache(family, settings, find_placement(devices))
        self._execution = Execution(
            steps_per_call=integer_or_auto("steps_per_call", steps_per_call),
            device_data=fraction(
                "device_data",
                device_data,
                write="device_data=0.5, a share of the free device memory",
            ),
            prefetch=integer("prefetch", prefetch, least=0),
        )
        self._store = TrainStateStore()
        # A file's state, to be restored once the model's inputs are known.
        self._pending: RestoreRequest | None = None
        # The clocks of the fits in progress: a callback may call this trainer.
        self._clocks: list[Clock] = []
        # The last run of this trainer, and the version of the state after it.
        self._last_run: tuple[str, int] | None = None
        binding = Binding(
            family.call_spec(settings.overrides),
            inputs=inputs,
            targets=targets,
            outputs=self._programs.outputs_of,
        )
        self._data = DataAdapter(self._programs, self._has_learned, binding)
        use_compilation_cache(compilation_cache)

    # ------------------------------------------------------------------ training

    def fit(
        self,
        x: Any,
        y: Any = None,
        *,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Callback | Sequence[Callback] | None = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Mapping[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | Iterable[int] = 1,
        run_dir: str | os.PathLike[str] | None = None,
        save_every: int | str | None = None,
        resume: str | os.PathLike[str] = "auto",
        monitor: str | None = None,
    ) -> History:
        """Trains the model; a second call continues from where the first ended.

        The arguments have Keras's names and meanings. Results differ where Keras is
        silently wrong: losses are averaged over examples, not batches; the last,
        shorter batch is filled with real rows of weight 0; an iterator that ends early
        is an error; the order of the data depends on the seed, the epoch and the step
        at which the call starts.

        Args:
          x: arrays in any nesting, `(x, y)`, `(x, y, weights)`, a dict of arrays, or
            files and arrays read by slices; a table of pandas, polars or pyarrow, whose
            columns are inputs by the argument names of the model's call, or one matrix;
            a dataset of TFDS (or its name), Grain, torch, Hugging Face or `tf.data`;
            anything with `len(x)` and `x[0]`; an iterable, a function that returns one,
            or an iterator, of batches or, if `batch_size` is given, of examples;
            `flaxfit.data.Examples`, `Batches` and `image_folder`.
          y: targets, for arrays.
          batch_size: rows of a batch, for arrays and single examples; by default 32.
            Never more than the number of examples.
          epochs: the epoch to end at (the number of epochs, from `initial_epoch` 0).
          verbose: 0 nothing, 1 a bar per epoch, 2 a line per epoch; `"auto"` is 1 in a
            terminal or notebook, else 2.
          callbacks: see `Callback`.
          validation_split: the last fraction of the arrays, or of examples with
            random access, taken before shuffling.
          validation_data: `(x, y)`, `(x, y, weights)` or any dataset.
          shuffle: whether arrays, and examples with random access, are shuffled
            before each epoch. Other datasets bring their own order.
          class_weight: class -> weight of its examples in training, 1 if left out.
          sample_weight: `float[examples]`, or one for every element of the targets.
          initial_epoch: the epoch to begin at, counted from 0.
          steps_per_epoch: the exact number of steps in an epoch. Each epoch continues
            where the last one ended; when the data ends, it starts again, reshuffled.
          validation_steps: validate on this many batches. An iterator continues where
            it was, and must have enough batches for all validations.
          validation_batch_size: rows of a validation batch; by default `batch_size`.
          validation_freq: validate every this many epochs, or after these epochs,
            counted from 1.
          run_dir: a folder for the last two checkpoints, the best one
            (`best.msgpack`), the history and a log. The same call, run again, continues
            exactly where the run stopped, or does nothing if it was finished.
          save_every: saves checkpoints within an epoch too, every this many steps, or
            every `"30s"`, `"5m"`, `"1h"`. The end of an epoch always saves one.
          resume: `"auto"` resumes the run in `run_dir`, or begins one; `"must"` fails
            if there is no run; `"never"` starts over, and moves an earlier run to
            `run_dir/old-1`; a path resumes that checkpoint.
          monitor: the log that decides which epoch is the best; by default `val_loss`,
            or `loss` without validation.

        Returns:
          The `History`; for a resumed run, from its first epoch on. After Ctrl-C, it
          has the finished epochs, and the trainer holds the last finished step. A
          second Ctrl-C raises.

        Raises:
          ValueError: arguments or data that cannot work (`DataError`), before the
            first step; the message has the line to write instead.
          CheckpointError: `run_dir` cannot be used, or its checkpoint does not fit.
          TypeError: data of an unknown kind.
          SystemExit: after SIGTERM. The training was saved in `run_dir`, and the
            process ends with status 143.
        """
        # ---- Check: nothing is read or changed before every argument is right.
        options = FitOptions.checked(locals(), self._programs.settings.nonfinite)
        display, timing = make_display(verbose), Timing()
        clock = timing.clock
        with (
            calling("fit"),
            Interrupt() as interrupt,
            listening(CompileReport(display, clock)),
            locked_run(
                options.run, self.step, options.initial_epoch, self._current_run
            ) as origin,
        ):
            # ---- Open: a resumed run decides how the data is read and shuffled.
            clock.switch("waiting_for_data")
            source, held_out = self._data.open_training(
                x, y, sample_weight, options, origin
            )
            # ---- Prepare: the training data first, because the rest has to fit it.
            clock.switch("compiling")  # traces the model, and compiles its `init`
            total_steps = options.total_steps(source, origin)
            self._programs.require_total_steps(total_steps)
            placement = self._placement_for(source)
            self._prepare(source, total_steps, placement=placement, state=False)
            validation = self._open_validation(held_out, options, source, origin)
            # ---- Resume: all that can fail comes before files are moved.
            session = self._begin_run(source, validation, options, origin, display)
            with session:
                # ---- Loop.
                if verbose != 0:
                    self._say_first_lines(source, display)
                fit = self._fit_context(
                    session, source, validation, options, timing, display, interrupt
                )
                clock.switch("stepping")
                with self._in_progress(fit):
                    fit_loop(fit)
            return _finish(fit)

    def compile(
        self,
        x: Any = None,
        y: Any = None,
        *,
        batch_size: int | None = None,
        epochs: int = 1,
        steps_per_epoch: int | None = None,
        verbose: int | str = "auto",
        **keras: Any,
    ) -> dict[str, float]:
        """Compiles the programs of `fit`, `evaluate` and `predict` for this data.

        This is optional: they compile at their first step. Nothing is trained.

        Args:
          x: the data, as for `fit`, but not an iterator, which would lose a batch.
          y: targets, for arrays.
          batch_size: as for `fit`.
          epochs: as for `fit`; needed only by a learning rate that depends on the
            length of the training.
          steps_per_epoch: as for `fit`.
          verbose: 0 to show nothing.
          **keras: arguments of Keras's `compile` are refused with a hint.

        Returns:
          `{"train": …, "eval": …, "predict": …}`, in seconds; near 0 for programs that
          were compiled already.

        Raises:
          TypeError: no data, or arguments of Keras's `compile`.
          ValueError: as `fit`.
        """
        if keras or x is None:
            raise compile_without_data(keras)
        epochs = integer("epochs", epochs)
        steps = optional_integer("steps_per_epoch", steps_per_epoch)
        display = make_display(verbose)
        with calling("compile"), listening(CompileReport(display)):
            dataset = open_dataset(x, y, batch_size=batch_size)
            refuse_to_use_up(dataset)
            check_passes(dataset, steps, "steps_per_epoch")
            source = batch_source(
                dataset,
                self._data.binding,
                BatchOptions(batch_size=batch_size, steps=steps),
            )
            epoch_steps = steps or source.num_batches
            total_steps = epoch_steps and self.step + epochs * epoch_steps
            self._programs.require_total_steps(total_steps)
            placement = self._placement_for(source)
            resolved = self._prepare(source, total_steps, placement=placement)
            self._data.remember(batch_size=source.batch_size)
            outputs = self._programs.find_outputs(source.example, sown=False)
            with self._store.borrow() as state:
                return compile_ahead(
                    resolved,
                    self._execution,
                    source,
                    state,
                    bytes_per_output=outputs.nbytes,
                    epochs=epochs,
                    steps=steps,
                )

    def train_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: Mapping[int, float] | None = None,
        *,
        return_dict: bool = True,
    ) -> dict[str, Any]:
        """Makes one optimizer step on one batch of any size.

        A new size is compiled for.

        Args:
          x: arrays in any nesting, or `(x, y)`, `(x, y, weights)` or a dict.
          y: their targets.
          sample_weight: `float[batch]`, or one for every element of the targets.
          class_weight: class -> weight of its examples.
          return_dict: as for `evaluate`.

        Returns:
          The loss and metrics of this batch before the update, as floats.
        """
        refuse_list(return_dict)
        with calling("train_on_batch"):
            batch = self._one_batch(x, y, sample_weight, class_weight)
        resolved = self._programs.resolved
        self._programs.require_total_steps(resolved.total_steps)
        with Interrupt() as interrupt:
            running, placed = resolved.empty(), resolved.placement.put_chunk(batch)
            with interrupt.shield(), self._store.lock:
                state, running = resolved.programs.train(
                    self._store.take(), running, placed, 0, 1
                )
                self._store.put(state)
            logs = read_logs(running, resolved.task.order)
        if interrupt.requested:
            raise KeyboardInterrupt
        return logs

    # ---------------------------------------------------------------- evaluation

    def evaluate(
        self,
        x: Any,
        y: Any = None,
        *,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        return_dict: bool = True,
    ) -> dict[str, Any]:
        """Returns the loss and metrics over all examples; changes nothing.

        The values are means over examples: they do not depend on `batch_size`.

        Args:
          x: the data, as for `fit`.
          y: targets, for arrays.
          batch_size: rows of a batch, for arrays; by default that of the last `fit`, or
            32.
          verbose: 0 nothing, 1 a bar; `"auto"` a bar in a terminal or notebook.
          sample_weight: `float[examples]`, or one for every element of the targets.
          steps: use only this many batches.
          return_dict: as in Keras, but only True is accepted.

        Returns:
          `{"loss": …, "accuracy": …}`, floats.

        Raises:
          ValueError: as `fit`.
        """
        refuse_list(return_dict)
        steps = optional_integer("steps", steps)
        display = make_progress(verbose)
        with calling("evaluate"), listening(CompileReport(display)):
            dataset = open_dataset(x, y, sample_weight, batch_size=batch_size)
            refuse_assumed_split(dataset)
            check_passes(dataset, steps, "steps")
            options = BatchOptions(batch_size=batch_size, steps=steps)
            source = self._data.source(dataset, options)
            resolved = self._prepare(source)
            with Interrupt() as interrupt, self._store.borrow() as state:
                evaluate = make_evaluation(
                    resolved,
                    self._execution,
                    source,
                    steps=steps,
                    display=display,
                    interrupted=lambda: interrupt.requested,
                )
                values = evaluate(state)
        if values is None:
            raise KeyboardInterrupt
        return values

    def test_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        return_dict: bool = True,
    ) -> dict[str, Any]:
        """Returns the loss and metrics of one batch of any size, as floats."""
        refuse_list(return_dict)
        with calling("test_on_batch"):
            batch = self._one_batch(x, y, sample_weight, None)
        resolved = self._programs.resolved
        placed = resolved.placement.put_chunk(batch)
        with self._store.borrow() as state:
            empty = resolved.empty_eval()
            running = resolved.programs.evaluate(state, empty, placed, 0, 1)
            return read_logs(running, resolved.task.order)

    # ---------------------------------------------------------------- prediction

    def predict(
        self,
        x: Any,
        *,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
        out: PyTree = None,
    ) -> PyTree:
        """Returns the model's outputs for all examples, in their order.

        Only the outputs of a few calls are on the device at a time; with `out`, the
        same is true of host memory. For endless data see `predict_batches`.

        Args:
          x: inputs in any nesting, or any dataset; if it yields `(x, y)`, the targets
            are dropped.
          batch_size: rows of a batch, for arrays and for examples; by default that of
            the last `fit`, or 32.
          verbose: 0 nothing, 1 a bar; `"auto"` a bar in a terminal or notebook.
          steps: use only this many batches.
          out: arrays `[examples, ...]` to write into, nested like the outputs: in
            memory, memory-mapped (`np.lib.format.open_memmap`), of zarr or HDF5.

        Returns:
          NumPy arrays `[examples, ...]` in the nesting of the model's output; `out`
          if it is given.

        Raises:
          TypeError: an `out` that cannot be written into.
          ValueError: as for `fit`; an output without a batch axis; an `out` of another
            nesting, shape, length or kind of numbers than the outputs. It is raised
            before anything is computed, unless the length of the data is unknown.
        """
        display = make_progress(verbose)
        with calling("predict"), listening(CompileReport(display)):
            prediction = self._open_prediction(x, batch_size, steps)
            writer = None
            if out is not None:
                shapes = prediction.outputs.shapes
                writer = OutputWriter(out, shapes, prediction.examples)
            with self._store.borrow() as state:
                parts = prediction.run(state, display=display)
                if writer is not None:
                    return writer.write(parts)
                return join_batches(parts, prediction.outputs.batched)

    def predict_batches(
        self, x: Any, *, batch_size: int | None = None, steps: int | None = None
    ) -> Generator[PyTree]:
        """Returns an iterator over the outputs of the batches.

        For data of any length, even endless: only a few batches are in memory at a
        time. All outputs are for the state at the time of the call, even if the trainer
        trains meanwhile. Data is read ahead, so an iterator may lose more batches than
        were used, unless `steps` is given. Closing the returned iterator stops that.

        Args:
          x: the data, as for `predict`.
          batch_size: as for `predict`.
          steps: use only this many batches.

        Yields:
          NumPy arrays `[rows, ...]` in the nesting of the model's output, as many rows
          as the batch has.

        Raises:
          ValueError: as for `predict`; at the call, not at the first batch.

        Example:
          `for outputs in trainer.predict_batches(make_batches): file.write(outputs)`
        """
        with calling("predict_batches"):
            opened = self._open_prediction(x, batch_size, steps, may_be_endless=True)
            # Read, not borrowed: a fit would have to copy a borrowed state in every
            # step while the iterator exists.
            return split_batches(opened.run(self._store.read(), copy=True))

    def predict_intermediates(
        self,
        x: Any,
        *,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
    ) -> PyTree:
        """Returns the `intermediates` that the model sows, for all examples.

        The arguments are those of `predict`.

        Returns:
          The nested dict of the collection, `{"layer": {"name": (array, …)}}`, as
          NumPy arrays `[examples, ...]`; a value without a batch axis is stacked
          `[batches, ...]`.
        """
        display = make_progress(verbose)
        with calling("predict_intermediates"), listening(CompileReport(display)):
            opened = self._open_prediction(x, batch_size, steps, sown=True)
            with self._store.borrow() as state:
                parts = opened.run(state, display=display)
                return join_batches(parts, opened.outputs.batched)

    def predict_on_batch(self, x: Any) -> PyTree:
        """Returns the outputs for one batch of inputs of any size."""
        with calling("predict_on_batch"):
            dataset = open_inputs(x, self._data.binding)
            refuse_assumed_split(dataset)
            warn_of_order(dataset)
            if dataset.one_shot:
                raise UsageError(_several_text(dataset))
            # Arrays are one batch; a dataset has its own batches.
            size = sys.maxsize if isinstance(dataset, Arrays) else None
            options = BatchOptions(batch_size=size, inputs_only=True)
            source = self._data.source(dataset, options)
            if source.num_batches != 1:
                raise UsageError(_several_text(source))
            prediction = self._prediction(source, None)
            with self._store.borrow() as state:
                return join_batches(prediction.run(state), prediction.outputs.batched)

    # -------------------------------------------------------------- a custom loop

    def init(self, batch: Any) -> TrainState:
        """Returns a fresh state for batches like `batch`, at step 0.

        Parameters equal those of `module.init(jax.random.key(seed), …)`, up to
        rounding of the last bit. The trainer's own state does not change.

        Args:
          batch: `(x, y)`, `(x, y, weights)` or a dict of arrays, or a `Batch`.
        """
        batch = self._data.raw_batch(batch)
        self._programs.build(batch, allow_rebuild=self._may_rebuild)
        if all(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(batch)):
            self._programs.check_values(batch)
        self._restore_pending()
        return self._programs.fresh_state(batch)

    def train_step(self, state: TrainState, batch: Any) -> tuple[TrainState, Logs]:
        """Makes one pure, jitted step, for a custom training loop.

        Nothing is donated; use `jax.jit(trainer.train_step, donate_argnums=0)` for it.

        Args:
          state: from `init` or the previous step.
          batch: as for `init`.

        Returns:
          The next state, and the logs as accumulators on the device:
          `logs["loss"].compute()`, `logs["loss"].merge(other)`.
        """
        if not isinstance(state, TrainState):
            raise UsageTypeError(
                f"train_step takes a TrainState, got {type(state).__name__}",
                write="state = trainer.init(batch), then state, logs = "
                "trainer.train_step(state, batch)",
            )
        batch = self._data.raw_batch(batch)
        resolved = self._programs.build(batch)
        self._programs.require_total_steps(resolved.total_steps)
        leaves = jax.tree.leaves(batch)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            batch = resolved.placement.put_chunk(batch)
        state, logs = resolved.programs.step(state, batch)
        return state, resolved.task.order(logs)

    # --------------------------------------------------------------------- state

    @property
    def state(self) -> TrainState:
        """The state after the last finished step; it stays valid during later training.

        It may be assigned: paths, shapes and dtypes are checked, and values copied.

        Raises:
          ValueError: there is no state before the first data.
        """
        self._require_state()
        return self._store.read()

    @state.setter
    def state(self, state: TrainState) -> None:
        resolved = self._programs.resolved
        self._store.put(resolved.placement.put(own_state(state, resolved.template)))
        self._pending = None

    @property
    def variables(self) -> dict[str, PyTree]:
        """The variables for `module.apply`: `{"params": …, "batch_stats": …}`.

        The parameters are those that `evaluate` and `predict` use.
        """
        state = self.state
        optimizer = self._programs.resolved.task.optimizer
        params = optimizer.evaluation_params(state.opt_state, state.params)
        return {"params": params, **state.collections}

    @property
    def step(self) -> int:
        """The number of optimizer steps so far."""
        if self._pending is not None:
            return self._pending.step
        if self._store.empty:
            return 0
        with self._store.borrow() as state:
            return int(read(state.step))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes 0, 1, …; empty if the data had no names for them."""
        return self._data.schema.class_names

    @property
    def compiles(self) -> dict[str, int]:
        """How often each phase was compiled: `{"train": 1, "eval": 1, …}`."""
        return self._programs.compiles

    # ------------------------------------------------------------ looking at it

    def summary(self, x: Any = None) -> Text:
        """Returns a table of the model's layers, for `print` or a notebook.

        Args:
          x: a batch of inputs; not needed once the trainer has seen data.
        """
        if x is not None:
            with calling("summary"):
                dataset = open_inputs(x, self._data.binding)
                options = BatchOptions(inputs_only=True)
                source = self._data.source(dataset, options, divided=False)
                resolved = self._prepare(source, inputs_only=True, state=False)
        else:
            resolved = self._programs.resolved
        return Text(resolved.adapted.summary(resolved.example.inputs))

    def check(
        self, x: Any, y: Any = None, *, batch_size: int | None = None
    ) -> CheckReport:
        """Shows what was detected, without training: `print(trainer.check(x, y))`.

        Compiles one step to count its FLOPs and memory.

        Args:
          x: the data, as for `fit`, but not an iterator, which would lose a batch.
          y: targets, for arrays.
          batch_size: rows of a batch, for arrays; by default that of the last `fit`, or
            32.
        """
        with calling("check"):
            dataset = open_dataset(x, y, batch_size=batch_size)
            refuse_to_use_up(dataset)
            options = BatchOptions(batch_size=batch_size)
            source = self._data.source(dataset, options, divided=False)
            resolved = self._prepare(source, state=False)
            self._restore_pending()
            names = self._data.schema.class_names
            if self._store.empty:
                state = self._programs.fresh_state(source.example)
                return make_report(resolved, state, source, names)
            with self._store.borrow() as state:
                return make_report(resolved, state, source, names)

    def __repr__(self) -> str:
        progress = "untrained" if self._store.empty else f"step {self.step}"
        return f"Trainer({self._name}, {progress})"

    # --------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole state into one file, completely or not at all.

        `flax.serialization.from_bytes({"state": target}, data)` reads it as well.

        Args:
          path: the file, e.g. `"run.msgpack"`; missing folders are made.

        Raises:
          ValueError: there is no state yet.
          CheckpointError: something in the state cannot be written.
        """
        self._require_state()
        clock = self._clocks[-1] if self._clocks else Clock()
        with clock.phase("saving"), self._store.borrow() as state:
            checkpoint.save(path, state, self._meta())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Any,
        *,
        strict: bool = True,
        params_only: bool = False,
        rename: Mapping[str, str | None] | None = None,
        **changes: Any,
    ) -> Self:
        """Returns the trainer that was saved, ready to continue.

        Args:
          path: a file written by `save`, by `fit(run_dir=...)` or by
            `ModelCheckpoint`; or the folder of a run, for its newest checkpoint.
          model: the same module.
          strict: as for `restore`.
          params_only: as for `restore`.
          rename: as for `restore`.
          **changes: arguments of `Trainer` to set; required for arguments that were
            functions or objects, which a file does not hold.

        Raises:
          CheckpointError: another kind of file, a required argument that is missing, or
            a state that does not fit the model; the message has all paths that differ.
        """
        saved = open_checkpoint(path)
        execution = {n: changes.pop(n) for n in _EXECUTION if n in changes}
        config, example, batch_size = from_meta(saved.meta, changes, saved.path)
        trainer = cls(model, **config, **execution)
        trainer._data.remember(batch_size=batch_size)
        trainer._data.read_like(saved)
        trainer._pending = RestoreRequest(
            saved, "learning_rate" in changes, strict, params_only, rename
        )
        if example is not None:
            trainer._build_for(example, saved.path)
            trainer._restore_pending()
        return trainer

    def restore(
        self,
        path: str | os.PathLike[str],
        *,
        strict: bool = True,
        params_only: bool = False,
        rename: Mapping[str, str | None] | None = None,
    ) -> RestoreReport:
        """Takes the state, or a part of it, from a file.

        Args:
          path: as for `load`; with `params_only` also a file written by
            `flax.serialization.to_bytes`, with parameters, variables or a
            `TrainState`.
          strict: whether everything has to fit. If False, leaves that do not fit stay
            as they are, and the report lists them.
          params_only: take only the parameters and collections, which `module.apply`
            needs; the optimizer and the step count start over. For another optimizer,
            or for transfer learning.
          rename: path prefix in the file -> path prefix in the model:
            `{"encoder": "backbone"}`. None instead of the latter leaves that part of
            the model as it is: `{"head": None}`.

        Returns:
          A report on every leaf; `print` it.

        Raises:
          CheckpointError: the file cannot be read or does not fit; the message has all
            paths that differ, and nothing is changed.
          ValueError: neither the trainer nor the file knows the model's inputs.

        Example:
          `trainer.restore("pretrained.msgpack", params_only=True, rename={"head":
          None})` takes all but the head.
        """
        saved = open_variables(path) if params_only else open_checkpoint(path)
        request = RestoreRequest(saved, False, strict, params_only, rename)
        scaled = saved.meta.get("config", {}).get("scale_images")
        if isinstance(scaled, bool):
            self._programs.learn(scaled)
        if not self._programs.is_resolved:
            example = example_of(saved.meta)
            if example is None:
                raise UsageError(
                    f"{saved.path!r} does not record the model's inputs, and this "
                    "trainer has seen none",
                    write="trainer.init((x, y)), then trainer.restore(...)",
                )
            self._build_for(example, saved.path)
        report = self._restore(request)
        if strict and not rename:
            self._data.read_like(saved)
        return report

    # ----------------------------------------------------------- inside of a fit

    @property
    def _current_run(self) -> str | None:
        """The run that the state is from, None if the state was changed since."""
        if self._last_run is None:
            return None
        name, version = self._last_run
        return name if version == self._store.version else None

    def _open_validation(
        self,
        held_out: Dataset | None,
        options: FitOptions,
        training: BatchSource,
        origin: ResumePoint,
    ) -> BatchSource | None:
        asked = options.validation
        if held_out is None and asked.data is None:
            return None
        epochs, steps = len(options.epochs_from(origin)), asked.steps
        try:
            with calling("validation_data"):
                dataset = held_out
                if dataset is None:
                    dataset = open_dataset(asked.data, batch_size=asked.batch_size)
                    refuse_assumed_split(dataset)
                check_passes(dataset, steps, "validation_steps", epochs=epochs)
                sizes = BatchOptions(
                    asked.batch_size,
                    default_batch_size=training.batch_size,
                    steps=steps,
                )
                source = self._data.source(dataset, sizes, of_fit=True)
                self._prepare(source, allow_rebuild=False, state=False)
        except Exception as error:
            error.add_note(_LAST_EXAMPLES if asked.split else "in validation_data")
            raise
        return source

    def _begin_run(
        self,
        source: BatchSource,
        validation: BatchSource | None,
        options: FitOptions,
        origin: ResumePoint,
        display: Display,
    ) -> RunSession:
        """Puts the state that a fit starts with into the store; returns its session."""
        programs, resolved = self._programs, self._programs.resolved
        total_steps = options.total_steps(source, origin)
        self._data.remember(batch_size=source.batch_size)
        data = describe_data(
            source, validation, shuffle=options.shuffle, steps=options.steps
        )
        record = RunRecord(self._meta(), data, options.epochs, total_steps)
        resumed = resumed_state(programs, origin, record.trainer["config"])
        session = RunSession(
            options.run,
            origin,
            record,
            options.callbacks,
            source,
            as_state=partial(as_state, resolved),
            empty=resolved.empty(),
            display=display,
        )
        if resumed is None:
            self._ensure_state(source.example)
        else:
            self._pending = None
            self._store.put(resumed)
        if programs.plans_ahead and origin.loop.get("total_steps") != total_steps:
            # The state has a constant rate, which was computed for another length.
            fresh = not self._store.has_trained
            state = with_new_rate(resolved, self._store.take())
            self._store.put(state, fresh=fresh)
        return session

    def _say_first_lines(self, source: BatchSource, display: Display) -> None:
        for line in first_lines(
            self._programs.resolved,
            self._store.peek(),
            source,
            self._programs.spare_devices,
            self._data.schema.class_names,
        ):
            display.say(line)

    def _fit_context(
        self,
        session: RunSession,
        source: BatchSource,
        validation: BatchSource | None,
        options: FitOptions,
        timing: Timing,
        display: Display,
        interrupt: Interrupt,
    ) -> FitContext:
        """Returns everything that the loop of a fit needs."""
        resolved, origin = self._programs.resolved, session.origin
        names = resolved.history_names(validated=validation is not None)
        steps = options.steps or source.num_batches
        loop = LoopState(
            self._store,
            history=History(
                self,
                {"epochs": options.epochs, "steps": steps, "verbose": options.verbose},
                timing,
            ),
            step=origin.step,
            epoch=origin.epoch,
            epochs=options.epochs,
            steps_per_epoch=steps,
            log_names=[*names, *session.callbacks.log_names],
        )
        validate = None
        if validation is not None:
            validate = make_evaluation(
                resolved,
                self._execution,
                validation,
                steps=options.validation.steps,
                keep=True,
                interrupted=lambda: interrupt.requested,
            )
        epochs = range(origin.epoch, options.epochs)
        data = FitData(
            source, options.steps, epochs, validate, options.validation.happens_at
        )
        return FitContext(
            resolved=resolved,
            data=data,
            execution=self._execution,
            session=session,
            store=self._store,
            loop=loop,
            display=display,
            interrupt=interrupt,
            nonfinite=self._programs.settings.nonfinite,
        )

    @contextmanager
    def _in_progress(self, fit: FitContext) -> Iterator[None]:
        """Registers a running fit. A first Ctrl-C ends it, a second one raises."""
        self._clocks.append(fit.loop.clock)
        try:
            yield
        except KeyboardInterrupt:
            if fit.interrupt.insisted:
                raise
            fit.loop.stop("interrupted")
        finally:
            self._clocks.pop()
            self._last_run = fit.session.origin.run, self._store.version

    # ----------------------------------------------------- data, programs, state

    def _prepare(
        self,
        source: BatchSource | InMemoryData,
        total_steps: int | None = None,
        *,
        inputs_only: bool = False,
        allow_rebuild: bool | None = None,
        placement: Placement | None = None,
        state: bool = True,
    ) -> ResolvedTask:
        """Makes programs and state for data, after checking that they fit together.

        Args:
          source: the data.
          total_steps: the step at which training will end, None if unknown.
          inputs_only: whether targets are not needed.
          allow_rebuild: whether data of another form may replace the programs; by
            default, True until something was trained or a fit is running.
          placement: the devices to use from now on, None for the current ones.
          state: whether to initialize a state as well.

        Raises:
          ValueError: data that does not fit the model or earlier data.
        """
        if allow_rebuild is None:
            allow_rebuild = self._may_rebuild
        # The data first: it decides whether images are scaled in the programs.
        self._data.learn(source, allow_rebuild=allow_rebuild)
        if inputs_only:
            resolved = self._programs.build_for_inputs(
                source.example, allow_rebuild=allow_rebuild
            )
        else:
            resolved = self._programs.build(
                source.example,
                total_steps,
                allow_rebuild=allow_rebuild,
                placement=placement,
            )
        if resolved.task.objective.scalar_loss and not isinstance(source, InMemoryData):
            source.pad = False
        source.check(self._programs.check_values)
        if state:
            self._ensure_state(source.example)
        return resolved

    def _placement_for(self, source: BatchSource) -> Placement | None:
        """Returns the devices that divide the batches; None for the current ones."""
        if not has_rows(source.example):
            return None
        rows, now = source.batch_size, self._programs.placement
        placement = self._programs.all_devices.for_rows(rows, source.num_examples)
        if self._clocks and placement.devices != now.devices:
            raise UsageError(
                f"A fit of this trainer is running on {len(now.devices)} devices, "
                f"which do not divide batch_size={rows}",
                write=f"batch_size={now.rounded(rows)} during the fit",
            )
        return placement

    def _one_batch(
        self, x: Any, y: Any, sample_weight: Any, class_weight: Any
    ) -> Batch:
        dataset = open_dataset(x, y, sample_weight)
        whole = one_batch(dataset, self._data.binding, class_weight)
        self._prepare(whole)
        return whole.batch

    def _open_prediction(
        self,
        x: Any,
        batch_size: int | None,
        steps: int | None,
        *,
        sown: bool = False,
        may_be_endless: bool = False,
    ) -> Prediction:
        """Returns the prediction for data, with programs and state ready."""
        steps = optional_integer("steps", steps)
        dataset = open_inputs(x, self._data.binding, batch_size=batch_size)
        refuse_assumed_split(dataset)
        if not may_be_endless:
            check_passes(dataset, steps, "steps")
        warn_of_order(dataset)
        options = BatchOptions(batch_size=batch_size, steps=steps, inputs_only=True)
        source = self._data.source(dataset, options)
        return self._prediction(source, steps, sown=sown)

    def _prediction(
        self, source: BatchSource, steps: int | None, *, sown: bool = False
    ) -> Prediction:
        resolved = self._prepare(source, inputs_only=True, state=False)
        outputs = self._programs.find_outputs(source.example, sown=sown)
        self._ensure_state(source.example)
        return Prediction(
            resolved, self._execution, source, outputs, steps=steps, sown=sown
        )

    @property
    def _may_rebuild(self) -> bool:
        """Whether data of another form may replace programs and state."""
        return not (self._store.has_trained or self._clocks)

    def _has_learned(self) -> bool:
        """Whether a state was trained or loaded, or a fit is running."""
        pending = self._pending is not None
        return self._store.has_trained or bool(self._clocks) or pending

    def _require_state(self) -> None:
        if self._store.empty:
            raise UsageError(NO_DATA_YET)

    def _ensure_state(self, example: Batch) -> None:
        """Restores or initializes the state, unless it was trained already."""
        self._restore_pending()
        ensure_state(self._store, self._programs, example)

    def _restore_pending(self) -> None:
        if self._pending is not None:
            self._restore(self._pending)

    def _restore(self, request: RestoreRequest) -> RestoreReport:
        current = None if self._store.empty else self._store.peek()
        state, report = restored_state(self._programs, request, current)
        self._store.put(state)
        self._pending = None
        return report

    def _meta(self) -> dict[str, Any]:
        resolved = self._programs.resolved
        return to_meta(
            {**self._config, "scale_images": self._programs.scaled},
            resolved.example,
            batch_size=self._data.schema.batch_size,
            opt_state=resolved.template.opt_state,
            class_names=self._data.schema.class_names,
            columns=self._data.schema.columns,
        )

    def _build_for(self, example: Batch, where: str) -> None:
        try:
            if example.targets is None and self._config["loss"] is not None:
                self._programs.build_for_inputs(example)
            else:
                self._programs.build(example)
        except Exception as error:
            raise CheckpointError(
                f"{where!r} was saved for inputs that {self._name} cannot take: {error}"
            ) from error


def _finish(fit: FitContext) -> History:
    """Shows why and how a fit ended; returns its history."""
    loop, history = fit.loop, fit.loop.history
    if loop.stop_reason is not None:
        fit.display.say(f"stopped after step {loop.step}: {loop.stop_reason}")
        history.stop_reason = loop.stop_reason
    if history.timing.remark:
        fit.display.say(history.timing.remark)
    return history


def _several_text(data: Dataset | BatchSource) -> str:
    return (
        f"predict_on_batch takes one batch, but the given {data.kind} may have more. "
        "Write predict(dataset), or predict_on_batch(next(iter(dataset)))."
    )
