"""The tests of this folder in processes of their own, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOM = Path(__file__).parent
NEEDS_NO_INTERPRETER = ("test_compile.py", "test_elsewhere.py", "test_notebook.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted({path.name for path in ROOM.glob("test_*.py")} - set(NEEDS_NO_INTERPRETER))
)
def test_the_kernels_in_the_interpreter(name):
    """Something else in this process has loaded triton to compile, after which no interpreter can be had.

    Each file is a test, so that it has the time of one on a busy machine, and is named where it fails.
    """
    command = [sys.executable, "-m", "pytest", ROOM / name, "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOM.parents[1], env=environment, capture_output=True, text=True)
    if process.returncode:
        pytest.fail(process.stdout[-20_000:] + process.stderr[-2000:], pytrace=False)
