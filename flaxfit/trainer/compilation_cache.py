"""Turns on JAX's persistent compilation cache, a setting of the process.

jax has no other way than `jax.config` to say where compiled programs are kept.
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
    """Has compiled programs kept in a folder, for this and all later processes.

    Programs that compile in less than a second are kept as well, which jax by itself
    does not do.

    Args:
      where: a folder; True for the default one; False for none; None for what the
        environment variable says, in the same words.

    Raises:
      TypeError: something else.
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
        compilation_cache.reset_cache()  # or a folder that was in use would stay so
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
