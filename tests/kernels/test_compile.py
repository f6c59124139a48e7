"""Every kernel compiles to machine code for GPUs that are not here, and fits their memory."""

import importlib.util
import os
from importlib import metadata
from pathlib import Path

import pytest

SOAK = os.environ.get("QTX_LAB_SOAK", "0") not in ("", "0")
QUICK = [("90", "bf16")]
CASES = [(c, d) for c in ("80", "90") for d in ("bf16", "fp16", "fp32")] if SOAK else QUICK
SHARED = {"80": 166_912, "90": 232_448}
"""Bytes of shared memory that a program may have, for each compute capability."""
KERNELS = {
    "scan_kernel",
    "prefix_kernel",
    "mean_kernel",
    "split_kernel",
    "merge_kernel",
    "prepare_kernel",
    "scan_sketch_kernel",
    "plan_kernel",
    "locate_sketch_kernel",
    "weigh_kernel",
    "forward_kernel",
    "backward_q_kernel",
    "backward_kv_kernel",
}


@pytest.fixture(scope="module")
def resources():
    """The module in `resources.py`, which is in no package."""
    spec = importlib.util.spec_from_file_location("resources", Path(__file__).with_name("resources.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("capability", "dtype"), CASES)
def test_compiles(resources, capability, dtype, tmp_path):
    """The first block sizes of each kernel; with QTX_LAB_SOAK other head sizes, masks, GPUs and dtypes."""
    kernels = resources.compiled(capability, dtype, ["sizes"] if SOAK else [], tmp_path)
    assert {kernel["kernel"] for kernel in kernels} == KERNELS
    for kernel in kernels:
        decoding = kernel["kernel"] not in ("forward_kernel", "backward_q_kernel", "backward_kv_kernel")
        # The first blocks of queries do not fit wide float32 heads: autotuning leaves them out.
        if decoding or not SOAK:
            assert kernel["shared"] <= SHARED[capability], kernel
        if decoding and not SOAK:
            assert kernel["stack"] == kernel["local"] == 0, f"registers are spilled: {kernel}"
        if dtype != "fp32" and kernel["kernel"] in ("scan_kernel", "forward_kernel"):
            assert kernel["wide_products"], f"no tensor cores: {kernel}"


@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_a_decode_step_needs_what_the_table_says(resources, capability, tmp_path):
    """So that nobody adds a launch, a buffer, registers or spills without noticing."""
    version, lines = resources.read_table()
    if metadata.version("triton") != version:
        pytest.skip(f"the table is of triton {version}, this is {metadata.version('triton')}")
    package = Path(importlib.util.find_spec("triton").origin).parent
    if capability == "100" and not (package / "backends" / "nvidia" / "bin" / "ptxas-blackwell").exists():
        pytest.skip("this triton has no assembler for Blackwell GPUs")
    expected = [line for line in lines if line["capability"] == capability]
    assert resources.decode_resources(capability, tmp_path) == expected, (
        "if the new numbers are meant: python tests/kernels/resources.py"
    )


def test_decode_kernels_spill_nothing(resources):
    _, lines = resources.read_table()
    kernels = [line for line in lines if "kernel" in line]
    assert {line["capability"] for line in kernels} == set(resources.CAPABILITIES)
    assert [line for line in kernels if line["stack"] or line["local"]] == []


def test_a_decode_step_launches_few_kernels(resources):
    """From a sketch three after the scan: the plan, the draws, and what gathers, weighs and combines."""
    _, lines = resources.read_table()
    steps = {(line["capability"], line["step"]): line for line in lines if "step" in line}
    limited = {"exact K, softcap and window", "exact K, lengths", "exact K, served"}
    sketches = {"int4", "rank 16", "int4, softcap", "rank 16, lengths", "rank 16, served"}
    assert {name for _, name in steps} == {"exact K", *limited, "exact, 8 tokens", *sketches}
    for (_, name), step in steps.items():
        if name in sketches:
            after = step["kernels"][step["kernels"].index("scan_sketch_kernel") + 1 :]
            assert after == ["plan_kernel", "locate_sketch_kernel", "weigh_kernel"]
            assert step["torch"] == []
        if name in limited:
            assert step["kernels"] == ["scan_kernel", "prefix_kernel", "mean_kernel"]
        if name == "exact, 8 tokens":
            assert (step["kernels"], step["torch"]) == (["split_kernel", "merge_kernel"], [])
