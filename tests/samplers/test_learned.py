"""The learned sampler: a distribution to draw from, honest about its bias, better than a random
projection.
"""

import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import qtx_lab as qtx
from qtx_lab.errors import ArgumentError, DtypeError, ShapeError, StorageError
from qtx_lab.models.reference import load_reference_model
from qtx_lab.models.text import encode, reference_text
from qtx_lab.problem import AttentionProblem
from qtx_lab.samplers import learned, learned_proposal
from qtx_lab.samplers.learned import LearnedImportanceSampler
from qtx_lab.samplers.learned_estimators import allocate
from qtx_lab.samplers.learned_proposal import best_low_rank

FALSE_ALARM = 1e-6


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of small operations: on a shared machine, threads wait for each other longer than they
    work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def inputs(*lead, length=24, keys=24, features=8, kv_lead=None, seed=5, dtype=torch.float32):
    g = seeded(seed)
    kv_lead = lead if kv_lead is None else kv_lead
    q = 1.5 * torch.randn(*lead, length, features, generator=g)
    k = torch.randn(*kv_lead, keys, features, generator=g)
    v = torch.randn(*kv_lead, keys, 5, generator=g) + 1
    return q.to(dtype), k.to(dtype), v.to(dtype)


@functools.cache
def fitted(features=8, heads=1, **options):
    q, k, v = inputs(2, heads, features=features, seed=99)
    sampler = LearnedImportanceSampler(features, features // 2, heads, **options)
    sampler.fit(q, k, v, steps=5, seed=0, progress=False)
    return sampler


# --- The proposal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("fit", [False, True])
def test_the_proposal_is_a_distribution_with_bounded_weights(is_causal, fit):
    sampler = fitted() if fit else LearnedImportanceSampler(8)
    q, k, _ = inputs(2, 3)
    proposal = sampler.proposal(100 * q, k, is_causal=is_causal)
    assert torch.allclose(proposal.sum(-1), torch.ones(2, 3, 24), atol=1e-5)
    seen = torch.ones(24, 24).tril().bool() if is_causal else torch.ones(24, 24).bool()
    assert proposal.masked_select(~seen).eq(0).all()
    count = seen.sum(-1, keepdim=True)
    assert bool(((proposal >= 0.02 / count - 1e-7) | ~seen).all())  # so p / q <= n / 0.02
    assert bool(sampler.chi_square(100 * q, k, is_causal=is_causal).le(24 / 0.02).all())


def test_chi_square_is_its_definition():
    q, k, _ = inputs(2, 3)
    sampler = fitted()
    p = torch.softmax(q @ k.mT / 8**0.5, -1)
    expected = (p.square() / sampler.proposal(q, k)).sum(-1) - 1
    assert torch.allclose(sampler.chi_square(q, k), expected, atol=1e-4)


def test_best_low_rank_is_best():
    """Its squared error is the sum of the squared singular values cut off, and no perturbation is better."""
    q, k, _ = inputs(1, length=200, keys=100, dtype=torch.float64)
    k = k + 3.0
    centred = k - k.mean(1, keepdim=True)

    def error(a, b):
        return (q @ centred.mT - (q @ a) @ (centred @ b).mT).square().mean()

    a, b = best_low_rank(q, k, 3)
    s = torch.linalg.svdvals(q @ centred.mT / (200 * 100) ** 0.5)
    assert error(a, b) == pytest.approx(float(s[:, 3:].square().sum()), rel=1e-9)
    for seed in range(5):
        noise = 0.01 * torch.randn(2, *a.shape, generator=seeded(seed), dtype=a.dtype)
        assert error(a + noise[0], b + noise[1]) > error(a, b)


def test_a_proposal_of_full_information_is_exact():
    """Keys of rank 4 and a proposal of rank 4: q = p but for the defensive part."""
    q, k, _ = inputs(2)
    k[..., 4:] = 0
    sampler = LearnedImportanceSampler(8, 4)
    assert bool(sampler.chi_square(q, k).lt(0.021).all())


# --- Estimates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", ["monte-carlo", "systematic"])
@pytest.mark.parametrize("estimator", ["self-normalised", "plain", "debiased"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_an_estimate_is_made_of_its_draws(estimator, points, is_causal):
    q, k, v = inputs(2, 4, kv_lead=(2, 2))
    options = {"is_causal": is_causal, "enable_gqa": True, "estimator": estimator}
    est = fitted(heads=2, points=points).estimate(q, k, v, 6, replicates=3, generator=seeded(0), **options)
    assert est.output.shape == est.std_error.shape == (2, 4, 24, 5)
    assert est.draws.weights.isfinite().all()
    assert est.std_error.isfinite().all()
    weights = est.attention_weights()
    assert torch.allclose(est.output, weights @ v.repeat_interleave(2, 1), atol=1e-4)
    if is_causal:
        assert weights.triu(1).eq(0).all()
        assert torch.allclose(est.output[..., 0, :], v.repeat_interleave(2, 1)[..., 0, :], atol=1e-5)
    if estimator != "plain":
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 24), atol=1e-4)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    many = fitted(heads=2, points=points).estimate(q, k, v, 400, generator=seeded(0), **options)
    assert torch.allclose(many.output, exact, atol=0.5)


def masks(kind):
    """A mask of (2, 4, 24, 24) of a kind, and as a float mask; query 3 of head 1 sees nothing."""
    g = seeded(8)
    seen = torch.rand(2, 1, 24, 24, generator=g) < 0.6
    seen[..., 3, :] = False
    mask = seen if kind == "bool" else torch.randn(2, 1, 24, 24, generator=g).masked_fill(~seen, -torch.inf)
    return mask.expand(2, 4, 24, 24)


@pytest.mark.parametrize("estimator", ["self-normalised", "plain"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_are_attended_to(kind, estimator):
    """So many systematic draws that every visible key is sure to be drawn: the estimate is exact."""
    q, k, v = inputs(2, 4, kv_lead=(2, 2), dtype=torch.float64)
    mask = masks(kind) if kind == "bool" else masks(kind).double()
    options = {"attn_mask": mask, "enable_gqa": True}
    exact = F.scaled_dot_product_attention(q, k, v, **options)
    exact[..., 3, :] = 0
    sampler = fitted(heads=2)
    est = sampler.estimate(q, k, v, 50 * 24, estimator=estimator, generator=seeded(0), **options)
    assert torch.allclose(est.output, exact, atol=1e-9)
    if estimator == "self-normalised":
        assert est.std_error.lt(1e-6).all()
        assert torch.allclose(sampler(q, k, v, 200 * 24, generator=seeded(0), **options), exact, atol=1e-2)
    few = sampler.estimate(q, k, v, 4, estimator=estimator, replicates=2, generator=seeded(0), **options)
    assert few.std_error.isfinite().all()
    assert few.std_error[..., 3, :].eq(0).all()
    hidden = mask.logical_not() if kind == "bool" else mask == -torch.inf
    assert few.attention_weights()[hidden].eq(0).all()


def test_a_proposal_knows_masks():
    q, k, _ = inputs(2, 4, kv_lead=(2, 2))
    sampler = fitted(heads=2)
    proposal = sampler.proposal(q, k, attn_mask=masks("float"), enable_gqa=True)
    seen = masks("float") > -torch.inf
    assert proposal[~seen].eq(0).all()
    assert torch.allclose(proposal.sum(-1), seen.any(-1).float(), atol=1e-5)
    chi = sampler.chi_square(q, k, attn_mask=masks("float"), enable_gqa=True)
    assert bool(chi.isfinite().all())
    causal = torch.ones(24, 24, dtype=torch.bool).tril()
    given, built_in = (
        sampler.proposal(q, k, enable_gqa=True, **x) for x in ({"attn_mask": causal}, {"is_causal": True})
    )
    assert torch.allclose(given, built_in, atol=1e-6)


def test_without_a_size_it_is_built_for_the_call():
    """What a name alone makes: the best map of the call's own keys, and a size from the first fit on."""
    q, k, v = inputs(2)
    sampler = qtx.make_sampler("learned")
    first, second = (
        x.estimate(q, k, v, 8, generator=seeded(0)) for x in (sampler, LearnedImportanceSampler(8))
    )
    assert torch.equal(first.output, second.output)
    assert "not fitted" in first.diagnostics["fallbacks"][0]
    assert sampler.estimate(q[..., :4], k[..., :4], v, 8).output.shape == v.shape
    sampler.fit(q, k, steps=1, seed=0, progress=False)
    assert (sampler.embed_dim, sampler.rank) == (8, 4)
    with pytest.raises(ShapeError, match="embed_dim=8"):
        sampler.estimate(q[..., :4], k[..., :4], v, 8)
    with pytest.raises(ArgumentError, match="embed_dim=1"):
        qtx.make_sampler("learned").estimate(q[..., :1], k[..., :1], v, 8)


def repeated(sampler, q, k, v, count, repetitions, seed, attn_mask=None, **options):
    """z-scores^2 summed: chi^2 of E[output] = exact over coordinates made independent (Hotelling's T^2)."""
    g = seeded(seed)
    double = None if attn_mask is None else attn_mask.double()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=double)[0]
    options["attn_mask"] = attn_mask
    rows = q.expand(1, repetitions // 4, -1)
    outputs = torch.cat(
        [sampler.estimate(rows, k, v, count, generator=g, **options).output[0] for _ in range(4)]
    ).double()
    difference = outputs.mean(0) - exact[0]
    covariance = outputs.T.cov() / repetitions
    return float(stats.chi2.sf(float(difference @ torch.linalg.solve(covariance, difference)), v.shape[-1]))


@pytest.mark.statistical
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("estimator", "points"),
    [("plain", "monte-carlo"), ("plain", "systematic"), ("debiased", "monte-carlo")],
)
def test_unbiased(estimator, points, masked, seed):
    """100,000 repetitions of 3 draws from 12 keys; false alarms once in a million."""
    q, k, v = inputs(1, length=1, keys=12)
    mask = torch.linspace(-2, 1, 12)[None].masked_fill(torch.arange(12) == 7, -torch.inf) if masked else None
    p = repeated(fitted(points=points), q, k, v[..., :3], 3, 100_000, seed, mask, estimator=estimator)
    assert p > FALSE_ALARM


@pytest.mark.statistical
@pytest.mark.parametrize("points", ["monte-carlo", "systematic"])
def test_the_bias_of_self_normalising_is_caught(points, seed):
    """The same test with the same power: 3 draws are too few for a ratio."""
    q, k, v = inputs(1, length=1, keys=12)
    assert repeated(fitted(points=points), q, k, v[..., :3], 3, 100_000, seed) < FALSE_ALARM


@pytest.mark.statistical
def test_the_bias_is_the_documented_one(seed):
    """-(1/S) sum_j (p_j^2 / q_j) (v_j - o) to leading order, where each key is rarely drawn."""
    n, size = 512, 16
    g = seeded(seed)
    q, k = 0.4 * torch.randn(1, 1, 8, generator=g), torch.randn(1, n, 8, generator=g)
    v = (q * k).sum(-1, keepdim=True)  # a value that goes with the logit: a large bias
    sampler = LearnedImportanceSampler(8, 1, points="monte-carlo")
    sampler.fit(q, k, steps=0, initialise="random", seed=3, progress=False)
    p, proposal = (q @ k.mT / 8**0.5).softmax(-1), sampler.proposal(q, k)
    o = p @ v
    expected = -((p.square() / proposal).unsqueeze(-1).squeeze(1) * (v - o)).sum(1) / size
    outputs = sampler.estimate(q.expand(1, 40_000, 8), k, v, size, generator=g).output
    bias, se = (outputs - o).mean().item(), outputs.std().item() / 200
    assert abs(expected.item()) > 10 * se  # enough power
    assert bias == pytest.approx(expected.item(), rel=0.2, abs=4 * se)


def test_plain_takes_the_normaliser(generator):
    q, k, v = inputs(2, 3)
    z = (q @ k.mT / 8**0.5).logsumexp(-1)
    sampler = fitted()
    given, computed = (
        sampler.estimate(q, k, v, 4, estimator="plain", log_normaliser=x, generator=seeded(1))
        for x in (z, None)
    )
    assert torch.allclose(given.output, computed.output, atol=1e-5)
    p = torch.softmax(q @ k.mT / 8**0.5, -1)
    assert torch.allclose(computed.draws.probabilities, p.gather(-1, computed.draws.indices), atol=1e-5)


def test_exact_logits_only_at_the_drawn_keys(monkeypatch):
    """S logits a row and no more; the function that forms them all is not called."""
    asked = []
    exact = AttentionProblem.logits_at

    def count(self, row, indices):
        asked.append(indices.numel())
        return exact(self, row, indices)

    whole = AttentionProblem.logits

    def refuse(self, *block):
        assert self.q.shape[-1] < 8, "all exact logits were formed"  # the proposal has rank 4 at most
        return whole(self, *block)

    sampler = fitted()
    monkeypatch.setattr(AttentionProblem, "logits_at", count)
    monkeypatch.setattr(AttentionProblem, "logits", refuse)
    q, k, v = inputs(2, 3, keys=400)
    sampler.estimate(q, k, v, 4, generator=seeded(0))
    assert sum(asked) == 2 * 3 * 24 * 4
    sinks = torch.zeros(3)  # they need no more: the sum over keys is estimated
    qtx.sampled_attention(q, k, v, sampler=sampler, num_samples=4, sinks=sinks, generator=seeded(0))
    assert sum(asked) == 2 * 2 * 3 * 24 * 4
    sampler(q, k, v, 4, generator=seeded(0))


@pytest.mark.parametrize("size", [30.0, 300.0, 3e3, 3e4])
@pytest.mark.parametrize("sink", [-1e4, 5.0, 300.0, 3e3, 1e5])
def test_an_error_bar_of_zero_is_exact_beside_a_sink(size, sink):
    """Where a sink leaves the drawn keys no weight in float32, keys that were not drawn may have it all."""
    g = seeded(7)
    q, k, v = size * torch.randn(1, 4, 32, 8, generator=g), *torch.randn(2, 1, 4, 64, 8, generator=g)
    sampler = LearnedImportanceSampler(8, rank=4)
    sampler.fit(q, k, steps=0, seed=0, progress=False)
    sinks = torch.full((4,), sink)
    exact = qtx.sampled_attention(q, k, v, sampler="exact", sinks=sinks).output
    for replicates in (1, 4):
        estimate = qtx.sampled_attention(
            q, k, v, sampler=sampler, num_samples=8, replicates=replicates, sinks=sinks, generator=g
        )
        wrong = (estimate.output - exact).abs() > 1e-5
        assert (estimate.std_error[wrong] > 0).all()
        assert estimate.output.isfinite().all()
        assert not estimate.reliability.isnan().any()


@pytest.mark.parametrize("estimator", ["self-normalised", "debiased"])
def test_same_seed_same_bits_whatever_the_blocks(estimator, monkeypatch):
    q, k, v = inputs(3, 2)
    sampler = fitted()
    first, again, other = (
        sampler.estimate(q, k, v, 5, estimator=estimator, replicates=2, generator=seeded(s)).output
        for s in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    if estimator == "self-normalised":
        monkeypatch.setattr(learned_proposal, "BLOCK_ELEMENTS", 1000)
        cut = sampler.estimate(q, k, v, 5, replicates=2, generator=seeded(7))
        assert torch.allclose(cut.output, first, atol=1e-5)
        assert cut.std_error.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 8), (0, 4, 8), (2, 0, 8), (2, 1, 3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_and_dtypes(shape, dtype):
    q = torch.randn(shape, generator=seeded(0)).to(dtype)
    k = v = torch.randn(*shape[:-2], 6, 8, generator=seeded(1)).to(dtype)
    sampler = LearnedImportanceSampler(embed_dim=8)
    for estimator in learned.ESTIMATORS:
        est = sampler.estimate(q, k, v, 3, estimator=estimator, replicates=2, generator=seeded(0))
        assert est.output.shape == est.std_error.shape == shape
        assert est.output.dtype == dtype
        assert est.draws.indices.shape[:-1] == shape[:-1]
        assert "not fitted" in est.diagnostics["fallbacks"][0]
    assert sampler.forward(q, k, v, base_num_samples=3).shape == shape


def test_forward_spends_its_budget_where_it_helps(seed):
    """Half of the rows peaked, half diffuse: at equal mean budget the summed squared error falls."""
    g = seeded(seed)
    q = torch.randn(1, 400, 8, generator=g)
    q[:, ::2] *= 8
    k, v = torch.randn(1, 300, 8, generator=g), torch.randn(1, 300, 4, generator=g)
    k[..., 4:] = 0  # so that the proposal is close on the peaked rows too
    sampler = LearnedImportanceSampler(8, 4)
    counts = allocate(sampler._propose(AttentionProblem.of(q, k, v)), 16)
    assert 15 < counts.double().mean() <= 16
    assert counts.min() >= 2
    assert counts.max() <= 64
    assert counts[:, ::2].double().mean() < counts[:, 1::2].double().mean()
    exact = F.scaled_dot_product_attention(q, k, v)
    adaptive = sampler(q, k, v, base_num_samples=16, generator=g)
    fixed = sampler.estimate(q, k, v, 16, generator=g).output
    assert (adaptive - exact).square().sum() < (fixed - exact).square().sum()


def test_debiased_reports_what_it_spent(generator):
    q, k, v = inputs(40, length=100)
    est = fitted().estimate(q, k, v, 4, estimator="debiased", generator=generator)
    assert est.std_error is None
    spent = est.diagnostics["draws_of_each_row"]
    assert spent.double().mean() == pytest.approx(est.diagnostics["draws_per_row"])
    assert est.diagnostics["draws_per_row"] == pytest.approx(4 * 2.2, rel=0.2)


def test_draw_keeps_the_protocol(generator):
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf] * 3])
    draws = LearnedImportanceSampler(8).draw(logits, 4, replicates=2, generator=generator)
    assert draws.weights[1].eq(0).all()
    assert not draws.indices[0].eq(1).any()
    assert LearnedImportanceSampler.name == "learned"


# --- Training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attention():
    """(train, test) Q, K, V of a middle layer of the reference model, on different windows of its text."""
    tokens = encode(reference_text())[:30_000].unfold(0, 192, 192)[:15]
    layer = load_reference_model().attention_inputs(tokens)[3]
    return [tuple(x[part] for x in layer) for part in (slice(0, 10), slice(11, 15))]


CAUSAL = {"is_causal": True, "enable_gqa": True}


@pytest.mark.statistical
def test_fitted_beats_random_projections_and_nears_exact_logits(attention, seed):
    """Rank d / 2 on windows it was not fitted on: error <= 1.1 x exact-logit i.i.d. draws, chi^2 halved."""
    (q, k, v), (qt, kt, vt) = attention
    sampler, random = LearnedImportanceSampler(32, 16, 2), LearnedImportanceSampler(32, 16, 2)
    history = sampler.fit(q, k, v, steps=60, batch_rows=64, seed=seed, progress=False, **CAUSAL)
    random.fit(q, k, steps=0, initialise="random", seed=seed, progress=False, **CAUSAL)
    assert min(history.objective) < history.objective[0]
    chi = [s.chi_square(qt, kt, **CAUSAL) for s in (sampler, random)]
    assert chi[0].mean() < chi[1].mean() / 2
    assert chi[0].median() < chi[1].median() / 2

    exact = F.scaled_dot_product_attention(qt, kt, vt, **CAUSAL)
    g = seeded(seed)
    ours = sampler.estimate(qt, kt, vt, 16, generator=g, **CAUSAL)
    iid = qtx.sampled_attention(qt, kt, vt, sampler="monte-carlo", num_samples=16, generator=g, **CAUSAL)
    error = [(est.output - exact)[..., 16:, :].square().mean().sqrt() for est in (ours, iid)]
    assert error[0] < 1.1 * error[1]
    low, high = ours.confidence_interval(0.95)
    assert 0.9 < ((low <= exact) & (exact <= high))[..., 16:, :].double().mean() < 0.99


def test_fit_improves_chi_square_without_values_too(attention):
    (q, k, _), _ = attention
    sampler = LearnedImportanceSampler(32)
    history = sampler.fit(q[:4], k[:4], steps=40, batch_rows=32, seed=0, progress=False, **CAUSAL)
    assert min(history.objective) < history.objective[0]
    assert history.objective == pytest.approx(history.chi_square, abs=1e-6)
    assert history.steps == (0, 10, 20, 30, 40)


@pytest.mark.parametrize("kind", ["event", "function"])
def test_cancel_keeps_the_best_so_far(kind):
    q, k, _ = inputs(2)
    asked = []
    event = threading.Event()

    def after_three():
        asked.append(1)
        return len(asked) > 3

    if kind == "event":
        event.set()
    sampler = LearnedImportanceSampler(8)
    cancel = event if kind == "event" else after_three
    history = sampler.fit(q, k, steps=10_000, seed=0, progress=False, cancel=cancel)
    assert history.cancelled
    assert len(asked) in (0, 4)
    a, _ = best_low_rank(q.flatten(0, 1)[None], k.flatten(0, 1)[None], 4)
    assert torch.allclose(sampler.query_map, a)  # nothing better was found before step 10
    assert not LearnedImportanceSampler(8).fit(q, k, steps=1, progress=False).cancelled


def test_fit_shows_progress(capsys):
    q, k, _ = inputs(2)
    LearnedImportanceSampler(8).fit(q, k, steps=2, seed=0)
    assert "fitting the proposal" in capsys.readouterr().err


def test_same_seed_same_fit():
    q, k, v = inputs(2, 2)
    a, b = (LearnedImportanceSampler(8, num_heads=2) for _ in range(2))
    a.fit(q, k, v, steps=12, seed=4, progress=False)
    b.fit(q, k, v, steps=12, generator=seeded(4), progress=False)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert a.history == b.history


def test_save_and_load_give_the_same_draws(tmp_path):
    q, k, v = inputs(2, 3)
    sampler = fitted(points="monte-carlo", defensive=0.1)
    sampler.save(tmp_path / "sampler.safetensors")
    loaded = LearnedImportanceSampler.load(tmp_path / "sampler.safetensors")
    assert loaded.history == sampler.history
    assert repr(loaded) == repr(sampler)
    first, second = (s.estimate(q, k, v, 8, generator=seeded(0)) for s in (sampler, loaded))
    assert torch.equal(first.output, second.output)
    assert torch.equal(first.draws.indices, second.draws.indices)
    assert second.diagnostics["fallbacks"] == ()


def test_bad_files_are_one_clear_error(tmp_path):
    (tmp_path / "no").write_text("not safetensors")
    for name in ("no", "missing"):
        with pytest.raises(ArgumentError, match=f"{name}.*does not hold a learned sampler"):
            LearnedImportanceSampler.load(tmp_path / name)
    with pytest.raises(StorageError, match="cannot be written"):
        fitted().save(tmp_path / "no folder" / "x")


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"embed_dim": 1}, "embed_dim=1"),
        ({"embed_dim": 2.5}, r"embed_dim=2\.5"),
        ({"embed_dim": 8, "rank": 5}, r"rank=5.*1\.\.4"),
        ({"embed_dim": 8, "rank": 0}, "rank=0"),
        ({"embed_dim": 8, "num_heads": 0}, "num_heads=0"),
        ({"embed_dim": 8, "points": "sistematic"}, "Did you mean 'systematic'"),
        ({"embed_dim": 8, "defensive": 0}, "defensive=0"),
    ],
)
def test_bad_settings_are_one_clear_error(options, match):
    with pytest.raises(ArgumentError, match=match):
        LearnedImportanceSampler(**options)


Q = torch.zeros(2, 4, 8)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q": torch.zeros(2, 4, 7), "k": torch.zeros(2, 4, 7)}, ShapeError, r"embed_dim=8.*q \(2, 4, 7\)"),
        ({"v": torch.zeros(2, 5, 8)}, ShapeError, "k and v must agree"),
        ({"q": Q + torch.nan}, ArgumentError, "q holds NaN"),
        ({"attn_mask": torch.ones(3)}, ShapeError, r"attn_mask has shape \(3,\)"),
        ({"num_samples": 0}, ArgumentError, "num_samples=0"),
        ({"replicates": True}, ArgumentError, "replicates=True"),
        ({"scale": float("nan")}, ArgumentError, "scale=nan"),
        ({"estimator": "plane"}, ArgumentError, "Did you mean 'plain'"),
        ({"generator": 3}, DtypeError, "generator is a int"),
        ({"log_normaliser": torch.zeros(2, 4)}, ArgumentError, "estimator='plain' only"),
        ({"log_normaliser": torch.zeros(2, 3), "estimator": "plain"}, ShapeError, r"\(2, 3\).*\(2, 4\)"),
    ],
)
def test_bad_input_is_one_clear_error(change, error, match):
    with pytest.raises(error, match=match):
        LearnedImportanceSampler(8).estimate(**{"q": Q, "k": Q, "v": Q, **change})


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"steps": -1}, ArgumentError, "steps=-1"),
        ({"lr": 0}, ArgumentError, "lr=0"),
        ({"initialise": "svd"}, ArgumentError, "initialise='svd'.*low-rank"),
        ({"seed": 1, "generator": seeded(1)}, ArgumentError, "exclude each other"),
        ({"cancel": 1}, DtypeError, "cancel is a int"),
        ({"Q": Q[:, :0]}, ShapeError, "at least one row"),
    ],
)
def test_bad_fit_is_one_clear_error(change, error, match):
    sampler = LearnedImportanceSampler(8)
    with pytest.raises(error, match=match):
        sampler.fit(**{"Q": Q, "K": Q, "progress": False, **change})
    assert not sampler.fitted


def test_heads_must_fit():
    with pytest.raises(ShapeError, match="num_heads=3"):
        LearnedImportanceSampler(8, num_heads=3).estimate(Q, Q, Q)


@pytest.mark.parametrize("estimator", ["self-normalised", "plain", "debiased"])
def test_weights_sum_to_one_beside_huge_logits(estimator):
    """Next to a logit of 1e8, a float32 loses the logarithm of how often a key was drawn."""
    q, k = torch.full((1, 6, 4), 1e4), torch.full((1, 1, 4), 5e3)
    v = torch.randn(1, 1, 3, generator=seeded(0))
    est = LearnedImportanceSampler().estimate(
        q, k, v, 7, estimator=estimator, replicates=3, generator=seeded(1)
    )
    torch.testing.assert_close(est.output, v.expand(1, 6, 3))


@pytest.mark.statistical
@pytest.mark.parametrize("replicates", [2, 4])
@pytest.mark.parametrize("estimator", ["plain", "debiased"])
@pytest.mark.parametrize("kind", ["outlier", "one-hot", "equal"])
def test_error_bars_know_of_values_that_no_replicate_has_drawn(kind, estimator, replicates):
    q, k, v, n, rows = (
        torch.randn(6, generator=seeded(1)),
        *torch.randn(2, 300, 6, generator=seeded(2)),
        300,
        300,
    )
    q, k[5] = 2 * q, 3 * q  # one key has most of the probability
    if kind == "outlier":
        v[9] = 1000
    elif kind == "one-hot":
        v = F.one_hot(torch.arange(n) % 6, 6).float()
    else:
        v = v[:1].expand(n, 6)
    est = LearnedImportanceSampler(points="monte-carlo").estimate(
        q.expand(1, rows, 6),
        k[None],
        v[None],
        8,
        estimator=estimator,
        replicates=replicates,
        generator=seeded(3),
    )
    expected = (k.double() @ q.double() / 6**0.5).softmax(-1) @ v.double()
    low, high = est.confidence_interval(0.95)
    slack = 1e-6 * float(v.abs().max())
    covered = ((low[0] <= expected + slack) & (expected - slack <= high[0])).all(-1)
    assert float((covered | ~est.reliable[0]).double().mean()) > 0.9
    off = (est.output[0] - expected).abs() > 10 * slack
    assert not bool((off & (est.std_error[0] == 0)).any())
