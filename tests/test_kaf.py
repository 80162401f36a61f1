"""KAFs against the formula written out in float64, and against finite differences."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from benchmark_kaf import peak_memory, step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from kafnb import KAF
from kafnb.kaf import RIDGE_TARGETS, compiled, dispatch
from kafnb.kaf.gaussian import gaussian_mixture, grid_mixture
from kafnb.kaf.kernels import KERNELS, condition, default_bandwidth, gram, ridge_coefficients, second_moment


def reference(x, alpha, dictionary, gamma):
    """The (x, D) tensor that the package never builds."""
    shape = (1, -1) + (1,) * (x.ndim - 2) + (alpha.shape[1],)
    d = dictionary.reshape(1, dictionary.shape[0], *shape[2:])
    g = gamma.reshape(1, -1, *[1] * (x.ndim - 1))
    return (alpha.reshape(shape) * torch.exp(-g * (x[..., None] - d) ** 2)).sum(-1)


def exact(kaf):
    """float64 copies of a float32 KAF's coefficients and of its exact grid and bandwidth."""
    points = torch.linspace(-kaf.boundary, kaf.boundary, kaf.dictionary_size, dtype=torch.float64)
    return kaf.alpha.detach().double(), points[None], torch.tensor([kaf.grid.gamma], dtype=torch.float64)


@pytest.mark.parametrize("size", [2, 3, 5, 8, 20, 37, 64, 100, 256])
@pytest.mark.parametrize("boundary", [0.5, 3.0, 10.0])
@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_float32_value_and_gradients_near_float64(size, boundary, scale):
    torch.manual_seed(size)
    kaf = KAF(3, size, boundary, bandwidth=scale * default_bandwidth(size, boundary))
    kaf.alpha.data.normal_()
    x = (torch.randn(40, 3, 5, 2) * boundary / 2).requires_grad_()
    g = torch.randn(40, 3, 5, 2)
    y = kaf(x)
    dx, dalpha = torch.autograd.grad(y, (x, kaf.alpha), g)
    alpha, d, gamma = (v.requires_grad_() for v in exact(kaf))
    x64 = x.detach().double().requires_grad_()
    want = reference(x64, alpha, d, gamma)
    want_dx, want_dalpha = torch.autograd.grad(want, (x64, alpha), g.double())
    assert (y - want).abs().max() < 2e-6 * alpha.abs().sum(1).max()
    assert (dx - want_dx).abs().max() < 1e-5 * want_dx.abs().max()
    assert (dalpha - want_dalpha).abs().max() < 1e-5 * want_dalpha.abs().max()


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 7), (2, 3, 4, 4), (2, 3, 2, 2, 3), (0, 3, 4, 4), (1, 3, 1, 1)])
def test_any_rank_and_empty_batch(shape):
    kaf = KAF(3).double()
    x = torch.randn(shape, dtype=torch.float64)
    y = kaf(x)
    assert y.shape == x.shape
    if x.numel():
        assert torch.allclose(y, reference(x, *exact(kaf)), atol=1e-12)


def test_channels_last_and_slices_give_the_same():
    kaf, x = KAF(4), torch.randn(3, 8, 6, 6)[:, ::2]
    want = kaf(x.contiguous())
    assert torch.equal(kaf(x), want)
    assert torch.equal(kaf(x.contiguous(memory_format=torch.channels_last)), want)


@pytest.mark.parametrize("trainable", [False, True])
def test_gradients_against_finite_differences(trainable):
    kaf = KAF(2, 6, trainable_dictionary=trainable).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    names, values = zip(*kaf.named_parameters(), strict=True)

    def f(x, *values):
        return torch.func.functional_call(kaf, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(f, (x, *values))
    assert torch.autograd.gradgradcheck(f, (x, *values))


def test_both_evaluations_agree():
    kaf = KAF(3, 20).double()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    alpha, d, gamma = exact(kaf)
    assert torch.allclose(grid_mixture(x, alpha, kaf.grid), gaussian_mixture(x, alpha, d, gamma), atol=1e-12)


@pytest.mark.parametrize("before", [False, True])
def test_subnormal_numbers_mean_after_a_call_what_they_meant_before(before):
    if not torch.set_flush_denormal(before):
        pytest.skip("this processor cannot take them for zero")
    try:
        x = torch.randn(3, 2, requires_grad=True)
        KAF(2, 100)(x).sum().backward()
        with pytest.raises(RuntimeError):
            grid_mixture(x.detach(), torch.zeros(5, 7), KAF(5, 7).grid)  # fails on the way
        with pytest.raises(RuntimeError):
            gaussian_mixture(x.detach(), torch.zeros(5, 7), torch.zeros(1, 7), torch.ones(1))
        assert (torch.full((1,), 1e-45).mul(1.0).item() == 0) == before
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tails_are_exact_zeros_with_zero_gradients(dtype):
    kaf, top = KAF(1), torch.finfo(dtype).max
    x = torch.tensor([[-top], [top], [-60000.0], [100.0], [-30.0]], dtype=dtype).requires_grad_()
    y = kaf(x)
    y.sum().backward()
    assert (y == 0).all() and (x.grad == 0).all() and kaf.alpha.grad.isfinite().all()


def numbers(kaf, x, g):
    """f and all gradients."""
    x = x.detach().requires_grad_()
    y = kaf(x)
    return [y, *torch.autograd.grad(y, (x, *kaf.parameters()), g)]


@pytest.mark.parametrize("trainable", [False, True])
def test_what_is_no_number_stays_so_and_infinity_is_beyond_the_tails(trainable):
    kaf, x = KAF(2, trainable_dictionary=trainable), torch.full((3, 2), torch.nan)
    x[:, 0] = torch.tensor([torch.inf, -torch.inf, 1.0])
    y = kaf(x)
    assert y[:, 1].isnan().all() and (y[:2, 0] == 0).all() and y[2, 0] != 0


@pytest.mark.parametrize("way", ["native", "whole tensors"])
@pytest.mark.parametrize("size", [5, 20, 50])
def test_far_away_large_coefficients_are_nothing(monkeypatch, way, size):
    if way != "native":
        monkeypatch.setattr(dispatch, "_cpu", lambda: None)
    kaf = KAF(1, size)
    far = 3 + kaf.grid.spacing * torch.linspace(35, 1000, 500)
    kaf.alpha.data.fill_(1e30)
    x = torch.cat([-far, far])[:, None]
    y, dx, dalpha = numbers(kaf, x, torch.ones_like(x))
    assert (y == 0).all() and (dx == 0).all() and (dalpha == 0).all()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("shape", [(37, 3, 5, 7), (8, 3, 9, 9), (50, 70)])
def test_threads_and_tasks_on_a_cpu(monkeypatch, shape, trainable):
    native = pytest.importorskip("kafnb.kaf.native")
    kaf, x, g = KAF(shape[1], trainable_dictionary=trainable), torch.randn(shape), torch.randn(shape)
    whole, before, found = numbers(kaf, x, g), torch.get_num_threads(), []
    monkeypatch.setattr(native, "TASK", 300)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(numbers(kaf, x, g))
    finally:
        torch.set_num_threads(before)
    for one, three, want in zip(*found, whole, strict=True):
        assert torch.equal(one, three)  # the sums are added in one order, however many threads there are
        torch.testing.assert_close(one, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_numba_the_same_in_whole_tensors(monkeypatch, trainable, dtype):
    pytest.importorskip("kafnb.kaf.native")
    kaf = KAF(3, 37, trainable_dictionary=trainable)
    x, g = torch.randn(20, 3, 4, dtype=dtype), torch.randn(20, 3, 4, dtype=dtype)
    with_it = numbers(kaf, x, g)
    monkeypatch.setattr(dispatch, "_cpu", lambda: None)
    for a, b in zip(with_it, numbers(kaf, x, g), strict=True):
        tolerance = 1e-2 if a.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_loops_are_compiled_where_nothing_can_be_kept(monkeypatch):
    loops = pytest.importorskip("kafnb.kaf.loops")
    compiled = loops.njit

    def nowhere(function, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compiled(function, **options)

    monkeypatch.setattr(loops, "njit", nowhere)
    assert loops._compiled(lambda x: x + 1)(1) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded(dtype):
    kaf, x = KAF(2, init="relu"), torch.randn(50, 2).to(dtype)
    assert kaf(x).dtype == dtype
    assert torch.equal(kaf(x), kaf(x.float()).to(dtype))


def test_ridge_follows_its_target():
    x = torch.linspace(-3, 3, 200)[:, None]
    for name, target in RIDGE_TARGETS.items():
        error = (KAF(1, init=name)(x) - target(x)).abs().max()
        assert error < (0.08 if name == "relu" else 0.02), (name, error)
    assert torch.allclose(KAF(1, init=torch.sin)(x), torch.sin(x), atol=0.01)


def test_ridge_coefficients_solve_their_system():
    d = torch.linspace(-3, 3, 20, dtype=torch.float64)
    gamma = default_bandwidth(20, 3.0)
    alpha = ridge_coefficients(torch.relu, d, gamma, eps=1e-3)
    left = (gram(d, gamma) + 1e-3 * torch.eye(20, dtype=torch.float64)) @ alpha
    assert torch.allclose(left, torch.relu(d), atol=1e-12)
    assert ridge_coefficients(torch.relu, d, gamma).abs().max() > 50 > 10 > alpha.abs().max()


def test_default_bandwidth_is_the_papers_rule():
    spacing = 6 / 19
    assert KAF(1).bandwidth.item() == pytest.approx(1 / (6 * spacing**2), rel=1e-6)


@pytest.mark.parametrize("size", [5, 20, 50, 200])
def test_narrow_kernels_are_finite_and_right_everywhere(size):
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([1e4, -1e4])])[:, None]
    for share in (1, 2, 2.1, 2.15, 2.2, 2.35, 2.5, 2.6, 4):  # powers end and single kernels begin at 2.16
        kaf = KAF(1, size, 3.0, bandwidth=share * default_bandwidth(size, 3.0))
        assert (kaf(x) - kaf.double()(x.double())).abs().max() < 1e-5, share


def test_free_kaf_learns_dictionary_and_bandwidth_and_stays_positive():
    kaf = KAF(2, trainable_dictionary=True)
    assert {n for n, _ in kaf.named_parameters()} == {"alpha", "points", "log_bandwidth"}
    optimizer = torch.optim.SGD(kaf.parameters(), lr=100.0)
    kaf(torch.randn(64, 2)).square().sum().backward()
    before = kaf.dictionary.clone()
    optimizer.step()
    assert (kaf.bandwidth >= 0).all() and not torch.equal(before, kaf.dictionary)


def test_state_deepcopy_and_autocast():
    kaf = KAF(3, init="elu")
    buffer = io.BytesIO()
    torch.save(kaf.state_dict(), buffer)
    buffer.seek(0)
    other = KAF(3)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(4, 3)
    assert torch.equal(kaf(x), other(x)) and torch.equal(copy.deepcopy(kaf)(x), kaf(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert kaf(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_memory_is_not_the_dictionarys(way):
    """At most 4 activations above the inputs, forward and backward."""
    kaf, x = KAF(16, 30), torch.randn(64, 16, 16, 16, requires_grad=True)
    function, g = torch.compile(kaf, fullgraph=True) if way == "compiled" else kaf, torch.randn_like(x)
    step(function, x, g, [kaf.alpha])
    most = 5.2 if way == "compiled" and torch.__version__.startswith("2.11.") else 4.2  # its compiler keeps one more
    assert peak_memory(lambda: step(function, x, g, [kaf.alpha])) < most * x.numel() * x.itemsize


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 60), st.floats(0.1, 20), st.floats(0.05, 20), st.floats(-50, 50, allow_nan=False), st.integers(0, 9)
)
def test_any_grid_any_input(size, boundary, scale, centre, seed):
    generator = torch.Generator().manual_seed(seed)
    kaf = KAF(2, size, boundary, bandwidth=scale * default_bandwidth(size, boundary)).double()
    kaf.alpha.data.normal_(generator=generator)
    x = centre + boundary * torch.randn(9, 2, dtype=torch.float64, generator=generator)
    want = reference(x, *exact(kaf))
    assert (kaf(x) - want).abs().max() <= 1e-11 * kaf.alpha.abs().sum()


@pytest.mark.parametrize(
    "arguments",
    [dict(channels=0), dict(channels=2, dictionary_size=1), dict(channels=2, boundary=0), dict(channels=2, boundary=math.inf),
     dict(channels=2, kernel="poly"), dict(channels=2, kernel=()), dict(channels=2, kernel="relu", init="relu"), dict(channels=2, init="rleu"), dict(channels=2, bandwidth=-1.0)],
)  # fmt: skip
def test_bad_arguments_get_one_line(arguments):
    with pytest.raises(ValueError) as error:
        KAF(**arguments)
    assert "\n" not in str(error.value)


def test_wrong_channels_get_one_line():
    with pytest.raises(ValueError, match="needs"):
        KAF(3)(torch.randn(2, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("free", [False, True])
def test_cuda_equals_cpu(memory_format, free):
    kaf, x = KAF(16, trainable_dictionary=free), torch.randn(100, 16, 32, 32)  # several tiles a program
    g = torch.randn_like(x)
    results = []
    for device in ("cpu", "cuda"):
        k, v = copy.deepcopy(kaf).to(device), x.to(device, memory_format=memory_format).requires_grad_()
        y = k(v)
        results.append([t.cpu() for t in (y, *torch.autograd.grad(y, (v, *k.parameters()), g.to(device)))])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


# --- other kernels ---------------------------------------------------------------------------------------------

NUMBER = {  # each kernel once more, for one number t and gamma
    "gaussian": lambda t, g: math.exp(-g * t * t),
    "laplacian": lambda t, g: math.exp(-abs(t) * math.sqrt(2 * g)),
    "matern32": lambda t, g: (1 + math.sqrt(6 * g) * abs(t)) * math.exp(-math.sqrt(6 * g) * abs(t)),
    "matern52": lambda t, g: (
        (1 + math.sqrt(10 * g) * abs(t) + 10 * g * t * t / 3) * math.exp(-math.sqrt(10 * g) * abs(t))
    ),
    "rational_quadratic": lambda t, g: 1 / (1 + g * t * t),
    "periodic": lambda t, g: math.exp(-g * (8 / math.pi * math.sin(math.pi * t / 8)) ** 2),
    "relu": lambda t, g: max(0, t) * math.sqrt(g),
    "softplus": lambda t, g: math.log1p(math.exp(4 * t * math.sqrt(g))) / 4,
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_by_hand(kernel):
    kaf = KAF(2, 5, 2.0, kernel=kernel).double()
    x = torch.tensor([[-3.1, 0.4], [1.9, -0.6]], dtype=torch.float64)
    gamma = default_bandwidth(5, 2.0)
    for n in range(2):
        for c in range(2):
            points = [-2.0, -1.0, 0.0, 1.0, 2.0]
            want = sum(
                a * NUMBER[kernel](x[n, c].item() - d, gamma)
                for a, d in zip(kaf.alpha[c].tolist(), points, strict=True)
            )
            assert kaf(x)[n, c].item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("kernel", ["matern32", "matern52", "rational_quadratic", "gaussian"])
def test_smooth_kernels_have_their_curvature_at_dictionary_points_too(kernel):
    kaf = KAF(1, 3, kernel=kernel).double()
    kaf.alpha.data = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([[0.0], [1e-6]], dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(kaf(x).sum(), x, create_graph=True)[0]
    at, near = torch.autograd.grad(slope.sum(), x)[0].flatten().tolist()
    assert at == pytest.approx(near, rel=1e-4) and at < -0.01
    assert kaf.float()(torch.tensor([[1e25]])).item() == 0


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("kernel", [*KERNELS, ("gaussian", "matern52", "laplacian")])
def test_kernels_against_finite_differences(kernel, trainable):
    torch.manual_seed(1)
    kaf = KAF(2, 4, kernel=kernel, trainable_dictionary=trainable).double()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    names, values = zip(*kaf.named_parameters(), strict=True)

    def f(x, *values):
        return torch.func.functional_call(kaf, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(f, (x, *values))
    assert torch.autograd.gradgradcheck(f, (x, *values))


@pytest.mark.parametrize("kernel", [k for k in KERNELS if KERNELS[k].positive_definite])
def test_ridge_for_every_kernel_that_has_one(kernel):
    d, gamma = torch.linspace(-3, 3, 20, dtype=torch.float64), default_bandwidth(20, 3.0)
    assert torch.linalg.eigvalsh(gram(d, gamma, kernel)).min() > -1e-12
    x = torch.linspace(-2.8, 2.8, 100)[:, None]
    assert (KAF(1, kernel=kernel, init="elu", ridge=1e-4)(x) - torch.nn.functional.elu(x)).abs().max() < 0.15
    assert condition(d, gamma, 1e-3, kernel) < condition(d, gamma, 1e-6, kernel)


def test_several_kernels_are_summed_with_learned_weights():
    kaf, x = KAF(3, kernel=("gaussian", "laplacian")).double(), torch.randn(4, 3, dtype=torch.float64)
    kaf.mix.data.copy_(torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.0, 1.0]]))
    parts = []
    for name in kaf.kernels:
        one = KAF(3, kernel=name).double()
        one.alpha.data.copy_(kaf.alpha)
        parts.append(one(x))
    assert torch.allclose(kaf(x), sum(kaf.mix[:, p] * parts[p] for p in range(2)))


@pytest.mark.parametrize("kernel", ["gaussian", "laplacian", "softplus", ("gaussian", "periodic")])
def test_unit_initialisation_has_unit_second_moment(kernel):
    torch.manual_seed(0)
    kaf = KAF(4000, kernel=kernel, init="unit")
    x = torch.randn(64, 1).expand(-1, 4000)
    assert kaf(x).square().mean().item() == pytest.approx(1, rel=0.15)


def test_second_moment_closed_form():
    d, g = torch.linspace(-3, 3, 20, dtype=torch.float64), 1.3
    want = sum(math.exp(-2 * g * v * v / (1 + 4 * g)) / math.sqrt(1 + 4 * g) for v in d.tolist())
    assert second_moment(d, g) == pytest.approx(want, rel=1e-9)


# --- transforms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [False, True])
def test_functorch(trainable):
    kaf = KAF(3, 8, trainable_dictionary=trainable).double()
    params = dict(kaf.named_parameters())

    def f(params, x):
        return torch.func.functional_call(kaf, params, x)

    x = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    want = torch.stack([kaf(v) for v in x])
    assert torch.allclose(torch.func.vmap(kaf)(x), want)
    stacked = {k: torch.stack([v, 2 * v]) for k, v in params.items()}
    both = torch.func.vmap(f, in_dims=(0, None))(stacked, x[0])
    assert torch.allclose(both[1], f({k: 2 * v for k, v in params.items()}, x[0]))
    v = torch.randn(1, 3, dtype=torch.float64)
    jacobian = torch.func.jacrev(kaf)(v)[0, :, 0]
    slope = torch.autograd.grad(kaf(w := v.clone().requires_grad_()).sum(), w)[0][0]
    assert torch.allclose(jacobian, torch.diag(slope), atol=1e-12)
    by_params = torch.func.jacrev(lambda p: f(p, v).sum())(params)
    for name, value in zip(params, torch.autograd.grad(kaf(v).sum(), tuple(params.values())), strict=True):
        assert torch.allclose(by_params[name], value, atol=1e-12)
    per_example = torch.func.vmap(torch.func.grad(lambda p, w: f(p, w[None]).sum()), in_dims=(None, 0))(params, x[0])
    assert torch.allclose(per_example["alpha"].sum(0), torch.autograd.grad(kaf(x[0]).sum(), kaf.alpha)[0])


def in_inference_mode(kaf, x):
    with torch.inference_mode():
        kaf(x)


def of_fake_tensors(kaf, x):
    with FakeTensorMode():
        fake = KAF(3, 20, kaf.boundary, kernel=kaf.kernels)
        assert type(fake(torch.randn(4, 3, 5))) is FakeTensor


def inside_torch_func(kaf, x):
    if kaf.kernels == ("gaussian",):
        torch.func.vmap(torch.func.grad(lambda v: kaf(v[None]).sum()))(x)


@pytest.mark.parametrize("first", [in_inference_mode, of_fake_tensors, inside_torch_func])
@pytest.mark.parametrize("kernel", ["gaussian", "matern32"])
def test_what_is_kept_for_later_calls_is_plain(first, kernel):
    """A layer's first call may be in a mode whose tensors are no others': the next can train, and gives numbers."""
    kaf, x = KAF(3, 20, 2.0 + torch.rand(()).item(), kernel=kernel), torch.randn(4, 3, 5)  # a grid no test has used
    first(kaf, x)
    y = kaf(x.requires_grad_())
    want = reference(x.double(), *exact(kaf)) if kernel == "gaussian" else copy.deepcopy(kaf).double()(x.double())
    assert (y - want).abs().max() < 1e-5
    slope, wanted = (torch.autograd.grad(f.sum(), x)[0] for f in (y, want))
    assert (slope - wanted).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("size", [5, 20, 64])
def test_compile_is_one_graph_with_the_same_numbers(size):
    kaf, x = KAF(4, size), torch.randn(8, 4, 5, 5)
    results = []
    for module in (kaf, torch.compile(kaf, fullgraph=True)):
        v = x.clone().requires_grad_()
        y = module(v)
        results.append((y.detach(), *torch.autograd.grad(y, (v, kaf.alpha), torch.ones_like(y))))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_compiled_formula_keeps_large_coefficients_under_autocast(dtype):
    kaf, x = KAF(8, init="relu"), torch.randn(4, 8, 6, 6)
    want = kaf(x)
    with torch.autocast("cpu", dtype):
        got, _ = compiled.forward(x, kaf.alpha, kaf.grid)
    assert (got - want).abs().max() < 1e-4


def test_export():
    kaf, x = KAF(4), torch.randn(3, 4, 5)
    program = torch.export.export(kaf, (x,))
    assert torch.allclose(program.module()(x), kaf(x), atol=1e-6)


@pytest.mark.parametrize("free", [False, True])
def test_nan_stays_nan_whatever_its_bits(free):
    x = torch.tensor([0x7FC00000, 0x7FC00001, 0x7F800001], dtype=torch.int32).view(torch.float32).expand(4, 3).T
    assert x.isnan().all() and KAF(4, trainable_dictionary=free)(x.contiguous()).isnan().all()


@pytest.mark.parametrize("kernel", ["laplacian", "softplus", ("gaussian", "matern52")])
def test_other_kernels_compile_to_one_graph(kernel):
    torch.manual_seed(0)
    kaf, x = KAF(3, 5, kernel=kernel), torch.randn(4, 3, 6, requires_grad=True)
    wanted, got = (torch.autograd.grad(f(x).sum(), x)[0] for f in (kaf, torch.compile(kaf, fullgraph=True)))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_sizes_may_be_scalars_of_numpy_and_torch():
    kaf = KAF(np.int64(2), np.int64(6), np.float64(2.0), bandwidth=torch.tensor(0.5))
    plain, x = KAF(2, 6, 2.0, bandwidth=0.5), torch.randn(3, 2, 4)
    plain.load_state_dict(kaf.state_dict())
    assert repr(kaf) == repr(plain) and kaf.grid == plain.grid
    torch.testing.assert_close(torch.export.export(kaf, (x,)).module()(x), plain(x), rtol=1e-5, atol=1e-6)


def test_several_kernels_are_rounded_once():
    torch.manual_seed(0)
    kaf = KAF(4, kernel=("gaussian", "laplacian", "matern32"), init="unit")
    x = torch.randn(64, 4, 32).bfloat16()
    assert torch.equal(kaf(x), kaf(x.float()).bfloat16()) and kaf(x).dtype == torch.bfloat16


def test_init_takes_any_function_of_the_points():
    step = KAF(2, init=lambda x: (x > 0).float())
    assert torch.equal(step.alpha, KAF(2, init=lambda x: (x > 0).double()).alpha)
    for wrong, said in ((torch.nn.PReLU(), "float64"), (lambda x: x[:3], "a value a point"), (torch.sum, "a point")):
        with pytest.raises(ValueError, match=f"KAF init must.*{said}"):
            KAF(2, init=wrong)
