"""Notebook 05 runs where there is no GPU, shows the committed table if there is one, and says what ran."""

import pytest

from qtx_lab.experiments.notebooks import notebooks_folder, run_notebook

pytestmark = pytest.mark.notebooks


def test_the_notebook_runs_and_says_what_ran(tmp_path):
    parameters = {"keys": 1024, "draw_counts": [16, 256], "repeats": 4}
    run = run_notebook("05_gpu_kernels", parameters, home=tmp_path, progress=False)
    results = run.manifest["results"]
    assert run.status == "done"
    assert results["committed_table"] == (notebooks_folder() / "results" / "gpu_kernels.json").exists()
    assert results["path"] in ("triton", "reference")
    assert "draws of the kernel" in results["summary"][-1]
