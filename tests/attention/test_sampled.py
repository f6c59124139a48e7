"""`sampled_attention` against SDPA and against its own dense weights."""

import math

import pytest
import torch
import torch.nn.functional as F

import qtx_lab as qtx
from qtx_lab import problem
from qtx_lab.samplers import SAMPLERS, value_order

RANDOM = sorted(set(SAMPLERS) - {"exact"})
SHAPES = [  # q, k, v, options
    ((5, 8), (7, 8), (7, 3), {}),
    ((2, 5, 8), (2, 7, 8), (2, 7, 8), {}),
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4), {}),
    ((2, 1, 3, 6, 8), (2, 1, 3, 6, 8), (2, 1, 3, 6, 8), {"is_causal": True}),
    ((2, 6, 9, 8), (2, 2, 9, 8), (2, 2, 9, 5), {"enable_gqa": True, "is_causal": True}),
    ((4, 9, 8), (1, 9, 8), (1, 9, 5), {"enable_gqa": True}),
    ((3, 4, 8), (3, 9, 8), (3, 9, 5), {"is_causal": True}),
    ((3, 9, 8), (3, 4, 8), (3, 4, 5), {"is_causal": True}),
    ((2, 2, 1, 8), (2, 2, 1, 8), (2, 2, 1, 8), {"scale": 0.3}),
    ((2, 2, 0, 8), (2, 2, 4, 8), (2, 2, 4, 8), {}),
    ((0, 2, 3, 8), (0, 2, 4, 8), (0, 2, 4, 8), {}),
]


def tensors(shapes, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g).to(dtype) for s in shapes)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_exact_is_sdpa(case):
    *shapes, options = case
    q, k, v = tensors(shapes)
    est = qtx.sampled_attention(q, k, v, sampler="exact", **options)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    assert est.output.shape == expected.shape
    assert torch.allclose(est.output, expected, atol=1e-6, rtol=1e-6)
    # ... and so are its draws, which are made another way: softmax block by block.
    values = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3) if options.get("enable_gqa") else v
    assert torch.allclose(est.attention_weights() @ values, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_output_is_the_drawn_weights_times_values_and_near_exact(case, name):
    *shapes, options = case
    q, k, v = tensors(shapes)
    est = qtx.sampled_attention(
        q, k, v, sampler=name, num_samples=512, replicates=8, generator=generator(), **options
    )
    assert est.draws.indices.shape == (*q.shape[:-1], 4096)
    values = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3) if options.get("enable_gqa") else v
    weights = est.attention_weights()
    assert torch.allclose(est.output, weights @ values, atol=1e-4)
    if est.output.numel():
        exact = F.scaled_dot_product_attention(q, k, v, **options)
        assert relative(est.output, exact) < 0.06
        assert est.std_error.shape == est.output.shape
        assert bool(((est.output - exact).abs() <= 8 * est.std_error + 2e-3).all())


def masks(shape, seed=3):
    g = generator(seed)
    keep = torch.rand(shape, generator=g) < 0.6
    bias = torch.randn(shape, generator=g).masked_fill(~keep, -torch.inf)
    return {"bool": keep, "float": bias}


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("mask_shape", [(9,), (6, 9), (1, 9), (4, 6, 9), (2, 1, 6, 9), (2, 4, 6, 9)])
@pytest.mark.parametrize("name", ["exact", "systematic"])
def test_masks(kind, mask_shape, name, monkeypatch):
    monkeypatch.setattr(problem, "BLOCK_ELEMENTS", 40)  # several blocks, cut in the middle of a head
    q, k, v = tensors([(2, 4, 6, 8), (2, 2, 9, 8), (2, 2, 9, 5)])
    mask = masks(mask_shape)[kind]
    est = qtx.sampled_attention(
        q, k, v, sampler=name, num_samples=4096, attn_mask=mask, enable_gqa=True, generator=generator()
    )
    mask = mask.expand(6, 9) if mask.ndim == 1 else mask  # SDPA takes no mask of one dimension
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert relative(est.output, expected) < (1e-6 if name == "exact" else 0.01)
    masked = ~mask if kind == "bool" else mask == -torch.inf
    assert est.attention_weights()[masked.expand(2, 4, 6, 9)].eq(0).all()


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_an_all_masked_row_attends_to_nothing(kind, name):
    q, k, v = tensors([(2, 5, 8), (2, 7, 8), (2, 7, 3)])
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    if kind == "float":
        mask = torch.zeros(5, 7).masked_fill(~mask, -torch.inf)
    est = qtx.sampled_attention(q, k, v, sampler=name, num_samples=8, replicates=2, attn_mask=mask)
    assert est.output[:, 2].eq(0).all()
    assert est.std_error[:, 2].eq(0).all()
    assert est.attention_weights()[:, 2].eq(0).all()
    for part in (est.output, est.std_error, est.attention_weights()):
        assert not part.isnan().any()
    assert est.output[:, 1].ne(0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_dtypes(dtype, name):
    """Draws are made in float32 (or float64), so the error is that of rounding the inputs and the output."""
    q, k, v = tensors([(2, 6, 16), (2, 30, 16), (2, 30, 8)], dtype=dtype)
    est = qtx.sampled_attention(q, k, v, sampler=name, num_samples=64, replicates=2, generator=generator())
    assert est.output.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    same = qtx.sampled_attention(
        q.to(wide), k.to(wide), v.to(wide), sampler=name, num_samples=64, replicates=2, generator=generator()
    )
    assert torch.equal(est.draws.indices, same.draws.indices)
    assert est.std_error.dtype == wide
    assert relative(est.output, same.output) < {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-12)


def products_by_threads(q, k):
    """Products of a head and of parts of it, for 1 and for 2 threads."""
    before, products = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            products.append([q[0, 0, :rows] @ k[0, 0, :rows].mT for rows in (17, 32, 63, 64, 100, 300)])
    finally:
        torch.set_num_threads(before)
    return products


@pytest.mark.parametrize("name", RANDOM)
def test_same_seed_same_bits_on_one_thread_and_on_two(name):
    """On processors whose matrix product rounds by the number of threads: the same draws."""
    q, k, v = tensors([(2, 8, 300, 32), (2, 2, 300, 32), (2, 2, 300, 32)])
    to_the_bit = all(map(torch.equal, *products_by_threads(q, k)))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(
                qtx.sampled_attention(
                    q, k, v, sampler=name, num_samples=32, replicates=2, is_causal=True, enable_gqa=True,
                    generator=generator(5),
                )
            )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].draws.indices, other.draws.indices)
        for mine, others in ((results[0].output, other.output), (results[0].std_error, other.std_error)):
            torch.testing.assert_close(mine, others, rtol=1e-5, atol=1e-6)
            assert torch.equal(mine, others) or not to_the_bit


@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
@pytest.mark.parametrize("name", RANDOM)
def test_blocks_do_not_change_the_draws(name, options, monkeypatch):
    q, k, v = tensors([(2, 4, 33, 8), (2, 2, 40, 8), (2, 2, 40, 8)], dtype=torch.float64)
    estimates = []
    for elements in (1, 100, 3000, 1 << 20):
        monkeypatch.setattr(problem, "BLOCK_ELEMENTS", elements)
        estimates.append(
            qtx.sampled_attention(
                q,
                k,
                v,
                sampler=name,
                num_samples=8,
                replicates=2,
                enable_gqa=True,
                generator=generator(),
                **options,
            )
        )
    for other in estimates[1:]:
        assert torch.equal(estimates[0].draws.indices, other.draws.indices)
        assert torch.allclose(estimates[0].std_error, other.std_error, rtol=1e-9, atol=1e-7)


def test_randomness_comes_from_the_generator_alone():
    q, k, v = tensors([(4, 8)] * 3)
    state = torch.get_rng_state()
    qtx.sampled_attention(q, k, v, num_samples=4, generator=generator())
    assert torch.equal(state, torch.get_rng_state())


def test_inputs_are_left_alone():
    q, k, v = tensors([(3, 20, 8)] * 3)
    copies = [x.clone() for x in (q, k, v)]
    for name in SAMPLERS:
        qtx.sampled_attention(q, k, v, sampler=name, num_samples=4, replicates=2, is_causal=True)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True))


def test_a_sampler_of_the_users_own():
    class First:
        """Always the first key that is not masked."""

        name, unbiased, independent = "first", False, False

        def draw(self, logits, num_samples, *, values=None, generator=None, replicates=1):
            first = (
                (logits > -torch.inf).int().argmax(-1, keepdim=True).expand(*logits.shape[:-1], num_samples)
            )
            return qtx.Draws(first, torch.full(first.shape, 1 / num_samples))

    q, k, v = tensors([(3, 5, 8)] * 3)
    est = qtx.sampled_attention(q, k, v, sampler=First(), num_samples=2)
    assert torch.allclose(est.output, v[:, :1].expand(3, 5, 8))
    assert est.diagnostics["sampler"] == "first"


def test_diagnostics():
    q, k, v = tensors([(3, 5, 8)] * 3)
    d = qtx.sampled_attention(q, k, v, sampler="stratified", num_samples=6, replicates=3).diagnostics
    assert (d["sampler"], d["num_samples"], d["replicates"], d["draws_per_row"]) == ("stratified", 6, 3, 18)
    assert d["effective_sample_size"].shape == (3, 5)
    assert torch.allclose(d["effective_sample_size"], torch.full((3, 5), 18.0))
    assert d["fallbacks"] == ()


Z = torch.zeros
BAD = [  # q, k, v, options, error, what the message must hold
    (Z(4, 8), Z(5, 9), Z(5, 8), {}, qtx.ShapeError, "features"),
    (Z(4, 8), Z(5, 8), Z(6, 8), {}, qtx.ShapeError, "k and v"),
    (Z(2, 4, 8), Z(3, 5, 8), Z(3, 5, 8), {}, qtx.ShapeError, "leading"),
    (Z(4, 4, 8), Z(2, 5, 8), Z(2, 5, 8), {}, qtx.ShapeError, "enable_gqa"),
    (Z(5, 4, 8), Z(2, 5, 8), Z(2, 5, 8), {"enable_gqa": True}, qtx.ShapeError, "multiple"),
    (Z(4, 8), Z(0, 8), Z(0, 8), {}, qtx.ShapeError, "at least one key"),
    (Z(4, 0), Z(5, 0), Z(5, 8), {}, qtx.ShapeError, "features"),
    (Z(8), Z(5, 8), Z(5, 8), {}, qtx.ShapeError, "q has shape"),
    (Z(4, 8).half(), Z(5, 8), Z(5, 8), {}, qtx.DtypeError, "agree"),
    (Z(4, 8).long(), Z(5, 8).long(), Z(5, 8).long(), {}, qtx.DtypeError, "int64"),
    ([[0.0]], Z(5, 8), Z(5, 8), {}, qtx.DtypeError, "q is a list"),
    (Z(4, 8) + torch.nan, Z(5, 8), Z(5, 8), {}, qtx.ArgumentError, "q holds NaN"),
    (Z(4, 8), Z(5, 8), Z(5, 8) + torch.inf, {}, qtx.ArgumentError, "v holds NaN or infinity"),
    (Z(4, 8), Z(5, 8), Z(5, 8), {"num_samples": 0}, qtx.ArgumentError, "num_samples=0"),
    (Z(4, 8), Z(5, 8), Z(5, 8), {"num_samples": -1}, qtx.ArgumentError, "num_samples=-1"),
    (Z(4, 8), Z(5, 8), Z(5, 8), {"num_samples": 1.5}, qtx.ArgumentError, "whole number"),
    (Z(4, 8), Z(5, 8), Z(5, 8), {"replicates": 0}, qtx.ArgumentError, "replicates=0"),
    (Z(4, 8), Z(5, 8), Z(5, 8), {"sampler": "stratifed"}, qtx.ArgumentError, "Did you mean 'stratified'"),
    (Z(4, 8), Z(5, 8), Z(5, 8), {"sampler": 7}, qtx.DtypeError, "sampler"),
    (Z(4, 8), Z(5, 8), Z(5, 8), {"scale": math.nan}, qtx.ArgumentError, "scale"),
    (Z(4, 8), Z(5, 8), Z(5, 8), {"attn_mask": Z(4, 6)}, qtx.ShapeError, "broadcast"),
    (Z(4, 8), Z(5, 8), Z(5, 8), {"attn_mask": Z(2, 4, 5)}, qtx.ShapeError, "broadcast"),
    (Z(4, 8), Z(5, 8), Z(5, 8), {"attn_mask": Z(4, 5).long()}, qtx.DtypeError, "attn_mask is torch.int64"),
    (Z(4, 8), Z(5, 8), Z(5, 8), {"attn_mask": Z(4, 5) + torch.nan}, qtx.ArgumentError, "attn_mask holds"),
    (Z(4, 8), Z(5, 8), Z(5, 8), {"attn_mask": Z(4, 5), "is_causal": True}, qtx.ArgumentError, "exclude"),
    (Z(4, 8), Z(5, 8), Z(5, 8), {"attn_mask": Z(4, 5).requires_grad_(), "tolerance": 0.1}, qtx.ArgumentError,
        "replicates >= 2"),
    (Z(4, 8).requires_grad_(), Z(5, 8), Z(5, 8), {"tolerance": 0.1}, qtx.ArgumentError, "replicates >= 2"),
    (Z(4, 8), Z(5, 8), Z(5, 8), {"generator": 3}, qtx.DtypeError, "generator"),
]  # fmt: skip


@pytest.mark.parametrize(("q", "k", "v", "options", "error", "match"), BAD)
def test_bad_input_is_one_clear_error_before_any_work(q, k, v, options, error, match):
    with pytest.raises(error, match=match) as caught:
        qtx.sampled_attention(q, k, v, **options)
    assert isinstance(caught.value, qtx.QtxError)
    assert isinstance(caught.value, ValueError | TypeError)


def test_overflowing_logits_are_refused():
    q = torch.full((1, 4), 1e30)
    with pytest.raises(qtx.ArgumentError, match="logits"):
        qtx.sampled_attention(q, q, q)


@pytest.mark.parametrize("length", [1024, 4096])
def test_workspace_does_not_grow_with_the_map(length):
    """Beyond inputs, output and draws, a call holds no more than BLOCK_ELEMENTS allows."""
    from qtx_lab.bench.base import peak_memory

    q, k, v = tensors([(1, 2, length, 32)] * 3)

    def call():
        return qtx.sampled_attention(q, k, v, sampler="systematic", num_samples=16, generator=generator())

    est = call()
    kept = est.output.nbytes + est.draws.indices.nbytes + 2 * est.draws.weights.nbytes
    map_bytes = 2 * length * length * 4
    limit = kept + q.nbytes + 64 * problem.BLOCK_ELEMENTS + (8 << 20)
    _, used = peak_memory(call)
    assert used is None or used < limit
    assert length < 4096 or limit < map_bytes


@pytest.mark.parametrize("name", ["systematic", "monte-carlo", "head-tail", "sobol"])
def test_the_heads_of_a_group_share_their_random_numbers(name, generator):
    """Alike heads then draw the same keys, and all together touch fewer values than heads by themselves
    would.
    """
    k, v = (torch.randn(2, 200, 8, generator=generator) for _ in range(2))
    q = torch.randn(2, 1, 7, 8, generator=generator).expand(2, 4, 7, 8) + 0.1 * torch.randn(
        2, 4, 7, 8, generator=generator
    )
    options = {"sampler": name, "num_samples": 16, "generator": generator}
    together = qtx.sampled_attention(q.flatten(0, 1), k, v, enable_gqa=True, **options)
    touched = together.keys_touched()
    assert touched.shape == (2, 7)
    counted = together.attention_weights().unflatten(0, (2, 4)).gt(0).any(1).sum(-1)
    assert torch.equal(touched, counted)
    alone = [x.repeat_interleave(4, 0) for x in (k, v)]
    apart = qtx.sampled_attention(q.flatten(0, 1), *alone, **options).attention_weights()
    assert touched.double().mean() < 0.75 * apart.unflatten(0, (2, 4)).gt(0).any(1).sum(-1).double().mean()
    same = qtx.sampled_attention(q[:, :1].repeat(1, 4, 1, 1).flatten(0, 1), k, v, enable_gqa=True, **options)
    assert torch.equal(same.draws.indices[0], same.draws.indices[3])


def test_the_order_of_values_is_kept_between_calls(monkeypatch, generator):
    counted, whole = [], value_order.ValueOrder.order
    monkeypatch.setattr(value_order.ValueOrder, "order", lambda self, v: counted.append(1) or whole(self, v))
    q, k, v = (torch.randn(2, 20, 4, generator=generator) for _ in range(3))
    for _ in range(3):
        qtx.sampled_attention(q, k, v, sampler="head-tail", num_samples=4)
    assert len(counted) == 1
    v += 1
    qtx.sampled_attention(q, k, v, sampler="head-tail", num_samples=4)
    assert len(counted) == 2


@pytest.mark.parametrize("name", ["monte-carlo", "systematic", "head-tail", "sobol", "learned"])
@pytest.mark.parametrize("size", [2.0**-100, 2.0**-50, 2.0**66, 2.0**120])
def test_values_of_any_size_give_the_same_relative_result(name, size):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 30, 8, generator=g) for _ in range(3))
    results = []
    for unit in (1.0, size):
        options = {"sampler": name, "num_samples": 8, "replicates": 3}
        est = qtx.sampled_attention(q, k, unit * v, generator=torch.Generator().manual_seed(1), **options)
        results.append((est.output / unit, est.std_error / unit))
        assert torch.allclose(est.draws.average(unit * v) / unit, results[-1][0], rtol=1e-3, atol=1e-4)
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    est = qtx.sampled_attention(q, k, size * v, sampler="systematic", tolerance=0.2)
    exact = F.scaled_dot_product_attention(q, k, v)
    assert ((est.output / size - exact).norm(dim=-1) <= 0.2 * exact.norm(dim=-1)).double().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"softcap": 5.0}, {"sinks": torch.zeros(2)}], ids=str
)
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_averages_of_the_largest_numbers_are_numbers(dtype, options, share):
    """An average is no larger than what it is of; torch adds values up before it divides by their weights."""
    g, largest = torch.Generator().manual_seed(0), torch.finfo(dtype).max
    q, k, signs = (torch.randn(1, 2, 40, 8, generator=g).to(dtype) for _ in range(3))
    v = signs.sign() * share * largest
    small = {"rtol": 1e-2, "atol": 1e-2} if dtype.itemsize == 2 else {}
    for sign in (v, v.abs()):
        exact = qtx.sampled_attention(q, k, sign, sampler="exact", **options).output
        expected = qtx.sampled_attention(q, k, sign / largest, sampler="exact", **options).output
        torch.testing.assert_close(exact / largest, expected, **small)
        for name in ("systematic", "head-tail", "monte-carlo"):
            drawn = qtx.sampled_attention(
                q, k, sign, sampler=name, num_samples=8, generator=g, **options
            ).output
            assert drawn.isfinite().all(), name


def test_values_swapped_under_a_tensor_get_an_order_of_their_own(generator):
    v = torch.randn(4, 8, 3, generator=generator)
    x = torch.randn(4, 8, 5, generator=generator)
    qtx.sampled_attention(x, x, v, sampler="head-tail", num_samples=4)
    v.data = torch.randn(2, 16, 3, generator=generator)
    y = torch.randn(2, 16, 5, generator=generator)
    est = qtx.sampled_attention(y, y, v, sampler="head-tail", num_samples=16)
    assert torch.allclose(est.output, F.scaled_dot_product_attention(y, y, v), atol=1e-5)


def test_draws_of_exact_do_not_see_a_mask_that_is_changed_later(generator):
    x = torch.randn(1, 6, 4, generator=generator)
    mask = torch.rand(6, 6, generator=generator) > 0.4
    mask[:, 0] = True
    est = qtx.sampled_attention(x, x, x, sampler="exact", attn_mask=mask)
    mask[:] = True
    assert torch.allclose(est.attention_weights() @ x, est.output, atol=1e-5)


def test_a_mask_of_finite_numbers_hides_nothing(generator):
    """-1e300 in float64 is no -inf: where all keys have it, the row still attends."""
    x = torch.randn(1, 5, 4, generator=generator)
    mask = torch.full((5, 5), -1e300, dtype=torch.float64)
    exact = qtx.sampled_attention(x, x, x, sampler="exact", attn_mask=mask).output
    assert torch.allclose(exact, x.mean(1, keepdim=True).expand_as(x), atol=1e-5)
    drawn = qtx.sampled_attention(x, x, x, num_samples=5, attn_mask=mask)
    assert torch.allclose(drawn.output, exact, atol=1e-5)
    with pytest.raises(qtx.ArgumentError, match="attn_mask holds"):
        qtx.sampled_attention(x, x, x, attn_mask=-mask)
