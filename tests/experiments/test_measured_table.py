"""What the notebooks of a sweep measured, a row for each combination of what they differ in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from qtx_lab.experiments.measured_table import NUM_RUNS, measured_table
from qtx_lab.experiments.notebooks import notebook_path
from qtx_lab.experiments.sweep_plan import plan
from qtx_lab.specs import split_words
from qtx_lab.storage import append_rows

Notebooks = list[tuple[Path, dict[str, Any]]]


def notebook(folder: Path, results: dict[str, Any], metrics: Any = None, **fields: Any) -> Any:
    """The folder and the manifest of a run that is done."""
    if metrics is not None:
        folder.mkdir()
        append_rows(folder / "metrics.parquet", metrics)
    measures = {
        "error": {"main": True, "half_width": "bar"},
        "bits": {"unit": "bit"},
        "speed": {"timing": True},
    }
    return folder, {
        "status": "done",
        "results": results,
        "measures": measures,
        "spec": {"kind": "ExperimentSpec", "fields": fields},
    }


def test_numbers_of_the_metrics_stand_beside_the_sampler_and_the_draws_they_were_measured_with(
    tmp_path: Path,
) -> None:
    made: Notebooks = []
    for samplers in (["systematic"], ["head-tail"]):
        for seed in (1, 2):
            rows = [
                {
                    "sampler": samplers[0],
                    "num_samples": count,
                    "error": seed / count,
                    "bar": 0.01,
                    "speed": 3.0,
                }
                for count in (16, 64)
            ]
            rows += [{**row, "error": None, "bits": 2.0 + seed, "figure": "bits"} for row in rows]
            rows += [{"layer": 0, "head": head, "variance": 0.5} for head in range(3)]
            name = f"{samplers[0]}-{seed}"
            made.append(notebook(tmp_path / name, {}, rows, samplers=samplers, layer=3, seed=seed))
    table = measured_table(made)
    assert table.keys == ("sampler", "num_samples")  # the list of samplers follows from the sampler
    texts = table.texts()
    assert [row["sampler"] for row in texts] == ["systematic"] * 2 + ["head-tail"] * 2
    assert list(texts[0]) == ["sampler", "draws per row", "runs", "error", "bits (bit)"]
    assert table.frame["error"].tolist() == pytest.approx([1.5 / 16, 1.5 / 64] * 2)
    half_width = stats.t.ppf(0.975, 1) * 0.5 / 16  # the spread of two runs is 1/16
    assert table.frame["half_width error"][0] == pytest.approx(half_width)
    assert table.frame["bits"].tolist() == [3.5] * 4
    assert table.finding().startswith("error is smallest at sampler systematic, draws per row 64: 0.02 ± ")
    data, x, by = table.of_figure("error")
    assert (x, by) == ("num_samples", "sampler")
    assert data["x"].tolist() == [16, 64, 16, 64]

    single = measured_table(made[:1])
    assert single.frame["half_width error"].tolist() == [0.01, 0.01]  # what the run says of itself
    assert single.keys == ("num_samples",)


def test_results_without_a_declaration_are_numbers_too_and_only_the_end_of_a_training_counts(
    tmp_path: Path,
) -> None:
    made: Notebooks = [
        (tmp_path / str(x), {"status": status, "results": {"square": x**2, "name": "text", "ok": True},
         "spec": {"fields": {"notebook": "n", "parameters": {"x": x}}}})
        for x, status in ((2, "done"), (3, "failed"), (4, "done"))
    ]  # fmt: skip
    assert measured_table(made).texts() == [{"x": "2", "square": "4"}, {"x": "4", "square": "16"}]
    assert measured_table(made[1:2]).texts() == []
    assert measured_table(made, "missing").measures == {"square": ""}
    steps = [{"step": step, "error": 1.0 / (1 + step)} for step in range(150)]
    trained = notebook(tmp_path / "train", {}, steps)
    assert measured_table([trained]).frame["error"].tolist() == [1 / 150]


def test_a_swept_parameter_stays_beside_a_logged_column_of_its_name(tmp_path: Path) -> None:
    made: Notebooks = []
    for sampler in ("sobol", "head-tail"):  # what the maps of the quickstart show
        for seed in (1, 2):
            rows = [
                {"sampler": name, "num_samples": 16, "error": factor + seed / 10, "bar": 0.01}
                for name, factor in (("systematic", 1), ("lattice", 2))
            ]
            made.append(notebook(tmp_path / f"{sampler}{seed}", {}, rows, sampler=sampler, seed=seed))
    table = measured_table(made)
    assert table.keys == ("sampler (parameter)", "sampler")
    assert len(table.frame) == 4
    assert table.frame["error"].tolist() == pytest.approx([1.15, 2.15] * 2)
    assert set(table.frame["sampler (parameter)"]) == {"sobol", "head-tail"}
    assert list(table.texts()[0]) == ["sampler (parameter)", "sampler", "runs", "error"]
    data, x, by = table.of_figure("error")
    assert (x, by) == (None, "sampler (parameter), sampler")
    assert "sobol, lattice" in set(data["by"])

    logged = [{"sampler": "sobol", "num_samples": 16.0, "error": 0.5}]
    same = notebook(tmp_path / "same", {}, logged, sampler="sobol", num_samples=16)
    other = notebook(
        tmp_path / "other", {}, [{**logged[0], "num_samples": 64.0}], num_samples=64, sampler="sobol"
    )
    assert measured_table([same, other]).keys == ("num_samples",)  # the parameter, logged as it is


NAMES = (
    "value",
    "run",
    "half_width",
    "runs",
    "mean",
    "std",
    "count",
    "own",
    "error",
    "bar",
    "status",
    NUM_RUNS,
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("logged", [False, True])
def test_a_parameter_of_any_name_is_seen(name: str, logged: bool, tmp_path: Path) -> None:
    made: Notebooks = []
    for swept in (3, 5):
        error = {"error": swept / 10, "bar": 0.25}
        rows = [{"head": head, **error} for head in (0, 1)] if logged else None
        made.append(notebook(tmp_path / str(swept), {} if logged else error, rows, **{name: swept}))
    table = measured_table(made)
    assert set(table.keys) == {
        *(["head"] if logged else []),
        *({name, f"{name} (parameter)"} & set(table.keys)),
    }
    texts = [" ".join(row.values()) for row in table.texts()]
    assert len(texts) == (4 if logged else 2)
    assert sorted({text.split()[0] for text in texts}) == ["3", "5"]
    assert table.frame["error"].tolist() == pytest.approx(
        [0.3] * (len(texts) // 2) + [0.5] * (len(texts) // 2)
    )


@pytest.mark.parametrize("name", ["value", "half_width", "kind", "name", "status", "mean"])
def test_a_logged_column_of_any_name_tells_values_apart(name: str, tmp_path: Path) -> None:
    rows = [{name: text, "error": x} for text, x in (("a", 0.5), ("b", 1.5))]
    made = notebook(tmp_path / "one", {}, rows)
    assert measured_table([made]).frame["error"].tolist() == [0.5, 1.5]


def test_a_number_may_have_the_name_of_a_parameter_or_of_a_column(tmp_path: Path) -> None:
    made: Notebooks = [
        (tmp_path / str(x), {"status": "done", "results": {"runs": 7, "x": x, "reached": 2 * x},
         "spec": {"fields": {"notebook": "n", "parameters": {"x": x, "reached": x}}}})
        for x in (2, 3)
    ]  # fmt: skip
    table = measured_table(made)
    assert list(table.measures) == ["runs", "reached"]  # x is the parameter, as it was given
    assert table.texts()[0] == {"reached (parameter)": "2", "runs": "7", "reached": "4"}


@pytest.mark.notebooks
def test_a_value_that_is_no_list_stands_for_a_list_with_it() -> None:
    path = notebook_path("00_quickstart")
    expected = {"sample_counts": ([16], [64]), "samplers": (["sobol"], ["head-tail"])}
    typed = {"sample_counts": split_words("16, [64]"), "samplers": split_words("sobol, head-tail")}
    for grid in ({"sample_counts": [16, 64], "samplers": ["sobol", ["head-tail"]]}, typed):
        planned = plan(path, grid, parameters={"num_windows": 1})
        assert planned.spec.grid == expected
    assert [cell.spec.sample_counts for cell in planned.notebooks] == [(16,), (16,), (64,), (64,)]
