"""Listings of runs: conditions in SQL, comparisons, exports, and folders that are not readable runs."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO, StringIO
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy import stats

from qtx_lab.cli import main
from qtx_lab.errors import ArgumentError, BackendUnavailable, StorageError
from qtx_lab.experiments import provenance
from qtx_lab.experiments.listing import COLUMNS, RunTable
from qtx_lab.experiments.manifest import spec_values
from qtx_lab.experiments.report import write_report
from qtx_lab.experiments.ro_crate_export import export_to_ro_crate
from qtx_lab.experiments.runs import Run, runs
from qtx_lab.specs import CircuitSpec, ExperimentSpec, NotebookSpec, SweepSpec


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Two samplers at three numbers of draws, three runs each; one failed; one of another kind."""
    home = tmp_path_factory.mktemp("runs")
    for sampler, factor in (("systematic", 1.0), ("head-tail", 0.5)):
        for draws in (8, 16, 32):
            for seed in range(3):
                spec = NotebookSpec(
                    notebook="x",
                    parameters={"sampler": sampler, "num_samples": draws, "seed": seed, "heads": [1, 2]},
                )
                with Run.create(spec, "cell", home) as run:
                    run.log_many({"step": i, "loss": factor / (i + 1) + seed} for i in range(3))
                    run.update(results={"error": factor / draws + seed / 100, "good": True, "table": [1]})
    with pytest.raises(ValueError, match="no"), Run.create(NotebookSpec(notebook="x"), "bad", home):
        raise ValueError("no good")
    with Run.create(ExperimentSpec(seed=9), "demo", home) as run:
        run.update(results={"error": "a text"})
    return home


def test_specs_and_results_are_columns(home) -> None:
    table = runs(home)
    assert list(table.columns[: len(COLUMNS)]) == list(COLUMNS)
    assert len(table) == 20
    cell = table[table["name"] == "cell"]
    assert cell["spec.num_samples"].dtype == "Int64"
    assert set(cell["spec.heads"]) == {"[1, 2]"}
    assert "results.table" not in table
    assert table.loc[table["name"] == "demo", "results.error"].tolist() == ["a text"]
    assert table.loc[table["name"] == "demo", "spec.layer"].tolist() == [3]
    assert table["results.good"].isna().sum() == 2


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("status = 'failed'", 1),
        ("sampler = 'head-tail' and num_samples >= 16", 6),
        ("spec.sampler = 'exact'", 0),
        ("results.good and seconds >= 0 and spec.seed = 2", 6),
        ("runs.error like '%no good%'", 1),
        ("started > timestamptz '2020-01-01' and kind = 'ExperimentSpec'", 1),
        ("true", 20),
        ("num_samples = 8 -- a remark", 6),
        ("seed = 9", 1),
    ],
)
def test_conditions_in_sql(home, where, count) -> None:
    selected = runs(home, where=where)
    assert len(selected) == count
    assert isinstance(selected, RunTable)
    assert selected["run"].tolist() == [run for run in runs(home)["run"] if run in set(selected["run"])]
    assert selected.attrs["skipped"] == []


@pytest.mark.parametrize(
    "where",
    [
        "",
        "statuss = 'done'",
        "num_samples >",
        "true; drop table runs",
        "error > 0",
        "true) union select 99 where (true",
    ],
)
def test_invalid_conditions_are_refused(home, where) -> None:
    with pytest.raises(ArgumentError, match="where="):
        runs(home, where=where)


def test_no_name_of_a_parameter_is_in_the_way_of_conditions(tmp_path) -> None:
    for value in (3, 4):
        names = {"row": value, "place": value, "it's": value, 'a "b"': value, "Case": 1, "case": value}
        Run.create(NotebookSpec(notebook="n", parameters=names), "t", tmp_path)
    for where in ("row = 3", "place = 3", '"it\'s" = 3', '"a ""b""" = 3', "spec.row = 3 and name = 't'"):
        assert len(runs(tmp_path, where=where)) == 1
    with pytest.raises(ArgumentError, match=r"differ in case only, .*: spec\.Case, spec\.case"):
        runs(tmp_path, where="case = 3")


def test_json_has_all_digits(tmp_path) -> None:
    exact = {
        "tiny": 1.2345678901234567e-12,
        "pi": 3.141592653589793,
        "large": 2**62,
        "yes": True,
        "text": "ü",
    }
    with Run.create(NotebookSpec(notebook="n"), "t", tmp_path) as run:
        run.update(results={**exact, "no": float("nan")})
    (tmp_path / "other").mkdir()
    done = CliRunner().invoke(main, ["runs", "--home", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    listed = json.loads(done.stdout)
    (row,) = listed["runs"]
    assert {n.removeprefix("results."): x for n, x in row.items() if n.startswith("results.")} == exact
    assert (row["seed"], row["error"], row["status"]) == (None, None, "done")
    assert pd.Timestamp(row["started"]) == pd.Timestamp(run.manifest["started"])
    assert row["started"].endswith("Z")
    assert [left_out["folder"] for left_out in listed["skipped"]] == ["other"]


@pytest.mark.parametrize(
    "form", [[], ["--json"], ["--export", "csv"], ["--export", "parquet"], ["--ro-crate"]]
)
def test_a_name_that_is_no_text_costs_only_its_own_run(tmp_path, form) -> None:
    """Linux takes any bytes for a name; and a name may hold what a terminal would obey."""
    home = tmp_path / "runs"
    for name in ("good", "bad"):
        with Run.create(NotebookSpec(notebook="n"), name, home) as run:
            pass
    os.rename(os.fsencode(run.path), os.fsencode(home) + b"/\xff\xfe")
    (home / "a\x1b[2J\nb").mkdir()
    if form == ["--ro-crate"]:
        pytest.importorskip("rocrate")
        form = [*form, str(tmp_path / "crates")]
    done = CliRunner().invoke(main, ["runs", "--home", str(home), *form])
    assert done.exit_code == 0, done.output
    assert b"good" in done.stdout_bytes
    told = done.stdout if "--json" in form else done.stderr
    assert "its name is not Unicode" in told
    assert not {"\x1b", "\udcff"} & {*told}
    assert "\nb" not in done.stderr
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    assert CliRunner().invoke(main, ["runs", "--home", odd, *form]).exit_code == 2


def test_an_unknown_column_is_answered_with_the_known_ones(home) -> None:
    with pytest.raises(ArgumentError, match=r"nope.*There are run, .*spec\.seed"):
        runs(home, where="results.nope > 0")


def test_conditions_on_an_empty_folder(tmp_path) -> None:
    assert runs(tmp_path, where="status = 'done'").empty
    assert runs(tmp_path).metrics().empty


def test_means_and_intervals_over_runs_of_a_group(home) -> None:
    cell = runs(home, where="name = 'cell'")
    cell["results.error"] = cell["results.error"].astype("float64")
    summary = cell.summary("error", "num_samples", "sampler")
    assert len(summary) == 6
    row = summary[(summary["by"] == "head-tail") & (summary["x"] == 16)].iloc[0]
    errors = 0.5 / 16 + np.arange(3) / 100
    assert row["mean"] == pytest.approx(errors.mean())
    assert row["half_width"] == pytest.approx(stats.t.ppf(0.975, 2) * errors.std(ddof=1) / np.sqrt(3))
    curves = cell[cell["spec.sampler"] == "systematic"].summary("loss", "step")
    assert curves["x"].tolist() == [0, 1, 2]
    assert curves["mean"].to_numpy() == pytest.approx(1 / np.arange(1, 4) + 1)
    assert cell.summary("seconds")["runs"].tolist() == [18]


def test_comparisons_survive_filtering(home) -> None:
    cell = runs(home)[lambda t: t["name"] == "cell"].assign(
        **{"results.error": lambda t: t["results.error"].astype(float)}
    )
    assert isinstance(cell, RunTable)
    figure = cell.compare("error", "num_samples", "sampler", title="A question")
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) == (
        "num_samples",
        "error",
        "A question",
    )
    assert {text.get_text() for text in axes.texts} == {"systematic", "head-tail"}
    for arguments in ({"by": "sampler"}, {"x": "sampler", "by": "num_samples"}, {}, {"x": "heads"}):
        for theme in ("light", "dark"):
            cell.compare("error", theme=theme, **arguments).canvas.draw()
    with pytest.raises(ArgumentError, match="y='eror' is unknown"):
        cell.compare("eror")
    with pytest.raises(ArgumentError, match=r"by='samplr' is unknown\. Did you mean 'spec.sampler'"):
        cell.compare("error", by="samplr")


@pytest.fixture
def two_meanings(tmp_path) -> RunTable:
    """Runs whose parameters `sampler` and `loss` are also columns of their metrics, with other values."""
    for chosen in ("sobol", "head-tail"):
        spec = NotebookSpec(notebook="x", parameters={"sampler": chosen, "num_samples": 8, "loss": 5})
        with Run.create(spec, "cell", tmp_path) as run:
            run.log_many(
                {"sampler": name, "num_samples": 8, "loss": x, "depth": x}
                for name, x in (("systematic", 0.5), ("lattice", 0.25))
            )
    return runs(tmp_path)


def test_a_name_with_two_meanings_is_refused_or_written_in_full(two_meanings) -> None:
    for arguments in ({"by": "sampler"}, {"x": "sampler"}):
        with pytest.raises(ArgumentError, match=r"two meanings.*'spec\.sampler' or 'metrics\.sampler'"):
            two_meanings.compare("depth", **arguments)
    by = two_meanings.summary("depth", by="metrics.sampler")
    assert dict(zip(by["by"], by["mean"], strict=True)) == {"lattice": 0.25, "systematic": 0.5}
    by = two_meanings.summary("depth", by="spec.sampler")
    assert dict(zip(by["by"], by["mean"], strict=True)) == {"sobol": 0.375, "head-tail": 0.375}
    assert two_meanings.summary("depth", "num_samples")["runs"].tolist() == [4]  # logged as it was given
    with pytest.raises(ArgumentError, match="is unknown"):
        two_meanings.summary("depth", by="metrics.status")


def test_a_number_is_what_was_measured_before_it_is_a_parameter(two_meanings) -> None:
    assert two_meanings.summary("loss")["mean"].tolist() == [0.375]
    assert two_meanings.summary("metrics.loss")["mean"].tolist() == [0.375]
    assert two_meanings.summary("spec.loss")["mean"].tolist() == [5]
    assert two_meanings.drop(columns="path").assign(path="gone").summary("loss")["mean"].tolist() == [5]


def test_broken_metrics_do_not_hide_others(home, tmp_path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(home, copy)
    broken = next(iter(runs(copy, where="name = 'cell'")["path"]))
    (Path(broken) / "metrics.parquet").write_bytes(b"PAR1 no")
    metrics = runs(copy).metrics()
    assert metrics["run"].nunique() == 17
    assert [run for run, _ in metrics.attrs["skipped"]] == [Path(broken).name]


@pytest.mark.parametrize("name", sorted({*NotebookSpec.model_fields, *SweepSpec.model_fields}))
def test_a_parameter_with_the_name_of_a_field_hides_no_field(name, tmp_path) -> None:
    """Wherever the fields of a spec are shown: in listings, comparisons, reports and exports."""
    from qtx_lab.experiments.run_comparison import Difference, compare_runs

    pair = [Run.create(NotebookSpec(notebook="n", parameters={name: x}), "t", tmp_path) for x in (3, 4)]
    shown = f"parameters.{name}" if name in NotebookSpec.model_fields else name
    table = runs(tmp_path)
    assert set(table["spec.notebook"]) == {"n"}
    assert set(table[f"spec.{shown}"]) == {3, 4}
    assert len(table.select(f'spec."{shown}" = 3')) == 1
    assert compare_runs(*pair).spec == (Difference(shown, 3, 4),)
    page = write_report(pair[0]).read_text(encoding="utf-8")
    assert all(f">{text}<" in page for text in (shown, "3", "n"))
    pytest.importorskip("rocrate")
    pair[0].finish("done")
    with zipfile.ZipFile(export_to_ro_crate(pair[0], tmp_path / "crates")) as archive:
        graph = json.loads(archive.read("ro-crate-metadata.json"))["@graph"]
    given = {x["@id"]: x["value"] for x in graph if x["@id"].startswith("#parameter-")}
    assert given == {"#parameter-notebook": "n", f"#parameter-{shown}": 3}
    pytest.importorskip("mlflow")
    from qtx_lab.experiments.mlflow_export import _parameters

    assert {x.key: x.value for x in _parameters(pair[0].manifest)} == {"notebook": "n", shown: "3"}
    sweep = SweepSpec(notebook="n", sha256="0" * 64, grid={}, parameters={name: 3})
    values = spec_values({"fields": sweep.to_parameters()})
    shown = f"parameters.{name}" if name in SweepSpec.model_fields else name
    assert values == {"notebook": "n", "sha256": "0" * 64, "grid": {}, "repeats": 1, "seed": 0, shown: 3}


def test_exports_hold_every_column(home) -> None:
    table = runs(home)
    csv = pd.read_csv(StringIO(table.export("csv").decode()))
    assert list(csv.columns) == list(table.columns)
    parquet = table.export("parquet")
    assert parquet[:4] == parquet[-4:] == b"PAR1"
    assert BytesIO(parquet).getbuffer().nbytes < 100_000
    with pytest.raises(ArgumentError, match="kind='xls'"):
        table.export("xls")


def test_ten_thousand_runs_and_foreign_files(tmp_path) -> None:
    with Run.create(ExperimentSpec(), "trial", tmp_path) as run:
        pass
    stored = json.loads((run.path / "manifest.json").read_text())
    for i in range(10_000):
        folder = tmp_path / f"20260101T000000Z-trial-{i:05d}"
        folder.mkdir()
        content = json.dumps({**stored, "seed": i, "results": {"error": i / 10_000}})
        (folder / "manifest.json").write_text(content[: 40 if i % 1000 == 7 else None])
    (tmp_path / "notes").write_text("mine")
    table = runs(tmp_path)
    assert len(table) == 10_001 - 10
    assert len(table.attrs["skipped"]) == 11
    assert len(table.select("results.error >= 0.5 and layer = 3")) == 5000 - 5


def test_the_device_and_its_calibration_are_recorded(tmp_path) -> None:
    with Run.create(CircuitSpec(), "circuits", tmp_path) as run:
        run.used(CircuitSpec(device="fake_fez").build())
        run.used(CircuitSpec().build())
    assert run.manifest["devices"]["aer"] is None
    assert run.manifest["devices"]["fake_fez"].startswith("20")
    assert "fake_fez, calibrated 20" in write_report(run).read_text(encoding="utf-8")


def test_runs_are_exported_as_ro_crates(home, tmp_path) -> None:
    """What RO-Crate 1.1 and Process Run Crate 0.5 require; their validator says so too, where it is there."""
    pytest.importorskip("rocrate")
    odd = {"a b": 1.5, "list": [1, 2], "inf": float("inf"), "text": "ü"}
    with Run.create(NotebookSpec(notebook="n", parameters=odd), "odd", tmp_path / "odd") as run:
        run.declare("error", unit="bits")
        run.update(results={"error": 0.5, "nan": float("nan"), "summary": ["x"]})
        run.log(a=1.0)
        (run.path / "figures" / "ä b.png").write_bytes(b"x")
        (run.path / "n.ipynb").write_text("{}")
    unfinished = Run.create(NotebookSpec(notebook="n"), "open", tmp_path / "odd")
    command = ["runs", "--home", str(tmp_path / "odd"), "--ro-crate", str(tmp_path / "crates")]
    done = CliRunner().invoke(main, [*command, "--license", "https://spdx.org/licenses/CC-BY-4.0"])
    assert done.exit_code == 0, done.output
    assert f"not exported: {unfinished.path.name}" in done.stderr
    (path,) = (tmp_path / "crates").iterdir()
    assert done.stdout.strip() == str(path)
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        graph = json.loads(archive.read("ro-crate-metadata.json"))["@graph"]
        assert archive.read("metrics.parquet") == (run.path / "metrics.parquet").read_bytes()
    entities = {entity["@id"]: entity for entity in graph}
    assert all(name.startswith("ro-crate-metadata") or quote(name) in entities for name in names)
    assert {"spec.yaml", "manifest.json", "requirements.txt", "n.ipynb", "figures/ä b.png"} <= names
    root, action = entities["./"], entities["#run"]
    assert {"name", "description", "datePublished", "license", "conformsTo", "mentions"} <= set(root)
    assert root["license"] == {"@id": "https://spdx.org/licenses/CC-BY-4.0"}
    assert action["@type"] == "CreateAction"
    assert action["instrument"] == {"@id": "n.ipynb"}
    assert action["actionStatus"].endswith("/CompletedActionStatus")
    given = {entities[x["@id"]]["name"]: entities[x["@id"]]["value"] for x in action["object"]}
    assert given == {"notebook": "n", "a b": 1.5, "list": "[1, 2]", "inf": "inf", "text": "ü"}
    results = [entities[x["@id"]] for x in action["result"] if x["@id"].startswith("#result")]
    assert {(x["name"], x["value"], x.get("unitText")) for x in results} >= {("error", 0.5, "bits")}
    failed = runs(home, where="status = 'failed'")
    (other,) = [export_to_ro_crate(Run(Path(path)), tmp_path) for path in failed["path"]]
    with zipfile.ZipFile(other) as archive:
        text = archive.read("ro-crate-metadata.json").decode()
    assert "FailedActionStatus" in text
    assert "Nobody has stated a licence" in text
    with pytest.raises(ArgumentError, match="license='MIT' is not allowed: it must be a URL"):
        export_to_ro_crate(run, tmp_path, license="MIT")


def read_crate(path: Path) -> tuple[set[str], dict[str, dict]]:
    """The names of the files in a crate, and its entities by their identifiers."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        graph = json.loads(archive.read("ro-crate-metadata.json"))["@graph"]
        assert len(archive.namelist()) == len(set(archive.namelist()))
        return set(archive.namelist()), {entity["@id"]: entity for entity in graph}


def deny_reading(path: Path, monkeypatch) -> None:
    """Let opening a file fail, also for root, whom no permission keeps out."""
    before = open

    def opened(file, *arguments, **named):
        if file == path:
            raise PermissionError(13, "Permission denied", str(path))
        return before(file, *arguments, **named)

    monkeypatch.setattr("builtins.open", opened)


def test_a_run_that_cannot_be_exported_keeps_no_other_from_it(tmp_path, monkeypatch) -> None:
    pytest.importorskip("rocrate")
    home, crates = tmp_path / "runs", tmp_path / "crates"
    for name in ("first", "bytes", "denied", "last"):
        with Run.create(NotebookSpec(notebook="n", parameters={"a b#?/é": 1}), name, home) as run:
            (run.path / "empty.txt").write_bytes(b"")
            (run.path / "a%20b #?.txt").write_bytes(b"1")
    folders = {row.name: Path(row.path) for row in pd.DataFrame(runs(home)).itertuples()}
    (Path(os.fsdecode(os.fsencode(folders["bytes"]) + b"/\xff"))).write_bytes(b"")
    secret = folders["denied"] / "empty.txt"
    deny_reading(secret, monkeypatch)
    command = ["runs", "--home", str(home), "--ro-crate", str(crates)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1
    assert {path.name for path in crates.iterdir()} == {f"{folders[n].name}.zip" for n in ("first", "last")}
    for name, reason in (("bytes", "not Unicode"), ("denied", f"Cannot read {secret}: Permission denied")):
        assert f"not exported: {folders[name].name}: " in done.stderr
        assert reason in done.stderr
    files, entities = read_crate(crates / f"{folders['last'].name}.zip")
    assert {"empty.txt", "a%20b #?.txt", "spec.yaml", "manifest.json"} <= files
    assert entities["#parameter-a%20b%23%3F%2F%C3%A9"]["value"] == 1
    (tmp_path / "file").write_bytes(b"")
    done = CliRunner().invoke(main, [*command[:-1], str(tmp_path / "file")])
    assert done.exit_code == 1
    assert done.stderr.count("not exported: ") == 1  # every other run would fail in the same way


def test_a_run_that_was_taken_from_a_crate_has_a_crate_of_its_own(tmp_path) -> None:
    pytest.importorskip("rocrate")
    with Run.create(NotebookSpec(notebook="n"), "t", tmp_path / "runs") as run:
        run.log(a=1.0)
    crate = export_to_ro_crate(run, tmp_path)
    taken = tmp_path / "others" / run.path.name
    with zipfile.ZipFile(crate) as archive:
        archive.extractall(taken)
    assert runs(tmp_path / "others")["run"].tolist() == [run.path.name]
    assert Run(taken).metrics()["a"].tolist() == [1.0]
    assert read_crate(export_to_ro_crate(Run(taken), tmp_path / "again")) == read_crate(crate)


def test_an_export_that_is_stopped_leaves_the_crate_that_was_there(tmp_path, monkeypatch) -> None:
    pytest.importorskip("rocrate")
    from qtx_lab.experiments import ro_crate_export

    with Run.create(NotebookSpec(notebook="n"), "t", tmp_path / "runs") as run:
        pass
    crates = tmp_path / "crates"
    before = export_to_ro_crate(run, crates).read_bytes()
    full = OSError(28, "No space left on device")
    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (full, StorageError)):

        def stop(path, error=error):
            assert path.stat().st_size > 0
            raise error

        monkeypatch.setattr(ro_crate_export, "sync_file", stop)
        with pytest.raises(raised):
            export_to_ro_crate(run, crates)
        (only,) = crates.iterdir()
        assert only.read_bytes() == before


def test_exports_at_once(home, tmp_path, monkeypatch) -> None:
    """Several that write the same crates, and that copy the same runs to MLflow: each run once, and whole."""
    pytest.importorskip("rocrate")
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    from qtx_lab.experiments.mlflow_export import export_to_mlflow

    some, uri = runs(home).head(3), f"file://{tmp_path / 'mlflow'}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("qtx_lab")
    with ThreadPoolExecutor(6) as pool:
        paths = [Path(path) for path in some["path"]] * 2
        crates = set(pool.map(lambda path: export_to_ro_crate(Run(path), tmp_path / "crates"), paths))
        exports = list(pool.map(lambda _: export_to_mlflow(some, uri), range(3)))
    assert sorted((tmp_path / "crates").iterdir()) == sorted(crates)
    assert all("manifest.json" in read_crate(crate)[0] for crate in crates)
    assert not [export.problems for export in exports if export.problems]
    assert sum(export.copied for export in exports) == 3
    assert len(client.search_runs([experiment])) == 3


def test_mlflow_takes_any_name_and_what_went_on_after_its_copy(tmp_path, monkeypatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    from qtx_lab.experiments.mlflow_export import MlflowExport, export_to_mlflow

    home, uri = tmp_path / "runs", f"file://{tmp_path / 'mlflow'}"
    for name in ("it's", 'a "b" c', 'it\'s "both" ü%'):
        with Run.create(NotebookSpec(notebook="n"), "t", home) as run:
            run.update(results={"huge": 10**400, "one": 1}, versions={"a b$//": "1"})
        run.path.rename(home / name)
    run = Run.create(NotebookSpec(notebook="n"), "t", home)
    run.finish("interrupted")
    assert export_to_mlflow(runs(home), uri) == MlflowExport(4, 0, 0, {})
    assert export_to_mlflow(runs(home), uri) == MlflowExport(0, 4, 0, {})
    run.update(status="running", process=provenance.this_process())  # a training that is resumed
    assert export_to_mlflow(runs(home), uri) == MlflowExport(0, 3, 1, {})
    run.update(results={"one": 2})
    run.finish("done")
    assert export_to_mlflow(runs(home), uri) == MlflowExport(1, 3, 0, {})
    client = MlflowClient(uri)
    copies = client.search_runs([client.get_experiment_by_name("qtx_lab").experiment_id])
    assert sorted(copy.info.status for copy in copies) == ["FINISHED"] * 4
    assert sorted(copy.data.metrics["results.one"] for copy in copies) == [1, 1, 1, 2]


def test_export_to_mlflow_once_a_run(home, tmp_path, monkeypatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    from qtx_lab.experiments.mlflow_export import TAG, MlflowExport, export_to_mlflow

    uri = f"file://{tmp_path / 'mlflow'}"
    some = runs(home, where="num_samples = 8 or status = 'failed'")
    assert export_to_mlflow(some, uri) == MlflowExport(7, 0, 0, {})
    assert export_to_mlflow(some, uri) == MlflowExport(0, 7, 0, {})
    client = MlflowClient(uri)
    copies = client.search_runs([client.get_experiment_by_name("qtx_lab").experiment_id])
    assert {run.data.tags[TAG] for run in copies} == set(some["run"])
    assert sorted(run.info.status for run in copies) == ["FAILED"] + ["FINISHED"] * 6
    one = next(
        run
        for run in copies
        if run.data.params.get("seed") == "2" and run.data.params["sampler"] == "head-tail"
    )
    assert one.data.metrics["results.error"] == pytest.approx(0.5 / 8 + 0.02)
    history = client.get_metric_history(one.info.run_id, "loss")
    assert [(x.step, x.value) for x in history] == [(i, 0.5 / (i + 1) + 2) for i in range(3)]
    assert {"spec.yaml", "manifest.json", "metrics.parquet"} <= {
        x.path for x in client.list_artifacts(one.info.run_id)
    }
    client.update_run(one.info.run_id, status="RUNNING")  # an export that was killed
    assert export_to_mlflow(some, uri) == MlflowExport(1, 6, 0, {})

    odd_names = {"a//b": 1.0, "p %": 2.0, "p $": 3.0, "../x": 4.0, "": 5.0, "x" * 300: 6.0}
    bad, good, open_one = (
        Run.create(NotebookSpec(notebook="x", parameters=odd_names), name, tmp_path / "odd")
        for name in ("bad", "good", "open")
    )
    for run in (bad, good):
        run.log_many([{name: value for name, value in odd_names.items() if name}])
        run.update(results=odd_names)
        run.finish("done")
    (bad.path / "metrics.parquet").write_bytes(b"no parquet")
    report = export_to_mlflow(runs(tmp_path / "odd"), uri, experiment="odd")
    assert (report.copied, report.already_there, report.running) == (1, 0, 1)
    assert list(report.problems) == [bad.path.name]
    assert "metrics.parquet" in report.problems[bad.path.name]
    assert str(report) == "1 copied, 1 still running, 1 not copied"
    (copy,) = client.search_runs([client.get_experiment_by_name("odd").experiment_id])
    params = {**copy.data.params}
    assert params.pop("notebook") == "x"
    assert sorted(map(float, params.values())) == [1, 2, 3, 4, 5, 6]
    assert sorted(copy.data.metrics.values()) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 6]
    open_one.finish("interrupted")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    os.environ.pop("MLFLOW_ALLOW_FILE_STORE", None)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BackendUnavailable, match="cannot be written"):
        export_to_mlflow(some, f"sqlite:///{tmp_path}/file/runs.db")
