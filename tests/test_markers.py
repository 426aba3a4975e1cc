"""The markers that tests get by what they use."""

import pytest
from helpers.markers import markers_of

MODULE = """
import subprocess
import pytest
from flaxfit import Trainer

zarr = None

@pytest.fixture
def fitted():
    return Trainer(None).fit()

def make_torch():
    return pytest.importorskip("torch.utils.data")

def chain():
    return make_torch()

def test_plain(tmp_path): ...
def test_fit(fitted): ...
def test_torch(): chain()
def test_run(): subprocess.run(["true"])
def test_workers(): load(processes=2)
def test_devices(eight_devices): ...
def test_rows(name): ...
"""


@pytest.mark.parametrize(
    ("function", "row", "expected"),
    [
        ("test_plain", "", {"quick"}),
        ("test_fit", "", {"trains"}),
        ("test_torch", "", {"torch", "optional", "quick"}),
        ("test_run", "", {"process"}),
        ("test_workers", "", {"process"}),
        ("test_devices", "", {"multi_device", "quick"}),
        ("test_rows", "Grain DataLoader", {"grain", "optional", "quick"}),
        ("test_rows", "{'processes': 2}", {"process"}),
        ("test_rows", "pandas-dict", {"optional", "quick"}),
        ("test_rows", "list of batches", {"quick"}),
    ],
)
def test_markers(function, row, expected):
    assert markers_of(MODULE, function, row) == expected


def test_a_module_that_is_skipped_without_a_library():
    source = 'import pytest\ntorch = pytest.importorskip("torch")\ndef test_a(): ...'
    assert markers_of(source, "test_a") == {"torch", "optional", "quick"}


@pytest.mark.parametrize("name", ["slow", "process"])
def test_what_is_marked_is_not_quick(name):
    assert markers_of(MODULE, "test_plain", given={name}) == {name}


def test_this_test_is_quick(request):
    assert "quick" in {marker.name for marker in request.node.iter_markers()}
