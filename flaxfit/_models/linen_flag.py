"""Detects and sets a linen module's train/eval flag."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn

from flaxfit._core.errors import DetectionError
from flaxfit._core.types import Inputs
from flaxfit._models.base import Overrides

# Name -> whether True means evaluation; names are tried in this order.
FLAGS: Mapping[str, bool] = MappingProxyType(
    {
        "train": False,
        "training": False,
        "is_training": False,
        "deterministic": True,
        "use_running_average": True,
    }
)


class TrainFlag(NamedTuple):
    """How to put one module into training or evaluation mode.

    Attributes:
      name: the flag's name, for messages.
      arguments: call arguments to set, each with whether True means evaluation.
      attributes: module attributes to set, in the same form.
      cleared: attributes to set to None because an argument of that name is set.
      layers: whether to set the flag on the layers that leave it unset.
      function: the user's function `(module, train) -> module`.
    """

    name: str
    arguments: tuple[tuple[str, bool], ...] = ()
    attributes: tuple[tuple[str, bool], ...] = ()
    cleared: tuple[str, ...] = ()
    layers: bool = False
    function: Callable[[Any, bool], Any] | None = None


def find_train_flag(module: nn.Module, overrides: Overrides) -> TrainFlag:
    """Returns how the module distinguishes training from evaluation.

    Raises:
      DetectionError: the flag that the user named is not an argument or attribute.
    """
    asked = overrides.train_flag
    if callable(asked):
        return TrainFlag("function", function=asked)
    if asked is None:
        return TrainFlag("none")
    if asked == "layers":
        return TrainFlag("layers", layers=True)
    parameters = parameters_of(module)
    fields = getattr(module, "__dataclass_fields__", {})
    if asked == "auto":
        in_call = [name for name in FLAGS if name in parameters]
        on_module = [name for name in FLAGS if name in fields]
        inverted: Mapping[str, bool] = FLAGS
    else:
        name = asked.removeprefix("not ").strip()
        inverted = {**FLAGS, name: asked.startswith("not ") or FLAGS.get(name, False)}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        on_module = [name] if name in fields else []
        in_call = [name] if name in parameters or (takes_any and not on_module) else []
        if not in_call and not on_module:
            raise DetectionError(
                f"train_flag={asked!r}: {type(module).__name__}.__call__ has no such "
                f"argument (it takes {', '.join(parameters) or 'none'}), and the "
                "module has no such attribute",
                write="train_flag='name' with the name of its flag, train_flag=None if "
                "it has none, or train_flag=lambda module, train: module.clone(...)",
            )
    # Further arguments are set unless they default to None: they could contradict the
    # first one.
    arguments = [
        n for i, n in enumerate(in_call) if not i or parameters[n].default is not None
    ]
    attributes = [n for n in on_module if n not in arguments]
    names = [f"{n}=" for n in arguments] + [f"attribute {n}" for n in attributes]
    return TrainFlag(
        ", ".join(names) or "none",
        arguments=tuple((n, inverted[n]) for n in arguments),
        attributes=tuple((n, inverted[n]) for n in attributes),
        # `nn.merge_param` refuses a flag given as an argument and as an attribute.
        cleared=tuple(
            n
            for n in arguments
            if n in on_module and getattr(module, n, None) is not None
        ),
    )


def parameters_of(module: nn.Module) -> dict[str, inspect.Parameter]:
    """Returns the parameters of `module.__call__` by name."""
    receiver, *others = inspect.signature(type(module).__call__).parameters.items()
    del receiver
    return dict(others)


@contextlib.contextmanager
def in_mode(
    module: nn.Module, inputs: Inputs, flag: TrainFlag, train: bool
) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Yields the module in the given mode, and the arguments to call it with."""
    if flag.function is not None:
        target = flag.function(module, train)
        yield target, *_call_arguments(target, inputs, {})
        return
    changes: dict[str, Any] = {name: None for name in flag.cleared}
    changes |= {name: train != inverted for name, inverted in flag.attributes}
    target = module.clone(**changes) if changes else module
    kwargs = {name: train != inverted for name, inverted in flag.arguments}
    with _layers_set_to(train) if flag.layers else contextlib.nullcontext():
        yield target, *_call_arguments(target, inputs, kwargs)


def _layers_set_to(train: bool) -> contextlib.AbstractContextManager[None]:
    def set_flag(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        name = _unset_flag(context.module)
        given = len(args) > 1 or name is None or kwargs.get(name) is not None
        if context.method_name == "__call__" and name is not None and not given:
            kwargs = {**kwargs, name: train != FLAGS[name]}
        return next_fun(*args, **kwargs)

    return nn.intercept_methods(set_flag)


def _unset_flag(module: nn.Module) -> str | None:
    if isinstance(module, nn.BatchNorm) and module.use_running_average is None:
        return "use_running_average"
    if isinstance(module, nn.Dropout):
        return "deterministic" if module.deterministic is None else None
    return None


def _call_arguments(
    module: nn.Module, inputs: Inputs, flags: dict[str, bool]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and named arguments of a call, including its flags."""
    if isinstance(inputs, dict):
        return (), {**inputs, **flags}
    # Flags that directly follow the inputs are passed by position, because
    # `nn.remat(..., static_argnums=...)` can make only positional arguments static.
    args, named = list(inputs), dict(flags)
    for parameter in list(parameters_of(module).values())[len(args) :]:
        by_position = parameter.kind is not inspect.Parameter.KEYWORD_ONLY
        if parameter.name not in named or not by_position:
            break
        args.append(named.pop(parameter.name))
    return tuple(args), named


def no_flag_error(module: nn.Module, moded_layers: Iterable[str]) -> DetectionError:
    """Returns the error for layers with a mode in a module without a flag."""
    layers = " and ".join(sorted(moded_layers)) or "a layer with a train flag"
    return DetectionError(
        f"{type(module).__name__} contains {layers}, but nothing tells training from "
        f"evaluation: its __call__ has none of the arguments {', '.join(FLAGS)}, and "
        "the module has no such attribute",
        "Add `train: bool` to __call__, and pass `use_running_average=not train` or "
        "`deterministic=not train` to these layers",
        'Trainer(model, train_flag="name") for a flag of another name ("not name" if '
        'True means evaluation), train_flag="layers" to set it on every BatchNorm and '
        "Dropout that leaves it unset, or train_flag=None to run both modes alike",
    )
