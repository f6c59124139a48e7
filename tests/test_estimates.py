"""`Draws` and `AttentionEstimate`."""

import copy
import pickle

import pytest
import torch

import qtx_lab as qtx


def random_draws(shape, n, s, seed=0):
    g = torch.Generator().manual_seed(seed)
    return qtx.Draws(torch.randint(n, (*shape, s), generator=g), torch.rand(*shape, s, generator=g))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_average_is_the_dense_weights_times_values(batch, dtype):
    draws = random_draws((*batch, 5), 11, 7)
    values = torch.randn(*batch, 11, 4, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected = draws.dense(11).to(wide) @ values.to(wide)
    average = draws.average(values)
    assert average.dtype == wide
    assert torch.allclose(average, expected, atol=1e-5)


def test_average_refuses_values_of_another_batch():
    with pytest.raises(qtx.ShapeError, match="leading dimensions"):
        random_draws((2, 5), 11, 7).average(torch.zeros(3, 11, 4))


def test_multiplicity_counts_each_key_in_its_row():
    draws = qtx.Draws(torch.tensor([[3, 1, 3, 3], [0, 2, 1, 2]]), torch.full((2, 4), 0.25))
    assert draws.multiplicity().tolist() == [[3, 1, 3, 3], [1, 2, 1, 2]]


def test_effective_sample_size():
    draws = qtx.Draws(torch.zeros(3, 4).long(), torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.0] * 4]))
    assert draws.effective_sample_size().tolist() == [4, 1, 0]


def test_an_interval_needs_a_level_and_an_error():
    q = torch.zeros(4, 8)
    one = qtx.sampled_attention(q, q, q, sampler="systematic", num_samples=4)
    assert one.std_error is None
    with pytest.raises(qtx.ArgumentError, match="replicates >= 2"):
        one.confidence_interval()
    two = qtx.sampled_attention(q, q, q, sampler="systematic", num_samples=4, replicates=2)
    for level in (0, 1, -0.5, 95):
        with pytest.raises(qtx.ArgumentError, match="between 0 and 1"):
            two.confidence_interval(level)
    for level in ("0.9", None, [0.9], torch.tensor([0.9, 0.8])):
        with pytest.raises(qtx.QtxError, match=r"level=.* is not allowed: it must be"):
            two.confidence_interval(level)
    for level in ("0.9", None, [0.9], torch.tensor([0.9, 0.8])):
        with pytest.raises(qtx.QtxError, match=r"level=.* is not allowed: it must be"):
            two.confidence_interval(level)
    with pytest.raises(AttributeError):
        two.output = q


@pytest.mark.parametrize("duplicate", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
@pytest.mark.parametrize("sampler", ["systematic", "exact", "learned"])
def test_an_estimate_is_pickled_and_copied_with_its_draws_and_error_bars(sampler, duplicate):
    q, k, v = torch.randn(3, 2, 8, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    estimate = qtx.sampled_attention(q, k, v, sampler=sampler, num_samples=4, replicates=2)
    again = duplicate(estimate)
    for get in (lambda x: x.output, lambda x: x.std_error, lambda x: x.reliability, lambda x: x.log_sum_exp):
        assert torch.equal(get(again), get(estimate))
    assert torch.equal(again.draws.indices, estimate.draws.indices)
    assert again.degrees_of_freedom == estimate.degrees_of_freedom
    assert again.info.sampler == sampler
    assert again.group == estimate.group


def test_what_is_known_of_an_estimate_is_printed_in_one_line():
    q, k, v = torch.randn(3, 2, 400, 4, generator=torch.Generator().manual_seed(0))
    estimate = qtx.sampled_attention(q, k, v, num_samples=4)
    assert repr(estimate.info) == (
        "EstimateInfo(sampler='systematic', unbiased=True, num_samples=4, replicates=1, draws_per_row=4, "
        "effective_sample_size=<tensor of shape (2, 400)>, log_sum_exp='exact')"
    )
