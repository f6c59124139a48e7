"""Every sampler keeps the interface of `qtx_lab.samplers.base.Sampler`."""

import pytest
import torch

import qtx_lab as qtx
from qtx_lab.problem import AttentionProblem
from qtx_lab.samplers import SAMPLERS, Budget, SystematicSampler
from qtx_lab.streams import Stream

NAMES = sorted(SAMPLERS)


@pytest.fixture(params=NAMES)
def sampler(request):
    return qtx.make_sampler(request.param)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 0, 7), (2, 3, 5, 130)])
def test_shapes_dtypes_and_weights(sampler, shape):
    logits = torch.randn(shape, generator=seeded(1))
    draws = sampler.draw(logits, 5, generator=seeded(0), replicates=3)
    total = 3 * (shape[-1] if sampler.name == "exact" else 5)
    assert draws.indices.shape == draws.weights.shape == draws.probabilities.shape == (*shape[:-1], total)
    assert draws.indices.dtype == torch.int64
    assert draws.weights.dtype == logits.dtype
    assert draws.replicates == 3
    assert torch.allclose(draws.weights.sum(-1), torch.ones(shape[:-1]), atol=1e-6)
    p = logits.softmax(-1)
    assert torch.allclose(draws.probabilities, p.gather(-1, draws.indices), atol=1e-6)
    if logits.numel():
        assert torch.allclose(draws.dense(shape[-1]).sum(-1), torch.ones(shape[:-1]), atol=1e-5)


def test_masked_keys_are_never_drawn(sampler):
    g = seeded(2)
    logits = torch.randn(2000, 40, generator=g)
    mask = torch.rand(2000, 40, generator=g) < 0.7
    mask[:, 11] = False
    logits = logits.masked_fill(mask, -torch.inf)
    logits[:, 11] = -200.0  # all but impossible, yet the last resort of a row where all else is masked
    draws = sampler.draw(logits, 16, generator=g)
    assert bool((logits.gather(-1, draws.indices)[draws.weights > 0] > -torch.inf).all())


@pytest.mark.parametrize("point", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval(point):
    """The first point is the first key of positive mass, the last one the last; masked ones lie outside."""
    from qtx_lab.samplers.inversion import invert, row_masses

    logits = torch.tensor([[-torch.inf, 0.3, -1.0, 2.0, -torch.inf], [5.0, -torch.inf, 0, 0, 0]])
    drawn, _ = invert(row_masses(logits), torch.full((2, 1), point, dtype=torch.float64))
    assert drawn.squeeze(-1).tolist() == ([1, 0] if point == 0 else [3, 4])


def test_an_all_masked_row_has_no_weight(sampler):
    logits = torch.zeros(3, 4)
    logits[1] = -torch.inf
    draws = sampler.draw(logits, 6, generator=seeded(0), replicates=2)
    assert draws.weights[1].eq(0).all()
    assert draws.weights[0].sum() == pytest.approx(1)
    assert draws.effective_sample_size()[1] == 0
    assert not draws.probabilities.isnan().any()


def test_same_seed_same_bits(sampler):
    logits = torch.randn(50, 300, generator=seeded(3))
    first, second, other = (
        sampler.draw(logits, 16, generator=seeded(s), replicates=2).indices for s in (7, 7, 8)
    )
    assert torch.equal(first, second)
    assert sampler.name == "exact" or not torch.equal(first, other)


def test_extreme_logits(sampler):
    logits = torch.tensor([[1e30, -1e30, 0.0], [-3e38, -3e38, -3e38], [88.0, 89.0, -1e5]])
    draws = sampler.draw(logits, 64, generator=seeded(0))
    dense = draws.dense(3)
    assert dense[0].tolist() == [1, 0, 0]
    assert torch.allclose(dense[1], torch.full((3,), 1 / 3), atol=0.2)
    assert dense[2, 2] == 0


@pytest.mark.parametrize(
    ("logits", "count", "replicates", "match"),
    [
        (torch.zeros(4), 0, 1, "num_samples=0"),
        (torch.zeros(4), -3, 1, "num_samples=-3"),
        (torch.zeros(4), 2.5, 1, r"num_samples=2\.5"),
        (torch.zeros(4), True, 1, "num_samples=True"),
        (torch.zeros(4), 4, 0, "replicates=0"),
        (torch.zeros(3, 0), 4, 1, "at least|n >= 1"),
        (torch.tensor([0.0, torch.nan]), 4, 1, "NaN"),
        (torch.tensor([0.0, torch.inf]), 4, 1, "inf"),
    ],
)
def test_bad_input_is_one_clear_error(sampler, logits, count, replicates, match):
    with pytest.raises(qtx.ArgumentError, match=match):
        sampler.draw(logits, count, replicates=replicates)


@pytest.mark.parametrize(
    "logits", [torch.zeros(4, dtype=torch.float16), torch.zeros(4, dtype=torch.int64), [0.0]]
)
def test_bad_dtype_is_one_clear_error(sampler, logits):
    with pytest.raises(qtx.DtypeError, match="float32 or float64"):
        sampler.draw(logits, 4)


def test_unknown_name_offers_the_nearest():
    with pytest.raises(qtx.ArgumentError, match="Did you mean 'systematic'"):
        qtx.make_sampler("sistematic")


def test_docstrings_state_bias_variance_and_source(sampler):
    text = type(sampler).__doc__.lower()
    assert "variance" in text
    assert sampler.name == "exact" or "unbiased" in text


def masks(n, L, kind):
    """The options of a problem whose queries see keys in one way or another."""
    rows, keys = torch.arange(n - L, n)[:, None], torch.arange(n)
    return {
        "all": {},
        "causal": {"is_causal": True, "first_position": n - L},
        "causal as a mask": {"attn_mask": keys <= rows},
        "padded": {"attn_mask": keys >= 70},
        "window": {"attn_mask": (keys <= rows) & (keys > rows - 130)},
        "any": {"attn_mask": torch.rand(L, n, generator=seeded(5)) < 0.99},
    }[kind]


@pytest.mark.parametrize("kind", ["all", "causal", "causal as a mask", "padded", "window", "any"])
@pytest.mark.parametrize("n", [50, 333])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("exact", "learned")])
def test_a_row_draws_alike_however_it_is_asked_for(name, n, kind, monkeypatch):
    """By `draw_from`, by `estimate_rows` in one block and in many, and alone.

    Learned proposals of logits are others than those of queries and keys.
    """
    sampler = qtx.make_sampler(name)
    L, S = 9, 12
    q, k, v = (torch.randn(2, size, 8, generator=seeded(size)) for size in (L, n, n))
    options = masks(n, L, kind)
    problem = AttentionProblem.of(q, k, v, **options)
    stream = Stream.of(3, 1, 2, L, options.get("first_position", 0))
    logits = problem.logits(slice(0, 2), slice(0, L))
    whole = sampler.estimate_rows(problem, Budget(S, 2), stream).make_draws()
    drawn = sampler.draw_from(stream, logits, S, values=problem.values, replicates=2)
    assert torch.equal(drawn.indices, whole.indices)
    # Not to the bit: how BLAS rounds a logit depends, on some processors, on the block it is computed in.
    torch.testing.assert_close(drawn.weights, whole.weights, rtol=1e-6, atol=1e-8)
    row, mask = 4, options.get("attn_mask")
    alone = {"attn_mask": mask if mask is None or mask.ndim == 1 else mask[row : row + 1]}
    if kind == "causal":
        alone = {"is_causal": True, "first_position": n - L + row}
    single = AttentionProblem.of(q[:, row : row + 1], k, v, **alone)
    of_row = sampler.estimate_rows(single, Budget(S, 2), stream[0:2, row : row + 1]).make_draws()
    assert torch.equal(of_row.indices[:, 0], whole.indices[:, row])
    monkeypatch.setattr("qtx_lab.problem.BLOCK_ELEMENTS", 3 * max(n, 16 * 2 * S))
    assert len(list(problem.blocks(16 * 2 * S))) > 2
    in_blocks = sampler.estimate_rows(problem, Budget(S, 2), stream).make_draws()
    assert torch.equal(in_blocks.indices, whole.indices)


def test_a_class_that_draws_in_another_way_has_no_kernel():
    """The kernels would draw as the class that it derives from does, without a word."""

    class Shifted(SystematicSampler):
        def points(self, stream, num_samples, replicates):
            return super().points(stream, num_samples, replicates) / 2

    class Renamed(SystematicSampler):
        name = "renamed"

    assert SystematicSampler.has_kernel
    assert Renamed.has_kernel
    assert not Shifted.has_kernel
    assert not qtx.HeadTailSampler.has_kernel


def test_a_sampler_without_a_name_is_refused():
    class Nameless(qtx.Sampler):
        def draw(self, logits, num_samples, **options):
            raise AssertionError("it must not be asked")

    with pytest.raises(qtx.DtypeError, match="name=''"):
        qtx.make_sampler(Nameless())


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda u: u.mT, "gave points"), (lambda u: 3 * u, "outside"), (lambda u: u[..., :-1], "gave points")],
)
def test_points_of_a_class_of_ones_own_are_checked(change, message):
    class Mine(SystematicSampler):
        name = "mine"

        def points(self, stream, num_samples, replicates):
            return change(super().points(stream, num_samples, replicates))

    x = torch.randn(2, 9, 4)
    with pytest.raises(qtx.QtxError, match=message):
        qtx.sampled_attention(x, x, x, sampler=Mine(), num_samples=5, replicates=2)
