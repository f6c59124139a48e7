"""Mitigated rows are nearer to the true rows, their error bars cover, and readout errors are never stale."""

import warnings

import mthree
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import minimize

import qtx_lab as qtx
from qtx_lab.backends.exact import compile_steps, density_matrices, outcome_probabilities
from qtx_lab.backends.requests import CalibrationRequest
from qtx_lab.bench.mitigation import synthetic_rows
from qtx_lab.circuits.base import pack_values
from qtx_lab.circuits.fidelity import total_variation_distance
from qtx_lab.mitigation import readout, scale_noise
from qtx_lab.mitigation.planner import Rehearsal
from qtx_lab.mitigation.readout import (
    calibrated_readout_errors,
    estimate_register,
    readout_errors,
    undo_readout,
)
from qtx_lab.specs import MitigationSpec

ZNE = qtx.ZeroNoiseExtrapolation
RICHARDSON = qtx.CircuitMitigation(ZNE([1, 3]), readout=True)
LIMIT_SHOTS = 10**15


def rows(count, n, generator, masked=0):
    logits = torch.randn(count, n, generator=generator, dtype=torch.float64)
    logits[:, n - masked :] = -torch.inf
    return logits.softmax(-1)


def twin(loader="tree", **options):
    return qtx.QiskitQuantumBackend("aer", "fake_sherbrooke", loader=loader, **options)


# --- Projection -------------------------------------------------------------------------------------


def test_the_projection_by_variances_is_the_nearest_distribution(generator):
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64) * 0.4 + 1 / 6
    variance = torch.rand(5, 6, generator=generator, dtype=torch.float64) ** 3 + 1e-3
    variance[4] = 0
    support = torch.tensor(
        [[True] * 6, [True] * 3 + [False] * 3, [False, True] * 3, [True] + [False] * 5, [True] * 6]
    )
    result = qtx.project_to_simplex(x, support, variance)
    assert (result[~support] == 0).all()
    torch.testing.assert_close(result[4], qtx.project_to_simplex(x[4]))
    for row in range(4):
        keys = support[row].nonzero()[:, 0]
        y, weight = x[row, keys].numpy(), 1 / variance[row, keys].numpy()
        nearest = minimize(
            lambda z, y=y, weight=weight: (weight * (z - y) ** 2).sum() / weight.sum(),
            np.full(len(y), 1 / len(y)),
            bounds=[(0, 1)] * len(y),
            constraints={"type": "eq", "fun": lambda z: z.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 1000},
        )
        assert np.allclose(result[row, keys].numpy(), nearest.x, atol=1e-4)
    assert not qtx.project_to_simplex(x, torch.zeros_like(support), variance).any()
    for bad in (variance - 1, variance * torch.inf):
        with pytest.raises(qtx.ArgumentError, match="variance"):
            qtx.project_to_simplex(x, support, bad)
    with pytest.raises(qtx.ShapeError, match="variance"):
        qtx.project_to_simplex(x, support, variance[:2])
    for given in ([0.5, 0.6], torch.tensor([1, 1])):  # whole numbers would lose 1/2
        with pytest.raises(qtx.DtypeError, match=r"x is .* it must be a floating-point tensor"):
            qtx.project_to_simplex(given)
    with pytest.raises(qtx.ShapeError, match="n >= 1 keys"):
        qtx.project_to_simplex(torch.zeros(2, 0))


def test_the_projection_is_the_nearest_distribution(generator):
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64) * 0.4 + 1 / 6
    support = torch.tensor(
        [[True] * 6, [True] * 3 + [False] * 3, [False, True] * 3, [True] + [False] * 5, [False] * 6]
    )
    result = qtx.project_to_simplex(x, support)
    assert (result[4] == 0).all()
    assert (result[~support] == 0).all()
    for row in range(4):
        keys = support[row].nonzero()[:, 0]
        y = x[row, keys].numpy()
        nearest = minimize(
            lambda z, y=y: ((z - y) ** 2).sum(),
            np.full(len(y), 1 / len(y)),
            jac=lambda z, y=y: 2 * (z - y),
            bounds=[(0, 1)] * len(y),
            constraints={"type": "eq", "fun": lambda z: z.sum() - 1},
            options={"ftol": 1e-14},
        )
        assert np.allclose(result[row, keys], nearest.x, atol=1e-6)
    p = rows(5, 6, generator)
    assert torch.allclose(qtx.project_to_simplex(p), p, atol=1e-15)
    assert ((qtx.project_to_simplex(x) - p).norm(dim=-1) <= (x - p).norm(dim=-1)).all()


# --- Readout ----------------------------------------------------------------------------------------


def test_undoing_readout_agrees_with_mthree(generator):
    errors = torch.tensor(
        [[[0.98, 0.02], [0.05, 0.95]], [[0.99, 0.01], [0.03, 0.97]], [[0.96, 0.04], [0.02, 0.98]]]
    )
    errors = errors.double()
    counts = torch.randint(1, 1000, (4, 8), generator=generator)
    mitigation = mthree.M3Mitigation(None)
    mitigation.cals_from_matrices([e.T.numpy() for e in errors])  # its columns are the true values
    result = undo_readout(counts / counts.sum(-1, keepdim=True).double(), errors)
    for row in range(4):
        theirs = mitigation.apply_correction(
            {f"{v:03b}": int(c) for v, c in enumerate(counts[row])}, [0, 1, 2], method="direct"
        )
        assert np.allclose(
            result[row], [theirs[f"{v:03b}"] for v in range(8)], atol=1e-6
        )  # mthree computes in float32


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_readout_of_counts_is_undone_as_that_of_shares(dtype):
    errors = torch.tensor([[[0.875, 0.125], [0.25, 0.75]]] * 2, dtype=torch.float64)
    counts = torch.tensor([[500, 200, 150, 150], [0, 0, 0, 0]], dtype=dtype)
    result = undo_readout(counts, errors)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, undo_readout(counts.double(), errors))
    torch.testing.assert_close(result.sum(-1), torch.tensor([1000.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(undo_readout(counts[0], errors.numpy()), result[0])
    assert undo_readout(counts.float(), errors.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("errors", "error"),
    [
        ([[[0.5, 0.5], [0.5, 0.5]]], "bit 0 reads the same"),
        ([[[0.3, 0.7], [0.3, 0.7]]], "bit 0 reads the same"),
        ([[[1.0, 0.0], [1.0, 0.0]]], "bit 0 reads the same"),
        ([[[1.1, -0.1], [0.0, 1.0]]], "from 0 to 1"),
        ([[[0.9, 0.2], [0.0, 1.0]]], "sum to 1"),
        ([[[0.9, float("nan")], [0.0, 1.0]]], "from 0 to 1"),
        ([[0.9, 0.1], [0.0, 1.0]], "bits, 2, 2"),
        ([[[1.0, 0.0], [0.0, 1.0]]] * 2, r"\(\.\.\., 4\)"),
    ],
)
def test_readout_errors_that_cannot_be_undone_are_refused(errors, error):
    with pytest.raises(qtx.ArgumentError, match=error):
        undo_readout(torch.tensor([[3, 5]]), torch.tensor(errors, dtype=torch.float64))
    if "4" not in error and "bits" not in error:
        for feeds_forward in (False, True):
            with pytest.raises(qtx.ArgumentError, match=error):
                estimate_register(
                    torch.tensor([[3, 5]]), torch.tensor(errors).double(), feeds_forward=feeds_forward
                )


@pytest.mark.parametrize("wrong", [None, "aer", 3])
def test_what_is_no_backend_and_holds_no_real_numbers_is_refused_by_name(wrong):
    for call in (
        lambda: readout_errors(wrong, 4),
        lambda: calibrated_readout_errors(wrong, 4),
        lambda: scale_noise(wrong, 2),
    ):
        with pytest.raises(qtx.DtypeError, match="backend is a"):
            call()
    errors = torch.eye(2)[None]
    for numbers in ("ab", [["a"]], torch.tensor([1j, 1.0]), None):
        with pytest.raises(qtx.DtypeError, match="shares is"):
            undo_readout(numbers, errors)
        with pytest.raises(qtx.DtypeError, match="errors is"):
            undo_readout(torch.tensor([0.5, 0.5]), numbers)


def test_a_level_that_is_measured_twice_counts_twice(generator):
    """Replicates of a level have shots of their own, and their results are independent."""
    p = rows(3, 8, generator)
    option = qtx.CircuitMitigation(ZNE([1, 1, 3], "linear"), readout=True)
    result = option.sample_rows(twin(), p, 9_000, generator=generator)
    assert set(result.diagnostics["shots_by_level"]) == {1.0, 3.0}
    assert sum(result.diagnostics["shots_by_level"].values()) == 9_000
    assert result.diagnostics["attained_levels"] == pytest.approx((1, 1, 3), rel=1e-12)
    assert (result.counts.sum(-1) + result.discarded == 9_000).all()


def test_readout_errors_alone_are_undone_exactly(generator):
    """With infinitely many shots, of circuits that measure at their end and of those that feed forward."""
    p = rows(4, 8, generator)
    for loader in ("tree", "dynamic"):
        backend = qtx.QiskitQuantumBackend("aer", noise=qtx.ParametricNoise(readout=0.05), loader=loader)
        rehearsal, option = Rehearsal(backend, p), qtx.CircuitMitigation(readout=True)
        (outcomes,), (errors,) = rehearsal.outcomes(option), rehearsal.readout_errors(option)
        assert total_variation_distance(outcomes, p).max() > 0.02
        estimate = estimate_register(outcomes, errors, feeds_forward=backend.loader.feeds_forward)
        assert torch.allclose(estimate.value, p, atol=1e-12)


def test_readout_errors_are_measured_once_for_each_calibration(monkeypatch, tmp_path, generator):
    monkeypatch.setenv("QTX_LAB_HOME", str(tmp_path))
    runs = []
    backend = twin()
    run = type(backend.engine).run
    monkeypatch.setattr(type(backend.engine), "run", lambda *a: runs.append(1) or run(*a))
    first = readout_errors(backend, 8)
    assert len(runs) == 4
    truth = calibrated_readout_errors(backend, 8)
    assert (first - truth).abs().max() < 0.002
    assert torch.equal(readout_errors(twin(), 8), first)
    assert len(runs) == 4, "measured again"
    readout_errors(backend, 4)
    assert len(runs) == 8, "other qubits were not measured"
    doubled = readout_errors(twin(noise_scale=2.0), 8)
    assert len(runs) == 12, "other noise was not measured"
    assert (doubled - first).abs().max() > 0.002
    facts = type(backend.engine).facts
    monkeypatch.setattr(type(backend.engine), "facts", lambda e: {**facts(e), "calibration": "tomorrow"})
    readout_errors(backend, 8)
    assert len(runs) == 16, "numbers of an old calibration were used"
    for path in (tmp_path / ".cache" / "readout").iterdir():
        path.write_text("[[1")
    readout_errors(backend, 8)
    assert len(runs) == 20, "a broken file was used"


def test_readout_without_contrast_is_not_undone(monkeypatch):
    monkeypatch.setattr(readout, "_measure", lambda *a: torch.full((2, 2, 2), 0.5, dtype=torch.float64))
    with pytest.raises(qtx.BackendUnavailable, match="cannot be undone"):
        readout_errors(twin(noise_scale=1.5), 4)


# --- Whole mitigations ------------------------------------------------------------------------------

OPTIONS = {
    "readout": qtx.CircuitMitigation(readout=True),
    "richardson": RICHARDSON,
    "two-qubit": qtx.CircuitMitigation(ZNE([1, 3]), readout=True, scaling="two-qubit"),
    "model": qtx.CircuitMitigation(ZNE([1, 2]), readout=True, scaling="model"),
    "linear": qtx.CircuitMitigation(ZNE([1, 3, 5], "linear"), readout=True),
    "exponential": qtx.CircuitMitigation(ZNE([1, 3], "exponential", asymptote=1 / 8), readout=True),
    "shared": qtx.CircuitMitigation(qtx.SharedDecay([1, 3]), readout=True),
    "corrected": qtx.CircuitMitigation(qtx.SharedDecay([1, 3], corrected=True), readout=True),
    "pec": qtx.ProbabilisticErrorCancellation(512, readout=True),
    "pec for each shot": qtx.ProbabilisticErrorCancellation(),
    "pauli": qtx.CircuitMitigation(ZNE([1, 2]), readout=True, scaling="pauli"),
}


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_mitigated_rows_are_nearer(option, generator):
    p = rows(6, 8, generator, masked=2)
    backend = twin()
    shots = 200_000
    raw = backend.sample_rows(p, shots, generator=generator)
    result = option.sample_rows(backend, p, shots, generator=generator)
    estimate = result.probabilities()
    assert (estimate >= 0).all()
    assert torch.allclose(estimate.sum(-1), torch.ones(6, dtype=torch.float64))
    assert (estimate[p == 0] == 0).all()
    assert (
        total_variation_distance(estimate, p).mean()
        < 0.8 * total_variation_distance(raw.probabilities(), p).mean()
    )
    assert (result.counts.sum(-1) + result.discarded == shots).all()
    assert (result.discarded > 0).all()
    assert (result.classical.counts.sum(-1) == shots).all()
    first, second = (
        option.sample_rows(backend, p, shots, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first.probabilities(), second.probabilities())


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["readout", "richardson", "shared", "pec", "pec for each shot", "pauli"])
def test_error_bars_of_rows_cover(name, generator):
    """95 % intervals of 64 rows × 8 keys cover the mean of many repetitions in 95 ± 3 % of cases.

    The coverage of 512 correlated numbers has a standard deviation of about 1 %. Error bars that are 20 % too
    small would cover 88 %.
    """
    option = OPTIONS[name]
    backend = qtx.QiskitQuantumBackend(
        "aer", noise=qtx.ParametricNoise(two_qubit=0.02, readout=0.02), loader="tree"
    )
    p = 0.5 / 8 + 0.5 * rows(64, 8, generator)  # away from the simplex's edge
    result = option.sample_rows(backend, p, 4000, generator=generator)
    if name.startswith("pec"):  # it is unbiased for this noise
        centre = p
    elif name == "shared":  # its decays differ from repetition to repetition
        centre = (
            sum(option.sample_rows(backend, p, 4000, generator=generator).estimate for _ in range(16)) / 16
        )
    else:
        rehearsal = Rehearsal(backend, p, readout_errors)
        counts = [LIMIT_SHOTS * x for x in rehearsal.outcomes(option)]
        centre = option.combine_results(backend, p, counts, rehearsal.readout_errors(option)).p
    covered = ((result.estimate - centre).abs() < 1.96 * result.std_error).double().mean()
    assert abs(covered - 0.95) < 0.03


@pytest.mark.statistical
@pytest.mark.parametrize(("loader", "readout"), [("tree", False), ("tree", True), ("dynamic", True)])
def test_error_bars_of_few_shots_know_that_an_unseen_key_is_possible(loader, readout):
    """95 % intervals of 2,048 keys with 30 shots miss at most 8 ± 1 %; error bars of 0 would miss 40 %."""
    p = rows(128, 16, torch.Generator().manual_seed(0))
    noise = qtx.ParametricNoise(readout=0.02 if readout else 0.0)
    backend = qtx.QiskitQuantumBackend("aer", noise=noise, loader=loader)
    result = qtx.CircuitMitigation(readout=readout).sample_rows(
        backend, p, 30, generator=torch.Generator().manual_seed(1)
    )
    assert (result.std_error > 0).all()
    assert ((result.estimate - p).abs() > 1.96 * result.std_error).double().mean() < 0.08


@pytest.mark.statistical
@pytest.mark.parametrize("shots", [100, 4000])
@pytest.mark.parametrize(
    ("option", "likely"),
    [
        (OPTIONS["exponential"], 0.0),
        (qtx.CircuitMitigation(ZNE([1, 3, 5], "exponential", asymptote=1 / 8), readout=False), 0.0),
        (qtx.ProbabilisticErrorCancellation(256, readout=True), 0.0),
        (qtx.ProbabilisticErrorCancellation(16), 0.05),
        (qtx.ProbabilisticErrorCancellation(4), 0.0),
        (qtx.ProbabilisticErrorCancellation(2), 0.0),
    ],
    ids=["exponential", "exponential of three", "pec", "pec 16", "pec 4", "pec 2"],
)
def test_error_bars_cover_likely_keys_as_well_as_unlikely_ones(option, likely, shots, generator):
    """1.96 standard errors miss no more than 7 % of the keys above 40 %, of those from 5 to 40 %, and of the
    rest, within what chance allows (false alarms in a millionth each).

    Where extrapolated keys were divided by their sum as if it were known, they missed 13 % of the likely
    ones, and with few draws of Paulis 20 to 99 %. Sixteen draws still miss more of the keys below `likely`,
    on which a Pauli that was not drawn would have put its shots.
    """
    backend = qtx.QiskitQuantumBackend(
        "aer", noise=qtx.ParametricNoise(two_qubit=0.02, readout=0.02 * option.readout), loader="tree"
    )
    p = (2 * rows(64, 8, generator).log()).softmax(-1)
    repeated = [option.sample_rows(backend, p, shots, generator=generator) for _ in range(6)]
    if isinstance(option, qtx.ProbabilisticErrorCancellation):
        centre = p
    else:
        rehearsal = Rehearsal(backend, p, readout_errors)
        counts = [LIMIT_SHOTS * x for x in rehearsal.outcomes(option)]
        centre = option.combine_results(backend, p, counts, rehearsal.readout_errors(option)).p
    inside = torch.stack([(x.estimate - centre).abs() <= 1.96 * x.std_error for x in repeated])
    flagged = torch.stack([x.std_error.isnan() for x in repeated])  # rows of which nothing is known
    assert not flagged.any() or option.instances <= 16
    inside |= flagged
    for low, high in ((likely, 0.05), (0.05, 0.4), (0.4, 1.01)):
        some = inside[((centre >= low) & (centre < high)).expand_as(inside)]
        missed = int((~some).sum())
        assert stats.beta.ppf(1e-6, max(missed, 1), some.numel() - missed + 1) <= 0.07


def test_pec_is_unbiased_for_pauli_noise_at_the_stated_overhead(generator):
    """The mean of 24 rows is within 4 standard errors (false alarm 0.1 %); the raw counts are 20 off."""
    noise = qtx.ParametricNoise(two_qubit=0.05, one_qubit=0.005)
    backend = qtx.QiskitQuantumBackend("aer", noise=noise, loader="tree")
    p = rows(1, 4, generator).expand(24, 4)
    pec = qtx.ProbabilisticErrorCancellation(512)
    result = pec.sample_rows(backend, p, 8192, generator=generator)
    mean, error = result.estimate.mean(0), result.std_error.square().mean(0).sqrt() / 24**0.5
    assert ((mean - p[0]).abs() < 4 * error).all()
    raw = backend.sample_rows(p, 8192, generator=generator).probabilities().mean(0)
    assert (raw - p[0]).abs().max() > 10 * error.max()
    assert result.diagnostics["overhead"] == pytest.approx(pec.overhead(backend, 4))
    spread = result.estimate.var(0).mean() / (p[0] * (1 - p[0]) / 8192).mean()
    assert 0.5 < spread / pec.overhead(backend, 4) < 1.6
    with pytest.raises(qtx.ArgumentError, match="before its end"):
        pec.overhead(twin("dynamic"), 4)


def test_pec_says_nothing_of_rows_whose_signs_cancel(generator):
    """They are flagged, and not normalised into a wrong certainty; the other rows are estimated."""
    backend = qtx.QiskitQuantumBackend("aer", noise=qtx.ParametricNoise(two_qubit=0.3), loader="tree")
    p = rows(200, 8, generator)
    with pytest.warns(qtx.FallbackWarning, match="cancel"):
        result = qtx.CircuitSampler(backend, mitigation=qtx.ProbabilisticErrorCancellation()).measure(
            p, 256, generator=generator
        )
    unknown = result.std_error.isnan().any(-1)
    assert 0 < int(unknown.sum()) < 200
    assert result.estimate[unknown].eq(0).all()
    assert torch.allclose(result.estimate[~unknown].sum(-1), torch.ones((), dtype=torch.float64))
    assert any("cancel" in fallback for fallback in result.diagnostics["fallbacks"])


@pytest.mark.parametrize(
    ("two_qubit", "by_mitiq"),
    [(1e-3, 1.0037572764205642), (0.01, 1.0382374885215802), (0.05, 1.207106994459837)],
)
def test_the_overhead_of_pec_is_that_of_mitiq(two_qubit, by_mitiq):
    """Numbers of mitiq 1.1.0, in an environment of its own, for a CZ: the square of the norm of
    `represent_operation_with_global_depolarizing_noise(circuit, level)`. A level is a probability of a Pauli
    error: 15/16 of `two_qubit`.
    """
    noise = qtx.ParametricNoise(two_qubit=two_qubit)
    backend = qtx.QiskitQuantumBackend("aer", noise=noise, loader="tree")  # of 4 keys: one CZ
    for twirled in (True, False):
        pec = qtx.ProbabilisticErrorCancellation(twirled=twirled)
        assert pec.overhead(backend, 4) == pytest.approx(by_mitiq, rel=1e-12)


def test_pec_works_out_how_many_draws_a_precision_needs(generator):
    """The standard errors keep to it, and fewer shots than it needs are refused before any work."""
    backend = qtx.QiskitQuantumBackend("aer", noise=qtx.ParametricNoise(two_qubit=0.02), loader="tree")
    p = rows(3, 8, generator)
    for precision in (0.05, 0.02):
        pec = qtx.ProbabilisticErrorCancellation(precision=precision)
        needed = pec.count_instances(backend, 8, 100_000)
        assert needed == np.ceil(pec.overhead(backend, 8) / precision**2)
        result = pec.sample_rows(backend, p, needed, generator=generator)
        assert result.diagnostics["instances"] == needed
        assert result.diagnostics["precision"] == precision
        assert float(result.std_error.max()) <= precision
        assert result.diagnostics["mass"].tolist() == pytest.approx([1, 1, 1], abs=0.2)
        with pytest.raises(qtx.ArgumentError, match=rf"precision={precision} needs {needed:,} shots"):
            pec.sample_rows(backend, p, needed - 1, generator=generator)
    counted = [
        qtx.ProbabilisticErrorCancellation().count_instances(backend, 8, n) for n in (64, 4000, 64_000)
    ]
    assert counted == [64, 4000, 64_000]  # anew for each shot
    assert qtx.ProbabilisticErrorCancellation(64).count_instances(backend, 8, 64_000) == 64


def test_pec_warns_where_the_overhead_nears_the_shots(generator):
    noisy = qtx.QiskitQuantumBackend("aer", noise=qtx.ParametricNoise(two_qubit=0.3), loader="tree")
    p = rows(4, 8, generator)
    pec = qtx.ProbabilisticErrorCancellation(128)
    assert pec.overhead(noisy, 8) > 12.8
    with pytest.warns(qtx.FallbackWarning, match="128 shots a row say as much as"):
        pec.sample_rows(noisy, p, 128, generator=generator)
    weak = qtx.QiskitQuantumBackend("aer", noise=qtx.ParametricNoise(two_qubit=0.01), loader="tree")
    with pytest.warns(
        qtx.FallbackWarning, match="300 shots a row do not pay for the mitigation 'readout, pec'"
    ):
        pec.sample_rows(weak, p, 300, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pec.sample_rows(weak, p, 30_000, generator=generator)


def test_pec_flags_rows_that_lost_their_mass():
    """Signed shots that sum to less than half are counted, though their rows are estimated."""
    backend = qtx.QiskitQuantumBackend("aer", noise=qtx.ParametricNoise(two_qubit=0.1), loader="tree")
    pec, p = qtx.ProbabilisticErrorCancellation(1000), torch.full((2, 2), 0.5, dtype=torch.float64)
    counts = torch.tensor([[5, 5]]).expand(2000, 2)
    signs = torch.ones(2000, dtype=torch.float64)
    signs[1000:1400] = -1  # of the second row: its sum is .2
    result = pec.combine_instances(backend, p, counts, signs, None)
    assert result.mass.tolist() == pytest.approx([1, 0.2])
    assert len(result.fallbacks) == 1
    assert "1 of 2 rows sum to less than 0.5" in result.fallbacks[0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"precision": 0}, "between 0 and 1"),
        ({"precision": 1.0}, "between 0 and 1"),
        ({"precision": True}, "precision"),
        ({"precision": float("nan")}, "precision"),
        ({"precision": 0.1, "instances": 10}, "exclude each other"),
        ({"readout": 1}, "readout"),
    ],
)
def test_bad_precisions_are_refused(arguments, error):
    with pytest.raises(qtx.QtxError, match=error):
        qtx.ProbabilisticErrorCancellation(**arguments)


@pytest.mark.statistical
@pytest.mark.parametrize("device", ["fake_fez", "fake_boston"])
def test_the_defaults_help_or_warn(device):
    """With 64,000 shots every default is better than raw counts; with 1,000 it is not worse, or it warns.

    12 rows of 16 keys; errors of 4 repetitions are known to 3 %, and those behind a warning to 5 %. The
    former default, Richardson extrapolation from three levels without readout correction, is worse at both.
    """
    p = synthetic_rows(4)[::2]
    backend = qtx.QiskitQuantumBackend("aer", device, loader="tree")
    rehearsal, rng = Rehearsal(backend, p), np.random.default_rng(0)
    options = [
        qtx.CircuitMitigation(),
        qtx.CircuitMitigation(ZNE()),
        qtx.CircuitMitigation(qtx.SharedDecay()),
        *(MitigationSpec(method=x).build() for x in ("zne", "shared-decay", "corrected-decay")),
    ]
    assert all(option.readout for option in options)
    former = qtx.CircuitMitigation(ZNE([1, 2, 3]), readout=False)
    raw = qtx.CircuitMitigation(readout=False)
    for shots in (64_000, 1_000):
        of_raw = rehearsal.predict(raw, shots, 4, rng).error
        errors = {x: rehearsal.predict(x, shots, 4, rng).error for x in (*options, former)}
        assert errors[former] > 1.1 * of_raw
        assert former.expect(backend, p, shots).warning
        for option in options:
            warning = option.expect(backend, p, shots).warning
            assert not warning or errors[option] > 0.95 * of_raw
            if shots == 64_000:
                assert errors[option] < 0.8 * of_raw
                assert not warning
            elif errors[option] > 1.1 * of_raw:
                assert f"1,000 shots a row do not pay for the mitigation {option.name!r}" in warning


def test_a_warning_says_from_how_many_shots_a_mitigation_pays(generator):
    """At that number it is about as good as raw counts; replicates of the same rows are rehearsed once."""
    backend, option, p = twin(), qtx.CircuitMitigation(ZNE([1, 2, 3])), synthetic_rows(3)
    with pytest.warns(qtx.FallbackWarning, match="do not pay for the mitigation 'readout, richardson 1 2 3"):
        actual = option.sample_rows(backend, p, 2000, generator=generator)
    assert actual.diagnostics["expected_error"] > actual.diagnostics["expected_raw_error"]
    expected = option.expect(backend, p, 2000)
    assert option.expect(backend, p, 2000) is expected
    enough = int(expected.warning.split("about ")[1].split(" shots")[0].replace(",", ""))
    rehearsal, rng = Rehearsal(backend, p), np.random.default_rng(0)
    raw = qtx.CircuitMitigation(readout=False)
    ratio = [rehearsal.predict(x, enough, 8, rng).error for x in (option, raw)]
    assert ratio[0] == pytest.approx(ratio[1], rel=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        option.sample_rows(backend, p[:2], 2000, generator=generator, rehearse=False)
        raw.sample_rows(backend, p[:2], 10, generator=generator)
        ideal = qtx.QiskitQuantumBackend("aer", loader="tree")
        option.sample_rows(ideal, p[:2], 100, generator=generator)


def test_two_copies_without_noise_show_the_row(generator):
    p = rows(3, 8, generator)
    option = qtx.CircuitMitigation(loader=qtx.TwoCopyLoader())
    ideal = option.sample_rows(
        qtx.QiskitQuantumBackend("aer", loader="tree"), p, 400_000, generator=generator
    )
    assert total_variation_distance(ideal.probabilities(), p).max() < 0.01
    with pytest.raises(qtx.ArgumentError):
        qtx.TwoCopyLoader().circuit(4)


def test_two_copies_measure_the_square_of_a_mixed_state(generator):
    """Noise comes after the trees' CZ gates only, so that the swap, made of CX gates, has none."""
    p = rows(3, 4, generator)
    noise = qtx.ParametricNoise(two_qubit=0.2).noise(5)
    loader, tree = qtx.TwoCopyLoader(), qtx.TreeLoader(phase=True)
    q, values = outcome_probabilities(compile_steps(loader.circuit(2), noise), loader.angles(p))
    packed = pack_values(values, 3)
    signed = q * torch.from_numpy(loader.signs(packed, 4))
    keys = torch.from_numpy(loader.keys(packed, 4))
    measured = torch.zeros(3, 4, dtype=torch.float64).index_add(-1, keys, signed)
    rho = density_matrices(compile_steps(tree.circuit(2), noise), tree.angles(p))
    square = (rho @ rho).diagonal(dim1=-2, dim2=-1).real
    assert torch.allclose(measured, square, atol=1e-12)
    pure, mixed = square / square.sum(-1, keepdim=True), rho.diagonal(dim1=-2, dim2=-1).real
    assert (total_variation_distance(pure, p) < 0.7 * total_variation_distance(mixed, p)).all()


def test_rows_of_zeros_and_of_a_single_key(generator):
    p = torch.tensor([[0.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0]])
    for option in (RICHARDSON, OPTIONS["shared"], OPTIONS["pec"]):
        result = option.sample_rows(twin(), p, 5000, generator=generator)
        assert result.probabilities()[0].eq(0).all()
        assert result.discarded[0] == 0
        assert result.probabilities()[2].tolist() == [0, 1, 0]
        empty = option.sample_rows(twin(), p[:1], 5000, generator=generator)
        assert empty.probabilities().eq(0).all()


def test_shared_decay_stays_near_where_rows_say_little(generator):
    """For uniform, single and equal rows and few shots, the error is at most twice that of readout alone."""
    for p in (
        torch.full((5, 8), 1 / 8, dtype=torch.float64),
        rows(1, 8, generator),
        rows(1, 8, generator).expand(9, 8),
    ):
        backend = twin()
        for shots in (50, 2000):
            errors = {}
            for name in ("readout", "shared"):
                errors[name] = np.mean(
                    [
                        total_variation_distance(
                            OPTIONS[name].sample_rows(backend, p, shots, generator=generator).estimate, p
                        ).mean()
                        for _ in range(8)
                    ]
                )
            assert errors["shared"] < 2 * errors["readout"]


def test_calibrations_are_run_for_requests_that_say_what_they_prepare(monkeypatch, tmp_path, generator):
    """What devices keep of rows and levels in the records of jobs is in tests/backends/test_calls.py."""
    monkeypatch.setenv("QTX_LAB_HOME", str(tmp_path))
    backend, requests = twin(), []
    run = type(backend.engine).run
    monkeypatch.setattr(type(backend.engine), "run", lambda *a: requests.append(a[-1]) or run(*a))
    p = rows(3, 8, generator)
    p[1] = 0  # such a row is not run
    RICHARDSON.sample_rows(backend, p, 1000, generator=generator)
    calibrations = [x for x in requests if isinstance(x, CalibrationRequest)]
    assert len(calibrations) + 2 == len(requests) == 4 + 2
    assert {x.prepared for x in calibrations} == {(0, 0, 0), (1, 1, 1), (1, 0, 1), (0, 1, 0)}


def test_sampler_draws_from_mitigated_rows(generator):
    backend = twin()
    p = rows(3, 8, generator, masked=1)
    sampler = qtx.CircuitSampler(backend, mitigation=RICHARDSON)
    draws = sampler.draw(p.log(), 40_000, generator=generator, replicates=4)
    assert draws.indices.shape == (3, 160_000)
    assert torch.allclose(draws.weights.sum(-1), torch.ones(3, dtype=torch.float64))
    dense = draws.dense(8)
    assert (dense[p == 0] == 0).all()
    raw = qtx.CircuitSampler(backend).draw(p.log(), 160_000, generator=generator).dense(8)
    assert total_variation_distance(dense, p).mean() < total_variation_distance(raw, p).mean()
    # Replicates differ as mitigated rows do, which is more than as many independent draws would.
    parts = draws.weights.view(3, 4, -1) * 4
    each = torch.zeros(3, 4, 8, dtype=torch.float64).scatter_add_(-1, draws.indices.view(3, 4, -1), parts)
    assert (each.var(1).mean() > 1.5 * (p * (1 - p)).mean() / 40_000).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hybrid = qtx.CircuitSampler(backend, mitigation=RICHARDSON, hybrid_mode=True)
        assert hybrid.measure(p, 5000, generator=generator).estimate is not None


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: qtx.CircuitMitigation(ZNE([0, 1, 2])), "answer itself"),
        (lambda: qtx.CircuitMitigation(ZNE([0.5, 1])), "no folding goes below"),
        (lambda: qtx.CircuitMitigation("richardson"), "ZeroNoiseExtrapolation"),
        (lambda: qtx.CircuitMitigation(scaling="globl"), "scaling"),
        (lambda: qtx.CircuitMitigation(loader="treee"), "loader"),
        (lambda: qtx.ProbabilisticErrorCancellation(0), "instances"),
        (lambda: qtx.ProbabilisticErrorCancellation(1), "at least 2"),
        (lambda: RICHARDSON.sample_rows("aer", torch.ones(1, 2) / 2, 10), "backend"),
        (lambda: RICHARDSON.sample_rows(twin(), torch.ones(1, 2), 10), "sums to"),
        (lambda: RICHARDSON.sample_rows(twin(), torch.ones(1, 2) / 2, 1), "shots"),
        (lambda: RICHARDSON.sample_rows(twin("dynamic"), torch.ones(1, 4) / 4, 10), "before its end"),
        (lambda: OPTIONS["two-qubit"].sample_rows(twin(), torch.ones(1, 2) / 2, 10), "too few gates"),
        (lambda: RICHARDSON.sample_rows(twin("unary"), torch.ones(1, 32) / 32, 10), "bits"),
    ],
)
def test_what_cannot_be_done_is_refused(make, error):
    with pytest.raises(qtx.QtxError, match=error):
        make()


def test_a_level_of_0_warns(generator):
    option = qtx.CircuitMitigation(ZNE([0, 1]), scaling="model")
    p = rows(2, 4, generator)
    with pytest.warns(qtx.FallbackWarning, match="the answer itself"):
        result = option.sample_rows(twin(), p, 100_000, generator=generator)
    assert total_variation_distance(result.probabilities(), p).max() < 0.01


def test_a_row_whose_shots_are_all_discarded_is_zero():
    noise = qtx.ParametricNoise(readout=0.45)
    backend = qtx.QiskitQuantumBackend("aer", noise=noise, loader="unary")
    p = torch.full((40, 3), 1 / 3)
    result = qtx.CircuitMitigation(readout=False).sample_rows(
        backend, p, 1, generator=torch.Generator().manual_seed(0)
    )
    lost = result.counts.sum(-1) == 0
    assert bool(lost.any())
    assert result.estimate[lost].eq(0).all()
    assert result.std_error[lost].isnan().all()
    assert torch.allclose(result.estimate[~lost].sum(-1), torch.ones((), dtype=torch.float64))


def test_backends_of_noise_levels_follow_a_change_of_the_engine():
    """They are made once for a backend, but anew when its engine is replaced."""
    mitigation = qtx.CircuitMitigation(qtx.ZeroNoiseExtrapolation([1, 3], "linear"))
    strong, weak = (
        qtx.QiskitQuantumBackend("aer", noise=qtx.ParametricNoise(two_qubit=x), loader="tree")
        for x in (0.1, 0.002)
    )
    before = mitigation.construct_backends(weak)
    weak.engine = strong.engine
    assert mitigation.construct_backends(weak)[1].engine is not before[1].engine
