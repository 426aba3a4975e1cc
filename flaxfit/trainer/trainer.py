"""The facade: checks arguments and connects data, programs, state and loops."""

import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import jax
import numpy as np

from flaxfit import checkpoint
from flaxfit._core.errors import CheckpointError
from flaxfit._core.keras_hints import compile_without_data, refuse_list
from flaxfit._core.types import Batch, Logs, PyTree, TrainState
from flaxfit._core.validation import (
    boolean,
    choice,
    fraction,
    integer,
    integer_or_auto,
    names,
    optional_integer,
    switch,
)
from flaxfit._loops.context import FitPlan
from flaxfit._loops.feeder import Execution
from flaxfit._loops.fit_loop import fit_loop
from flaxfit._loops.host_reads import read_logs
from flaxfit._loops.interrupt import Interrupt
from flaxfit._loops.output_writer import Destination
from flaxfit._loops.predict_loop import Part, join_batches, split_batches
from flaxfit._models import model_family
from flaxfit._models.base import Overrides
from flaxfit._programs import steps as _steps
from flaxfit._programs.compile import listening
from flaxfit._programs.placement import find_placement, has_rows
from flaxfit._programs.program_cache import Outputs, ProgramCache
from flaxfit._programs.resolve import ResolvedTask, Settings
from flaxfit._programs.steps import Task, TrainStep
from flaxfit._reporting.display import Display, make_display, make_progress
from flaxfit._reporting.history import History
from flaxfit._reporting.timing import Clock
from flaxfit._runs.session import Run, describe_data
from flaxfit._runs.trainer_metadata import example_of, from_meta, to_meta
from flaxfit.callbacks.base import Callback, CallbackList, LoopState, as_callbacks
from flaxfit.checkpoint import RestoreReport
from flaxfit.data.binding.binding import Binding
from flaxfit.data.datasets.example_dataset import ExampleSet
from flaxfit.data.datasets.stream import Stream
from flaxfit.data.open import as_inputs_source, as_source, split_data
from flaxfit.data.sources.base import Source
from flaxfit.trainer.arguments import as_epoch_filter, as_variables
from flaxfit.trainer.assemble import (
    compile_ahead,
    make_evaluate,
    open_prediction,
    plan_fit,
)
from flaxfit.trainer.check import CheckReport, Text, first_lines, make_report
from flaxfit.trainer.compilation_cache import use_compilation_cache
from flaxfit.trainer.compile_report import CompileReport
from flaxfit.trainer.data import (
    Reader,
    refuse_one_shot,
    refuse_to_go_back,
    refuse_to_use_up,
)
from flaxfit.trainer.state import Pending, StateKeeper, open_checkpoint, open_variables

# Arguments that say how to run: they belong to a machine, and not into a file.
_EXECUTION = (
    "devices",
    "steps_per_call",
    "device_data",
    "prefetch",
    "compilation_cache",
)

_LAST_EXAMPLES = (
    "in the last examples, which validation_split took; row 0 is the first of them"
)


class Trainer:
    """Trains, evaluates and runs a Flax module.

    Everything but the model is found out from it and the data, and can be said
    instead. `trainer.check(data)` tells what was found out and why.

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
        0.001 where it has none.
      metrics: names, functions `(outputs, targets) -> float[batch]`, objects of clu
        or metrax; a list, or a dict with names of your own.
      seed: decides parameters, dropout and the order of the data.
      weight_decay: passed on to the optimizer.
      clip_norm: clips gradients to this global norm.
      accumulate_steps: averages the gradients of so many steps into one update.
      freeze: patterns of parameter paths that stay as they are, e.g. `"encoder/*"`.
      variables: variables to start from, e.g. `{"params": …, "batch_stats": …}`;
        collections left out are initialized.
      train_flag: how the model tells training from evaluation: the name of the
        argument or attribute, `"not <name>"` where True means evaluation,
        `"layers"` to set every BatchNorm and Dropout that leaves it unset, None if
        nothing does, or a function `(module, train) -> module`.
      collections: the names of the mutable collections to carry.
      rngs: the names of the RNG streams to supply.
      inputs: what of a dict batch or table the model is called with: a key, a list of
        keys, a dict argument -> key, or a function of the batch. A list of columns is
        one matrix, where the model takes one input.
      targets: the key or keys of a dict batch, or columns, that hold the targets.
      make_train_step: `(task) -> train_step` in place of
        `flaxfit.make_train_step`, for a training step of one's own.
      nonfinite: what `fit` does when the loss of a batch is NaN or infinite: `"stop"`,
        with the last checkpoint of the `run_dir` where there is one; `"rollback"` goes
        back to that checkpoint, and on with the next batch; `"skip"` leaves the batch
        out, as well as one that makes a parameter so, which takes a pass over the
        state in every step; `"ignore"` goes on.
      scale_images: whether pictures, inputs of `uint8[batch, height, width, ...]`, are
        divided by 255 on the device before the model is called. `"auto"` does so where
        the first data says that they are pictures: TFDS, Hugging Face and image
        folders do, plain arrays do not.
      devices: what to train on, data-parallel: None for all local devices, as many as
        divide the batch (or `jax_default_device` alone, where it is set); their
        number, a list of them, or a `jax.sharding.Mesh`, whose devices all have to
        divide it.
      steps_per_call: steps of one call of the compiled program, as far as 4 MiB of
        batches go. `"auto"` goes by the clock, and by what callbacks need.
        Convolutions on a CPU run one by one.
      device_data: the share of the free device memory that arrays may take; those
        that fit lie there for the whole `fit`. 0 for none.
      prefetch: how many calls ahead of the steps a background thread reads and
        transfers data that is not on the device. 0 reads in your thread, no batch
        before it is needed.
      compilation_cache: a folder in which jax keeps compiled programs for the next
        process, True for `~/.cache/flaxfit`; `$FLAXFIT_COMPILATION_CACHE` if None.
        It holds for the whole process.

    The last five decide how fast it is, and change no result beyond rounding; a saved
    trainer does not hold them.

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
        self._config: dict[str, Any] = {
            name: value
            for name, value in locals().items()
            if name not in ("self", "model", "variables", *_EXECUTION)
        }
        overrides = Overrides(
            train_flag,
            names("collections", collections),
            names("rngs", rngs),
        )
        settings = Settings(
            loss=loss,
            loss_weights=loss_weights,
            optimizer=optimizer,
            learning_rate=learning_rate,
            metrics=metrics,
            overrides=overrides,
            optimizer_options={
                "weight_decay": weight_decay,
                "clip_norm": clip_norm,
                "accumulate_steps": accumulate_steps,
                "freeze": freeze,
            },
            variables=as_variables(variables),
            seed=integer("seed", seed, least=0),
            make_train_step=make_train_step or _steps.make_train_step,
            nonfinite=choice(
                "nonfinite", nonfinite, ("stop", "skip", "rollback", "ignore")
            ),
            scale_images=switch("scale_images", scale_images),
        )
        family = model_family(model)
        self._name = type(model).__name__
        self._builder = ProgramCache(model, family, settings, find_placement(devices))
        self._keeper = StateKeeper(self._builder)
        binding = Binding(
            family.call_spec(model, overrides),
            inputs=inputs,
            targets=targets,
            outputs=self._builder.outputs_of,
        )
        self._reader = Reader(self._builder, self._keeper, binding)
        self._execution = Execution(
            steps_per_call=integer_or_auto("steps_per_call", steps_per_call),
            device_data=fraction(
                "device_data",
                device_data,
                write="device_data=0.5, a share of the free device memory",
            ),
            prefetch=integer("prefetch", prefetch, least=0),
        )
        use_compilation_cache(compilation_cache)
        # The run this trainer took part in last, and its state's version since then.
        self._run: tuple[str, int] | None = None

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
        data_dir: str | os.PathLike[str] | None = None,
    ) -> History:
        """Trains the model; a second call goes on from where the first ended.

        Argument names and meaning are Keras's. Where Keras is silently wrong this
        differs: weights and losses are averaged over examples, not batches; the
        last, shorter batch is filled with real rows at weight 0; an iterator that
        runs dry is an error; the order of the data follows the seed and differs by
        epoch and by call.

        Args:
          x: arrays in any nesting, `(x, y)`, `(x, y, weights)`, a dict of arrays, or
            files and arrays read by slices; a table of pandas, polars or pyarrow, whose
            columns are inputs by the names of the model's call, or one matrix; a
            dataset of TFDS (by name, too), Grain, torch, Hugging Face or `tf.data`;
            anything with `len(x)` and `x[0]`; an iterable, a function that returns one,
            or an iterator, of batches or, where `batch_size` is given, of examples;
            `flaxfit.data.Examples`, `Batches` and `image_folder`.
          y: targets, for arrays.
          batch_size: rows of a batch, for arrays and single examples; 32. Never more
            than there are.
          epochs: the epoch to end at (the number of epochs, from `initial_epoch` 0).
          verbose: 0 nothing, 1 a bar per epoch, 2 a line per epoch, `"auto"`.
          callbacks: see `Callback`.
          validation_split: the last fraction of the arrays, or of examples that are
            had by index, taken before shuffling.
          validation_data: `(x, y)`, `(x, y, weights)` or any dataset.
          shuffle: whether arrays, and examples that are had by index, are shuffled
            before each epoch. Other datasets bring their own order.
          class_weight: class -> weight of its examples in training; 1 if missing.
          sample_weight: `float[examples]`, or one for every element of the targets.
          initial_epoch: the epoch to begin at.
          steps_per_epoch: an epoch then has exactly that many steps: the data goes
            on from where it was, and starts anew, reshuffled, when it ends.
          validation_steps: validate on the first so many batches. An iterator goes
            on where it was, and must have as many for each validation.
          validation_batch_size: rows of a validation batch; `batch_size`.
          validation_freq: validate every so many epochs, or after these epochs,
            counted from 1.
          run_dir: a folder for the last two checkpoints, the best one
            (`best.msgpack`), the history and a log. The same line, run again, goes on
            exactly where it stopped, or does nothing more when it was finished.
          save_every: a checkpoint within an epoch every so many steps, or every
            `"30s"`, `"5m"`, `"1h"`; those after every epoch do not need it.
          resume: `"auto"` goes on with what is in `run_dir`, or begins; `"must"` has to
            find something; `"never"` begins anew, and moves what was there into
            `run_dir/old-1`; a path goes on from that checkpoint.
          monitor: the log that decides which epoch is the best; `val_loss`, or `loss`
            without a validation.
          data_dir: where datasets of TensorFlow Datasets lie that are given by name;
            `$TFDS_DATA_DIR`, or `~/tensorflow_datasets`.

        Returns:
          The `History`, of a resumed run from its first epoch on. After Ctrl-C too, of
          the epochs that were finished; the trainer then holds the last finished step.
          A second Ctrl-C raises.

        Raises:
          ValueError: arguments or data that cannot work (`DataError`), before the
            first step; the message holds the line to write instead.
          CheckpointError: `run_dir` cannot be used, or what is in it does not fit.
          TypeError: data of a kind that is not understood.
          SystemExit: SIGTERM came: the training was saved in `run_dir`, and the
            process ends with status 143.
        """
        epochs = integer("epochs", epochs)
        initial_epoch = integer("initial_epoch", initial_epoch, least=0)
        hooks = as_callbacks(callbacks)
        display = make_display(verbose)
        validates_at = as_epoch_filter(validation_freq)
        steps = optional_integer("steps_per_epoch", steps_per_epoch)
        validation_steps = optional_integer("validation_steps", validation_steps)
        boolean("shuffle", shuffle)
        if validation_split and validation_data is not None:
            raise ValueError(
                "fit got both validation_split and validation_data; give one of them."
            )
        run = Run(run_dir, save_every, resume, monitor, display)
        run.check_policy(self._builder.nonfinite)
        own_step, clock = self.step, Clock()
        with (
            Interrupt() as interrupt,
            listening(CompileReport(display, clock)),
            run.opened(own_step, initial_epoch) as origin,
        ):
            if self._run != (run.name, self._keeper.holder.version):
                run.refuse_to_overwrite(own_step)
            span = range(origin.first_epoch, max(epochs, origin.first_epoch))
            clock.switch("waiting_for_data")
            binding = (
                self._reader.binding
                if origin.saved is None
                else self._reader.read_like(origin.saved)
            )
            if validation_split:
                x, validation_data = split_data(
                    x,
                    y,
                    sample_weight,
                    validation_split,
                    binding=binding,
                    data_dir=data_dir,
                )
                y = sample_weight = None
            source = as_source(
                x,
                y,
                sample_weight,
                binding=binding,
                batch_size=batch_size,
                shuffle=bool(shuffle),
                seed=(self._builder.seed, origin.first_step),
                class_weight=class_weight,
                steps=steps,
                check=self._builder.check_values,
                refuse=refuse_to_go_back
                if self._builder.nonfinite == "rollback"
                else partial(
                    refuse_one_shot, what="fit", epochs=len(span), steps=steps
                ),
                data_dir=data_dir,
            )
            epoch_steps = steps or source.num_batches
            total_steps = epoch_steps and origin.first_step + len(span) * epoch_steps
            self._builder.require_total_steps(total_steps)
            clock.switch("compiling")  # traces and the compile of `init`
            if origin.saved is not None:
                self._reader.refuse_other_classes(source)
            resolved = self._build(source, total_steps, place=True)
            validation = self._validation_source(
                validation_data,
                validation_batch_size,
                source.batch_size,
                len(span),
                validation_steps,
                data_dir,
                _LAST_EXAMPLES if validation_split else "in validation_data",
            )
            self._reader.batch_size = source.batch_size
            run.compare(
                self._meta(),
                source,
                describe_data(source, validation, shuffle=shuffle, steps=steps),
                hooks,
                epochs,
                total_steps,
            )
            self._keeper.begin(source.example, run, total_steps)
            run.take_folder()
            if verbose != 0:
                state = self._keeper.holder.peek()
                for line in first_lines(
                    resolved,
                    state,
                    source,
                    self._builder.spare_devices,
                    self._reader.class_names,
                ):
                    display.say(line)
            history = History(
                self,
                {"epochs": epochs, "steps": epoch_steps, "verbose": verbose},
            )
            loop = LoopState(
                self._keeper.holder,
                history=history,
                step=origin.step,
                epoch=origin.epoch,
                epochs=epochs,
                steps_per_epoch=epoch_steps,
                log_names=[
                    *resolved.history_names(validated=validation is not None),
                    *CallbackList(hooks).log_names,
                ],
                clock=clock,
            )
            clock.switch("stepping")
            plan = plan_fit(
                resolved,
                self._execution,
                source,
                validation,
                run,
                epochs=epochs,
                steps=steps,
                validation_steps=validation_steps,
                validates_at=validates_at,
                callbacks=CallbackList(run.with_recorder(hooks)),
                display=display,
                interrupt=interrupt,
                as_state=self._keeper.as_state,
                nonfinite=self._builder.nonfinite,
            )
            return self._fit(loop, plan, run)

    def _fit(self, loop: LoopState, plan: FitPlan, run: Run) -> History:
        self._keeper.clocks.append(loop.clock)
        try:
            fit_loop(loop, self._keeper.holder, plan)
        except KeyboardInterrupt:
            if plan.interrupt.insisted:
                raise
            loop.stop("interrupted")
        finally:
            self._keeper.clocks.pop()
            run.close()
            self._run = run.name, self._keeper.holder.version
        history = loop.history
        if loop.stop_reason is not None:
            plan.display.say(f"stopped after step {loop.step}: {loop.stop_reason}")
            history.stop_reason = loop.stop_reason
        if history.timing.remark:
            plan.display.say(history.timing.remark)
        return history

    def compile(
        self,
        x: Any = None,
        y: Any = None,
        *,
        batch_size: int | None = None,
        epochs: int = 1,
        steps_per_epoch: int | None = None,
        verbose: int | str = "auto",
        data_dir: str | os.PathLike[str] | None = None,
        **keras: Any,
    ) -> dict[str, float]:
        """Compiles what `fit`, `evaluate` and `predict` need for this data, ahead.

        There is no need to: they compile at their first step. Nothing is trained.

        Args:
          x: the data, as for `fit`, but no iterator: it would lose a batch.
          y: targets, for arrays.
          batch_size: as for `fit`.
          epochs: as for `fit`; only a learning rate that depends on the length of the
            training needs it.
          steps_per_epoch: as for `fit`.
          verbose: 0 to show nothing.
          data_dir: as for `fit`.
          **keras: refused, with a hint, for those who know Keras's `compile`.

        Returns:
          `{"train": …, "eval": …, "predict": …}`, seconds; near 0 for what was
          compiled already.

        Raises:
          TypeError: no data, or arguments of Keras's `compile`.
          ValueError: as `fit`.
        """
        if keras or x is None:
            raise compile_without_data(keras)
        epochs = integer("epochs", epochs)
        steps = optional_integer("steps_per_epoch", steps_per_epoch)
        display = make_display(verbose)
        source = as_source(
            x,
            y,
            binding=self._reader.binding,
            batch_size=batch_size,
            steps=steps,
            check=self._builder.check_values,
            refuse=partial(refuse_to_use_up, what="compile"),
            data_dir=data_dir,
            what="compile",
        )
        epoch_steps = steps or source.num_batches
        total_steps = epoch_steps and self.step + epochs * epoch_steps
        self._builder.require_total_steps(total_steps)
        resolved = self._build(source, total_steps, place=True)
        self._reader.batch_size = source.batch_size
        self._keeper.settle(source.example)
        outputs = self._builder.find_outputs(source.example, sown=False)
        with listening(CompileReport(display)), self._keeper.holder.borrow() as state:
            return compile_ahead(
                resolved,
                self._execution,
                source,
                state,
                outputs=outputs,
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

        A size not seen before is compiled for.

        Args:
          x: arrays in any nesting, or `(x, y)`, `(x, y, weights)` or a dict.
          y: their targets.
          sample_weight: `float[batch]`, or one for every element of the targets.
          class_weight: class -> weight of its examples.
          return_dict: as for `evaluate`.

        Returns:
          The loss and metrics of this batch before the step, as floats.
        """
        refuse_list(return_dict)
        batch = self._one_batch(x, y, sample_weight, class_weight, "train_on_batch")
        resolved = self._builder.resolved
        self._builder.require_total_steps(resolved.total_steps)
        with Interrupt() as interrupt:
            running, placed = resolved.empty(), resolved.placement.put_chunk(batch)
            with interrupt.shield(), self._keeper.holder.lock:
                state, running = resolved.programs.train(
                    self._keeper.holder.take(), running, placed, 0, 1
                )
                self._keeper.holder.put(state)
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
        data_dir: str | os.PathLike[str] | None = None,
    ) -> dict[str, Any]:
        """Returns the loss and metrics over all examples; changes nothing.

        The values are means over examples: they do not depend on `batch_size`.

        Args:
          x: what `fit` takes.
          y: targets, for arrays.
          batch_size: rows of a batch, for arrays; that of the last `fit`, or 32.
          verbose: 0 nothing, 1 a bar; `"auto"` a bar where someone watches.
          sample_weight: `float[examples]`, or one for every element of the targets.
          steps: use the first so many batches only.
          return_dict: for those who know Keras; there is nothing but a dict.
          data_dir: as for `fit`.

        Returns:
          `{"loss": …, "accuracy": …}`, floats.

        Raises:
          ValueError: as `fit`.
        """
        refuse_list(return_dict)
        steps = optional_integer("steps", steps)
        display = make_progress(verbose)
        source = self._reader.source(
            x,
            y,
            sample_weight,
            what="evaluate",
            batch_size=batch_size,
            steps=steps,
            divided=True,
            data_dir=data_dir,
        )
        resolved = self._build(source)
        self._keeper.settle(source.example)
        with (
            Interrupt() as interrupt,
            listening(CompileReport(display)),
            self._keeper.holder.borrow() as state,
        ):
            evaluate = make_evaluate(
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
        batch = self._one_batch(x, y, sample_weight, None, "test_on_batch")
        resolved = self._builder.resolved
        placed = resolved.placement.put_chunk(batch)
        with self._keeper.holder.borrow() as state:
            running = resolved.programs.evaluate(
                state, resolved.empty_eval(), placed, 0, 1
            )
            logs = read_logs(running, resolved.task.order)
        return logs

    # ---------------------------------------------------------------- prediction

    def predict(
        self,
        x: Any,
        *,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
        out: PyTree = None,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> PyTree:
        """Returns the model's outputs for all examples, in their order.

        The outputs of a few calls are on the device at a time; with `out` there are no
        more of them in memory either. For data without an end see `predict_batches`.

        Args:
          x: inputs in any nesting, or any dataset; of its `(x, y)` batches the
            targets are dropped.
          batch_size: rows of a batch, for arrays and for examples; that of the last
            `fit`, or 32.
          verbose: 0 nothing, 1 a bar; `"auto"` a bar where someone watches.
          steps: use the first so many batches only.
          out: arrays `[examples, ...]` to write into, nested as the outputs are: in
            memory, memory-mapped (`np.lib.format.open_memmap`), of zarr, HDF5.
          data_dir: where datasets by name lie.

        Returns:
          NumPy arrays `[examples, ...]` in the nesting of the model's output; `out`
          where it is given.

        Raises:
          TypeError: an `out` that cannot be written into.
          ValueError: as `fit`; an output without a batch axis; an `out` of another
            nesting, shape, length or kind of numbers than the outputs. It is raised
            before anything is computed, unless only reading tells the length.
        """
        display = make_progress(verbose)
        opened = self._open(x, "predict", batch_size, steps, data_dir)
        target = None
        if out is not None:
            target = Destination(out, opened.outputs.shapes, opened.examples)
        with listening(CompileReport(display)), self._keeper.holder.borrow() as state:
            parts = self._predict(opened, state, display=display)
            if target is not None:
                return target.write(parts)
            return join_batches(parts, opened.outputs.batched)

    def predict_batches(
        self,
        x: Any,
        *,
        batch_size: int | None = None,
        steps: int | None = None,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> Generator[PyTree]:
        """Returns an iterator over the outputs of one batch after the other.

        For data of any length, endless too: no more than a few batches are in memory.
        All outputs are those of the state at the time of the call, whatever is trained
        meanwhile. The data is read ahead: of an iterator more than was asked for,
        unless `steps` says how much. Closing the iterator ends that.

        Args:
          x: what `predict` takes.
          batch_size: as of `predict`.
          steps: use the first so many batches only.
          data_dir: where datasets by name lie.

        Yields:
          NumPy arrays `[rows, ...]` in the nesting of the model's output, as many rows
          as the batch has.

        Raises:
          ValueError: as `predict`; at once, and not with the first batch.

        Example:
          `for outputs in trainer.predict_batches(make_batches): file.write(outputs)`
        """
        opened = self._open(x, "predict_batches", batch_size, steps, data_dir)
        # Not borrowed: a fit would copy the state in every step, for as long as anyone
        # holds the iterator.
        parts = self._predict(opened, self._keeper.holder.read(), own=True)
        return split_batches(parts)

    def predict_intermediates(
        self,
        x: Any,
        *,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> PyTree:
        """Returns what the model sows as `intermediates`, for all examples.

        Arguments are those of `predict`.

        Returns:
          The nested dict of the collection, `{"layer": {"name": (array, …)}}`, as
          NumPy arrays `[examples, ...]`; a value without a batch axis is stacked
          `[batches, ...]`.
        """
        display = make_progress(verbose)
        what = "predict_intermediates"
        opened = self._open(x, what, batch_size, steps, data_dir, sown=True)
        with listening(CompileReport(display)), self._keeper.holder.borrow() as state:
            parts = self._predict(opened, state, display=display)
            return join_batches(parts, opened.outputs.batched)

    def predict_on_batch(self, x: Any) -> PyTree:
        """Returns the outputs for one batch of inputs of any size."""
        what = "predict_on_batch"
        source = self._reader.inputs(x, what=what, refuse=_refuse_several)
        if source.kind == "arrays":
            rows = source.num_examples
            source = self._reader.inputs(x, what=what, batch_size=rows)
        elif source.num_batches != 1:
            raise ValueError(_several_text(source))
        opened = self._open_inputs(source, None)
        with self._keeper.holder.borrow() as state:
            parts = self._predict(opened, state)
            return join_batches(parts, opened.outputs.batched)

    def _open(
        self,
        x: Any,
        what: str,
        batch_size: int | None,
        steps: int | None,
        data_dir: str | os.PathLike[str] | None,
        *,
        sown: bool = False,
    ) -> "_Inputs":
        """Returns what the method `what` predicts on."""
        steps = optional_integer("steps", steps)
        source = self._reader.inputs(
            x, what=what, batch_size=batch_size, steps=steps, data_dir=data_dir
        )
        return self._open_inputs(source, steps, sown=sown)

    def _open_inputs(
        self, source: Source, steps: int | None, *, sown: bool = False
    ) -> "_Inputs":
        """Sees to it that there are parts and a state for inputs, and checks them."""
        self._reader.learn(source, allow_rebuild=not self._keeper.settled)
        resolved = self._builder.build_for_inputs(
            source.example, allow_rebuild=not self._keeper.settled
        )
        source.check()
        outputs = self._builder.find_outputs(source.example, sown=sown)
        self._keeper.settle(source.example)
        return _Inputs(resolved, source, outputs, steps, sown)

    def _predict(
        self,
        inputs: "_Inputs",
        state: TrainState,
        *,
        own: bool = False,
        display: Display | None = None,
    ) -> Generator[Part]:
        return open_prediction(
            inputs.resolved,
            self._execution,
            inputs.source,
            state,
            outputs=inputs.outputs,
            steps=inputs.steps,
            sown=inputs.sown,
            own=own,
            display=display,
        )

    # ------------------------------------------------------- a loop of one's own

    def init(self, batch: Any) -> TrainState:
        """Returns a fresh state for batches like `batch`, at step 0.

        Parameters equal those of `module.init(jax.random.key(seed), …)`, up to
        rounding of the last bit. The trainer's own state is left alone.

        Args:
          batch: `(x, y)`, `(x, y, weights)` or a dict of arrays, or a `Batch`.
        """
        batch = self._reader.raw_batch(batch)
        self._builder.build(batch, allow_rebuild=not self._keeper.settled)
        if all(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(batch)):
            self._builder.check_values(batch)
        self._keeper.restore_pending()
        return self._builder.fresh_state(batch)

    def train_step(self, state: TrainState, batch: Any) -> tuple[TrainState, Logs]:
        """Makes one step, pure and jitted, for those who own their loop.

        Nothing is donated; `jax.jit(trainer.train_step, donate_argnums=0)` does.

        Args:
          state: from `init` or a step before.
          batch: as for `init`.

        Returns:
          The next state, and the logs as accumulators on the device:
          `logs["loss"].compute()`, `logs["loss"].merge(other)`.
        """
        if not isinstance(state, TrainState):
            raise TypeError(
                f"train_step takes a TrainState, got {type(state).__name__}. Write "
                f"state = trainer.init(batch), then state, logs = "
                f"trainer.train_step(state, batch)."
            )
        batch = self._reader.raw_batch(batch)
        resolved = self._builder.build(batch)
        self._builder.require_total_steps(resolved.total_steps)
        leaves = jax.tree.leaves(batch)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            batch = resolved.placement.put_chunk(batch)
        state, logs = resolved.programs.step(state, batch)
        return state, resolved.task.order(logs)

    # --------------------------------------------------------------------- state

    @property
    def state(self) -> TrainState:
        """The state after the last finished step; it stays valid whatever follows.

        May be assigned: paths, shapes and dtypes are checked, values copied.

        Raises:
          ValueError: there is none before the first data.
        """
        self._keeper.require()
        return self._keeper.holder.read()

    @state.setter
    def state(self, state: TrainState) -> None:
        self._keeper.assign(state)

    @property
    def variables(self) -> dict[str, PyTree]:
        """What `module.apply` takes: `{"params": …, "batch_stats": …}`.

        The parameters are those `evaluate` and `predict` use.
        """
        state = self.state
        resolved = self._builder.resolved
        params = resolved.task.optimizer.evaluation_params(
            state.opt_state, state.params
        )
        return {"params": params, **state.collections}

    @property
    def step(self) -> int:
        """The number of optimizer steps so far."""
        return self._keeper.step

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes 0, 1, …, where the data had names for them."""
        return self._reader.class_names

    @property
    def compiles(self) -> dict[str, int]:
        """How often each phase was compiled: `{"train": 1, "eval": 1, …}`."""
        return self._builder.compiles

    # ------------------------------------------------------------ looking at it

    def summary(self, x: Any = None) -> Text:
        """Returns a table of the model's layers, for `print` or a notebook.

        Args:
          x: a batch of inputs; not needed once the trainer has seen data.
        """
        if x is not None:
            source = as_inputs_source(x, binding=self._reader.binding, what="summary")
            resolved = self._builder.build_for_inputs(
                source.example, allow_rebuild=not self._keeper.settled
            )
        else:
            resolved = self._builder.resolved
        return Text(resolved.adapted.summary(resolved.example.inputs))

    def check(
        self,
        x: Any,
        y: Any = None,
        *,
        batch_size: int | None = None,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> CheckReport:
        """Tells what was understood, without training: `print(trainer.check(x, y))`.

        Compiles one step to count its FLOPs and memory.

        Args:
          x: the data, as for `fit`, but no iterator: it would lose a batch.
          y: targets, for arrays.
          batch_size: rows of a batch, for arrays; that of the last `fit`, or 32.
          data_dir: as for `fit`.
        """
        source = self._reader.source(
            x,
            y,
            what="check",
            batch_size=batch_size,
            refuse=partial(refuse_to_use_up, what="check"),
            data_dir=data_dir,
        )
        resolved = self._build(source)
        self._keeper.restore_pending()
        if self._keeper.holder.empty:
            state = self._builder.fresh_state(source.example)
            return make_report(resolved, state, source, self._reader.class_names)
        with self._keeper.holder.borrow() as state:
            return make_report(resolved, state, source, self._reader.class_names)

    def __repr__(self) -> str:
        progress = "untrained" if self._keeper.holder.empty else f"step {self.step}"
        return f"Trainer({self._name}, {progress})"

    # --------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole state into one file, all of it or nothing.

        `flax.serialization.from_bytes({"state": target}, data)` reads it as well.

        Args:
          path: the file, e.g. `"run.msgpack"`; missing folders are made.

        Raises:
          ValueError: there is no state yet.
          CheckpointError: something in the state cannot be written.
        """
        self._keeper.require()
        meta = self._meta()
        timed = (
            self._keeper.clocks[-1].phase("saving")
            if self._keeper.clocks
            else nullcontext()
        )
        with timed, self._keeper.holder.borrow() as state:
            checkpoint.save(path, state, meta)

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
        """Returns the trainer that was saved, ready to go on.

        Args:
          path: a file written by `save`, by `fit(run_dir=...)` or by
            `ModelCheckpoint`; or the folder of a run, for its newest checkpoint.
          model: the same module.
          strict: as for `restore`.
          params_only: as for `restore`.
          rename: as for `restore`.
          **changes: arguments of `Trainer` to set; needed for those that were
            functions or objects, which a file does not hold.

        Raises:
          CheckpointError: not such a file, an argument that has to be given, or a
            state that does not fit the model, every path that differs named.
        """
        saved = open_checkpoint(path)
        execution = {n: changes.pop(n) for n in _EXECUTION if n in changes}
        config, example, batch_size = from_meta(saved.meta, changes, saved.path)
        trainer = cls(model, **config, **execution)
        trainer._reader.batch_size = batch_size
        trainer._reader.read_like(saved)
        trainer._keeper.pending = Pending(
            saved, "learning_rate" in changes, strict, params_only, rename
        )
        if example is not None:
            trainer._build_for(example, saved.path)
            trainer._keeper.restore_pending()
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
          path: as for `load`; with `params_only` also a file of plain
            `flax.serialization.to_bytes`, of parameters, of variables or of a
            `TrainState`.
          strict: whether everything has to fit. Otherwise what does not is left as it
            is, and the report says so.
          params_only: take parameters and collections, what `module.apply` needs. The
            optimizer and the step count begin anew. For another optimizer, or for
            transfer learning.
          rename: prefix of a path in the file -> the one in the model:
            `{"encoder": "backbone"}`. None for the latter leaves that part of the
            model as it is: `{"head": None}`.

        Returns:
          What became of every leaf; `print` it.

        Raises:
          CheckpointError: a file that cannot be read, or that does not fit; every path
            that differs is named, and nothing is changed.
          ValueError: the model has seen no data, and the file does not tell of any.

        Example:
          `trainer.restore("pretrained.msgpack", params_only=True, rename={"head":
          None})` takes all but the head.
        """
        saved = open_variables(path) if params_only else open_checkpoint(path)
        pending = Pending(saved, False, strict, params_only, rename)
        scaled = saved.meta.get("config", {}).get("scale_images")
        if isinstance(scaled, bool):
            self._builder.learn(scaled)
        if not self._builder.is_resolved:
            example = example_of(saved.meta)
            if example is None:
                raise ValueError(
                    f"{saved.path!r} does not tell what the model's inputs look like, "
                    "and this trainer has seen none. Write trainer.init((x, y)) with a "
                    "batch, then trainer.restore(...)."
                )
            self._build_for(example, saved.path)
        report = self._keeper.restore(pending)
        if strict and not rename:
            self._reader.read_like(saved)
        return report

    # ------------------------------------------------------------------ plumbing

    def _validation_source(
        self,
        data: Any,
        batch_size: int | None,
        default_batch_size: int,
        epochs: int,
        steps: int | None,
        data_dir: Any,
        note: str,
    ) -> Source | None:
        if data is None:
            return None
        try:
            source = self._reader.source(
                data,
                what="validation_data",
                batch_size=batch_size,
                steps=steps,
                divided=True,
                default_batch_size=default_batch_size,
                refuse=partial(
                    refuse_one_shot, what="validation_data", epochs=epochs, steps=steps
                ),
                data_dir=data_dir,
            )
            self._build(source, allow_rebuild=False)
        except Exception as error:
            error.add_note(note)
            raise
        return source

    def _one_batch(
        self, x: Any, y: Any, sample_weight: Any, class_weight: Any, what: str
    ) -> Batch:
        whole = self._reader.one_batch(x, y, sample_weight, class_weight, what=what)
        allow_rebuild = not self._keeper.settled
        self._reader.learn(whole, allow_rebuild=allow_rebuild)
        self._builder.build(whole.batch, allow_rebuild=allow_rebuild)
        self._builder.check_values(whole.batch)
        self._keeper.settle(whole.batch)
        return whole.batch

    def _build(
        self,
        source: Source,
        total_steps: int | None = None,
        *,
        allow_rebuild: bool | None = None,
        place: bool = False,
    ) -> ResolvedTask:
        allow_rebuild = (
            not self._keeper.settled if allow_rebuild is None else allow_rebuild
        )
        placement = None
        if place and has_rows(source.example):
            placement = self._builder.placement_for(
                source.batch_size, source.num_examples
            )
            now = self._builder.placement
            if self._keeper.clocks and placement.devices != now.devices:
                raise ValueError(
                    f"A fit of this trainer is under way on {len(now.devices)} devices,"
                    f" which do not divide batch_size={source.batch_size}. Write "
                    f"batch_size={now.rounded(source.batch_size)} inside of it."
                )
        self._reader.learn(source, allow_rebuild=allow_rebuild)
        resolved = self._builder.build(
            source.example,
            total_steps,
            allow_rebuild=allow_rebuild,
            placement=placement,
        )
        if resolved.task.objective.scalar_loss:
            source.pad = False
        source.check()
        return resolved

    def _meta(self) -> dict[str, Any]:
        resolved = self._builder.resolved
        return to_meta(
            {**self._config, "scale_images": self._builder.scaled},
            resolved.example,
            batch_size=self._reader.batch_size,
            opt_state=resolved.template.opt_state,
            class_names=self._reader.class_names,
            columns=self._reader.columns,
        )

    def _build_for(self, example: Batch, where: str) -> None:
        try:
            if example.targets is None and self._config["loss"] is not None:
                self._builder.build_for_inputs(example)
            else:
                self._builder.build(example)
        except Exception as error:
            raise CheckpointError(
                f"{where!r} was saved for inputs that {self._name} cannot take: {error}"
            ) from error


class _Inputs(NamedTuple):
    """What a prediction runs on."""

    resolved: ResolvedTask
    source: Source
    outputs: Outputs
    steps: int | None
    sown: bool

    @property
    def examples(self) -> int | None:
        """How many there will be, None if only reading tells."""
        source, steps = self.source, self.steps
        if steps is None or source.num_examples is None:
            return source.num_examples
        if source.kind == "arrays":
            return min(source.num_examples, steps * source.batch_size)
        enough = source.num_batches is not None and steps >= source.num_batches
        return source.num_examples if enough else None


def _refuse_several(data: ExampleSet | Stream) -> None:
    if data.one_shot:
        raise ValueError(_several_text(data))


def _several_text(data: ExampleSet | Stream | Source) -> str:
    return (
        f"predict_on_batch takes one batch, and the {data.kind} given may have more. "
        "Write predict(dataset), or predict_on_batch(next(iter(dataset)))."
    )
