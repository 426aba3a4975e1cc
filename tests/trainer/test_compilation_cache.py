"""The persistent cache: where it is, what it keeps, and that it changes no result."""

import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers.data import labeled
from helpers.models import DropoutNet
from jax.experimental.compilation_cache import compilation_cache

from flaxfit import Trainer
from flaxfit.trainer.compilation_cache import use_compilation_cache

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
X, Y = labeled(20)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.delenv("FLAXFIT_COMPILATION_CACHE", raising=False)
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def settings():
    return tuple(getattr(jax.config, name) for name in SETTINGS)


def in_use():
    return jax.config.jax_compilation_cache_dir


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_folder_is_made_and_everything_is_kept_in_it(tmp_path, as_type):
    folder = tmp_path / "some" / "where"
    use_compilation_cache(as_type(folder))
    assert folder.is_dir()
    assert settings() == (str(folder), 0.0, -1)


def test_a_relative_folder_and_home_are_made_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    use_compilation_cache("here")
    assert in_use() == str(tmp_path / "here")
    use_compilation_cache("~/there")
    assert in_use() == str(tmp_path / "home" / "there")
    use_compilation_cache(True)
    assert in_use() == str(tmp_path / "home" / ".cache" / "flaxfit")
    assert Path(in_use()).is_dir()


@pytest.mark.parametrize("off", [None, False])
def test_off_touches_nothing(off):
    before = settings()
    use_compilation_cache(off)
    Trainer(nn.Dense(1), compilation_cache=off)
    assert settings() == before


@pytest.mark.parametrize("text", ["1", "true", "Yes", " ON "])
def test_the_environment_can_turn_it_on(text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FLAXFIT_COMPILATION_CACHE", text)
    Trainer(nn.Dense(1))
    assert in_use() == str(tmp_path / ".cache" / "flaxfit")


@pytest.mark.parametrize("text", ["", "0", "false", "No", "off", "  "])
def test_the_environment_can_leave_it_off(text, monkeypatch):
    before = settings()
    monkeypatch.setenv("FLAXFIT_COMPILATION_CACHE", text)
    Trainer(nn.Dense(1))
    assert settings() == before


def test_the_environment_can_name_a_folder_and_an_argument_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAXFIT_COMPILATION_CACHE", str(tmp_path / "Named"))
    Trainer(nn.Dense(1))
    assert in_use() == str(tmp_path / "Named")
    Trainer(nn.Dense(1), compilation_cache=tmp_path / "argument")
    assert in_use() == str(tmp_path / "argument")
    Trainer(nn.Dense(1), compilation_cache=False)
    assert in_use() == str(tmp_path / "argument")  # a process has one


@pytest.mark.parametrize("wrong", [1, 0, 1.5, ["a"], b"bytes"])
def test_what_is_no_folder_is_refused(wrong):
    before = settings()
    with pytest.raises(TypeError, match=r"compilation_cache=.*write a folder, or True"):
        Trainer(nn.Dense(1), compilation_cache=wrong)
    assert settings() == before


def results(cache):
    trainer = Trainer(DropoutNet(), compilation_cache=cache)
    history = trainer.fit(
        X, Y, batch_size=8, epochs=2, validation_data=(X, Y), verbose=0
    )
    return jax.device_get(
        (trainer.variables, trainer.state.opt_state, trainer.predict(X))
    ), history.history


def test_the_cache_changes_no_bit_and_is_hit(tmp_path):
    hits = []
    # Not that of the test run, where other tests may have kept the same programs.
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()

    def listen(event, **labels):
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        without = results(None)
        assert hits == []
        cold = results(tmp_path)
        kept = {p.name for p in tmp_path.iterdir() if p.name.endswith("-cache")}
        cold_hits = len(hits)
        warm = results(tmp_path)
    finally:
        jax.monitoring.clear_event_listeners()
    # The train, eval, predict and init programs, however fast they compiled.
    assert len([name for name in kept if name.startswith("jit_")]) >= 4
    assert len(hits) - cold_hits >= 4
    assert {p.name for p in tmp_path.iterdir() if p.name.endswith("-cache")} == kept
    for other in (cold, warm):
        jax.tree.map(np.testing.assert_array_equal, other[0], without[0])
        assert other[1] == without[1]


def test_a_second_folder_in_a_process_is_used_from_then_on(tmp_path):
    def compile_one(width):
        Trainer(nn.Dense(width), compilation_cache=tmp_path / str(width)).predict(X)
        return len(list((tmp_path / str(width)).iterdir()))

    assert compile_one(3) > 0
    assert compile_one(4) > 0


def test_another_process_finds_what_the_first_has_compiled(tmp_path):
    code = (
        "import flax.linen as nn, jax, numpy as np\n"
        "from flaxfit import Trainer\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(\n"
        "    lambda event, **labels: hits.append(event))\n"
        "jax.jit(lambda x: x + 1)(1.0)\n"  # before there is a trainer
        "t = Trainer(nn.Dense(3), devices=1)\n"
        "h = t.fit(np.ones((8, 4), 'float32'), np.zeros(8, 'int32'), verbose=0)\n"
        "print(hits.count('/jax/compilation_cache/cache_hits'),\n"
        "      h.history['loss'][0].hex(), np.asarray(\n"
        "          t.variables['params']['kernel']).tobytes().hex())\n"
    )
    environment = {**os.environ, "FLAXFIT_COMPILATION_CACHE": str(tmp_path / "c")}
    answers = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        ).stdout.split()
        for _ in range(2)
    ]
    assert int(answers[0][0]) == 0
    assert int(answers[1][0]) >= 2  # init and train
    assert answers[0][1:] == answers[1][1:]
