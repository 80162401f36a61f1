"""Growth of gradients: closed forms, the mean-field prediction against measured networks, and the monitor in fit."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

import kafnb
from kafnb import KAF, Recipe, fit, gradients, meanfield, models, training

BANDWIDTH = KAF(1).grid.gamma
NETS = {
    "relu": "relu",
    "swish": "swish",
    "kaf": "kaf",
    "kaf_elu": "kaf_elu",
    "kaf, gamma / 4": lambda channels: KAF(channels, bandwidth=BANDWIDTH / 4),
}


def test_chi_in_closed_form():
    slope = 0.01  # leaky ReLU's
    leaky = ((1 + slope**2) / 2) / ((1 + slope**2) / 2 - (1 - slope) ** 2 / (2 * math.pi))
    p1, p2 = math.exp(0.5) * norm.cdf(-1), math.exp(2) * norm.cdf(-2)
    elu = (0.5 + p2) / (0.5 + p2 - 2 * p1 + 0.5 - (1 / math.sqrt(2 * math.pi) + p1 - 0.5) ** 2)
    for name, chi in (("relu", math.pi / (math.pi - 1)), ("leaky_relu", leaky), ("elu", elu), ("identity", 1.0)):
        assert gradients.growth_factor(name) == pytest.approx(chi, abs=1e-10), name


@pytest.mark.parametrize("name, f", [("swish", lambda x: x / (1 + math.exp(-x))), ("tanh", math.tanh)])
def test_chi_by_adaptive_quadrature(name, f):
    mean = quad(lambda x: f(x) * norm.pdf(x), -12, 12)[0]
    second = quad(lambda x: f(x) ** 2 * norm.pdf(x), -12, 12)[0]
    slope = quad(lambda x: ((f(x + 1e-5) - f(x - 1e-5)) / 2e-5) ** 2 * norm.pdf(x), -12, 12)[0]
    assert gradients.growth_factor(name) == pytest.approx(slope / (second - mean**2), rel=1e-7)


def test_chi_is_the_mean_hermite_degree():
    """f = sum c_n h_n has chi = sum n c_n^2 / sum_{n > 0} c_n^2; only straight lines have 1."""
    coefficients = [0.7, 0.5, -0.3, 0.4]
    scaled = [c / math.sqrt(math.factorial(n)) for n, c in enumerate(coefficients)]
    powers = np.polynomial.hermite_e.herme2poly(scaled)
    chi = sum(n * c**2 for n, c in enumerate(coefficients)) / sum(c**2 for c in coefficients[1:])
    f = lambda x: sum(c * x**n for n, c in enumerate(powers))  # noqa: E731
    assert gradients.growth_factor(lambda channels: f) == pytest.approx(chi, rel=1e-10)


@pytest.mark.parametrize("size, boundary, share", [(20, 3.0, 1), (20, 3.0, 4), (7, 2.0, 1), (50, 4.0, 2)])
def test_kaf_moments_against_quadrature(size, boundary, share):
    kaf = KAF(3, size, boundary, bandwidth=kafnb.kaf.kernels.default_bandwidth(size, boundary) / share)
    slopes, covariance = gradients.kaf_moments(kaf.dictionary[0], kaf.grid.gamma)
    a = kaf.alpha.detach().double()
    chi = torch.einsum("ci,ij,cj->", a, slopes, a) / torch.einsum("ci,ij,cj->", a, covariance, a)
    assert gradients.growth_factor(lambda channels: kaf if channels == 3 else kaf_of(kaf, channels)) == pytest.approx(
        float(chi), rel=1e-6
    )


def kaf_of(kaf, channels):
    """The same functions repeated."""
    new = KAF(channels - channels % 3, kaf.dictionary_size, kaf.boundary, bandwidth=kaf.grid.gamma)
    new.alpha.data = kaf.alpha.data.repeat(channels // 3, 1)
    return lambda x: new.double()(x[:, : new.channels])


def test_scale_of_alpha_does_not_matter_behind_normalisation():
    one, ten = (lambda c, s=s: _scaled(c, s) for s in (1, 10))
    assert gradients.growth_factor(one) == pytest.approx(gradients.growth_factor(ten), rel=1e-9)


def _scaled(channels, scale):
    kaf = KAF(channels)
    kaf.alpha.data *= scale
    return kaf


@pytest.mark.parametrize("block", models.BLOCKS)
def test_prediction_agrees_with_measured_growth(digits, block):
    """Depth 56, per block, within 10 %; also at the default image size, which is not that of the digits."""
    batch = digits.test(48)
    for name, activation in NETS.items():
        measured = []
        for seed in range(2):
            torch.manual_seed(seed)
            model = models.resnet(56, activation, block, in_channels=1, image_size=8)
            norms = list(gradients.measure(model, batch).values())
            measured.append((norms[0] / norms[-1]) ** (1 / (len(norms) - 1)))
        mean = sum(measured) / len(measured)
        exact = gradients.growth_factor(activation, block, image_size=8)
        assert exact == pytest.approx(mean, rel=0.07), (name, exact, mean)
        default = gradients.growth_factor(activation, block)
        assert default == pytest.approx(mean, rel=0.15 if block == "plain" else 0.10), name


@pytest.mark.parametrize(("activation", "side"), [("relu", 1), ("kaf_swish", -1)])
def test_images_that_deviate_unequally_are_kept_apart(digits, activation, side):
    """Over the 26 steps of ResNet56: within a factor of 2, and far off if all images are given the mean's variance."""
    batch = digits.test(32)

    def total(norms):
        norms = list(norms.values())
        return math.log(norms[0] / norms[-1])

    def measured(seed):
        torch.manual_seed(seed)
        return total(gradients.measure(models.resnet(56, activation, in_channels=1, image_size=8), batch))

    def predicted(seed, alike):
        return total(meanfield.predict(activation, image_size=8, seed=seed, alike=alike))

    apart, together = (sum(predicted(s, alike) - measured(s) for s in range(3)) / 3 for alike in (False, True))
    assert abs(apart) < math.log(2) < side * together, (apart, together)


def test_measure_against_autograd_and_leaves_no_trace(digits):
    model, (x, y) = models.resnet(8, "kaf_elu", in_channels=1, image_size=8).eval(), digits.test(16)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    norms = gradients.measure(model, (x, y))
    assert list(norms) == ["blocks.0", "blocks.1", "blocks.2"] and not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    h = model.train().stem(x)
    outputs = [h := block(h) for block in model.blocks]
    loss = torch.nn.functional.cross_entropy(model.head(h), y)
    for norm_, grad in zip(norms.values(), torch.autograd.grad(loss, outputs), strict=True):
        assert norm_ == pytest.approx(grad.norm().item(), rel=1e-4)


def test_measure_in_float16_overflows_where_float32_passes_65504(digits):
    torch.manual_seed(0)
    model, batch = models.resnet(44, "kaf", in_channels=1, image_size=8), digits.test(8)
    single, half = gradients.measure(model, batch), gradients.measure(model, batch, torch.float16)
    bad = [name for name, v in half.items() if not math.isfinite(v)]
    assert bad and bad == list(half)[: len(bad)]  # those on the input side
    assert single[bad[-1]] > 1e4 and single[list(half)[-1]] < 10


def test_bad_input():
    with pytest.raises(ValueError, match="constant"):
        gradients.growth_factor(lambda channels: lambda x: 0 * x)
    with pytest.raises(ValueError, match="at least 2 images"):
        gradients.measure(models.mlp(), (torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long)))
    with pytest.raises(ValueError, match="activation"):
        gradients.growth_factor("rellu")
    with pytest.raises(ValueError, match="block"):
        gradients.growth_factor("relu", "tesis")


# --- the monitor -----------------------------------------------------------------------------------------------


def test_monitor_writes_norms_and_changes_nothing(tiny):
    runs = []
    for monitor in (False, True):
        torch.manual_seed(0)
        model = models.resnet(8, "kaf_elu", in_channels=1, image_size=8)
        runs.append((fit(model, tiny, Recipe(epochs=2, batch_size=50, monitor=monitor)), model.state_dict()))
    (plain, a), (watched, b) = runs
    assert set(watched.columns) - set(plain.columns) == {f"gradient blocks.{i}" for i in range(3)}
    assert (watched.filter(like="gradient") > 0).all(axis=None) and all(torch.equal(a[k], b[k]) for k in a)


def test_monitor_warns_before_float16_would_overflow(tiny):
    torch.manual_seed(0)
    model = models.resnet(44, "kaf", in_channels=1, image_size=8)
    with pytest.warns(UserWarning, match="blocks.0 has norm .* float16"):
        fit(model, tiny, Recipe(epochs=1, batch_size=100, lr=(0, 0), monitor=True))


def test_monitor_warns_of_nan(tiny, monkeypatch):
    monkeypatch.setattr(training, "measure", lambda *_: {"blocks.0": 1e6, "blocks.1": float("nan"), "blocks.2": 1.0})
    with pytest.warns(UserWarning, match="blocks.1 has norm nan"):
        fit(models.mlp(), tiny, Recipe(epochs=1, batch_size=100, monitor=True))


class Exploding(torch.nn.Module):
    """The identity, until its gradient overflows in the given call of backward."""

    def __init__(self, call):
        super().__init__()
        self.left = call

    def forward(self, x):
        if x.requires_grad:
            x.register_hook(self.explode)
        return x

    def explode(self, grad):
        self.left -= 1
        return grad * float("inf") if self.left == 0 else grad


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_stops_with_the_layer_and_the_last_good_weights(tiny, clip):
    torch.manual_seed(0)
    saved = []
    net = models.mlp("relu", hidden=(8, 8))
    net = torch.nn.Sequential(*list(net[:3]), torch.nn.Linear(8, 8), Exploding(6), *list(net[4:]))
    recipe = Recipe(epochs=4, batch_size=50, lr=(0.01, 0.1), monitor=True, clip=clip)  # fails in the second epoch
    with pytest.warns(UserWarning, match="epoch 2: the gradient of 3 is not finite"):
        history = fit(
            net, tiny, recipe, save=lambda state: saved.append({k: v.clone() for k, v in state["model"].items()})
        )
    assert len(history) == 2 and math.isnan(history.loss.iloc[-1])
    assert all(torch.equal(v, saved[0][k]) and torch.isfinite(v).all() for k, v in net.state_dict().items())


def test_clip_bounds_the_step(tiny):
    moved = []
    for clip in (None, 1e-3):
        torch.manual_seed(0)
        model = models.mlp("relu", hidden=(8,))
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        one_step = dataclasses.replace(tiny, x_train=tiny.x_train[:32], y_train=tiny.y_train[:32])
        fit(model, one_step, Recipe(epochs=1, batch_size=32, lr=(0, 1.0), peak=0.5, clip=clip))
        moved.append((torch.nn.utils.parameters_to_vector(model.parameters()) - before).norm().item())
    assert moved[1] <= 1e-3 * 1.001 < moved[0]


def test_layers_in_place_are_measured_as_others():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    batch = torch.rand(4, 1, 8, 8), torch.arange(4)
    expected = gradients.measure(net, batch)
    net[2].inplace = True
    assert gradients.measure(net, batch) == expected
    assert gradients.growth_factor(lambda channels: torch.nn.ReLU(inplace=True)) == gradients.growth_factor("relu")
    same = [
        gradients.growth_factor(f, "thesis", depth=14, seeds=1) for f in ("relu", lambda channels: torch.nn.ReLU(True))
    ]
    assert same[0] == same[1]


def test_growth_of_a_kaf_by_its_kernels():
    assert gradients.growth_factor("unit:gaussian") == pytest.approx(gradients.growth_factor("kaf"), rel=0.1)
    with pytest.raises(ValueError, match="did you mean 'relu'"):
        gradients.growth_factor("rellu")
