"""Every activation against a slow, obvious float64 reference and finite differences."""

import math

import pytest
import torch

from kafnb import ACTIVATIONS, KWTA, activation
from kafnb.parametric import APL, SAF, Maxout, PSSiLU, SReLU

POINTS = torch.tensor([-7.3, -3.0, -1.2, -0.4, 0.0, 0.3, 0.9, 1.7, 2.99, 6.1], dtype=torch.float64)


def phi(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


SCALAR = {  # each written once more for one number
    "identity": lambda x: x,
    "relu": lambda x: x if x > 0 else 0.0,
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "prelu": lambda x: x if x > 0 else 0.25 * x,
    "elu": lambda x: x if x > 0 else math.exp(x) - 1,
    "swish": lambda x: x / (1 + math.exp(-x)),
    "pssilu": lambda x: x / (1 + math.exp(-x)),  # as it starts
    "gelu": lambda x: x * phi(x),
    "softplus": lambda x: math.log1p(math.exp(x)),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "srelu": lambda x: x if x > 0 else 0.2 * x,  # as it starts
}


@pytest.mark.parametrize("name", SCALAR)
def test_values(name):
    module = activation(name, 1).double()
    want = torch.tensor([SCALAR[name](v) for v in POINTS.tolist()], dtype=torch.float64)
    assert torch.allclose(module(POINTS[:, None])[:, 0], want, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (2, 3, 4, 4)])
def test_shape_and_gradients(name, shape):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = activation(name, 3).double()
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if name == "pssilu":  # it starts at the end of its range, where the derivative in b is one-sided
        module.b.data.fill_(0.1)
    assert module(x).shape == shape
    assert torch.autograd.gradcheck(module, (x,))
    params = dict(module.named_parameters())
    if params:

        def f(*values):
            return torch.func.functional_call(module, dict(zip(params, values, strict=True)), x.detach())

        assert torch.autograd.gradcheck(f, tuple(params.values()))


def _one(module, **values):
    for name, value in values.items():
        getattr(module, name).data.copy_(torch.tensor(value, dtype=torch.float64))
    return module(POINTS[:, None])[:, 0].tolist()


def test_srelu_off_its_start():
    got = _one(SReLU(1).double(), left=[-1.0], left_slope=[0.3], right=[2.0], right_slope=[0.5])
    for x, y in zip(POINTS.tolist(), got, strict=True):
        want = 2 + 0.5 * (x - 2) if x >= 2 else (-1 + 0.3 * (x + 1) if x <= -1 else x)
        assert y == pytest.approx(want)


def test_apl():
    got = _one(APL(1, pieces=2).double(), slopes=[[0.5], [-0.2]], hinges=[[1.0], [-2.0]])
    for x, y in zip(POINTS.tolist(), got, strict=True):
        assert y == pytest.approx(max(0, x) + 0.5 * max(0, 1 - x) - 0.2 * max(0, -2 - x))


def test_maxout():
    got = _one(Maxout(1, pieces=3).double(), weight=[[-1.0], [0.5], [2.0]], bias=[[0.0], [0.1], [-1.0]])
    for x, y in zip(POINTS.tolist(), got, strict=True):
        assert y == pytest.approx(max(-x, 0.5 * x + 0.1, 2 * x - 1))


def test_pssilu():
    got = _one(PSSiLU(1).double(), a=[1.5], b=[0.2])
    for x, y in zip(POINTS.tolist(), got, strict=True):
        assert y == pytest.approx(x * (1 / (1 + math.exp(-1.5 * x)) - 0.2) / 0.8)


def test_pssilu_learns_its_shift():
    target, module = PSSiLU(1), PSSiLU(1)
    target.b.data.fill_(0.3)
    x, optimizer = torch.linspace(-4, 4, 200)[:, None], torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(1000):
        optimizer.zero_grad()
        (module(x) - target(x)).square().mean().backward()
        optimizer.step()
    assert module.b.item() == pytest.approx(0.3, abs=1e-3) and module.a.item() == pytest.approx(1, abs=1e-3)
    module.b.data.fill_(-0.5)  # kept in its range all the same
    assert torch.allclose(module(x), x * torch.sigmoid(module.a * x))


def test_saf_passes_through_its_values_and_is_c1():
    saf = SAF(2, points=9, boundary=2.0).double()
    saf.values.data.normal_(generator=torch.Generator().manual_seed(0))
    grid = torch.linspace(-2, 2, 9, dtype=torch.float64)
    assert torch.allclose(saf(grid[:, None].expand(-1, 2)), saf.values.T, atol=1e-12)
    x = torch.linspace(-3, 3, 6001, dtype=torch.float64)[:, None].expand(-1, 2).clone().requires_grad_()
    slope = torch.autograd.grad(saf(x).sum(), x)[0]
    assert (slope[1:] - slope[:-1]).abs().max() < 0.2  # no jumps, at the joints or at the ends
    assert torch.allclose(slope[0], slope[500]) and torch.allclose(slope[-1], slope[-500])  # linear outside


def test_nan_stays_nan_in_kwta():
    y = KWTA(0.5)(torch.tensor([[math.nan, 1.0, 2.0, 3.0]]))
    assert y[0, 0].isnan() and y[0, 1:].tolist() == [0, 0, 3]


def test_kwta_of_nothing_is_nothing():
    assert KWTA(0.5)(torch.zeros(2, 3, 0, 4)).shape == (2, 3, 0, 4) and KWTA(0.5)(torch.zeros(0, 3)).shape == (0, 3)


def test_kwta_keeps_the_largest_of_each_example():
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    for ratio in (0.01, 0.15, 0.5, 0.99):
        y, k = KWTA(ratio)(x), max(1, round(ratio * 48))
        for before, after in zip(x.flatten(1), y.flatten(1), strict=True):
            kept = sorted(before.tolist(), reverse=True)[:k]
            assert sorted(after[after != 0].tolist(), reverse=True) == kept
            assert torch.equal(after[after != 0], before[after != 0])  # in place, not shuffled
    assert torch.equal(KWTA(1.0)(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kwta_by_other_ways_is_the_same(dtype):
    x = torch.randn(5, 3, 4, 4).to(dtype).round(decimals=1)  # equal values among them
    k, layer = round(0.3 * 48), KWTA(0.3)
    expected = torch.where(x >= x.flatten(1).kthvalue(48 - k + 1, dim=1).values.view(-1, 1, 1, 1), x, 0)
    assert torch.equal(layer(x), expected)
    assert torch.equal(torch.vmap(lambda one: layer(one[None])[0])(x), expected)
    assert torch.equal(torch.func.grad(lambda v: layer(v).square().sum() / 2)(x), expected)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected) and torch.equal(compiled(x[:, :, :, :2]), layer(x[:, :, :, :2]))
    assert layer(x[:0]).shape == (0, 3, 4, 4) and layer(x.to("meta")).shape == x.shape


def test_kwta_does_not_care_about_memory_format():
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(KWTA(0.3)(x), KWTA(0.3)(x.to(memory_format=torch.channels_last)))


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5])
def test_kwta_bad_ratio(ratio):
    with pytest.raises(ValueError, match="ratio"):
        KWTA(ratio)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'kaf_swish'"):
        activation("kaf_swihs", 3)


def test_kafs_of_other_kernels_by_name():
    torch.manual_seed(0)
    x = torch.randn(500, 3)
    sums = activation("elu:gaussian+matern32", 3)
    assert sums.kernels == ("gaussian", "matern32") and sums.mix.shape == (3, 2)
    assert torch.allclose(sums(x.clamp(-2.9, 2.9)), torch.nn.functional.elu(x.clamp(-2.9, 2.9)), atol=0.1)
    assert activation("unit:periodic", 3)(x).square().mean().item() == pytest.approx(1, rel=0.8)
    with pytest.raises(ValueError, match="unknown KAF kernel 'gausian'; did you mean 'gaussian'"):
        activation("unit:gausian", 3)
    with pytest.raises(ValueError, match="'elo'"):
        activation("elo:gaussian", 3)


def test_saf_hands_nan_on():
    assert SAF(2)(torch.tensor([[math.nan, 0.5]])).isnan().tolist() == [[True, False]]
