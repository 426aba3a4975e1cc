"""Sources of data as `Trainer` opens them, without a trainer."""

from flaxfit._core.errors import calling
from flaxfit.data import tfds
from flaxfit.data.open import (
    BatchOptions,
    Dataset,
    batch_source,
    one_batch,
    open_dataset,
    open_inputs,
    split_dataset,
)
from flaxfit.trainer.data import check_passes, refuse_assumed_split

_ARGUMENTS = {"fit": "steps_per_epoch", "validation_data": "validation_steps"}


def as_source(
    x,
    y=None,
    sample_weight=None,
    *,
    binding,
    name="fit",
    data_dir=None,
    **options,
):
    """Returns a source of what is given to the method `name`."""
    with calling(name):
        if data_dir is not None:
            x = tfds(x, data_dir=data_dir)
        size = options.get("batch_size")
        dataset = x
        if not isinstance(x, Dataset):
            dataset = open_dataset(x, y, sample_weight, batch_size=size)
        if name != "fit":
            refuse_assumed_split(dataset)
        check_passes(dataset, options.get("steps"), _ARGUMENTS.get(name, "steps"))
        return batch_source(dataset, binding, BatchOptions(**options))


def as_inputs_source(x, *, binding, name="predict", **options):
    """Returns a source of what is given to `predict`."""
    with calling(name):
        dataset = open_inputs(x, binding, batch_size=options.get("batch_size"))
        if name == "predict":
            check_passes(dataset, options.get("steps"), "steps")
        options = BatchOptions(**options, inputs_only=True)
        return batch_source(dataset, binding, options)


def as_whole(x, y=None, sample_weight=None, *, binding, class_weight=None):
    """Returns data as one batch."""
    return one_batch(open_dataset(x, y, sample_weight), binding, class_weight)


def split_data(x, y, sample_weight, fraction, *, binding):
    """Returns the two datasets of a `validation_split`."""
    return split_dataset(open_dataset(x, y, sample_weight), fraction, binding)
