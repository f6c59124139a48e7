"""The tests of this folder in a process of their own, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_kernels_in_the_interpreter():
    """Something else in this process has loaded triton to compile, after which no interpreter can be had."""
    room = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        room,
        "-q",
        "-p",
        "no:cacheprovider",
        "--deselect",
        room / "test_compile.py",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=room.parents[1], env=environment, capture_output=True, text=True)
    if process.returncode:
        pytest.fail(process.stdout[-20_000:] + process.stderr[-2000:], pytrace=False)
