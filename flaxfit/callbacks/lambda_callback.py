"""A callback that calls plain functions."""

from collections.abc import Callable

from flaxfit._core.errors import UsageTypeError, did_you_mean
from flaxfit.callbacks.base import HOOKS, Callback, LoopState


class LambdaCallback(Callback):
    """Calls each given function, with the `LoopState`, at its hook.

    Args:
      every_steps: how often the batch hooks run; see `Callback`.
      **hooks: a hook's name -> the function to call there; see `Callback`.

    Raises:
      TypeError: a name that is not a hook, or a value that cannot be called.

    Example:
      >>> from flaxfit import LambdaCallback
      >>> callback = LambdaCallback(on_epoch_end=lambda loop: print(loop.logs["loss"]))
    """

    def __init__(
        self,
        *,
        every_steps: int | None = 1,
        **hooks: Callable[[LoopState], object],
    ) -> None:
        self.every_steps = every_steps
        for name, function in hooks.items():
            if name not in HOOKS:
                raise UsageTypeError(
                    f"LambdaCallback({name}=...): {name} is not a hook."
                    f"{did_you_mean(name, HOOKS)}",
                    f"The hooks are {', '.join(HOOKS)}",
                )
            if not callable(function):
                raise UsageTypeError(
                    f"LambdaCallback({name}=...) takes a function of the LoopState, "
                    f"got {type(function).__name__}"
                )
            setattr(self, name, function)
