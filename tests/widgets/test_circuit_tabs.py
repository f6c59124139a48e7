"""The tabs Circuit, Mitigate and Hardware: verdicts with intervals, which rows are taken, what is logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from qtx_lab.backends import CircuitSampler, QiskitQuantumBackend
from qtx_lab.errors import ArgumentError, ShapeError
from qtx_lab.experiments.runs import Run
from qtx_lab.mitigation import CircuitMitigation, ZeroNoiseExtrapolation
from qtx_lab.specs import CircuitSpec, MitigationSpec
from qtx_lab.theme import fixed, with_error
from qtx_lab.widgets.measurement import distances_of_counts, distances_of_estimate
from qtx_lab.widgets.outputs import estimate_outputs
from qtx_lab.widgets.workbench.tabs.html_parts import rows_table
from qtx_lab.widgets.workbench.tabs.mitigate import verdict
from qtx_lab.widgets.workbench.tasks import registry as tasks
from qtx_lab.widgets.workbench.tasks.circuits import CircuitRows
from qtx_lab.widgets.workbench.workbench import Workbench


def result_of(mitigated: list[float] | None, raw: list[float], std_error: float) -> dict[str, Any]:
    """A result of the task `mitigate` with these distances."""
    errors = [std_error] * len(raw)
    return {
        "rows": np.arange(len(raw)), "p": np.full((len(raw), 2), 0.5), "shots": 1000, "fallbacks": [],
        "discarded": np.zeros(len(raw)), "facts": {"device": "fake_fez", "mitigation": "linear 1 3"},
        "estimate": mitigated and np.zeros((len(raw), 2)), "error": mitigated, "error_std": errors,
        "raw_error": raw, "raw_error_std": errors, "classical_error": [0.05] * len(raw),
        "classical_error_std": errors, "plan": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mitigated", "raw", "says"),
    [
        ([0.14, 0.16], [0.07, 0.09], "Mitigation hurt: 0.150 ± 0.014 against 0.080 ± 0.014"),
        ([0.04, 0.02], [0.11, 0.13], "Mitigation helped: 0.030 ± 0.014 against 0.120 ± 0.014"),
        (
            [0.08, 0.09],
            [0.09, 0.09],
            "No difference that these shots can show: mitigated 0.085 ± 0.014, raw 0.090",
        ),
        (None, [0.07, 0.09], "No row could be mitigated"),
    ],
)
def test_the_verdict_minds_the_intervals(mitigated: list[float] | None, raw: list[float], says: str) -> None:
    text, detail = verdict(result_of(mitigated, raw, 0.01), 1000)
    assert text.startswith(says)
    assert "As many classical draws: 0.050 ± 0.014" in detail


def test_there_is_no_verdict_before_both_have_all_shots(bench: Workbench) -> None:
    result = result_of([0.04, 0.02], [0.11, 0.13], 0.01)
    text, detail = verdict(result, 4000)
    assert (
        text
        == "Provisional, no verdict yet: raw counts 0.120 ± 0.014 after 1\u2009000 of 4\u2009000 shots a row"
    )
    assert "4\u2009000" not in detail
    tab = bench.mitigate
    facts = {**result["facts"], "device_label": "fake_fez"}
    for shots, names in ((4000, ["measured", "classical"]), (1000, ["mitigated", "measured", "classical"])):
        bench.circuit.form.change(shots=shots)
        tab.show({**result, "facts": facts})
        assert tab.view.frame()["way"].tolist() == names
        assert (">mitigated<" in tab._table.value) == ("mitigated" in names)
        assert tab._verdict.value.count("Provisional") == (shots > 1000)


def test_the_table_has_a_mean_and_every_number_its_interval() -> None:
    table = rows_table(result_of([0.14, 0.16], [0.07, 0.09], 0.01))
    assert "<tfoot><tr><th scope='row'>mean</th><td></td><td>0.150 ± 0.014</td>" in table
    assert table.count("±") == 3 * 3 + 1  # two rows and the mean, and the caption
    old = {k: v for k, v in result_of(None, [0.07, 0.09], 0.01).items() if not k.endswith("_std")}
    assert "<td>0.07</td>" in rows_table(old)  # saved by a version that knew no standard errors


@pytest.mark.parametrize("value", [-0.0004, -0.0, 0.0])
def test_a_zero_has_no_sign(value: float) -> None:
    assert fixed(value, 3) == "0.000"
    assert not with_error(value, 0.03).startswith("−")


@pytest.mark.parametrize("value", [10.0**e for e in range(-12, 12)])
@pytest.mark.parametrize("half_width", [None, float("nan"), 0.0, 1e-9, 0.03, 5.0])
def test_a_difference_of_any_size_has_a_sign_unless_it_is_rounded_to_zero(
    value: float, half_width: float | None
) -> None:
    shown, signed = with_error(value, half_width), with_error(value, half_width, sign=True)
    is_zero = not any(digit in shown.partition(" ± ")[0] for digit in "123456789")
    assert signed == (shown if is_zero else f"+{shown}")
    assert with_error(-value, half_width, sign=True).startswith("−") != is_zero


@pytest.mark.statistical
@pytest.mark.parametrize("mitigation", [None, CircuitMitigation(ZeroNoiseExtrapolation([1, 3]))])
def test_the_bootstrap_is_the_spread_of_repetitions(mitigation: CircuitMitigation | None) -> None:
    """Over 24 seeds the spread of the mean distance is known to 15 %; the bootstrap may be half too large."""
    p = torch.rand(4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    p /= p.sum(-1, keepdim=True)
    sampler = CircuitSampler(
        QiskitQuantumBackend("aer", "fake_sherbrooke", loader="tree"), mitigation=mitigation
    )
    means, claimed = [], []
    for seed in range(24):
        counts = sampler.measure(p, 1024, generator=torch.Generator().manual_seed(seed))
        if counts.estimate is None or counts.std_error is None:
            distance = distances_of_counts(counts.counts, p, seed)
        else:
            distance = distances_of_estimate(counts.estimate, counts.std_error, p, seed)
        mean, std_error = distance.mean
        means.append(mean)
        claimed.append(std_error)
    ratio = np.mean(claimed) / np.std(means, ddof=1)
    assert 0.6 < ratio < 2.1, ratio


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    bench = Workbench(home=tmp_path)
    yield bench
    bench.close()


def test_of_many_selected_rows_some_are_taken_and_named(bench: Workbench) -> None:
    assert bench.circuit.take_rows([7, 3, 3, 9]) == (3, 7, 9)
    assert bench.circuit._rows_note.value == ""
    taken = bench.circuit.take_rows(range(100, 140))
    assert len(taken) == 16
    assert (taken[0], taken[-1]) == (100, 139)
    assert bench.circuit.rows == taken
    said = f"16 of 40 selected rows are measured: {', '.join(map(str, taken))}."
    assert said in bench.circuit._rows_note.value
    assert said in bench.circuit._message.value  # there is no picture yet
    bench.circuit.forms["rows"].change(rows=[1])
    assert bench.circuit._rows_note.value == ""
    with pytest.raises(ArgumentError, match="at least one row"):
        bench.circuit.take_rows([])


@pytest.mark.statistical
def test_three_estimates_of_an_output_use_the_row_equally_often_and_cover_it(
    generator: torch.Generator,
) -> None:
    """24 intervals of each method: below 18 that cover by chance in 1 of 500 runs, if they are right."""
    p = torch.rand(8, 16, generator=generator, dtype=torch.float64).pow(4)
    p /= p.sum(-1, keepdim=True)
    v = torch.randn(16, generator=generator, dtype=torch.float64)
    sampler = CircuitSampler(QiskitQuantumBackend("aer", "fake_boston"))
    covered: dict[str, int] = {}
    for seed in range(3):
        done = estimate_outputs(sampler, p, v, loads=1024, keys=4, seed=seed)
        torch.testing.assert_close(done.exact, p @ v)
        torch.testing.assert_close(done.rest, 1 - p.topk(4).values.sum(-1))
        assert (done.amplitude.loads <= 1024).all()
        for name, x in done.methods.items():
            inside = (x.lower <= done.exact) & (done.exact <= x.upper)
            covered[name] = covered.get(name, 0) + int(inside.sum())
    assert min(covered.values()) >= 18, covered
    widths = {name: x.half_width.mean() for name, x in done.methods.items()}
    assert widths["amplitude estimation"] < 0.8 * widths["classical draws"]
    with pytest.raises(ShapeError, match=r"v has shape \(3,\)"):
        estimate_outputs(sampler, p, v[:3], loads=1024, keys=4, seed=0)


def test_shots_that_all_agree_are_no_certainty() -> None:
    """All of 64 draws of a row often give its key of .99: the interval holds the exact output still."""
    p = torch.tensor([[0.99, 0.006, 0.004]], dtype=torch.float64)
    v = torch.tensor([1.0, -1.0, 3.0], dtype=torch.float64)
    sampler = CircuitSampler(QiskitQuantumBackend("aer"))
    for seed in range(8):
        done = estimate_outputs(sampler, p, v, loads=64, keys=3, seed=seed)
        for name, x in done.methods.items():
            assert x.lower <= done.exact <= x.upper, (seed, name)


def test_measurements_are_runs_that_the_dashboard_shows(tmp_path: Path) -> None:
    pytest.importorskip("panel")
    from qtx_lab.widgets.dashboard.records import Records

    class Report:
        def __call__(self, fraction: float, text: str = "") -> None: ...
        def send(self, data: object) -> None: ...

    rows = CircuitRows(
        source={"model": "reference", "text": "reference", "num_tokens": 16}, layer=3, head=0, rows=(7, 15),
        circuit=CircuitSpec(device="fake_fez", shots=256, noise_scale=2).to_parameters(), seed=0,
    )  # fmt: skip
    home = str(tmp_path)
    levels = MitigationSpec(method="zne", noise_levels=(1, 3), scaling="model").to_parameters()
    measured = tasks.measure(Report(), rows, home)
    mitigated = tasks.mitigate(Report(), rows, levels, home)
    assert mitigated["counts"].tolist() == measured["counts"].tolist()
    assert [way["kind"] for way in mitigated["ways"][:3]] == ["classical", "raw", "chosen"]
    by_name = {way["name"]: way["error"] for way in mitigated["ways"]}
    assert by_name["classical draws"][-1] < by_name["raw"][-1]
    submitted = tasks.submit(Report(), rows, home)
    saved = Run.open(tmp_path / submitted["run"]).manifest["results"]  # what its page and the table show
    assert saved["distance"] == pytest.approx(np.mean(submitted["raw_error"]))
    assert saved["distance_half_width"] > 0
    last = submitted["curve"][-1]
    assert saved["fidelity"] == pytest.approx(np.mean(last["fidelity"]))
    assert saved["fidelity_half_width"] == pytest.approx(1.96 * np.linalg.norm(last["error"]) / 2)
    assert "mitigated" not in saved
    records = Records(tmp_path)
    shown = records.rows(records.listing.table, "loader", "shots", "distance").frame
    assert sorted(shown["name"]) == sorted(["circuit", "mitigate", "hardware"] * 2)
    assert set(shown["device"]) == {"fake_fez, noise × 2"}
    assert sorted(shown["distance"]) == sorted(3 * measured["raw_error"])
    assert submitted["raw_error"] == measured["raw_error"]
    assert (pd.to_numeric(shown["half_width"]) > 0).all()
    logged = shown[shown["name"] == "mitigate"].sort_values("row")
    assert logged["mitigated"].tolist() == mitigated["error"]
    output = {"coordinate": 1, "loads": 2048, "keys": 4}
    estimated = tasks.estimate(Report(), rows, output, home)
    run = Run.open(tmp_path / estimated["run"])
    assert sorted(run.metrics()["row"].unique()) == [7, 15]
    first = estimated["methods"][0]
    half_width = np.mean(np.subtract(first["upper"], first["lower"])) / 2
    name = f"{first['name'].replace(' ', '_')}_half_width"
    assert run.manifest["results"][name] == pytest.approx(half_width)
    with pytest.raises(ArgumentError, match="coordinate=32 is not allowed: there are 32"):
        tasks.estimate(Report(), rows, {**output, "coordinate": 32}, home)
    with pytest.raises(ArgumentError, match="there is nothing to mitigate"):
        tasks.mitigate(Report(), rows, MitigationSpec().to_parameters(), home)
