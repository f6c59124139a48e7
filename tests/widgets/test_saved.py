"""Results of the workbench on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qtx_lab.errors import StorageError
from qtx_lab.widgets.workbench.saved import read_result, write_result


def test_inputs_are_written_once_until_they_change(tmp_path: Path) -> None:
    path = tmp_path / "results" / "sample.npz"
    inputs = {name: np.full((2, 3), i, np.float32) for i, name in enumerate("qkv")}

    def written(result: dict) -> dict[str, int]:
        write_result(path, result, {"sampler": {"num_samples": 8}})
        return {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir()}

    first = written({**inputs, "error": 0.5, "output": np.zeros(3)})
    again = written({**inputs, "error": 0.25, "output": np.ones(3)})
    assert len(again) == 2
    (name,) = set(first) - {path.name}
    assert again[name] == first[name]
    result, forms = read_result(path)
    assert forms == {"sampler": {"num_samples": 8}}
    assert result["error"] == 0.25
    assert set(result) == {"q", "k", "v", "error", "output"}
    np.testing.assert_array_equal(result["v"], inputs["v"])
    changed = written({**inputs, "v": np.ones((2, 3), np.float32), "error": 0.25})
    assert len(changed) == 2
    assert name not in changed
    np.testing.assert_array_equal(read_result(path)[0]["v"], np.ones((2, 3)))
    next(file for file in path.parent.iterdir() if "-inputs-" in file.name).unlink()
    with pytest.raises(StorageError, match="sample"):
        read_result(path)
