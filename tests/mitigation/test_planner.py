"""The planner is never worse than doing nothing, near the best option in hindsight, and says what it did."""

import numpy as np
import pytest
import torch
from qiskit.transpiler import generate_preset_pass_manager

import qtx_lab as qtx
from qtx_lab.backends.base import Engine
from qtx_lab.backends.exact import compile_steps, outcome_probabilities
from qtx_lab.backends.noise import fake_device, instruction_errors, on_used_qubits
from qtx_lab.bench import mitigation as bench_mitigation
from qtx_lab.bench.base import BENCHES
from qtx_lab.circuits.base import pack_values
from qtx_lab.circuits.fidelity import total_variation_distance
from qtx_lab.mitigation import SharedDecay, scale_noise
from qtx_lab.mitigation.planner import Rehearsal, default_options
from qtx_lab.mitigation.results import bias_aware_std_error


def tree_options(backend, n):
    return [option for option in default_options(backend, n) if option.loader is None]


def test_the_plan_says_what_was_picked_and_why(generator):
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader="tree")
    p = bench_mitigation.synthetic_rows(4)
    planner = qtx.MitigationPlanner()
    result = planner.sample_rows(backend, p, 20_000, generator=generator)
    plan = result.diagnostics["plan"]
    assert plan.choice.option.name in str(plan)
    assert plan.choice.option.name in plan.reason
    assert plan.choice in plan.predictions
    assert result.diagnostics["expected_error"] == plan.choice.error
    assert result.diagnostics["error"] == pytest.approx(
        total_variation_distance(result.probabilities(), p).mean().item()
    )
    assert result.diagnostics["error"] == pytest.approx(result.diagnostics["expected_error"], rel=0.15)
    for x in plan.predictions:  # the triangle inequality
        assert x.error <= x.bias + x.noise + 1e-9
    twice = [planner.plan(backend, p, 20_000, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert str(twice[0]) == str(twice[1])


def test_the_plan_tells_what_it_knew(generator):
    """Rehearsed on other rows it does not look at those that it measures, and says so."""
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader="tree")
    p, others = bench_mitigation.synthetic_rows(3), bench_mitigation.synthetic_rows(3, seed=1)
    options = [qtx.CircuitMitigation(), qtx.CircuitMitigation(qtx.SharedDecay())]
    knowing = qtx.MitigationPlanner(options)
    unknowing = qtx.MitigationPlanner(options, rows=others)
    own, blind, blind_too = (
        planner.plan(backend, rows, 4000, generator=torch.Generator().manual_seed(0))
        for planner, rows in ((knowing, p), (unknowing, p), (unknowing, p.flip(-1)))
    )
    assert own.rehearsed_on == "16 of the 24 rows themselves"
    assert blind.rehearsed_on == "16 of the 24 other rows"
    assert blind.rehearsed_on in str(blind)
    assert str(blind) == str(blind_too)
    assert blind.raw.error != own.raw.error
    result = unknowing.sample_rows(backend, p[:2], 4000, generator=generator)
    assert result.diagnostics["rehearsed_on"] == "16 of the 24 other rows"
    with pytest.raises(qtx.ShapeError, match="8 keys and p has 4"):
        unknowing.plan(backend, torch.ones(1, 4) / 4, 10)
    for rows, error in ((torch.ones(1, 4), "sums to"), (torch.zeros(2, 4), "rows has no row")):
        with pytest.raises(qtx.ArgumentError, match=error):
            qtx.MitigationPlanner(rows=rows)


def test_few_shots_are_not_spent_on_extrapolation(generator):
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader="tree")
    cancellation = qtx.ProbabilisticErrorCancellation
    options = [x for x in tree_options(backend, 64) if not isinstance(x, cancellation)]
    planner = qtx.MitigationPlanner(options)
    p = bench_mitigation.synthetic_rows(6)
    assert planner.plan(backend, p, 300, generator=generator).choice.option.zne is None
    assert planner.plan(backend, p, 300_000, generator=generator).choice.option.zne is not None


def test_without_noise_nothing_is_mitigated(generator):
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader="tree", noise_scale=0)
    planner = qtx.MitigationPlanner(tree_options(backend, 8))
    plan = planner.plan(backend, bench_mitigation.synthetic_rows(3), 10_000, generator=generator)
    assert plan.choice is plan.raw
    assert plan.reason.startswith("Nothing was mitigated")


def test_options_that_cannot_be_used_are_reported(generator):
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader="dynamic")
    folded = qtx.CircuitMitigation(qtx.ZeroNoiseExtrapolation([1, 3]))
    plan = qtx.MitigationPlanner([folded]).plan(backend, torch.ones(2, 8) / 8, 1000, generator=generator)
    assert plan.choice is plan.raw
    assert "before its end" in plan.predictions[-1].problem
    assert "before its end" in str(plan)
    large = qtx.QiskitQuantumBackend("aer", "fake_fez", loader="tree", noise_scale=2.0)
    p = torch.ones(1, 600) / 600  # ten entangled qubits with noise are too many for an exact simulation
    plan = qtx.MitigationPlanner([]).plan(large, p, 100, generator=generator)
    assert plan.choice is plan.raw
    assert "too large" in plan.reason
    # This register has more bits than can be mitigated, but its shots are counted all the same.
    unary = qtx.QiskitQuantumBackend("aer", loader="unary")
    result = qtx.MitigationPlanner([]).sample_rows(unary, torch.ones(1, 17) / 17, 100, generator=generator)
    assert result.counts.sum() == 100
    assert "at most 16" in result.diagnostics["plan"].reason


@pytest.mark.statistical
@pytest.mark.parametrize("device", ["fake_fez", "fake_sherbrooke"])
def test_it_is_not_worse_than_raw_and_near_the_best(device, soak):
    """Errors of 24 rows × 8 repetitions are known to 2 %, so the best in hindsight is also the luckiest."""
    sizes, budgets = ((3, 4, 5, 6), bench_mitigation.BUDGETS) if soak else ((3, 4), (1_000, 64_000))
    measured = [
        row
        for m in sizes
        for kind, p in (
            ("synthetic", bench_mitigation.synthetic_rows(m)),
            ("reference", bench_mitigation.reference_rows(m)),
        )[: None if soak else 1]
        for stage in [bench_mitigation.Stage(bench_mitigation.Case(device, m, kind, p))]
        for shots in budgets
        for row in stage.measure(shots)
        if row.details["choice"] is not None
    ]
    for name in (bench_mitigation.PLANNER, bench_mitigation.TREE, bench_mitigation.MISINFORMED):
        part = [row.details for row in measured if row.method == name]
        assert max(row["raw ratio"] for row in part) <= 1.05, part
        assert np.mean([row["best ratio"] for row in part]) <= 1.10, part


@pytest.mark.statistical
@pytest.mark.parametrize(("m", "limit"), [(4, 0.008), (6, 0.025)])
def test_at_256k_shots_on_the_twin_of_fez(m, limit, generator):
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader="tree")
    planner = qtx.MitigationPlanner(tree_options(backend, 1 << m))
    for p in (bench_mitigation.reference_rows(m), bench_mitigation.synthetic_rows(m)):
        plan = planner.plan(backend, p, 256_000, generator=generator)
        rng = np.random.default_rng(0)
        assert Rehearsal(backend, p).predict(plan.choice.option, 256_000, 3, rng).error <= limit


@pytest.mark.statistical
def test_the_benchmark_compares_what_users_get(capsys, monkeypatch):
    """Whoever turns mitigation on gets rows that are no worse, or is warned; those of before were not."""
    monkeypatch.setattr(bench_mitigation, "FEW_REPEATS", 1)
    rows = bench_mitigation.compare_defaults("fake_fez", 1_000)
    assert all(row.passed for row in rows), [row.check for row in rows]
    ratio = {row.method: row.details["raw ratio"] for row in rows}
    assert all(ratio[name] > 2 for name in ratio if name.startswith("richardson"))
    assert sum("rehearsed on" in name for name in ratio) == 2
    bench_mitigation.print_defaults(rows)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ratio)
    assert "16 of the 24 other rows" in printed
    assert "warned" in printed


def test_attention_outputs_come_closer(generator, soak):
    """Outputs of a layer of the reference model, mitigated by the planner, on three twins."""
    model = qtx.load_reference_model()
    tokens = qtx.encode(qtx.reference_text())[None, :16]
    q, k, v = (x[0].double() for x in model.attention_inputs(tokens)[3])
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
    p = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf).softmax(-1)
    p, v = p[:, -4:].flatten(0, 1), v.repeat_interleave(4, dim=0)  # 32 rows
    exact = (p[:, None] @ v)[:, 0]
    for device in bench_mitigation.DEVICES if soak else bench_mitigation.DEVICES[1:2]:
        backend = qtx.QiskitQuantumBackend("aer", device, loader="tree")
        planner = qtx.MitigationPlanner(tree_options(backend, 16))
        errors = []
        for mitigation in (None, planner):
            sampler = qtx.CircuitSampler(backend, mitigation=mitigation)
            draws = sampler.draw(p.log(), 16_000, generator=generator)
            errors.append(((draws.dense(16)[:, None] @ v)[:, 0] - exact).norm())
        assert errors[1] < 0.7 * errors[0]


def test_bad_input_is_refused(generator):
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader="tree")
    planner = qtx.MitigationPlanner()
    p = torch.ones(1, 4) / 4
    for arguments, kind in (
        (("aer", p, 10), qtx.DtypeError),
        ((backend, p, 0), qtx.ArgumentError),
        ((backend, 2 * p, 10), qtx.ArgumentError),
        ((backend, p[0], 10), qtx.ShapeError),
        ((backend, 0 * p, 10), qtx.ArgumentError),
    ):
        with pytest.raises(kind):
            planner.plan(*arguments, generator=generator)
    with pytest.raises(qtx.DtypeError, match="options"):
        qtx.MitigationPlanner(["raw"])
    with pytest.raises(qtx.DtypeError, match="model"):
        qtx.MitigationPlanner(model="fake_fez")
    assert planner.sample_rows(backend, 0 * p, 10, generator=generator).counts.sum() == 0


def test_the_benchmark_is_registered():
    assert "mitigation" in BENCHES


class Device(Engine):
    """An engine that stands for a device offline: it reports a calibration, and runs on the device's twin."""

    name, ideal = "ibm_fez", False

    def __init__(self):
        self.device = fake_device("fake_fez")

    def _backend(self):
        return self.device

    def identity(self):
        return "a device"

    def facts(self):
        return {"device": self.name, "calibration": "today", "noise": "device"}

    def transpile(self, circuit, level):
        manager = generate_preset_pass_manager(level, target=self.device.target, seed_transpiler=0)
        return manager.run(circuit)

    def calibrated(self, circuit):
        return on_used_qubits(circuit, self.device.target)

    def errors(self, circuit):
        return instruction_errors(circuit, self.device.target)

    def run(self, circuit, bindings, shots, seed, request=None):
        p, values = outcome_probabilities(compile_steps(*self.calibrated(circuit)), bindings)
        rng = np.random.default_rng(seed)
        drawn = [rng.choice(values, shots, p=(row / row.sum()).numpy()) for row in p]
        return pack_values(np.stack(drawn), circuit.num_clbits)


def test_a_device_is_planned_by_its_calibration(generator):
    backend = qtx.QiskitQuantumBackend("aer", loader="tree")
    backend.engine = Device()
    assert not any(option.loader == "dynamic" for option in default_options(backend, 8)), (
        "what feeding forward costs there is not known"
    )
    p = bench_mitigation.synthetic_rows(2)[:24]
    assert backend.transpiled(4).num_qubits == 156
    options = [
        qtx.CircuitMitigation(qtx.SharedDecay([1, 5]), readout=True),
        qtx.CircuitMitigation(readout=True),
    ]
    result = qtx.MitigationPlanner(options).sample_rows(backend, p, 200_000, generator=generator)
    assert result.diagnostics["mitigation"] != "raw"
    raw = backend.sample_rows(p, 200_000, generator=generator)
    assert result.diagnostics["error"] < total_variation_distance(raw.probabilities(), p).mean()
    assert result.diagnostics["error"] == pytest.approx(result.diagnostics["expected_error"], rel=0.5)
    with pytest.raises(qtx.ArgumentError, match="model"):
        scale_noise(backend, 2, "model")
    with pytest.raises(qtx.BackendUnavailable, match="for simulators"):
        qtx.ProbabilisticErrorCancellation().overhead(backend, 4)


def test_intervals_allow_for_the_bias_that_is_left_and_for_decays_that_are_learned():
    """Intervals of a shared decay cover what they say, also where its bias is as large as the noise."""
    backend = qtx.QiskitQuantumBackend("aer", "fake_torino", loader="tree")
    p = bench_mitigation.synthetic_rows(5)[::2][:12]
    option = qtx.CircuitMitigation(SharedDecay((1, 3)))
    rehearsal, rng = Rehearsal(backend, p), np.random.default_rng(0)
    bias = qtx.MitigationPlanner().expected_bias(backend, p, option)
    few = rehearsal.predict(option, 1000, 30, rng)
    assert 0.93 < few.coverage < 0.98
    known = rehearsal.predict(option, 64_000, 30, rng, bias=bias)
    assert 0.93 < known.coverage < 0.98
    unknown = rehearsal.predict(option, 64_000, 30, rng)
    assert unknown.coverage < known.coverage - 0.01
    many = rehearsal.predict(option, 1_000_000, 30, rng)
    assert many.coverage < 0.85  # the bias counts
    other = qtx.MitigationPlanner(rows=p).expected_bias(backend, p[:2], option)
    assert torch.allclose(other, bias.square().mean().sqrt().expand(2, 32))


def test_an_interval_for_a_known_bias_misses_as_often_as_it_says(generator):
    bias = torch.tensor([0.0, 0.3, 1.0, 3.0, 12.0])
    widened = bias_aware_std_error(torch.ones(5), bias)
    noise = torch.randn(200_000, 5, generator=generator)
    covered = ((noise + bias).abs() <= 1.959964 * widened).double().mean(0)
    assert (covered - 0.95).abs().max() < 4 * (0.95 * 0.05 / 200_000) ** 0.5
    assert bias_aware_std_error(torch.tensor([torch.nan, 0.0]), torch.zeros(2)).isnan().tolist() == [
        True,
        False,
    ]
