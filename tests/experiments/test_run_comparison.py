"""Two runs are compared by spec, code, environment, inputs and metrics, and exactly what differs is named."""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner

import qtx_lab
from qtx_lab.cli import main
from qtx_lab.experiments import provenance
from qtx_lab.experiments.run_comparison import Difference, compare_runs, environment_of
from qtx_lab.experiments.runs import Run, runs
from qtx_lab.specs import ExperimentSpec, NotebookSpec

PACKAGE = Path(qtx_lab.__file__).parent


def finished(home: Path, line: str, **parameters: object) -> Run:
    """A run of a notebook of two cells, as papermill leaves it."""
    with Run.create(NotebookSpec(notebook="n", parameters=parameters), "trial", home) as run:
        cells = [nbformat.v4.new_code_cell(text) for text in ("n = 1", "# injected", f"a = 1\n{line}\nb = 2")]
        cells[0].metadata["tags"], cells[1].metadata["tags"] = ["parameters"], ["injected-parameters"]
        cells[1].source = f"# {parameters}"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), run.path / "n.ipynb")
        run.update(results={"error": 0.5, "slopes": {"a": 1.0}, "summary": ["In 3 s."]})
        run.log_many({"step": i, "loss": i / 7, "half_width": 0.1} for i in range(3))
    return run


def test_one_line_one_package_and_one_parameter_are_named_and_nothing_else(tmp_path, monkeypatch) -> None:
    one = finished(tmp_path, "c = 3", n=1, text="a")
    versions = {**provenance.distributions(), "numpy": "0.9"}
    monkeypatch.setattr(provenance, "distributions", lambda: versions)
    two = finished(tmp_path, "c = 4", n=2, text="a")
    comparison = compare_runs(one, two)
    assert comparison.spec == (Difference("n", 1, 2),)
    assert [(part.file, part.lines) for part in comparison.code] == [("n.ipynb", ("-c = 3", "+c = 4"))]
    assert [difference.name for difference in comparison.environment] == ["numpy"]
    assert comparison.environment[0].b == "0.9"
    assert comparison.inputs == comparison.metrics == ()
    assert comparison.compared == 2 + 9
    assert comparison.reproduced
    assert not comparison.same_setup
    again = compare_runs(one.path.name, one, tmp_path)
    assert again.same_setup
    assert again.reproduced
    shown = CliRunner().invoke(main, ["diff", one.path.name, two.path.name, "--home", str(tmp_path)]).output
    for line in ("  n: 1 → 2", "  -c = 3", "  +c = 4", "inputs: the same", "the same, bit for bit"):
        assert f"{line}\n" in shown
    as_json = ["diff", one.path.name, two.path.name, "--json", "--home", str(tmp_path)]
    assert json.loads(CliRunner().invoke(main, as_json).output)["spec"][0]["name"] == "n"


def test_a_line_of_the_package_is_named_by_commit_and_patch(tmp_path) -> None:
    one, two = finished(tmp_path, "c = 3"), finished(tmp_path, "c = 3")
    assert compare_runs(one, two).code == ()
    two.update(code={"package": "0" * 64})
    commit = provenance.commit()
    if commit is None:  # not a checkout
        assert "not known" in compare_runs(one, two).code[0].lines[0]
        return
    one_patch = one.path / "code.patch"
    (two.path / "code.patch").write_bytes(one_patch.read_bytes() if one_patch.exists() else b"")
    assert compare_runs(one, two).code == ()  # another hash alone names no line
    path = PACKAGE / "specs" / "sweep.py"
    if provenance.uncommitted() and path.name in provenance.uncommitted().decode():
        pytest.skip("this file is being worked on")
    old = path.read_text().splitlines(keepends=True)
    new = [line.replace("le=65_536", "le=65_537") for line in old]
    patch = "".join(
        difflib.unified_diff(old, new, f"a/qtx_lab/specs/{path.name}", f"b/qtx_lab/specs/{path.name}")
    )
    with (two.path / "code.patch").open("a") as file:
        file.write(patch)
    (difference,) = compare_runs(one, two).code
    assert difference.file == f"qtx_lab/specs/{path.name}"
    assert [line[0] for line in difference.lines] == ["-", "+"]
    assert "le=65_536" in difference.lines[0]
    assert "le=65_537" in difference.lines[1]


def test_what_is_not_committed_is_a_patch_that_git_applies() -> None:
    commit = provenance.commit()
    if commit is None:
        assert provenance.uncommitted() is None
        return
    patch = provenance.uncommitted()
    assert patch is not None
    assert bool(patch.strip()) == commit["dirty"]
    assert provenance.code_difference((commit["commit"], patch), (commit["commit"], patch)) == ""


def test_metrics_are_compared_by_what_they_are_declared_to_be(tmp_path) -> None:
    one, two = finished(tmp_path, "c = 3"), finished(tmp_path, "c = 3")
    rows = [{"step": i, "loss": i / 7 + (0.14 if i == 2 else 0), "half_width": 0.1} for i in range(3)]
    (two.path / "metrics.parquet").unlink()
    two.log_many(rows)
    two.update(results={"error": 0.5 + 2**-53, "speed": 7.0})
    one.update(results={"speed": 5.0})
    differences = {difference.name: difference for difference in compare_runs(one, two).metrics}
    assert set(differences) == {"loss", "results.speed", "results.error"}  # the last bit of a number counts
    difference = differences["loss"]
    assert (difference.row, difference.within, difference.half_width) == (2, False, None)
    two.declare("speed", unit="tokens/s", timing=True)
    two.declare("loss", half_width="half_width")
    comparison = compare_runs(one, two)
    (loss,) = [difference for difference in comparison.metrics if difference.name == "loss"]
    assert loss.within
    assert loss.half_width == pytest.approx(0.1 * 2**0.5)
    assert comparison.not_compared == ("speed",)
    assert "speed tell time" in str(comparison)
    rows[2]["loss"] += 0.01
    (two.path / "metrics.parquet").unlink()
    two.log_many([*rows])
    assert not compare_runs(one, two).reproduced
    two.log(step=3)
    (step,) = [difference for difference in compare_runs(one, two).metrics if difference.name == "step"]
    assert (step.a, step.b) == ("3 values", "4 values")


@pytest.mark.parametrize("status", ["failed", "interrupted", "cancelled", "running"])
def test_runs_that_ended_in_other_ways_are_not_the_same(tmp_path, status) -> None:
    """Also where all that was measured until then is equal; two that are running have no end to compare."""
    one, two = finished(tmp_path, "c = 3"), finished(tmp_path, "c = 3")
    two.update(status=status)
    comparison = compare_runs(one, two)
    assert (comparison.status_a, comparison.status_b) == ("done", status)
    assert comparison.metrics == ()
    assert not comparison.reproduced
    shown = CliRunner().invoke(main, ["diff", str(one.path), str(two.path)]).output
    assert shown.splitlines()[:2] == [f"a: {one.path.name} (done)", f"b: {two.path.name} ({status})"]
    assert compare_runs(two, two).reproduced == (status != "running")


def test_texts_lists_tables_and_long_integers_are_compared(tmp_path) -> None:
    one, two = finished(tmp_path, "c = 3"), finished(tmp_path, "c = 3")
    same = {"list": [1, math.nan, "x"], "whole": 2**60, "nothing": None, "zero": 0.0}
    same["table"] = [{"sampler": "a", "error": 0.1, "speed": 1.0}, {"sampler": "b", "error": 0.2}]
    for run, long in ((one, 2**53 + 1), (two, 2**53 + 1)):
        run.update(results={**same, "pick": "head-tail"})
        (run.path / "metrics.parquet").unlink()
        run.log_many([{"count": long, "name": "x", "good": True}, {"count": 1, "name": None, "good": False}])
    comparison = compare_runs(one, two)
    assert comparison.metrics == ()
    assert "the same, bit for bit" in str(comparison)
    two.update(results={"list": [1, math.nan, "y"], "whole": 2**60 + 1, "pick": "sobol", "zero": -0.0})
    two.update(
        results={"table": [{"sampler": "a", "error": 0.1, "speed": 9.0}, {"sampler": "c", "error": 0.2}]}
    )
    two.update(results={"summary": ["In 4 s."]})
    two.declare("speed", timing=True)
    (two.path / "metrics.parquet").unlink()
    two.log_many([{"count": 2**53, "name": "x", "good": True}, {"count": 1, "name": "y", "good": False}])
    differences = {
        difference.name: (difference.row, difference.a, difference.b)
        for difference in compare_runs(one, two).metrics
    }
    assert differences.pop("results.list")[0] is None
    assert differences == {
        "results.whole": (None, 2**60, 2**60 + 1),
        "results.pick": (None, "head-tail", "sobol"),
        "results.zero": (None, 0.0, -0.0),
        "results.table.sampler": (1, "b", "c"),
        "count": (0, 2**53 + 1, 2**53),
        "name": (1, None, "y"),
    }
    assert not compare_runs(one, two).reproduced


def test_inputs_are_compared_by_their_contents(tmp_path, monkeypatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one")
    made = [Run.create(ExperimentSpec(text=str(text)), "one", tmp_path / "home")]
    text.write_text("two")
    made.append(Run.create(ExperimentSpec(text=str(text)), "two", tmp_path / "home"))
    comparison = compare_runs(*made)
    assert comparison.spec == ()
    assert [difference.name for difference in comparison.inputs] == [str(text)]


def test_the_whole_environment_is_kept_as_pip_reads_it(tmp_path) -> None:
    run = finished(tmp_path, "c = 3")
    assert environment_of(run) == dict(provenance.distributions())
    assert len(environment_of(run)) > 100
    (run.path / "requirements.txt").unlink()  # a run of an earlier version
    assert environment_of(run)["python"] == provenance.distributions()["python"]
    assert runs(tmp_path)["status"].tolist() == ["done"]
