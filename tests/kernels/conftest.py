"""Kernels run natively where CUDA is, and elsewhere in Triton's interpreter.

The interpreter has to be chosen before triton is loaded.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qtx_lab.streams import Stream

CUDA = torch.cuda.is_available()
ROOM = Path(__file__).parent

if not CUDA and "triton" not in sys.modules:
    given = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    if given is None:  # processes that are started later choose for themselves
        del os.environ["TRITON_INTERPRET"]
        triton.knobs.runtime.interpret = True

collect_ignore = ["ahead_of_time.py", "launches.py", "resources.py"]
if CUDA:
    collect_ignore += ["test_elsewhere.py"]
else:
    from qtx_lab.kernels.philox import INTERPRETED

    # If something else has loaded triton to compile, these tests run in a process of their own.
    collect_ignore += (
        ["test_elsewhere.py"]
        if INTERPRETED
        else [
            path.name
            for path in ROOM.glob("test_*.py")
            if path.name not in ("test_compile.py", "test_elsewhere.py", "test_notebook.py")
        ]
    )


def pytest_collection_modifyitems(items):
    """Mark all tests of this folder as tests of the GPU, where there is one."""
    if CUDA:
        for item in items:
            if ROOM in item.path.parents:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    """The device on which the kernels run."""
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(scope="session", autouse=True)
def few_block_sizes():
    """On a GPU compare only two choices of block sizes for each kernel; results do not depend on them."""
    if CUDA:
        from triton.runtime.autotuner import Autotuner

        from qtx_lab.kernels.decode import triton as decode
        from qtx_lab.kernels.exact_decode import triton as exact_decode
        from qtx_lab.kernels.prefill import triton as prefill
        from qtx_lab.kernels.sketch_decode import triton_plan, triton_scan, triton_weigh

        for module in (decode, exact_decode, prefill, triton_plan, triton_scan, triton_weigh):
            for kernel in vars(module).values():
                if isinstance(kernel, Autotuner):
                    kernel.configs = [kernel.configs[0], kernel.configs[-1]]


@pytest.fixture
def compare_draws(device):
    """Assert that draws are the reference's, and return in which rows all of them are.

    A GPU rounds exp2 in another way, so there a few may differ.
    """

    def compare(indices, expected):
        equal = indices == expected
        if device.type == "cpu":
            assert bool(equal.all())
        assert float(equal.float().mean()) > 0.97
        return equal.all(-1)

    return compare


@pytest.fixture
def stream_of():
    """Make the stream of a seed for the heads and positions of `Inputs`."""

    def make(x, seed):
        batch, groups = x.k.shape[:2]
        return Stream.of(torch.as_tensor(seed, device=x.q.device), batch, groups, x.length)

    return make


@pytest.fixture
def paged(generator):
    """Put the tokens of inputs into shuffled blocks, some of them unused; NaN is behind each last token."""

    def put(x, block_size):
        heads, n = x.k.shape[1:3]
        batch, columns = x.q.shape[0] // heads, -(-n // block_size)
        table = torch.randperm(batch * columns + 3, generator=generator)[: batch * columns]
        table = table.view(batch, columns)

        def blocks(y):
            pages = torch.full((batch * columns + 3, heads, block_size, y.shape[-1]), torch.nan)
            full = F.pad(y.float().cpu(), (0, 0, 0, columns * block_size - n), value=torch.nan)
            pages[table] = full.unflatten(2, (columns, block_size)).transpose(1, 2)
            return pages.to(y.dtype).to(y.device)

        lengths = torch.full((batch,), n) if x.lengths is None else x.lengths
        device = x.q.device
        return replace(
            x,
            k=blocks(x.k),
            v=blocks(x.v),
            block_table=table.to(device, torch.int32),
            lengths=lengths.to(device),
        )

    return put


@pytest.fixture
def kernels(monkeypatch):
    """Have the kernels run, whatever the device."""
    monkeypatch.setenv("QTX_LAB_KERNELS", "triton")


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Fill every buffer of a launch with NaN or a wrong number: it shows what a kernel does not write."""
    fresh = torch.Tensor.new_empty

    def new_empty(self, *args, **options):
        out = fresh(self, *args, **options)
        return out.fill_(torch.nan if out.is_floating_point() else 77) if out.dtype.itemsize > 1 else out

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
