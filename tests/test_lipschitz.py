"""Spectral norms against SVD and a library, KAF constants against sampled slopes, bounds against what they bound."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kafnb
from kafnb import lipschitz, models
from kafnb.lipschitz import layers as lipschitz_layers
from kafnb.lipschitz.kaf import KafRanges
from kafnb.lipschitz.units import TURNS, ranges


def randomised(model, seed=0):
    """Batch normalisation with statistics and gains that are not 1, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.5, generator=generator)
            m.running_var.uniform_(0.2, 3, generator=generator)
            m.weight.data.normal_(0, 1, generator=generator)
    return model.eval()


def slopes(kaf, x):
    """|f'| of every channel at x (M,), the plain formula in float64: (C, M)."""
    alpha = kaf.alpha.detach().double()[:, :, None]
    gamma = kaf.bandwidth.detach().double().reshape(-1, 1, 1)
    if kaf.grid is not None:
        points = torch.linspace(-kaf.boundary, kaf.boundary, kaf.dictionary_size, dtype=torch.float64)[None, :, None]
    else:
        points = kaf.points.detach().double()[:, :, None]
    t = x - points
    return (-2 * gamma * alpha * t * torch.exp(-gamma * t * t)).sum(1).abs()


# --- KAF ---------------------------------------------------------------------------------------------------------


def test_kaf_constant_of_1000_random_kafs_against_a_million_slopes():
    torch.manual_seed(0)
    kaf = kafnb.KAF(1000)
    kaf.alpha.data *= 10 ** torch.empty(1000, 1).uniform_(-3, 3)
    constant = lipschitz.kaf_constant(kaf)
    grid = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    for part in (torch.empty(1000, dtype=torch.float64).uniform_(-6, 6), grid):
        highest = torch.cat([slopes(kaf, p).amax(1)[:, None] for p in part.split(100)], 1).amax(1)
        assert (constant >= highest).all()
    assert (constant <= 1.01 * highest).all()


@pytest.mark.parametrize(
    "options",
    [dict(), dict(init="relu"), dict(init="elu", ridge=1e-3), dict(init="swish"), dict(init="unit", dictionary_size=7),
     dict(trainable_dictionary=True), dict(bandwidth=0.3), dict(bandwidth=40.0), dict(dictionary_size=2, boundary=0.5)],
)  # fmt: skip
def test_kaf_constant_is_tight(options):
    torch.manual_seed(1)
    kaf = kafnb.KAF(5, **options)
    if options.get("trainable_dictionary"):
        kaf.points.data += torch.randn_like(kaf.points)
        kaf.log_bandwidth.data += 0.5 * torch.randn(5)
    constant = lipschitz.kaf_constant(kaf)
    million = torch.rand(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 20 - 10
    sampled = torch.stack([slopes(kaf, part).amax(1) for part in million.split(20_000)]).amax(0)
    assert (constant >= sampled).all() and (constant <= 1.01 * sampled).all()
    assert (constant <= lipschitz.kaf_bound(kaf) * 1.001).all()
    assert (lipschitz.kaf_bound(kaf) <= lipschitz.kaf_bound(kaf, "max") * (1 + 1e-12)).all()


def test_kaf_constant_of_one_kernel_is_known():
    kaf = kafnb.KAF(1)
    kaf.alpha.data.zero_()
    assert lipschitz.kaf_constant(kaf).item() == 0
    kaf.alpha.data[0, 3] = 2.0
    exact = 2 * math.sqrt(2 * kaf.bandwidth.item() / math.e)
    assert exact <= lipschitz.kaf_constant(kaf).item() <= 1.001 * exact * (1 + 1e-9)
    assert lipschitz.kaf_bound(kaf).item() == pytest.approx(exact)


@given(st.integers(0, 10**6), st.floats(-4, 2), st.floats(0.1, 20))
@settings(max_examples=40, deadline=None)
def test_kaf_constant_never_below_the_slope(seed, size, gamma):
    torch.manual_seed(seed)
    kaf = kafnb.KAF(3, dictionary_size=8, bandwidth=gamma)
    kaf.alpha.data *= 10**size
    x = torch.empty(3000, dtype=torch.float64).uniform_(-5, 5)
    assert (lipschitz.kaf_constant(kaf) >= slopes(kaf, x).amax(1)).all()


def test_kaf_constant_ends_where_rounding_keeps_it_from_closing(monkeypatch):
    kaf, most = kafnb.KAF(1, 2, trainable_dictionary=True), 2**14
    kaf.points.data[:] = 0.5
    kaf.alpha.data[:] = torch.tensor([1.0, -1.0])  # cancels, up to rounding
    seen, derivatives = [], lipschitz.kaf.derivatives
    monkeypatch.setattr(lipschitz.kaf, "MOST", most)
    monkeypatch.setattr(lipschitz.kaf, "derivatives", lambda m, *a: seen.append(len(m)) or derivatives(m, *a))
    assert 0 <= lipschitz.kaf_constant(kaf).item() < 1e-6 and max(seen) <= 2 * most


def test_kaf_constant_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="one Gaussian kernel"):
        lipschitz.kaf_constant(kafnb.KAF(2, kernel="laplacian"))
    with pytest.raises(ValueError, match="one Gaussian kernel"):
        lipschitz.kaf.kaf_steepest(kafnb.KAF(2, kernel="laplacian"))
    kaf = kafnb.KAF(2)
    kaf.alpha.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        lipschitz.kaf_constant(kaf)


@pytest.mark.parametrize("options", [dict(), dict(init="relu"), dict(trainable_dictionary=True)])
def test_kaf_ranges_enclose_and_are_close(options):
    torch.manual_seed(2)
    kaf = kafnb.KAF(4, **options).double()
    low = torch.empty(6, 4, 3, dtype=torch.float64).uniform_(-7, 7)
    high = low + 10 ** torch.empty_like(low).uniform_(-6, 1)
    f_low, f_high, s_low, s_high = KafRanges(kaf)(low, high)
    shares = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None, None, None]
    x = (low + shares * (high - low)).flatten(0, 1).requires_grad_()
    f = kaf(x)
    slope = torch.autograd.grad(f.sum(), x)[0].view(2001, *low.shape)
    f = f.detach().view(2001, *low.shape)
    assert (f_low <= f.amin(0)).all() and (f_high >= f.amax(0)).all()
    assert (s_low <= slope.amin(0)).all() and (s_high >= slope.amax(0)).all()
    widest = lipschitz.kaf_constant(kaf).max()
    assert (s_high - slope.amax(0)).max() < 0.05 * widest and (f.amin(0) - f_low).max() < 0.05 * widest


# --- other activations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(kafnb.ACTIVATIONS) - {"kwta"}))
def test_activation_constants_against_autograd(name):
    torch.manual_seed(3)
    act = kafnb.activation(name, 3).double()
    for p in act.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64)[:, None].repeat(1, 3).requires_grad_()
    slope = torch.autograd.grad(act(x).sum(), x)[0].abs().amax(0)
    constant = lipschitz.activation_constant(act).expand(3)
    assert (constant >= slope).all() and (constant <= 1.01 * slope + 1e-3).all()


def test_crossed_srelu_and_elu_with_alpha():
    act = kafnb.activation("srelu", 1).double()
    act.left.data[:], act.right.data[:], act.left_slope.data[:], act.right_slope.data[:] = 1, -1, 0.7, 0.9
    assert lipschitz.activation_constant(act).item() == pytest.approx(1.6)
    assert lipschitz.activation_constant(nn.ELU(1.7)).item() == 1.7


def test_kwta_is_not_lipschitz():
    assert lipschitz.activation_constant(kafnb.KWTA(0.2)).item() == math.inf
    model = models.light_cnn("kwta", 1, 8)
    assert lipschitz.network_bound(model, torch.zeros(1, 1, 8, 8)) == math.inf
    act, tiny = kafnb.KWTA(0.5), 1e-6  # two values change places: the jump does not shrink with the step
    jump = act(torch.tensor([[1.0, 1.0 - tiny]])) - act(torch.tensor([[1.0 - tiny, 1.0]]))
    assert jump.abs().max() > 0.9


def test_unknown_activation_gets_one_line():
    with pytest.raises(ValueError, match="no Lipschitz constant known for Hardtanh"):
        lipschitz.activation_constant(nn.Hardtanh())
    with pytest.raises(ValueError, match="no interval rule"):
        ranges(kafnb.activation("apl", 2), torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="no Lipschitz rule for Hardtanh"):
        lipschitz.network_bound(nn.Sequential(nn.Hardtanh()), torch.zeros(1, 3))


@pytest.mark.parametrize("kind", TURNS, ids=lambda t: t.__name__)
def test_ranges_of_fixed_activations(kind):
    act = (kind(1.6) if kind is nn.ELU else kind()).double()
    low = torch.linspace(-4, 3, 29, dtype=torch.float64)[:, None]
    high = low + torch.tensor([0.01, 0.5, 2.0, 6.0], dtype=torch.float64)
    low, high = (v.reshape(-1, 1) for v in torch.broadcast_tensors(low, high))
    found = ranges(act, low, high)
    x = (low + torch.linspace(0, 1, 4001, dtype=torch.float64) * (high - low)).requires_grad_()
    f = act(x.reshape(-1, 1)).view_as(x)
    slope = torch.autograd.grad(f.sum(), x)[0]
    truth = f.detach().amin(1), f.detach().amax(1), slope.amin(1), slope.amax(1)
    for i, (bound, value) in enumerate(zip(found, truth, strict=True)):
        gap = (bound[:, 0] - value) * (1 if i % 2 else -1)
        assert (gap >= -1e-12).all() and (gap < 0.01).all(), i


# --- layers ----------------------------------------------------------------------------------------------------------

LAYERS = [
    (nn.Linear, (24, 17), {}, (24,)),
    (nn.Conv2d, (3, 8, 3), dict(padding=1), (3, 8, 8)),
    (nn.Conv2d, (5, 4, 3), dict(stride=2, padding=1), (5, 9, 7)),
    (nn.Conv2d, (4, 6, 3), dict(stride=2, padding=1, bias=False), (4, 8, 8)),
    (nn.Conv2d, (2, 3, 5), dict(padding=0), (2, 6, 9)),
    (nn.Conv2d, (4, 4, 3), dict(padding=1, padding_mode="circular"), (4, 6, 6)),
    (nn.Conv2d, (3, 5, 3), dict(stride=2, padding=1, padding_mode="circular"), (3, 8, 8)),
]


@pytest.mark.parametrize("kind, sizes, options, shape", LAYERS)
def test_power_iteration_equals_svd_of_the_layer_itself(kind, sizes, options, shape):
    torch.manual_seed(4)
    layer = kind(*sizes, **options).double()
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        matrix = (layer(basis) - layer(torch.zeros_like(basis))).flatten(1)
    exact = np.linalg.svd(matrix.numpy(), compute_uv=False)[0]
    power = lipschitz.spectral_norm(layer, shape)
    assert power.residual <= 1e-5 and abs(power.value - exact) <= 1e-4 * exact
    assert lipschitz.spectral_norm(layer, shape, "svd").value == pytest.approx(exact, rel=1e-9)
    certified = lipschitz.spectral_norm(layer, shape, "certified").value
    assert exact * (1 - 1e-12) <= certified <= 1.5 * exact
    if options.get("padding_mode") == "circular":  # both sizes are divided by the stride: the torus itself
        assert certified == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("padding, kernel", [(1, 1), (2, 3), (1, 2)])
def test_circular_padding_that_repeats_outputs_has_no_certificate(padding, kernel):
    layer = nn.Conv2d(2, 2, kernel, padding=padding, padding_mode="circular")
    with pytest.raises(ValueError, match="repeats outputs"):
        lipschitz.spectral_norm(layer, (2, 6, 6), "certified")


def test_circular_padding_of_an_image_smaller_than_the_kernel_has_none_either():
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False).double()
    layer.weight.data = torch.tensor([1.0, -1, 1]).outer(torch.tensor([1.0, -1, 1]))[None, None].double()
    assert lipschitz.spectral_norm(layer, (1, 2, 2), "svd").value == pytest.approx(9)
    with pytest.raises(ValueError, match="smaller than the kernel"):
        lipschitz.spectral_norm(layer, (1, 2, 2), "certified")


def test_one_layer_in_two_places_is_refused():
    layer, x = nn.Conv2d(1, 1, 3, bias=False), torch.rand(1, 1, 5, 5)
    with pytest.raises(ValueError, match="1 is a layer used twice"):
        lipschitz.network_bound(nn.Sequential(layer, layer), x)
    act = nn.ReLU()  # no size matters to it
    model = nn.Sequential(layer, act, nn.Conv2d(1, 1, 3), act)
    assert lipschitz.network_bound(model, x) > 0


@pytest.mark.parametrize("options", [dict(ceil_mode=True), dict(divisor_override=1), dict(count_include_pad=False)])
def test_average_pooling_of_uneven_windows_has_no_rule(options):
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.AvgPool2d(2, padding=1, **options))
    with pytest.raises(ValueError, match="AvgPool2d"):
        lipschitz.network_bound(net, torch.rand(1, 1, 5, 5))


def test_spectral_norm_agrees_with_another_library():
    """PyTorch's own spectral normalisation divides a dense weight by its norm."""
    torch.manual_seed(5)
    layer = nn.Linear(30, 20)
    value = lipschitz.spectral_norm(layer).value
    normed = nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=200)
    assert torch.linalg.matrix_norm(normed.weight * value, 2).item() == pytest.approx(value, rel=1e-3)


def test_power_iteration_says_when_it_has_not_converged():
    torch.manual_seed(0)
    result = lipschitz.spectral_norm(nn.Conv2d(8, 8, 3, padding=1), (8, 8, 8), iterations=2)
    assert result.iterations == 2 and result.residual > 1e-3


def test_folded_scale():
    torch.manual_seed(6)
    layer, scale = nn.Conv2d(3, 4, 3, padding=1).double(), torch.rand(4).double() * 3
    scaled = nn.Conv2d(3, 4, 3, padding=1).double()
    scaled.weight.data = layer.weight.data * scale.view(-1, 1, 1, 1)
    for method in lipschitz_layers.METHODS:
        one = lipschitz.spectral_norm(layer, (3, 6, 6), method, scale=scale).value
        assert one == pytest.approx(lipschitz.spectral_norm(scaled, (3, 6, 6), method).value, rel=1e-6)


@pytest.mark.parametrize(
    "call",
    [lambda: lipschitz.spectral_norm(nn.Conv2d(2, 2, 3)), lambda: lipschitz.spectral_norm(nn.ReLU(), (3,)),
     lambda: lipschitz.spectral_norm(nn.Linear(2, 2), method="fourier"), lambda: lipschitz.spectral_norm(nn.Linear(2, 2), method="qr"),
     lambda: lipschitz.spectral_norm(nn.Conv2d(4, 4, 3, groups=2), (4, 8, 8)), lambda: lipschitz.kaf_bound(kafnb.KAF(1), "l2")],
)  # fmt: skip
def test_bad_calls_get_one_line(call):
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)


# --- networks --------------------------------------------------------------------------------------------------------

NETWORKS = {
    "mlp": lambda act: models.mlp(act),
    "light_cnn": lambda act: models.light_cnn(act, 1, 8),
    "vgg": lambda act: models.vgg(act, 1, 8),
} | {
    b: lambda act, b=b: models.resnet(8, act, block=b, in_channels=1, image_size=8, width=4) for b in models.BLOCKS
}  # fmt: skip


@pytest.fixture
def digits_batch(digits):
    return digits.test(12)


@pytest.mark.parametrize("act", ["relu", "kaf_elu", "swish"])
@pytest.mark.parametrize("name", NETWORKS)
def test_lower_bounds_stay_below_upper_bounds(name, act, digits_batch):
    torch.manual_seed(7)
    model, (x, y) = randomised(NETWORKS[name](act)), digits_batch
    bound = lipschitz.network_bound(model, x)
    assert lipschitz.network_bound(model, x, norm="power") <= bound * (1 + 1e-9)
    assert bound <= lipschitz.network_bound(model, x, fold=False) * (1 + 1e-9)
    assert lipschitz.jacobian_norms(model, x).max() <= bound
    with torch.no_grad():
        logits = model(x)
    change = torch.pdist(logits) / torch.pdist(x.flatten(1))
    assert change.max() <= bound
    lower = lipschitz.gradient_norms(model, x, y, eps=0.02, samples=4)
    upper = lipschitz.local_bound(model, x, y, eps=0.02)
    assert (lower <= upper * (1 + 1e-4) + 1e-9).all()
    assert (upper.gather(1, y[:, None]) == 0).all()


def test_bound_of_a_linear_network_is_exact():
    """Dense layers of which the singular vectors agree: the product is the norm."""
    torch.manual_seed(8)
    q = [torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q for _ in range(3)]
    layers = [nn.Linear(6, 6).double() for _ in range(2)]
    values = torch.tensor([3.0, 2, 1, 0.5, 0.2, 0.1], dtype=torch.float64)
    layers[0].weight.data, layers[1].weight.data = (
        q[1] @ torch.diag(values) @ q[0].T,
        q[2] @ torch.diag(values) @ q[1].T,
    )
    model = nn.Sequential(layers[0], nn.Identity(), layers[1])
    x = torch.randn(3, 6, dtype=torch.float64)
    assert lipschitz.network_bound(model, x) == pytest.approx(9.0, rel=1e-9)
    assert lipschitz.jacobian_norms(model, x, iterations=100).numpy() == pytest.approx(9.0, rel=1e-6)


def test_pooling_factors():
    x = torch.randn(50, 2, 6, 6, dtype=torch.float64)
    for pool in (nn.MaxPool2d(2), nn.AvgPool2d(3), nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(3, stride=2)):
        bound = lipschitz.network_bound(nn.Sequential(pool), x)
        ratio = torch.pdist(pool(x).flatten(1)) / torch.pdist(x.flatten(1))
        constant = pool(torch.ones_like(x[:1])).norm() / x[0].numel() ** 0.5  # a constant image: worst for averages
        assert max(ratio.max(), 0 if isinstance(pool, nn.MaxPool2d) else constant) <= bound * (1 + 1e-12)
        if not isinstance(pool, nn.MaxPool2d):
            assert constant == pytest.approx(bound)


def test_jacobian_norm_equals_svd_of_the_jacobian(net, images):
    x, _ = images
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda v: net(v[None])[0], v) for v in x[:4]])
    exact = torch.linalg.matrix_norm(jacobian.flatten(2), 2)
    assert torch.allclose(lipschitz.jacobian_norms(net, x[:4], iterations=200), exact, rtol=1e-4)


@pytest.mark.parametrize("norm, p", [("linf", 1), ("l2", 2)])
def test_gradient_norms_equal_the_plain_ones(net, images, norm, p):
    x, y = images
    found = lipschitz.gradient_norms(net, x, y, norm=norm)
    z = x[2:3].clone().requires_grad_()
    logits = net(z)[0]
    for j in range(10):
        g = torch.autograd.grad(logits[y[2]] - logits[j], z, retain_graph=True)[0]
        assert found[2, j].item() == pytest.approx(g.flatten().norm(p).item(), abs=1e-12)


@pytest.mark.parametrize("act", ["relu", "kaf_elu", "tanh"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_local_bound_goes_to_the_gradient(act, norm, digits_batch):
    torch.manual_seed(9)
    model, (x, y) = models.mlp(act).double().eval(), digits_batch
    x = x.double() * 0.8 + 0.1
    gradient = lipschitz.gradient_norms(model, x, y, norm=norm)
    upper = lipschitz.local_bound(model, x, y, eps=1e-9, norm=norm)
    assert torch.allclose(upper, gradient, rtol=2e-3) and (upper >= gradient * (1 - 1e-9)).all()
    wider = [lipschitz.local_bound(model, x, y, eps=e, norm=norm) for e in (1e-3, 1e-2, 1e-1)]
    assert (wider[0] <= wider[1]).all() and (wider[1] <= wider[2]).all()


def test_rounding_does_not_lower_the_local_bound():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Linear(12, 10)).double()
    x, y = torch.rand(1, 1, 4, 4, dtype=torch.float64), torch.tensor([3])
    first, second = ([[Fraction(v) for v in row] for row in net[i].weight.tolist()] for i in (1, 2))
    rows = [[sum(a * b for a, b in zip(row, column)) for column in zip(*first)] for row in second]  # noqa: B905
    upper = lipschitz.local_bound(net, x, y, eps=0.01)[0].tolist()
    for row, bound in zip(rows, upper, strict=True):
        exact = sum(abs(a - b) for a, b in zip(rows[3], row, strict=True))
        assert exact <= Fraction(bound) <= exact * (1 + Fraction(1, 10**12))


@pytest.mark.parametrize(("shift", "gain"), [(1e4, 1e-3), (1e10, 1e-2), (1e13, 1e-3)])
def test_a_large_shift_does_not_hide_the_gain_from_the_local_bound(shift, gain):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 10), nn.BatchNorm1d(10)).double().eval()
    net[2].weight.data.fill_(gain)
    net[2].bias.data.fill_(shift)
    scale = gain / (1 + net[2].eps) ** 0.5
    exact = (net[1].weight[3] - net[1].weight).abs().sum(1) * scale
    upper = lipschitz.local_bound(net, torch.rand(1, 1, 4, 4, dtype=torch.float64), torch.tensor([3]), eps=0.01)[0]
    assert (upper >= exact).all() and torch.allclose(upper, exact, rtol=1e-9)


def test_certified_images_resist_attack(digits_batch):
    from kafnb.attacks import pgd

    torch.manual_seed(10)
    model, (x, y) = models.mlp("kaf"), digits_batch
    kafnb.fit(model, kafnb.load_data("digits"), kafnb.Recipe(epochs=15, lr=(0.003, 0.3), batch_size=64))
    eps = 0.004
    upper = lipschitz.local_bound(model, x, y, eps=eps)
    with torch.no_grad():
        logits = model(x).double()
    margin = logits.gather(1, y[:, None]) - logits
    others = torch.arange(10) != y[:, None]
    certified = (margin > eps * upper)[others].view(-1, 9).all(1)
    assert certified.float().mean() > 0.5
    adv = pgd(model, x[certified], y[certified], eps=eps, steps=20, restarts=3)
    with torch.no_grad():
        assert (model(adv).argmax(1) == y[certified]).all()


def test_clever_of_a_linear_model_is_exact():
    """The margin of a linear model over its gradient's dual norm is the radius."""
    torch.manual_seed(11)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    x = torch.rand(1, 8, 8)
    with torch.no_grad():
        logits = model(x[None])[0]
    y = logits.argmax()
    weight = model[1].weight.detach()
    radius = min(((logits[y] - logits[j]) / (weight[y] - weight[j]).abs().sum()).item() for j in range(3) if j != y)
    assert lipschitz.clever(model, x, eps=1.0) == pytest.approx(radius, rel=1e-4)
    assert lipschitz.clever(model, x, eps=radius / 2) == pytest.approx(radius / 2, rel=1e-4)


def test_clever_against_another_library(digits_batch):
    from art.estimators.classification import PyTorchClassifier
    from art.metrics import clever_t

    torch.manual_seed(12)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    other = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), 3, clip_values=(0.0, 1.0), device_type="cpu")
    pairs = []
    for x in digits_batch[0][:4]:
        y = model(x[None]).argmax().item()
        np.random.seed(0)
        theirs = min(clever_t(other, x.numpy(), j, 20, 16, 0.3, np.inf) for j in range(3) if j != y)
        pairs.append((lipschitz.clever(model, x, eps=0.3), float(theirs)))
    sound = [(a, b) for a, b in pairs if b > 1e-3]  # theirs returns 0 where its fit runs away
    assert len(sound) >= 1 and all(a == pytest.approx(b, rel=0.25) for a, b in sound), pairs


def test_nothing_is_left_behind(digits_batch):
    x, y = digits_batch
    model = models.light_cnn("kaf", 1, 8).train()
    model[1].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.get_rng_state()
    lipschitz.network_bound(model, x)
    lipschitz.gradient_norms(model, x[:2], y[:2], eps=0.1, samples=2)
    lipschitz.local_bound(model, x[:2], y[:2], eps=0.01)
    lipschitz.jacobian_norms(model, x[:2], iterations=2)
    lipschitz.clever(model, x[0], eps=0.1, batches=3, samples=2)
    assert all(m.training for m in model.modules()) and not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1 and not model[1].weight.requires_grad
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_local_bound_with_layers_in_place_and_without_running_statistics():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).eval()
    x, y = torch.rand(2, 1, 6, 6), torch.tensor([0, 3])
    net(x)
    expected = lipschitz.local_bound(net, x, y, eps=0.05)
    net[2].inplace = True
    assert torch.equal(lipschitz.local_bound(net, x, y, eps=0.05), expected) and net[2].inplace
    net[1] = nn.BatchNorm2d(3, track_running_stats=False)
    with pytest.raises(ValueError, match="running statistics"):
        lipschitz.local_bound(net, x, y, eps=0.05)


def test_what_has_no_rule_is_refused_rather_than_bounded_wrongly():
    class Tenfold(nn.Sequential):
        def forward(self, x):
            return 10 * super().forward(x)

    x = torch.rand(2, 1, 6, 6)
    for layer in (
        Tenfold(nn.Flatten(), nn.Linear(36, 3)),
        nn.MaxPool2d(2, dilation=2),
        nn.GELU("tanh"),
        nn.Softplus(threshold=1),
    ):
        with pytest.raises(ValueError, match=r"rule|GELU|softplus"):
            lipschitz.network_bound(nn.Sequential(layer), x)


def test_an_elu_that_turns_at_zero():
    low = torch.tensor([[-1.0]], dtype=torch.float64)
    assert ranges(nn.ELU(-1.0), low, -low)[0].item() == 0


def test_the_gradient_of_an_l1_ball_is_measured_by_its_largest_entry():
    net, x, y = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(1, 1, 2, 2), torch.tensor([0])
    w = net[1].weight.detach()
    assert lipschitz.gradient_norms(net, x, y, norm="l1")[0, 1].item() == pytest.approx(
        (w[0] - w[1]).abs().max().item()
    )
