"""`python -m flaxfit`: what it prints, and its exit codes."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from helpers.data import labeled
from helpers.models import Linear

from flaxfit import Callback, Trainer, checkpoint
from flaxfit.__main__ import main

META = {"versions": {"flaxfit": "0.1.0", "jax": "0.10"}, "epoch": 2, "batch_size": 32}


def save(path, bias=0.0, kernel=(4, 8), meta=META):
    params = {"Dense_0": {"kernel": jnp.ones(kernel), "bias": jnp.zeros(8) + bias}}
    state = {"step": jnp.int32(7), "params": params, "rng": jax.random.key(0)}
    checkpoint.save(path, state, meta)
    return str(path)


def test_inspect(tmp_path, capsys):
    path = save(tmp_path / "a")
    assert main(["inspect", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == path
    assert lines[1].startswith("  flaxfit checkpoint, format 1, checksums correct, ")
    assert lines[2:] == [
        "  written by flaxfit 0.1.0, jax 0.10",
        "  step 7",
        "",
        "  step                   int32[]             4 B",
        "  params/Dense_0/kernel  float32[4,8]      128 B",
        "  params/Dense_0/bias    float32[8]         32 B",
        "  rng                    key<fry>[]          8 B",
        "",
        "  step                   1 leaf              4 B",
        "  params                 2 leaves          160 B",
        "  rng                    1 leaf              8 B",
        "  total                  4 leaves          172 B",
    ]


def test_inspect_tells_where_a_fit_stood(tmp_path, capsys):
    class SaveAtStep7(Callback):
        def on_train_batch_end(self, loop):
            if loop.step == 7:
                loop.save(tmp_path / "middle")

    x, y = labeled(32)
    Trainer(Linear()).fit(
        x,
        y,
        epochs=2,
        batch_size=8,
        callbacks=SaveAtStep7(),
        run_dir=tmp_path,
        verbose=0,
    )
    for name, position in (
        ("middle", "step 7, epoch 2, batch 3"),
        ("step-0000000008.msgpack", "step 8, end of epoch 2"),
    ):
        assert main(["inspect", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out.splitlines()[3] == f"  {position}"


def test_inspect_a_file_of_plain_flax(tmp_path, capsys):
    path = tmp_path / "flax"
    path.write_bytes(serialization.to_bytes({"params": {"w": np.ones(2)}}))
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "plain flax.serialization file" in out
    assert "  params/w  float64[2]       16 B" in out


def test_verify(tmp_path, capsys):
    good, bad = save(tmp_path / "a.msgpack"), save(tmp_path / "b.msgpack")
    assert main(["verify", good]) == 0
    assert capsys.readouterr().out == f"{good}: ok\n"
    data = bytearray((tmp_path / "b.msgpack").read_bytes())
    data[data.rfind(b"kernel") + 30] ^= 1
    (tmp_path / "b.msgpack").write_bytes(data)
    (tmp_path / "c.msgpack").write_bytes(b"<html>")
    (tmp_path / "other").write_bytes(b"")
    assert main(["verify", str(tmp_path)]) == 1
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == f"{good}: ok"
    assert second.startswith(f"{bad}: DAMAGED: leaf params/Dense_0/kernel (bytes ")
    assert "c.msgpack: NOT READ: is not a checkpoint; it looks like an HTML" in third


def test_diff(tmp_path, capsys):
    a, same = save(tmp_path / "a"), save(tmp_path / "same")
    assert main(["diff", a, same]) == 0
    assert capsys.readouterr().out == "equal\n"
    bias = jnp.zeros(8).at[3].set(0.25).at[4].set(jnp.nan)
    b = save(tmp_path / "b", bias, (4, 9), {**META, "epoch": 3, "new": [1]})
    assert main(["diff", a, b]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "meta epoch: 2 | 3",
        "meta new: 'nothing' | [1]",
        "params/Dense_0/kernel  float32[4,8] | float32[4,9]",
        "params/Dense_0/bias    2 of 8 differ, max |difference| 0.25",
    ]
    assert main(["diff", b, b]) == 0  # NaN equals NaN.


def test_trouble_is_2(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "There is no file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["unknown"])
    assert caught.value.code == 2


def test_it_runs_as_a_module(tmp_path):
    path = save(tmp_path / "a")
    command = [sys.executable, "-m", "flaxfit", "verify", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{path}: ok\n")
