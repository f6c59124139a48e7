"""Kernels run natively where CUDA is, and in Triton's interpreter elsewhere, which must be set before triton is loaded."""

import os
import sys
from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.is_available()
ROOM = Path(__file__).parent

if not CUDA and "triton" not in sys.modules:
    given = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    if given is None:  # processes that are started later are none of this
        del os.environ["TRITON_INTERPRET"]
        triton.knobs.runtime.interpret = True

collect_ignore = ["ahead_of_time.py", "launches.py"]
if CUDA:
    collect_ignore += ["test_elsewhere.py"]
else:
    from qtx_lab.kernels.philox import INTERPRETED

    # Where something else has loaded triton to compile, these tests run in a process of their own.
    collect_ignore += (
        ["test_elsewhere.py"]
        if INTERPRETED
        else [
            path.name
            for path in ROOM.glob("test_*.py")
            if path.name not in ("test_elsewhere.py", "test_compile.py")
        ]
    )


def pytest_collection_modifyitems(items):
    """On a GPU everything here is a test of it."""
    if CUDA:
        for item in items:
            if ROOM in item.path.parents:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    """Where the kernels run."""
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(scope="session", autouse=True)
def hardly_tuned():
    """On a GPU the first choice of each kernel's blocks, or the last where that does not fit: numbers hang on neither."""
    if CUDA:
        from triton.runtime.autotuner import Autotuner

        from qtx_lab.kernels.decode import triton as decode
        from qtx_lab.kernels.prefill import triton as prefill
        from qtx_lab.kernels.sketch_decode import triton as sketch_decode

        for module in (decode, prefill, sketch_decode):
            for kernel in vars(module).values():
                if isinstance(kernel, Autotuner):
                    kernel.configs = [kernel.configs[0], kernel.configs[-1]]


@pytest.fixture
def rows_alike(device):
    """Asserts that draws are the reference's, on a GPU but for a few, as it rounds exp2 otherwise, and says in which rows all are."""

    def check(found, wanted):
        same = found == wanted
        if device.type == "cpu":
            assert bool(same.all())
        assert float(same.float().mean()) > 0.97
        return same.all(-1)

    return check


@pytest.fixture
def kernels(monkeypatch):
    """Kernels whatever the device."""
    monkeypatch.setenv("QTX_LAB_KERNELS", "triton")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every buffer of every launch starts as NaN or as nonsense: what is not written shows."""
    fresh = torch.Tensor.new_empty

    def new_empty(self, *args, **options):
        out = fresh(self, *args, **options)
        return out.fill_(torch.nan if out.is_floating_point() else 77) if out.dtype.itemsize > 1 else out

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
