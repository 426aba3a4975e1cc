"""The README, the examples and the docstrings run, and come out as they say."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import flaxfit

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MODULES = [
    "flaxfit",
    *(m.name for m in pkgutil.walk_packages(flaxfit.__path__, "flaxfit.")),
]


def load(example):
    return runpy.run_path(str(ROOT / "examples" / example))


def test_digits(tmp_path, capsys):
    plot = tmp_path / "digits_history.png"
    result = load("digits.py")["main"](plot=str(plot))
    assert result["accuracy"] >= 0.98
    assert result["loss"] < 0.1
    shown = capsys.readouterr().out
    for text in (
        "BatchNorm_1  BatchNorm  float32[32,4,4,64]     128          128",
        "collections: batch_stats · rngs: dropout · train flag: train=",
        "Epoch 20/20 · 21 steps",
        f"test accuracy {result['accuracy']:.2%}",
    ):
        assert text in shown
    height, width, _ = matplotlib.image.imread(plot).shape
    assert width > 2 * height > 400


def test_digits_from_the_command_line(tmp_path):
    command = [sys.executable, ROOT / "examples" / "digits.py", "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Epoch 1/1" in done.stdout
    assert (tmp_path / "digits_history.png").exists()


def test_batch_norm_ends_with_equal_numbers():
    differences = load("batch_norm.py")["main"]()
    assert len(differences) == 16
    assert {"epoch 3 loss", "batch_stats/BatchNorm_0/var"} <= set(differences)
    assert max(differences.values()) <= 1e-6


def test_tfds_digits(tmp_path, capsys):
    result = load("tfds_digits.py")["main"](data_dir=tmp_path, epochs=8)
    assert result["accuracy"] >= 0.96
    shown = capsys.readouterr().out
    assert "sklearn_digits/train 1.0.0 (TFDS): 1,437 examples, 23 batches" in shown
    assert "pictures: uint8, divided by 255 on the device" in shown


def test_tabular(capsys):
    result = load("tabular.py")["main"]()
    assert result["accuracy"] > 0.95
    shown = capsys.readouterr().out
    assert "classes: malignant, benign" in shown
    assert f"test accuracy {result['accuracy']:.2%}" in shown
    assert "malignant       0.9" in shown


def test_stream(tmp_path, capsys):
    result = load("stream.py")["main"](epochs=4, folder=str(tmp_path))
    assert result["accuracy"] > 0.9
    assert result["rows"] == 200 * 512 == len(np.load(tmp_path / "tones.npy"))
    assert result["streamed_megabytes"] == 640
    first, *_, last = result["peak_megabytes"]
    assert last - first < 100
    assert "640 MB went by" in capsys.readouterr().out


def test_language_model():
    result = load("language_model.py")["main"](epochs=1)
    assert result["bits"] < 3.8
    assert result["compiles"]["train"] == 3


def test_torch_loader():
    pytest.importorskip("torch")
    result = load("torch_loader.py")["main"]()
    assert result["accuracy"] > 0.85


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """The names the README's blocks leave behind, and what each of them printed."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names, printed = {"__name__": "readme"}, []
    with contextlib.chdir(tmp_path_factory.mktemp("readme")):
        for number, block in enumerate(blocks):
            # The file name is where the traceback of a failure points to.
            code = compile(block, f"README.md, python block {number}", "exec")
            with contextlib.redirect_stdout(io.StringIO()) as shown:
                exec(code, names)
            printed.append(shown.getvalue())
    return names, printed


def test_readme_prints_what_it_says(readme):
    _, printed = readme
    assert len(printed) == 18
    first_lines = re.search(r"```text\n(.*?)```", README, flags=re.DOTALL)[1]
    assert printed[0].startswith(first_lines)
    assert "Epoch 10/10 · 45 steps" in printed[0]
    assert "zero gradient  none" in printed[1]
    assert "waiting for data  0" in printed[10]
    assert "after step 45: " in printed[11]


def test_readme_ends_with_the_numbers_it_says(readme):
    names, _ = readme
    x, y, ink = names["x"], names["y"], names["ink"]
    assert names["report"].chance_loss == pytest.approx(np.log(10))
    assert names["history"].stop_reason is None
    outputs = names["trainer"].predict(x, verbose=0)
    assert (outputs.shape, outputs.dtype) == ((1797, 10), np.float32)
    assert names["logits"] == pytest.approx(outputs[:5], abs=1e-5)
    # Four epochs with a part held out, resumed from the best; one of all after load.
    assert names["trainer"].step == 4 * 45 + 57
    assert names["restored"].skipped == ("params/Dense_1/bias", "params/Dense_1/kernel")
    assert names["trainer"].evaluate(x, y)["accuracy"] == pytest.approx(
        np.mean(outputs.argmax(-1) == y)
    )
    assert names["loss"] < 1.0
    assert names["tagger"].compiles["train"] == 3
    assert names["outputs"].shape == (1797 - 28 * 64, 10)
    assert names["out"].shape == (1797, 10) and np.all(np.any(names["out"], axis=1))
    assert names["clipped"].step == 57
    hidden = names["sparse"].predict_intermediates(x)["hidden"][0]
    assert hidden.shape == (1797, 32)
    assert list(names["reader"].evaluate(x, {"digit": y, "ink": ink})) == [
        "loss",
        "digit_loss",
        "ink_loss",
        "digit_accuracy",
        "ink_mae",
    ]


def test_try_line_and_test_line_can_be_pasted():
    for name, extra in (("try", "examples"), ("test", "test")):
        lines = re.findall(rf"<!-- {name} line -->\n```sh\n(.*)\n```", README)
        assert len(lines) == 1
        assert lines[0].startswith(
            "python3 -m venv .venv && .venv/bin/pip install -q -e "
            f'".[{extra}]" && .venv/bin/python '
        )


def test_readme_links_exist():
    links = [t for t in re.findall(r"\]\(([^)]*)\)", README) if "://" not in t]
    assert links
    assert all((ROOT / link).exists() for link in links)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    failed, _ = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.ELLIPSIS
    )
    assert failed == 0


def test_public_names_have_examples():
    finder = doctest.DocTestFinder(recurse=False)
    for name in ("Trainer", "Loss", "EarlyStopping", "LambdaCallback"):
        (found,) = finder.find(getattr(flaxfit, name), name)
        assert found.examples, name
