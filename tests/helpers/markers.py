"""Marks tests by what they use: a trainer, processes, optional libraries, devices.

Read from the source: the test, the fixtures it takes, and the functions of its module
that these call. Tables of functions are not followed; there, the name of the row says
which library it needs, as in `test_batches[torch DataLoader]`.
"""

import ast
from functools import cache

# A package that `pytest.importorskip` is asked for -> markers.
LIBRARIES = {
    "torch": ("torch", "optional"),
    "torchdata": ("torch", "optional"),
    "grain": ("grain", "optional"),
    "tensorflow": ("tensorflow", "optional"),
    "datasets": ("hugging_face", "optional"),
    "tensorflow_datasets": (),  # required
    "PIL": (),
}
# The first words of a row in a table of tests -> the package it needs.
ROWS = {
    "torch": "torch",
    "grain": "grain",
    "hugging": "datasets",
    "tf.data": "tensorflow",
    "tensorflow": "tensorflow",
    "pandas": "pandas",
    "polars": "polars",
    "pyarrow": "pyarrow",
    "zarr": "zarr",
    "h5py": "h5py",
}
_TRAINERS = {"Trainer", "runpy", "exec"}  # examples and the README train too
_PROCESSES = {"subprocess", "multiprocessing", "processes"}
_DEVICES = {"eight_devices", "devices"}


@cache
def uses(source):
    """Returns function -> the names it reaches, `"import torch"` for a library.

    The entry `""` is of the module: libraries without which all of it is skipped.
    """
    body = ast.parse(source).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    direct = {node.name: _names(node) for node in body if isinstance(node, kinds)}
    rest = set().union(*(_names(n) for n in body if not isinstance(n, kinds)))
    reached = {"": {name for name in rest if name.startswith("import ")}}
    for name in direct:
        found, ahead = set(), [name]
        while ahead:
            names = direct.get(ahead.pop(), set()) - found
            found |= names
            ahead += names
        reached[name] = found
    return reached


def _names(node):
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            found.add(child.id)
        elif isinstance(child, ast.arg | ast.keyword):
            found.add(child.arg or "")
        elif isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.Call):
            function = getattr(child.func, "attr", getattr(child.func, "id", ""))
            if function == "importorskip" and isinstance(child.args[0], ast.Constant):
                found.add(f"import {child.args[0].value.split('.')[0]}")
    return found


def markers_of(source, function, row="", given=()):
    """Returns the markers of a test.

    Args:
      source: the source of its module.
      function: its name.
      row: the id of its parameters, as in `[row]`.
      given: the names of the markers it has in its source.
    """
    reached = uses(source)
    names = reached[""] | reached.get(function, set())
    packages = {name.removeprefix("import ") for name in names if "import " in name}
    packages |= {ROWS[word] for word in row.lower().split("-") if word in ROWS}
    first = row.lower().split(" ")[0].split("-")[0]
    packages |= {ROWS[first]} if first in ROWS else set()
    found = set(given)
    for package in packages:
        found |= set(LIBRARIES.get(package, ("optional",)))
    if names & _TRAINERS:
        found.add("trains")
    if names & _PROCESSES or "processes" in row:
        found.add("process")
    if names & _DEVICES:
        found.add("multi_device")
    if not found & {"trains", "process", "slow"}:
        found.add("quick")
    return found
