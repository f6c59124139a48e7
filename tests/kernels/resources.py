"""What the kernels of a decode step need on each GPU.

`python tests/kernels/resources.py` writes the table resources.jsonl. It has, for the decode steps of the
benchmark at their real sizes (`launches.decode_steps`), what is launched and the bytes of the buffers between
kernels, and for each compute capability the registers, shared memory, stack and spills of each kernel with
its first block sizes. `test_compile.py` compares with it.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOM = Path(__file__).parent
TABLE = ROOM / "resources.jsonl"
CAPABILITIES = ("80", "90", "100")


def compiled(capability, dtype, words, cache_folder):
    """What `ahead_of_time.py` prints, a mapping a line."""
    command = [sys.executable, ROOM / "ahead_of_time.py", capability, dtype, *words]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache_folder), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-5000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def decode_resources(capability, cache_folder):
    """The lines of the table for one compute capability."""
    return [
        {"capability": capability, **line}
        for line in compiled(capability, "bf16", ["decoding"], cache_folder)
    ]


def read_table():
    """The version of triton that the table is of, and its lines."""
    first, *lines = map(json.loads, TABLE.read_text().splitlines())
    return first["triton"], lines


def main():
    with tempfile.TemporaryDirectory() as folder:
        resources = [line for capability in CAPABILITIES for line in decode_resources(capability, folder)]
    lines = [{"triton": metadata.version("triton")}, *resources]
    TABLE.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
