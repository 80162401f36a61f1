"""Bounds hold what they promise: against 10,000 random points a layer, corner points, and exact answers."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import kafnb
from kafnb import KAF, KWTA, certify
from kafnb.certify import bounds, crown, curves
from kafnb.models import _PadShortcut

ELEMENTWISE = {
    "relu": nn.ReLU(), "leaky": nn.LeakyReLU(0.2), "elu": nn.ELU(), "elu2": nn.ELU(2.0),
    "celu2": nn.CELU(2.0), "softplus": nn.Softplus(beta=3), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(), "swish": nn.SiLU(), "gelu": nn.GELU(), "prelu": nn.PReLU(4, -0.5),
    "kaf": KAF(4), "kaf_unit": KAF(4, init="unit"), "kaf_relu": KAF(4, init="relu"), "kaf_elu": KAF(4, init="elu"),
    "kaf_free": KAF(4, trainable_dictionary=True), "kaf_sharp": KAF(4, dictionary_size=40, boundary=2.0, init="unit"), "kwta": KWTA(0.3),
}  # fmt: skip


def intervals(n, channels=4, widest=3.0, seed=0):
    """n boxes (n, channels, 1, 1) of widths from tiny to ``widest``, some of them points, some far out."""
    g = torch.Generator().manual_seed(seed)
    middle = torch.randn(n, channels, 1, 1, dtype=torch.float64, generator=g) * 2
    middle[: n // 10] *= 6
    half = widest / 2 * 10 ** (-4 * torch.rand(n, channels, 1, 1, dtype=torch.float64, generator=g))
    half[-n // 20 :] = 0
    return middle - half, middle + half


def within(low, high, points, g):
    """``points`` random points of each box, many at its corners: (points, N, ...)."""
    share = torch.rand(points, *low.shape, dtype=low.dtype, generator=g) * 1.5 - 0.25
    return torch.minimum(torch.maximum(low + share.clamp(0, 1) * (high - low), low), high)


@pytest.mark.parametrize("name", [n for n in ELEMENTWISE if n != "kwta"])
def test_ranges_and_lines_hold_10000_points_and_are_tight(name):
    f = ELEMENTWISE[name].double()
    shape, (low, high) = curves.curve(f), intervals(200)
    with torch.no_grad():
        a, b = curves.value_range(shape, low, high)
        (al, bl), (au, bu) = curves.relaxation(shape, low, high)
        x = within(low, high, 50, torch.Generator().manual_seed(1))  # 50 * 200 = 10,000 of each channel
        y = torch.stack([f(p) for p in x])
        assert (y >= a).all() and (y <= b).all()
        coarse = curves.value_range(shape, low, high, pieces=5)
        assert (y >= coarse[0]).all() and (y <= coarse[1]).all()
        assert (y >= al * x + bl).all() and (y <= au * x + bu).all()
        # a dense look at each interval: the range is exact up to the stated error
        dense = low + torch.linspace(0, 1, 1001, dtype=torch.float64).view(-1, 1, 1, 1, 1) * (high - low)
        values = torch.stack([f(p) for p in dense])
        stray = ((high - low) / curves.PIECES) ** 2 / 8 * curves._channels(shape.curvature, low)
        slack = 2 * stray + 1e-6 + 1e-3 * shape.kink * (high - low)  # the dense look may miss the kink itself
        assert (values.amin(0) - a <= slack).all() and (b - values.amax(0) <= slack).all()


@pytest.mark.parametrize("name", ["kaf", "kaf_unit", "kaf_relu", "kaf_elu", "kaf_free", "kaf_sharp"])
def test_curvature_of_a_kaf_is_certain_and_near(name):
    kaf = ELEMENTWISE[name].double()
    x = torch.linspace(-9, 9, 20001, dtype=torch.float64)[:, None].expand(-1, 4).contiguous().requires_grad_()
    first = torch.autograd.grad(kaf(x).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), x)[0].abs().amax(0)
    shape = curves.curve(kaf)
    assert (second <= shape.curvature).all()
    near = 1.05 * second + 0.03 * second.max() + (1 / 64) ** 2 / 8 * 12 * kaf.bandwidth**2 * kaf.alpha.abs().sum(1)
    assert (shape.curvature <= near).all()
    far = torch.full((1, 4), shape.reach + 0.01, dtype=torch.float64)
    assert (kaf(far).abs() <= shape.tail).all() and (kaf(-far).abs() <= shape.tail).all()


@pytest.mark.parametrize("name", ["softplus", "sigmoid", "tanh", "swish", "gelu", "elu", "elu2"])
def test_curvature_constants(name):
    f = ELEMENTWISE[name].double()
    x = torch.linspace(-12, 12, 48001, dtype=torch.float64).requires_grad_()
    first = torch.autograd.grad(f(x).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), x)[0].abs().max()
    assert second <= curves.curve(f).curvature * (1 + 1e-9) and second >= 0.98 * curves.curve(f).curvature


def test_relu_lines_are_crowns():
    """Zhang et al., section 3: the chord above, 0 or x below, whichever has less area."""
    low, high = torch.tensor([[-1.0, -2.0, 1.0, -3.0]]).double(), torch.tensor([[2.0, 1.0, 2.0, -1.0]]).double()
    (al, bl), (au, bu) = curves.relaxation(curves.curve(nn.ReLU()), low, high)
    assert torch.allclose(al, torch.tensor([[1.0, 0, 1, 0]]).double()) and bl.abs().max() < 1e-6
    assert torch.allclose(au, torch.tensor([[2 / 3, 1 / 3, 1, 0]]).double(), atol=1e-6)
    assert torch.allclose(bu, torch.tensor([[2 / 3, 2 / 3, 0, 0]]).double(), atol=1e-6)


def boxes(shape, eps, seed=0):
    g = torch.Generator().manual_seed(seed)
    middle = torch.rand(shape, dtype=torch.float64, generator=g)
    half = eps * torch.rand(shape, dtype=torch.float64, generator=g)
    return middle - half, middle + half


LAYERS = {
    "linear": (nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), 4), "conv": (nn.Conv2d(4, 6, 3, 2, 1), 4),
    "batchnorm": (nn.BatchNorm2d(4), 4), "avg": (nn.AvgPool2d(2), 4), "global": (nn.AdaptiveAvgPool2d(1), 4),
    "max": (nn.MaxPool2d(2), 4), "overlapping_max": (nn.MaxPool2d(3, 1, 1), 4), "dropout": (nn.Dropout(0.5), 4),
    "pad": (_PadShortcut(4, 8, 2), 4), "kwta": (KWTA(0.3), 4), "kaf": (KAF(4, init="unit"), 4), "swish": (nn.SiLU(), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_bounds_of_each_layer_hold_10000_points(name):
    layer, channels = LAYERS[name]
    layer = nn.Sequential(layer, nn.Flatten()).double().train()  # the mode must not matter
    if name == "batchnorm":
        layer(torch.randn(99, 4, 4, 4, dtype=torch.float64) * 3 + 1)
        nn.init.normal_(layer[0].weight)
    low, high = boxes((20, channels, 4, 4), 0.5)
    with torch.no_grad():
        a, b = bounds.interval_bounds(layer, low, high)
        c, d = crown.crown_bounds(layer, low, high)
        x = within(low, high, 500, torch.Generator().manual_seed(2))  # 500 * 20 = 10,000 boxes' points
        y = layer.eval()(x.flatten(0, 1)).unflatten(0, (500, 20))
        assert (y >= a - 1e-9).all() and (y <= b + 1e-9).all() and (y >= c - 1e-9).all() and (y <= d + 1e-9).all()
        assert (c >= a).all() and (d <= b).all()


NETWORKS = [
    ("mlp", "relu", {}), ("mlp", "kaf_elu", {}), ("mlp", "kaf", {}), ("mlp", "kaf_free", {}), ("mlp", "elu", {}),
    ("light_cnn", "relu", {}), ("light_cnn", "kaf_elu", {}), ("vgg", "gelu", {}), ("resnet8", "kaf_elu", {"block": "thesis"}),
    ("resnet8", "relu", {"block": "he"}), ("resnet8", "swish", {"block": "preact"}), ("mlp", "kwta", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "activation", "options"), NETWORKS)
def test_bounds_of_whole_networks(name, activation, options, digits):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kafnb.models.build(name, activation, digits, **options)
        model(torch.rand(64, 1, 8, 8))  # batch statistics that are not the initial ones
    model.double()
    x = digits.test(4)[0].double()
    low, high = (x - 0.02).clamp(0, 1), (x + 0.02).clamp(0, 1)
    inner = "crown" if name == "mlp" else "interval"
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        a, b = bounds.interval_bounds(model, low, high)
        c, d = crown.crown_bounds(model, low, high, inner=inner)
        assert [m.training for m in model.modules()] == modes
        y = model.eval()(within(low, high, 250, torch.Generator().manual_seed(3)).flatten(0, 1)).unflatten(0, (250, 4))
    assert (y >= c - 1e-9).all() and (y <= d + 1e-9).all() and (c >= a).all() and (d <= b).all()
    if name == "mlp" and activation not in ("kwta", "kaf"):
        assert ((d - c) < 0.5 * (b - a)).all()  # crossing signs cancel in linear bounds, not in intervals


def test_crown_is_exact_for_affine_networks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(5, 9), nn.Linear(9, 3)).double()
    low, high = boxes((6, 5, 1, 1), 1.0)
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=5))).double().view(32, 1, 5, 1, 1)
    with torch.no_grad():
        y = net((low + corners * (high - low)).flatten(0, 1)).unflatten(0, (32, 6))
        c, d = crown.crown_bounds(net, low, high)
        a, b = bounds.interval_bounds(net, low, high)
    assert torch.allclose(c, y.amin(0)) and torch.allclose(d, y.amax(0)) and (b - a > 1.05 * (d - c)).all()


def test_intervals_of_a_point_are_the_network(digits):
    model = kafnb.models.build("resnet8", "relu", digits, block="he").double().eval()
    x = digits.test(5)[0].double()
    low, high = bounds.interval_bounds(model, x, x)
    assert torch.allclose(low, model(x)) and torch.allclose(high, model(x))


def test_interval_training_has_gradients_in_every_weight(digits):
    x = digits.test(8)[0]
    for activation in ("relu", "kaf_elu"):
        model = kafnb.models.mlp(activation)
        low, high = bounds.interval_bounds(model, x - 0.05, x + 0.05)
        (high - low).sum().backward()
        grads = [p.grad for n, p in model.named_parameters() if not n.endswith("5.bias") and "4.bias" not in n]
        assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_unknown_layers_and_operations_get_one_line():
    class Doubled(nn.Module):
        def forward(self, x):
            return x * 2

    for net in (
        nn.Sequential(nn.Flatten(), nn.Bilinear(2, 2, 1)),
        Doubled(),
        nn.Sequential(nn.Conv2d(1, 1, 3), nn.LSTM(3, 3)),
    ):
        with pytest.raises((ValueError, TypeError)) as error:
            bounds.interval_bounds(net, torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="Gaussian"):
        curves.curve(KAF(2, kernel="laplacian"))


@pytest.mark.parametrize("both", [False, True])
def test_a_network_that_does_not_return_its_last_step_is_refused(both):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.first, self.second = nn.Flatten(), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            x = self.flat(x)
            out, other = self.first(x), self.second(x)
            return (out, other) if both else out

    with pytest.raises(ValueError, match="return what their last layer gives"):
        bounds.interval_bounds(TwoHeads(), torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("gamma", [1e-8, 1.0, 1e4])
def test_curvature_of_a_kaf_of_any_bandwidth_is_close(gamma):
    kaf = KAF(2, 5, bandwidth=gamma).double()
    x = torch.linspace(-3, 3, 200_001, dtype=torch.float64)
    s = gamma * (x[:, None, None] - kaf.dictionary) ** 2
    seen = (kaf.alpha * 2 * gamma * (2 * s - 1) * torch.exp(-s)).sum(2).abs().amax(0)
    bound = curves.kaf_curve(kaf).curvature
    assert (bound >= seen * (1 - 1e-9)).all() and (bound <= 1.05 * seen).all()


def test_unknown_bounds_get_one_line():
    with pytest.raises(ValueError, match="inner must be"):
        crown.crown_bounds(nn.Flatten(), torch.zeros(1, 2), torch.ones(1, 2), inner="x")


# --- certificates ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(digits):
    """A small network with KAFs, trained by PGD, and one with ReLU."""
    out = {}
    for activation in ("kaf_elu", "relu"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            out[activation] = kafnb.models.mlp(activation, hidden=(32, 32))
        kafnb.fit(
            out[activation], digits, kafnb.Recipe("pgd", epochs=12, lr=(0.005, 0.5), batch_size=64, eps=0.05, steps=3)
        )
    return out


@pytest.mark.parametrize("activation", ["kaf_elu", "relu"])
@pytest.mark.parametrize("method", certify.METHODS)
def test_no_attack_reaches_what_is_certified(trained, digits, activation, method):
    model, (x, y) = trained[activation], digits.test(40)
    shares = []
    for eps in (0.005, 0.01, 0.02, 0.04, 0.08, 0.3):
        proved = certify.certified(model, x, y, eps, method)
        shares.append(proved.float().mean().item())
        adv = kafnb.attacks.pgd(model, x, y, eps=eps, steps=20, restarts=3)
        assert not (proved & (model(adv).argmax(1) != y)).any()
    assert shares[0] > 0.5 and shares[-1] < 0.2, shares


def test_methods_in_order_of_tightness(trained, digits):
    model, (x, y) = trained["kaf_elu"], digits.test(30)
    values = [certify.margin_bound(model, x, y, 0.03, m) for m in certify.METHODS]
    assert (values[0] <= values[1] + 1e-9).all() and values[1].mean() < values[2].mean()
    own = model(x).detach().double().gather(1, y[:, None])[:, 0]
    assert torch.allclose(
        certify.margin_bound(model, x, y, 0.0),
        own - model(x).detach().double().scatter(1, y[:, None], -math.inf).amax(1),
        atol=1e-4,
    )


def test_certificates_leave_the_model_alone(trained, digits):
    model, (x, y) = trained["relu"].train(), digits.test(4)
    certify.certified(model, x, y, 0.01)
    assert model.training and all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    model.eval()
    with pytest.raises(ValueError, match="unknown method"):
        certify.margin_bound(model, x, y, 0.1, "lirpa")


def test_lipschitz_radius_of_a_linear_map():
    """For logits W x with spectral norm s, no L2 step of the certified length changes the answer; a longer one may."""
    torch.manual_seed(0)
    weight, x = torch.randn(2, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    weight[1] = -weight[0]  # then the bound is tight
    logits, constant = x @ weight.T, torch.linalg.matrix_norm(weight, 2)
    y = logits.argmax(1)
    radius = certify.lipschitz_radius(logits, y, constant)
    direction = (weight[1] - weight[0])[None] * torch.where(y == 0, 1.0, -1.0)[:, None].double()
    direction /= direction.norm(dim=1, keepdim=True)
    for factor, same in ((0.999, True), (1.001, False)):
        assert ((((x + factor * radius[:, None] * direction) @ weight.T).argmax(1) == y) == same).all()
    assert (certify.lipschitz_radius(logits, 1 - y, constant) == 0).all()


def test_clopper_pearson_against_scipy_and_by_simulation():
    from scipy.stats import binomtest

    for k, n in ((0, 10), (5, 10), (10, 10), (990, 1000)):
        exact = binomtest(k, n).proportion_ci(1 - 2 * 0.01, method="exact").low
        assert certify.lower_confidence(k, n, 0.01) == pytest.approx(exact, abs=1e-12)
    draws = torch.distributions.Binomial(50, torch.tensor(0.7)).sample((4000,))
    missed = sum(certify.lower_confidence(int(k), 50, 0.05) > 0.7 for k in draws) / 4000
    assert missed <= 0.05 + 0.01


class HalfSpace(nn.Module):
    """Class 1 where w.x > b: the smoothed classifier's radius is known, |w.x - b| / |w|."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = nn.Parameter(w), b

    def forward(self, x):
        z = x.flatten(1) @ self.w - self.b
        return torch.stack([-z, z], 1)


def test_smoothing_of_a_half_space_never_exceeds_the_exact_radius():
    w = torch.tensor([3.0, 4.0])
    smoothed = certify.Smoothed(HalfSpace(w, 0.5), sigma=0.5, alpha=0.01)
    g, ratios = torch.Generator().manual_seed(0), []
    for i in range(30):
        image = torch.rand(1, 1, 2, generator=torch.Generator().manual_seed(i))
        exact = float((image.flatten() @ w - 0.5) / 5)
        answer, radius = smoothed.certify(image, 100, 2000, g)
        assert answer in (-1, int(exact > 0)) and smoothed.predict(image, 2000, g) in (-1, int(exact > 0))
        ratios.append(radius / abs(exact))
    assert max(ratios) <= 1.0 and sum(r > 0.8 for r in ratios) > 5  # sound, and not empty (all 2000 votes: sigma * 2.8)


def test_smoothing_leaves_generators_and_modes(digits):
    model = kafnb.models.light_cnn("relu", in_channels=1, image_size=8).train()
    state, statistics = torch.get_rng_state(), model[1].running_mean.clone()
    votes = certify.Smoothed(model, 0.1, batch_size=64).votes(
        digits.test(1)[0][0], 100, torch.Generator().manual_seed(0)
    )
    assert votes.sum() == 100 and model.training and torch.equal(model[1].running_mean, statistics)
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_in_place_change_no_bound():
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 20), nn.ELU(), nn.Linear(20, 4)
    ).double()
    in_place = copy.deepcopy(plain)
    in_place[2].inplace = in_place[4].inplace = True
    low = torch.rand(6, 1, 4, 4, dtype=torch.float64) * 0.8
    for bound in (certify.interval_bounds, certify.crown_bounds):
        assert all(map(torch.equal, bound(plain, low, low + 0.2), bound(in_place, low, low + 0.2)))
    assert in_place[2].inplace


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(2, dilation=2),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.GELU("tanh"),
        nn.Softplus(threshold=1),
    ],
)
def test_layers_without_a_sound_rule_are_refused(layer):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), layer, nn.Flatten(), nn.LazyLinear(2)).double().eval()
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    net(x)
    with pytest.raises(ValueError, match="bounds"):
        certify.interval_bounds(net, x, x)


def test_batch_normalisation_without_weights():
    net = (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, affine=False), nn.Flatten(), nn.LazyLinear(2))
        .double()
        .eval()
    )
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    expected = net(x)
    low, high = certify.interval_bounds(net, x, x)
    assert torch.allclose(low, expected) and torch.allclose(high, expected)


def test_a_network_of_nan_gets_no_certificate():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    nn.init.constant_(net[1].weight, math.nan)
    smoothed, image = certify.Smoothed(net, 0.25), torch.rand(1, 2, 2)
    assert smoothed.certify(image, 10, 50) == (-1, 0.0) and smoothed.predict(image, 10) == -1
    with pytest.raises(ValueError, match="NaN"):
        kafnb.lipschitz.clever(net, image, eps=0.1)
    with pytest.raises(ValueError, match="not all finite"):
        kafnb.lipschitz.network_bound(net, image[None])


def test_a_layer_without_a_rule_is_named():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), kafnb.activation("srelu", 3)).double()
    x = torch.rand(2, 1, 2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="no bounds are known for the layer SReLU"):
        bounds.interval_bounds(net, x, x)


def test_a_radius_in_grey_levels_is_asked_about():
    net, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), (torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="did you mean 8 / 255"):
        certify.certified(net, x, y, 8)
