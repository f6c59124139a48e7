"""Compile every kernel to machine code for a GPU that is not here.

`python ahead_of_time.py 90 bf16 [sizes] [configs]` does it for compute capability 9.0 and bfloat16.

The launchers run as they are, with tensors on the CPU and a driver that only says which GPU it is; nothing is
executed. Prints one line of JSON a kernel: its name, options, shared memory, registers, stack and what of it
is spilled.
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
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import autotuner, driver, jit


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


def main(capability, dtype, every, configs=False):
    assert CUDABackend.supports_target(GPUTarget("cuda", capability, 32))
    driver.set_active(Driver(capability))
    run = jit.JITFunction.run
    seen = set()

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            print(json.dumps(describe(self.__name__, compiled)), flush=True)

    def each_config(self, *args, **kwargs):
        for config in self.configs if configs else self.configs[:1]:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    jit.JITFunction.run = compile_only
    autotuner.Autotuner.run = each_config
    with torch.no_grad():
        launches.launch_all(dtype, every)


def describe(name, compiled):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    resources = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    meta = compiled.metadata
    return {
        "kernel": name,
        "warps": meta.num_warps,
        "stages": meta.num_stages,
        "shared": meta.shared,
        "wide_products": len(re.findall(r"\b(?:mma|wgmma)\b", compiled.asm["ptx"])),
        **resources,
    }


if __name__ == "__main__":
    main(
        int(sys.argv[1]),
        {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[sys.argv[2]],
        "sizes" in sys.argv[3:],
        "configs" in sys.argv[3:],
    )
