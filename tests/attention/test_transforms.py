"""What torch makes of functions (`torch.func`, forward mode, tracing, export) is right, or refused in one
sentence.
"""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import qtx_lab as qtx
from qtx_lab.samplers import SAMPLERS

OPTIONS = {
    "plain": {},
    "replicates": {"replicates": 3},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.linspace(-1, 1, 7).double().expand(2, 7)},
    "control": {"control_variate": "linformer"},
    "tolerance": {"num_samples": None, "tolerance": 0.5, "replicates": 2},
    "sequences": {"sequences": torch.tensor([7])},
}


def problem(generator):
    """q, k, v and a gradient of the output, float64."""
    shapes = [(2, 2, 3), (2, 7, 3), (2, 7, 2), (2, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attention(seed, **options):
    """Sampled attention as a function of q, k and v, the same draws at each call."""

    def attend(q, k, v):
        generator = torch.Generator().manual_seed(seed)
        return qtx.sampled_attention(q, k, v, **{"num_samples": 4, "generator": generator, **options}).output

    return attend


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in SAMPLERS] + [("systematic", options) for options in OPTIONS.values()],
)
def test_torch_func_has_autograds_gradients(name, options, generator, seed):
    *inputs, g = problem(generator)
    attend = attention(seed, sampler=name, **options)
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(attend(*leaves), leaves, g)
    by_grad = grad(lambda *x: (attend(*x) * g).sum(), argnums=(0, 1, 2))(*inputs)
    output, pull = vjp(attend, *inputs)
    assert torch.equal(output, attend(*inputs))
    for x, y, z in zip(expected, by_grad, pull(g), strict=True):
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(z, x)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in SAMPLERS] + [("head-tail", options) for options in OPTIONS.values()],
)
def test_tangents_are_the_transpose_of_the_gradients(name, options, generator, seed):
    """(g, tangent) is the tangents' product with the gradients, which are tested to be unbiased."""
    *inputs, g = problem(generator)
    tangents = problem(generator)[:3]
    attend = attention(seed, sampler=name, **options)
    output, by_func = jvp(attend, tuple(inputs), tuple(tangents))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        by_duals = forward_ad.unpack_dual(attend(*duals)).tangent
    leaves = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(attend(*leaves), leaves, g)
    expected = sum((x * t).sum() for x, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close(output, attend(*inputs))
    torch.testing.assert_close(by_func, by_duals)
    torch.testing.assert_close((g * by_func).sum(), expected)


def test_a_tangent_of_one_input_alone(generator, seed):
    *inputs, _ = problem(generator)
    tangents = problem(generator)[:3]
    attend = attention(seed, sampler="stratified")
    parts = []
    for i, tangent in enumerate(tangents):

        def of_one(x, i=i):
            return attend(*inputs[:i], x, *inputs[i + 1 :])

        parts.append(jvp(of_one, (inputs[i],), (tangent,))[1])
    torch.testing.assert_close(sum(parts), jvp(attend, tuple(inputs), tuple(tangents))[1])


@pytest.mark.parametrize("sampler", ["exact", "systematic", "monte-carlo", "head-tail", "learned"])
def test_tangents_of_masks_and_sinks_are_the_transpose_of_their_gradients(sampler, generator, seed):
    *inputs, g = problem(generator)
    h = torch.randn(2, 2, generator=generator, dtype=torch.float64)
    inputs += [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 7), (2,))]
    tangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in inputs]

    def attend(q, k, v, mask, sinks):
        est = qtx.sampled_attention(
            q, k, v, sampler=sampler, num_samples=4, attn_mask=mask, sinks=sinks, softcap=2.0,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return est.output, est.log_sum_exp

    _, (output, log_sum_exp) = jvp(attend, tuple(inputs), tuple(tangents))
    leaves = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(attend(*leaves), leaves, (g, h))
    expected = sum((x * t).sum() for x, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close((g * output).sum() + (h * log_sum_exp).sum(), expected)
    _, pull = vjp(attend, *inputs)
    for x, y in zip(pull((g, h)), gradients, strict=True):
        torch.testing.assert_close(x, y)


def test_exact_tangents_are_those_of_attention(generator):
    *inputs, _ = problem(generator)
    tangents = problem(generator)[:3]

    def reference(q, k, v):
        return (q @ k.mT / 3**0.5).softmax(-1) @ v

    ours = jvp(attention(0, sampler="exact"), tuple(inputs), tuple(tangents))
    for x, y in zip(ours, jvp(reference, tuple(inputs), tuple(tangents)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["systematic", "monte-carlo", "head-tail"])
def test_tangents_are_unbiased(name, generator):
    """20,000 repetitions of 4 draws: the mean is within 5.5 standard errors (false alarm 2e-7 for 4 numbers);
    one by the derivative with draws held fixed is hundreds away.
    """
    *inputs, _ = problem(generator)
    tangents = tuple(problem(generator)[:3])
    _, exact = jvp(attention(0, sampler="exact"), tuple(inputs), tangents)
    many, ways = (tuple(x.expand(20_000, *x.shape) for x in y) for y in (inputs, tangents))
    _, tangent = jvp(attention(int(generator.initial_seed()), sampler=name), many, ways)
    error = tangent.std(0) / 20_000**0.5
    assert float(((tangent.mean(0) - exact).abs() / error).max()) < 5.5


def test_a_mask_and_names_made_inside_of_a_transform(generator, seed):
    *inputs, g = problem(generator)

    def loss(q, k, v):
        mask, names = torch.ones(2, 7, dtype=torch.bool).tril(3), torch.arange(1)
        return (attention(seed, attn_mask=mask, sequences=names)(q, k, v) * g).sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    for x, y in zip(
        torch.autograd.grad(loss(*leaves), leaves), grad(loss, argnums=(0, 1, 2))(*inputs), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_inputs_that_a_transform_leaves_alone(generator, seed):
    """The attention of constants, inside of the gradient of something else."""
    *inputs, _ = problem(generator)
    for name in ("systematic", "sobol", "exact"):
        attend = attention(seed, sampler=name)
        constant = attend(*inputs)
        result = grad(lambda x, attend=attend: (x * attend(*inputs)).sum())(torch.ones(2, 2, 2).double())
        torch.testing.assert_close(result, constant)


def test_what_an_estimate_tells_outlives_the_transform(generator):
    *inputs, _ = problem(generator)
    estimates = []

    def loss(q):
        est = qtx.sampled_attention(q, *inputs[1:], num_samples=4, replicates=2, generator=generator)
        estimates.append(est)
        return est.output.sum()

    grad(loss)(inputs[0])
    (est,) = estimates
    assert est.std_error.shape == est.attention_weights()[..., :2].shape
    assert bool((est.std_error.numpy() >= 0).all())


def test_parameters_of_a_module_as_arguments(generator):
    attn = qtx.QuantumMultiheadAttention(8, 2, batch_first=True, num_samples=4)
    x = torch.randn(3, 5, 8, generator=generator)

    def loss(parameters):
        torch.manual_seed(0)
        return functional_call(attn, parameters, (x, x, x))[0].square().sum()

    gradients = grad(loss)(dict(attn.named_parameters()))
    assert attn.last_estimate is None
    torch.manual_seed(0)
    attn(x, x, x)[0].square().sum().backward()
    for name, parameter in attn.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("name", ["systematic", "monte-carlo", "learned"])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_a_derivative_of_a_derivative_is_refused(name, argument, generator, seed):
    """By any input and in both modes, also where it is zero or where autograd would call it unused."""
    *inputs, _ = problem(generator)
    attend = attention(seed, sampler=name)

    def of(power):
        def loss(x):
            return attend(*inputs[:argument], x, *inputs[argument + 1 :]).pow(power).sum()

        return loss

    x, tangent = inputs[argument], torch.ones_like(inputs[argument])
    for power in (1, 2):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(of(power)(leaf), leaf, create_graph=True)
        twice = {
            "backward": lambda dx=dx: dx.sum().backward(),
            "unused": lambda dx=dx, leaf=leaf: torch.autograd.grad(dx.sum(), leaf, allow_unused=True),
            "hessian": lambda power=power: torch.autograd.functional.hessian(of(power), x),
            "strict": lambda power=power: torch.autograd.functional.hessian(of(power), x, strict=True),
            "hvp": lambda power=power: torch.autograd.functional.hvp(of(power), x, tangent),
            "grad of grad": lambda power=power: grad(lambda y: grad(of(power))(y).sum())(x),
            "jvp of grad": lambda power=power: jvp(grad(of(power)), (x,), (tangent,)),
            "grad of jvp": lambda power=power: grad(lambda y: jvp(of(power), (y,), (tangent,))[1].sum())(x),
            "jvp of jvp": lambda power=power: jvp(
                lambda y: jvp(of(power), (y,), (tangent,))[1], (x,), (tangent,)
            ),
        }
        for call in twice.values():
            with pytest.raises(qtx.TransformError, match="first derivatives only"):
                call()
        with pytest.raises(qtx.TransformError, match="vmap"):
            hessian(of(power))(x)


def test_kernels_refuse_a_derivative_of_a_derivative_too(generator):
    q, k, v = (x.float().requires_grad_() for x in problem(generator)[:3])
    loss = qtx.gpu_quantum_attention(q, k, v, 4, generator=generator).sum()
    (dq,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(qtx.TransformError, match="first derivatives only"):
        torch.autograd.grad(dq.sum(), q, allow_unused=True)
    with pytest.raises(qtx.TransformError, match="sampled_attention"):
        grad(lambda x: qtx.gpu_quantum_attention(x, k, v, 4).sum())(q)


def test_exact_second_derivatives_are_those_of_attention(generator):
    q, k, v, _ = problem(generator)

    def loss(x):
        return qtx.sampled_attention(x, k, v, sampler="exact").output.square().sum()

    def reference(x):
        return ((x @ k.mT / 3**0.5).softmax(-1) @ v).square().sum()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        actual = torch.autograd.functional.hessian(loss, q)
    torch.testing.assert_close(actual, torch.autograd.functional.hessian(reference, q))


def test_vmap_is_refused_and_says_what_to_do(generator, seed):
    *inputs, g = problem(generator)
    attend = attention(seed)
    q = inputs[0]
    alone = lambda x: attend(x, *inputs[1:])  # noqa: E731
    attn = qtx.QuantumMultiheadAttention(8, 2, num_samples=4)
    rows = torch.randn(3, 5, 8, generator=generator)
    for call in (
        lambda: vmap(attend)(*inputs),
        lambda: vmap(attend, randomness="different")(*inputs),
        lambda: vmap(grad(lambda *x: attend(*x).sum()))(*inputs),
        lambda: vmap(lambda x: attn(x, x, x)[0])(rows),
        lambda: jacfwd(alone)(q),
    ):
        with pytest.raises(qtx.TransformError, match="leading dimensions"):
            call()
    leaf = q.clone().requires_grad_()
    output = alone(leaf)
    for call in (
        lambda: jacrev(alone)(q),
        lambda: torch.autograd.grad(output, leaf, torch.stack((g, g)), is_grads_batched=True),
    ):
        with pytest.raises(qtx.TransformError, match="one row at a time"):
            call()
    assert torch.autograd.functional.jacobian(alone, q).shape == (2, 2, 2, 2, 2, 3)


class Attention(nn.Module):
    """Sampled attention of an input with itself."""

    def __init__(self, sampler="systematic"):
        super().__init__()
        self.sampler = sampler

    def forward(self, x):
        return qtx.sampled_attention(x, x, x, sampler=self.sampler, num_samples=4).output


class Layer(nn.Module):
    """A model around a `QuantumMultiheadAttention`."""

    def __init__(self, sampler="systematic"):
        super().__init__()
        self.attn = qtx.QuantumMultiheadAttention(4, 2, sampler=sampler, num_samples=4)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("model", [Attention, Layer])
def test_tracing_scripting_and_export_are_refused(model, generator):
    x = torch.randn(2, 9, 4, generator=generator)
    for tool, call in {
        "torch.jit.script": lambda: torch.jit.script(model()),
        "torch.jit.trace": lambda: torch.jit.trace(model(), (x,)),
        "torch.export": lambda: torch.export.export(model(), (x,)),
    }.items():
        with pytest.raises(qtx.TransformError, match=tool):
            call()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.export"):
        torch.export.export(model(), (x,), strict=True)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_exact_attention_is_traced(generator):
    x, y = torch.randn(2, 2, 9, 4, generator=generator)
    model = Attention("exact")
    assert torch.equal(torch.jit.trace(model, (x,))(y), model(y))


@pytest.mark.parametrize(
    "model",
    [Layer(), lambda x: qtx.gpu_quantum_attention(x, x, x, 4)],
    ids=["module", "kernels"],
)
def test_one_whole_graph_of_a_module_is_a_clear_error(model, generator):
    x = torch.randn(2, 9, 4, generator=generator)
    assert torch.compile(model, backend="eager")(x).shape == x.shape
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"draws keys, which is not compiled"):
        torch.compile(model, backend="eager", fullgraph=True)(x)


def test_a_compiled_module_draws_anew_at_each_call(generator):
    attn = Layer()
    compiled = torch.compile(attn, backend="eager")
    x = torch.randn(2, 9, 4, generator=generator)
    outputs = [compiled(x) for _ in range(3)]
    assert not torch.equal(outputs[1], outputs[2])
    torch.manual_seed(0)
    expected = attn(x)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x), expected)


EMPTY = {
    "batch": [(0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 3)],
    "heads": [(3, 0, 5, 8), (3, 0, 7, 8), (3, 0, 7, 3)],
    "queries": [(3, 4, 0, 8), (3, 4, 7, 8), (3, 4, 7, 3)],
    "queries without a head": [(0, 8), (7, 8), (7, 3)],
}


@pytest.mark.parametrize("shapes", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in SAMPLERS]
    + [
        ("systematic", {key: x for key, x in options.items() if key != "attn_mask"})
        for options in OPTIONS.values()
    ]
    + [
        ("head-tail", {"control_variate": ["performer", "topk"], "replicates": 2}),
        ("monte-carlo", {"enable_gqa": True}),
    ],
)
def test_an_empty_problem_has_empty_derivatives(name, options, shapes, generator):
    if "sequences" in options:
        options = {"sequences": torch.arange(shapes[0][0] if len(shapes[0]) > 3 else 1)}
    if len(shapes[0]) < 3:  # groups need a dimension of heads
        options = {key: x for key, x in options.items() if key != "enable_gqa"}
    inputs = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    leaves = [x.clone().requires_grad_() for x in inputs]
    attend = attention(0, sampler=name, **options)
    output = attend(*leaves)
    assert output.shape == (*shapes[0][:-1], 3)
    output.sum().backward()
    for x in leaves:
        assert torch.equal(x.grad, torch.zeros_like(x))
    _, tangent = jvp(attend, tuple(inputs), tuple(inputs))
    assert tangent.shape == output.shape


@pytest.mark.parametrize("shapes", EMPTY.values(), ids=EMPTY)
def test_kernels_and_circuits_have_empty_gradients_too(shapes):
    circuits = qtx.CircuitSampler(qtx.QiskitQuantumBackend("aer"))
    for call in (
        lambda *x: qtx.gpu_quantum_attention(*x, 4),
        lambda *x: qtx.sampled_attention(*x, num_samples=4, sampler=circuits).output,
    ):
        leaves = [torch.zeros(shape, requires_grad=True) for shape in shapes]
        call(*leaves).sum().backward()
        for x in leaves:
            assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize(
    "shapes", [((2, 3), (0, 3), (0, 2)), ((2, 3), (7, 3), (7, 0)), ((2, 0), (7, 0), (7, 3))]
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_keys_and_no_features_are_refused(name, shapes):
    leaves = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    with pytest.raises(qtx.ShapeError, match=r"at least one|E >= 1"):
        qtx.sampled_attention(*leaves, sampler=name)
