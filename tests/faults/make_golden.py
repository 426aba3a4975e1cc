"""Makes `golden/format-N.golden`: run once for each format that is released.

    python tests/faults/make_golden.py

Never make one again that has been released: old files must go on being read.
"""

import jax
import jax.numpy as jnp
import numpy as np
from harness import HERE

from flaxfit import checkpoint
from flaxfit._core.types import TrainState

_META = {"step": 7, "history": {"loss": [0.5, 0.25, None]}, "name": "é"}


def golden_state() -> TrainState:
    """Every dtype, nesting and kind of leaf a state may hold."""
    names = ("bfloat16", "float16", "float32", "int8", "int32", "uint8", "bool")
    names = (*names, "complex64", "int4", "float8_e4m3fn")
    params = {name: jnp.asarray([[0, 1, 1], [1, 0, 1]], name) for name in names}
    params |= {"scalar": jnp.float32(2), "empty": jnp.zeros((0, 3)), "none": None}
    params |= {"list": [jnp.ones(1) * i for i in range(11)], "é": jnp.ones(1)}
    return TrainState(
        step=jnp.int32(7),
        params=params,
        collections={"batch_stats": {"norm": {"mean": jnp.arange(4.0)}}},
        opt_state=({"count": jnp.int32(7)}, (), {"weak": jnp.asarray(0.5)}),
        rng=jax.random.key(3),
    )


def main() -> None:
    """Writes the file of today's format."""
    folder = HERE / "golden"
    folder.mkdir(exist_ok=True)
    temporary = folder / "new"
    checkpoint.save(temporary, golden_state(), _META)
    number = checkpoint.load(temporary).meta["format"]
    path = folder / f"format-{number}.golden"
    if path.exists():
        temporary.unlink()
        raise SystemExit(f"{path} is there already.")
    temporary.rename(path)
    print(path, path.stat().st_size, "bytes", np.__version__)


if __name__ == "__main__":
    main()
