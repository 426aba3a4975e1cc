"""The floor plan: a module imports from strictly lower floors only."""

import ast
from pathlib import Path

import pytest

import flaxfit

ROOT = Path(flaxfit.__file__).parent
FLOORS = {
    "__init__": 7,
    "trainer": 6,
    "__main__": 8,
    "_inspect": 5,
    "_run": 5.1,
    "_resume": 4,
    "_recorder": 4.1,
    "_intervals": 1,
    "_counts": 1,
    "_saving": 3.5,
    "_run_folder": 3.5,
    "_check": 5.2,
    "_builder": 5.1,
    "_runs": 5.2,
    "_keeper": 5.2,
    "_reader": 5.3,
    "_build": 5,
    "_forms": 1.5,
    "_loop": 5,
    "_watch": 4.9,
    "_plan": 4.8,
    "_eval_loop": 4.8,
    "_readings": 4.5,
    "_predict": 5.05,
    "_outputs": 5.1,
    "_compile_report": 5,
    "_compilation_cache": 4,
    "_feed": 4,
    "_position": 2.1,
    "_pictures": 2.1,
    "_packing": 3,
    "_pace": 2,
    "_timing": 2.1,
    "_sharding": 2,
    "_segments": 1.5,
    "data.prefetch": 2,
    "_arguments": 4,
    "_compile": 4,
    "callbacks.__init__": 4.5,
    "callbacks.early_stopping": 4,
    "callbacks.model_checkpoint": 4.2,
    "callbacks.monitor": 3,
    "callbacks.lambda_callback": 4,
    "_steps": 3,
    "_meta": 3,
    "checkpoint": 3,
    "callbacks.base": 3,
    "_models.__init__": 2.2,
    "_models.linen": 2.1,
    "_models.linen_flag": 2.05,
    "_models.linen_summary": 2,
    "_models.base": 2,
    "data.__init__": 2.4,
    "data.dispatch": 2.3,
    "data.kinds": 2.29,
    "data.whole": 2.27,
    "data.stream_source": 2.25,
    "data.examples": 2.27,
    "data.image_folder": 2.28,
    "data.sliced": 2.26,
    "data.files": 2,
    "data.batches": 2.26,
    "data.padding": 2.15,
    "data.padding_arguments": 2.2,
    "data.parts": 2.12,
    "data.example_set": 2.25,
    "data.example_stream": 2.26,
    "data.tfds": 2.28,
    "data.tfds_builders": 2.1,
    "data.arrays": 2.2,
    "data.iterables": 2.2,
    "data.weights": 2.1,
    "data.checks": 2.1,
    "data.collate": 2.1,
    "data.batch": 2.1,
    "data.table_batch": 2.15,
    "data.tables": 2,
    "data.columns": 1.4,
    "data.workers": 2.1,
    "data.processes": 2,
    "data.grain": 2.27,
    "data.order": 2,
    "data.recipe": 2.1,
    "data.stream": 1.5,
    "data.tensors": 1.6,
    "data.hugging_face": 2.27,
    "data.torch": 2.27,
    "data.tf_data": 2.27,
    "data.source": 2,
    "metrics": 2.5,
    "_named_metrics": 2.4,
    "_foreign_metrics": 2.4,
    "_confusion": 2,
    "_objective": 2.3,
    "_loss_pairing": 2.25,
    "_target_checks": 2.2,
    "losses": 2.1,
    "_loss_names": 2,
    "optimizers": 2.1,
    "_transforms": 2,
    "_restore": 2.5,
    "_format": 2.4,
    "_damage": 2.35,
    "_msgpack": 2.3,
    "_codec": 2,
    "_disk": 1,
    "_sown": 2,
    "_display": 2,
    "_interrupt": 2,
    "history": 2.2,
    "_types": 1,
    "_errors": 0,
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def resolve(name: str) -> str:
    """`flaxfit.data` -> `data.__init__`, `flaxfit._types` -> `_types`."""
    name = name.removeprefix("flaxfit").removeprefix(".")
    if not name:
        return "__init__"
    return name if name in FILES else f"{name}.__init__"


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("flaxfit")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if (node.module or "").split(".")[0] == "flaxfit":
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                modules = {name for name in inner if resolve(name) in FILES}
                found |= modules if modules == inner else {node.module}
    return {resolve(name) for name in found}


def test_every_file_has_a_floor():
    assert set(FILES) == set(FLOORS)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name):
    climbs = {n for n in imported(TREES[name]) if FLOORS[n] >= FLOORS[name]}
    assert not climbs, f"{name} (floor {FLOORS[name]}) imports {climbs}"


@pytest.mark.parametrize("name", FILES)
def test_only_compile_jits(name):
    used = {
        ast.unparse(n) for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute)
    }
    assert name == "_compile" or not used & {"jax.jit", "jax.pmap", "nn.jit"}


@pytest.mark.parametrize("name", FILES)
def test_only_the_compilation_cache_configures_jax(name):
    used = {
        ast.unparse(n) for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute)
    }
    assert name == "_compilation_cache" or "jax.config.update" not in used


@pytest.mark.parametrize("name", FILES)
def test_no_global_state(name):
    tree = TREES[name]
    assert not any(isinstance(n, ast.Global | ast.Nonlocal) for n in ast.walk(tree))
    mutable = ast.Dict | ast.List | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
    for node in tree.body:
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, mutable):
            assert ast.unparse(node).startswith("__all__"), ast.unparse(node)


@pytest.mark.parametrize("name", FILES)
def test_only_the_models_know_flax_modules(name):
    names = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    known = {n for n in names if n and n.startswith(("flax.linen", "flax.nnx"))}
    assert not known or name.startswith("_models."), known


def test_all_equals_the_public_names():
    public = {name for name in vars(flaxfit) if not name.startswith("_")}
    submodules = {name.split(".")[0] for name in FILES}
    assert sorted(public - submodules) == flaxfit.__all__
    assert sorted(flaxfit.__all__) == flaxfit.__all__


def test_public_names():
    assert flaxfit.__all__ == [
        "Average",
        "Batch",
        "Callback",
        "CheckpointCorruptError",
        "CheckpointError",
        "DataError",
        "DetectionError",
        "EarlyStopping",
        "History",
        "LambdaCallback",
        "LoopState",
        "Loss",
        "Model",
        "ModelCheckpoint",
        "RestoreReport",
        "Task",
        "TrainState",
        "Trainer",
        "load_params",
        "make_train_step",
    ]


def test_nothing_optional_is_imported():
    import subprocess
    import sys

    code = (
        "import sys, flaxfit; "
        "heavy = {'tensorflow', 'tensorflow_datasets', 'torch', 'grain', 'pandas', "
        "'matplotlib', 'clu', 'metrax', 'IPython', 'flax.nnx', 'orbax'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_importing_brings_next_to_nothing_beyond_jax_flax_and_optax():
    """What `import flaxfit` costs over them is its own files, by count."""
    import subprocess
    import sys

    code = (
        "import sys, jax, flax, optax; before = set(sys.modules); import flaxfit; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - {'flaxfit'} - sys.stdlib_module_names))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_a_fit_imports_no_package_of_data_that_it_is_not_given():
    """Whatever is asked of a dataset to find out what it is."""
    import subprocess
    import sys

    code = """
import sys
import flax.linen as nn
import numpy as np
from flaxfit import Trainer
from flaxfit.data import Examples
x, y = np.ones((8, 3), np.float32), np.arange(8) % 2
batches = [(x[:4], y[:4]), (x[4:], y[4:])]
trainer = Trainer(nn.Dense(2))
for data in (
    (x, y), batches, lambda: iter(batches), iter(batches), list(zip(x, y)),
    Examples((x, y), threads=1),
):
    trainer.fit(data, verbose=0)
trainer.evaluate(batches, verbose=0), trainer.predict(batches, verbose=0)
heavy = {"tensorflow", "tensorflow_datasets", "torch", "grain", "pandas", "polars",
         "pyarrow", "datasets", "zarr", "h5py", "PIL"}
print(sorted(heavy & set(sys.modules)))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
