"""Turns on JAX's persistent compilation cache, a setting of the process.

Only `jax.config` can set the folder in which jax keeps compiled programs.
"""

import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

_VARIABLE = "FLAXFIT_COMPILATION_CACHE"
_ON = ("1", "true", "yes", "on")
_OFF = ("", "0", "false", "no", "off")


def use_compilation_cache(where: Any) -> None:
    """Keeps compiled programs in a folder, for this and all later processes.

    Programs that compile in less than a second are kept as well, unlike by jax's
    default.

    Args:
      where: a folder; True for the default one; False to change nothing; None for the
        value of `$FLAXFIT_COMPILATION_CACHE`, a folder or e.g. "1" or "0".

    Raises:
      TypeError: another type.
    """
    if where is None:
        where = os.environ.get(_VARIABLE, "").strip()
        if where.lower() in (*_ON, *_OFF):
            where = where.lower() in _ON
    if where is True:
        where = Path.home() / ".cache" / "flaxfit"
    if where is False:
        return
    if not isinstance(where, str | os.PathLike):
        raise TypeError(
            f"compilation_cache={where!r}: write a folder, or True for the default, "
            "~/.cache/flaxfit."
        )
    folder = os.fspath(Path(where).expanduser().absolute())
    Path(folder).mkdir(parents=True, exist_ok=True)
    if jax.config.jax_compilation_cache_dir != folder:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # otherwise jax keeps using the earlier folder
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
