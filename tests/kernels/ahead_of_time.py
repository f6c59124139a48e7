"""Compile every kernel to machine code for a GPU that is not here.

`python ahead_of_time.py 90 bf16 [sizes] [configs]` does it for compute capability 9.0 and bfloat16;
`python ahead_of_time.py 90 bf16 decoding` for the decode steps of the benchmark, at their real sizes.

The launchers run as they are, with tensors on the CPU and a driver that only says which GPU it is; nothing is
executed. Prints one line of JSON a kernel, at its first launch: its name, options, shared memory, registers,
stack and what of it is spilled; of kernels that scan, the instructions of each loop. For decode steps it
prints one line more for each: what is launched, and the bytes of the buffers.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import launches
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import autotuner, driver, jit

ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided")
"""Operations of torch that make a buffer and launch nothing."""


class Driver:
    """The driver of a GPU that is not here."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def map_python_to_cpp_type(self, ty):
        return ty


class Counted(TorchDispatchMode):
    """Counts what a call launches: kernels by name, and operations of torch that are no views."""

    def __init__(self):
        super().__init__()
        self.kernels, self.torch, self.buffer_bytes = [], [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.name().removeprefix("aten::").partition(".")[0]
        if name in ALLOCATIONS:
            self.buffer_bytes += result.nbytes
        elif not operation.is_view:
            self.torch.append(name)
        return result


def main(capability, dtype, words):
    assert CUDABackend.supports_target(GPUTarget("cuda", capability, 32))
    driver.set_active(Driver(capability))
    run = jit.JITFunction.run
    seen, counted = set(), []

    def compile_only(self, *args, grid, warmup, **kwargs):
        for count in counted:
            count.kernels.append(self.__name__)
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            print(json.dumps(describe(self.__name__, compiled)), flush=True)

    def each_config(self, *args, **kwargs):
        for config in self.configs if "configs" in words else self.configs[:1]:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    jit.JITFunction.run = compile_only
    autotuner.Autotuner.run = each_config
    with torch.no_grad():
        if "decoding" not in words:
            launches.launch_all(dtype, "sizes" in words)
            return
        for name, step in launches.decode_steps(dtype).items():
            with Counted() as count:
                counted.append(count)
                step()
                counted.remove(count)
            step_facts = {"kernels": count.kernels, "torch": count.torch, "buffer_bytes": count.buffer_bytes}
            print(json.dumps({"step": name, **step_facts}), flush=True)


def describe(name, compiled):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

        def dump(option):
            return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout

        usage = dump("-res-usage")
        loops = {"loops": loop_lengths(dump("-sass"))} if name.startswith("scan") else {}
    resources = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    meta = compiled.metadata
    return {
        "kernel": name,
        "warps": meta.num_warps,
        "stages": meta.num_stages,
        "shared": meta.shared,
        "wide_products": len(re.findall(r"\b(?:mma|wgmma)\b", compiled.asm["ptx"])),
        **resources,
        **loops,
    }


def loop_lengths(code):
    """The instructions of each loop of a kernel, from its listing."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", code)
    jumps = [(int(at, 16), re.search(r"BRA.*?0x([0-9a-f]+)", what)) for at, what in lines]
    places = [int(at, 16) for at, _ in lines]
    backward = [(int(jump[1], 16), at) for at, jump in jumps if jump and int(jump[1], 16) < at]
    return [sum(first <= place <= last for place in places) for first, last in backward]


if __name__ == "__main__":
    main(
        int(sys.argv[1]),
        {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[sys.argv[2]],
        sys.argv[3:],
    )
