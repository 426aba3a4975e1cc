"""The floor plan: a room imports from rooms on strictly lower floors only."""

import ast
import inspect
import pickle
import pkgutil
import re
from graphlib import TopologicalSorter
from importlib import import_module
from inspect import ismodule
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest

import flaxfit

ROOT = Path(flaxfit.__file__).parent
# Room -> floor. A room imports from rooms on strictly lower floors; inside a room the
# only rule is: no cycle.
ROOMS = {
    "__init__": 7,
    "__main__": 7,
    "_cli": 7,
    "trainer": 6,
    "_loops": 5,
    "_runs": 4,
    "callbacks": 3,
    "_programs": 3,
    "metrics": 2,
    "losses": 1,
    "optimizers": 1,
    "_models": 1,
    "data": 1,
    "checkpoint": 1,
    "_reporting": 1,
    "_core": 0,
}
# The wings of data/, in the same manner. `__init__` is the face `flaxfit.data`.
WINGS = {
    "__init__": 6,
    "open": 5,
    "adapters": 4,
    "sources": 3,
    "binding": 2,
    "datasets": 1,
    "host": 0,
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def resolve(name: str) -> str:
    """`flaxfit.data` -> `data.__init__`, `flaxfit._core.types` -> `_core.types`."""
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
                found |= modules
                if modules != inner:  # names of the module itself, not only submodules
                    found.add(node.module)
    return {resolve(name) for name in found}


def room_of(name: str) -> str:
    return name.split(".")[0]


def wing_of(name: str) -> str:
    return name.split(".")[1]


def test_every_file_is_in_a_room():
    assert {room_of(name) for name in FILES} == set(ROOMS)
    inside = {name for name in FILES if room_of(name) == "data"}
    assert {wing_of(name) for name in inside} == set(WINGS)


def test_the_root_shows_the_rooms():
    entries = [path for path in ROOT.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 18, sorted(path.name for path in entries)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name):
    own = room_of(name)
    others = {n for n in imported(TREES[name]) if room_of(n) != own}
    if name in ("__init__", "__main__", "_cli"):  # one floor, and no room behind it
        others = {n for n in others if ROOMS[room_of(n)] < 7}
    climbs = {n for n in others if ROOMS[room_of(n)] >= ROOMS[own]}
    assert not climbs, f"{name} (floor {ROOMS[own]}) imports {climbs}"


@pytest.mark.parametrize("name", [n for n in FILES if room_of(n) == "data"])
def test_imports_in_data_go_down(name):
    own = wing_of(name)
    others = {n for n in imported(TREES[name]) if room_of(n) == "data"}
    others = {n for n in others if wing_of(n) != own}
    climbs = {n for n in others if WINGS[wing_of(n)] >= WINGS[own]}
    assert not climbs, f"{name} imports {climbs}"


def test_there_is_no_cycle():
    TopologicalSorter({name: imported(TREES[name]) for name in FILES}).prepare()


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from flaxfit.data import Examples", {"data.__init__"}),
        ("from flaxfit.data import Examples, open", {"data.__init__", "data.open"}),
        ("import flaxfit.data", {"data.__init__"}),
        ("from flaxfit.data.host import arrays", {"data.host.arrays"}),
        ("from flaxfit._core.types import Batch", {"_core.types"}),
        ("from flaxfit import Trainer", {"__init__"}),
    ],
)
def test_imports_are_found(code, found):
    assert imported(ast.parse(code)) == found


# Values that are pickled, and errors: their class names the public path.
VALUES = [
    "flaxfit.Average",
    "flaxfit.Batch",
    "flaxfit.CheckpointCorruptError",
    "flaxfit.CheckpointError",
    "flaxfit.DataError",
    "flaxfit.DetectionError",
    "flaxfit.History",
    "flaxfit.RestoreReport",
    "flaxfit.TrainState",
    "flaxfit.checkpoint.Checkpoint",
    "flaxfit.checkpoint.Snapshot",
]
FACES = ("callbacks", "checkpoint", "data", "losses", "metrics", "optimizers")
PUBLIC = [
    *(f"flaxfit.{name}" for name in flaxfit.__all__),
    *(
        f"flaxfit.{face}.{name}"
        for face in FACES
        for name in import_module(f"flaxfit.{face}").__all__
    ),
]


@pytest.mark.parametrize("name", VALUES)
def test_values_name_the_public_path(name):
    value = pkgutil.resolve_name(name)
    assert f"{value.__module__}.{value.__name__}" == name
    assert pickle.loads(pickle.dumps(value)) is value


def test_pickles_of_values_name_no_private_module():
    values = [
        flaxfit.TrainState(0, {"w": np.ones(2)}, {}, (), None),
        flaxfit.Batch(np.ones(2), np.ones(2), np.ones(2)),
        flaxfit.Average(1.0, 2.0, 0.0, 0.0),
        flaxfit.History(),
        flaxfit.RestoreReport(renamed={}, mismatched={}),
        flaxfit.DataError("a problem"),
        flaxfit.CheckpointCorruptError("a problem", path="a.msgpack"),
    ]
    text = pickle.dumps(values, protocol=0)
    assert b"flaxfit._" not in text
    copies = pickle.loads(text)
    assert [type(copy) for copy in copies] == [type(value) for value in values]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_source_of_public_names_is_found(name):
    value = pkgutil.resolve_name(name)
    if not isinstance(value, type | FunctionType):  # an annotation, such as `Put`
        return
    if value in map(pkgutil.resolve_name, VALUES):  # the public path, or its source
        return
    source = inspect.getsource(value)
    keyword = "class" if isinstance(value, type) else "def"
    assert re.search(rf"^{keyword} {value.__name__}\b", source, re.MULTILINE)
    assert pickle.loads(pickle.dumps(value)) is value


def test_public_faces():
    from flaxfit import (
        callbacks,
        checkpoint,
        data,
        losses,
        metrics,
        optimizers,
        trainer,
    )

    faces = (callbacks, checkpoint, data, losses, metrics, optimizers, trainer)
    for face in faces:
        assert face.__all__ == sorted(face.__all__)
        modules = {name for name, value in vars(face).items() if ismodule(value)}
        public = {name for name in vars(face) if not name.startswith("_")}
        assert public - modules == set(face.__all__), face.__name__


@pytest.mark.parametrize("name", FILES)
def test_only_compile_jits(name):
    used = {
        ast.unparse(n) for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute)
    }
    assert name == "_programs.compile" or not used & {"jax.jit", "jax.pmap", "nn.jit"}


@pytest.mark.parametrize("name", FILES)
def test_only_the_compilation_cache_configures_jax(name):
    used = {
        ast.unparse(n) for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute)
    }
    assert name == "trainer.compilation_cache" or "jax.config.update" not in used


@pytest.mark.parametrize("name", FILES)
def test_no_global_state(name):
    tree = TREES[name]
    assert not any(isinstance(n, ast.Global | ast.Nonlocal) for n in ast.walk(tree))
    mutable = ast.Dict | ast.List | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
    for node in tree.body:
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, mutable):
            # Kinds of data are registered for the whole process.
            allowed = ("__all__", "_REGISTERED: ")
            assert ast.unparse(node).startswith(allowed), ast.unparse(node)


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
         "pyarrow", "narwhals", "datasets", "zarr", "h5py", "PIL"}
print(sorted(heavy & set(sys.modules)))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
