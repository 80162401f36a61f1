"""Replaced backward passes keep the forward pass; smoothed KAFs are averages; the checklist finds what is hidden."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

import kafnb
from kafnb import attacks, errata, evaluate, models
from kafnb.attacks import adaptive, checklist


def small(name, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.light_cnn(name, in_channels=1, image_size=8).double().eval()


def gradient(layer, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(layer(x).sum(), x)[0]


def test_smooth_kwta_goes_forward_as_it_is_and_backward_smoothly():
    layer = kafnb.KWTA(0.2)
    smooth = adaptive.SmoothKWTA(layer, 0.3)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    assert torch.allclose(smooth(x), layer(x), atol=1e-12)
    theta = layer(x).flatten(1).masked_fill(layer(x).flatten(1) == 0, torch.inf).amin(1).view(-1, 1, 1, 1)
    width = 0.3 * x.flatten(1).std(1).view(-1, 1, 1, 1)
    s = torch.sigmoid((x - theta) / width)
    assert torch.allclose(gradient(smooth, x), s + x * s * (1 - s) / width)
    assert (gradient(layer, x) == 0).float().mean() == pytest.approx(0.8, abs=0.01) and (gradient(smooth, x) != 0).all()


def test_open_tails_pass_the_slope_at_the_boundary():
    layer = kafnb.KAF(2, init="elu").double()
    tails = adaptive.OpenTails(layer)
    x = torch.tensor([-20.0, -3.5, -1.0, 0.0, 2.9, 4.0, 30.0], dtype=torch.float64)[:, None].repeat(1, 2)
    assert torch.allclose(tails(x), layer(x), atol=1e-12)
    assert torch.allclose(gradient(tails, x), gradient(layer, x.clamp(-3, 3)), atol=1e-12)
    assert gradient(layer, x)[-1].abs().max() == 0


@pytest.mark.parametrize("options", [{}, {"trainable_dictionary": True}, {"dictionary_size": 7, "boundary": 2.0}])
@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_smoothed_kaf_is_the_average_over_normal_noise(options, tau):
    torch.manual_seed(0)
    layer = kafnb.KAF(3, **options).double()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.linspace(-4, 4, 21, dtype=torch.float64)[:, None].repeat(1, 3)
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    slow = sum(w * layer(x + tau * t) for t, w in zip(nodes, weights, strict=True)) / np.sqrt(2 * np.pi)
    assert torch.allclose(adaptive.smoothed(layer, tau)(x), slow, atol=1e-9)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    with pytest.raises(ValueError, match="only Gaussian"):
        adaptive.smoothed(kafnb.KAF(2, kernel="laplacian"), tau)


def test_averaged_gradient_is_the_mean_of_its_draws(images):
    net, (x, y) = small("swish"), images
    objective = lambda z: nn.functional.cross_entropy(z, y, reduction="none")  # noqa: E731
    torch.manual_seed(1)
    _, g = adaptive.averaged(3, 0.1)(net, x, objective)
    torch.manual_seed(1)
    draws = [
        attacks.input_gradient(net, (x + torch.empty_like(x).uniform_(-0.1, 0.1)).clamp(0, 1), y) for _ in range(3)
    ]
    assert torch.allclose(g, sum(draws) / 3)


@pytest.mark.parametrize("name", ["kwta", "kaf", "kaf_free", "relu"])
def test_every_attack_of_the_suite_stays_inside_and_leaves_no_trace(images, name):
    model, (x, y) = small(name).train(), images
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, model[0].weight.requires_grad
    found = adaptive.suite(model, source=small("relu", 1))
    assert (
        "transfer" in found
        and ("kwta_smooth" in found) == (name == "kwta")
        and ("kaf_tails" in found) == ("kaf" in name)
    )
    for attack in found.values():
        adv = attack(model, x, y, eps=0.1, steps=4, early_stop=True)
        assert (adv - x).abs().max() <= 0.1 + 1e-9 and adv.min() >= 0 and adv.max() <= 1 and adv.dtype == x.dtype
    assert model.training and model[0].weight.requires_grad == state
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture(scope="module")
def digit_nets(digits):
    """Networks that know digits, one a kind."""
    nets = {}
    for name in ("swish", "relu", "kwta"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            nets[name] = models.mlp(name, hidden=(64, 64))
        kafnb.fit(nets[name], digits, kafnb.Recipe(epochs=12, lr=(0.01, 0.5)))
    return nets


def test_adaptive_attack_breaks_more_of_kwta_than_pgd(digit_nets, digits):
    model, options = digit_nets["kwta"], dict(eps=0.1, step_size=0.025, steps=20, early_stop=True)
    left = [
        evaluate.robust_accuracy(model, digits, functools.partial(a, **options), n=100).rate
        for a in (attacks.pgd, adaptive.kwta_smooth)
    ]
    assert left[1] < left[0] - 0.05, left


class Noisy(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x + 0.05 * torch.randn_like(x))


class Steps(Noisy):
    """Rounds its input: the gradient is zero."""

    def forward(self, x):
        return self.model((x * 4).round() / 4)


def findings(model, digits, source=None, n=50):
    report = checklist.checklist(model, digits, eps=0.1, source=source, n=n, steps=10, queries=100)
    assert list(report.columns) == ["check", "value", "limit", "finding", "explanation"]
    assert (report.finding == (report.value > report.limit)).all() and report.explanation.str.len().min() > 20
    return set(report.check[report.finding])


def test_checklist_passes_the_sound_and_finds_each_kind(digit_nets, digits):
    pytest.importorskip("pyautoattack")
    relu, swish = digit_nets["relu"], digit_nets["swish"]
    assert findings(swish, digits, relu) == set()
    assert "softmax outputs" in findings(nn.Sequential(swish, nn.Softmax(1)), digits)
    assert "randomness" in findings(Noisy(swish), digits)
    hidden = findings(Steps(swish), digits, relu)
    assert {"images without gradient", "zeros in the gradient", "transfer beats white box"} <= hidden
    assert "more restarts help" in findings(digit_nets["kwta"], digits, relu, n=200)


@pytest.mark.parametrize("hole", [torch.nan, torch.inf])
@pytest.mark.parametrize("columns, shares", [(4, [0, 0.5, 1]), (8, [1, 1, 1])])
def test_checklist_finds_gradients_that_are_no_numbers(net, images, columns, shares, hole):
    class Holes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g.index_fill(3, torch.arange(columns), hole)

    class Holed(nn.Module):
        def forward(self, x):
            return net(Holes.apply(x))

    values = checklist.outputs(Holed(), images[0], net(images[0]).argmax(1))
    names = "images without gradient", "zeros in the gradient", "gradient against differences"
    assert [values[k] for k in names] == shares


def test_one_image_is_no_finding():
    for n in (20, 40, 100, 150, 400, 1000):
        limit = checklist._limit("more restarts help", n)
        fewest = int(checklist.TOLERANCE * n) + 1
        assert not fewest / n > limit and (fewest + 1) / n > limit
    assert checklist._limit("randomness", 40) == checklist.LIMITS["randomness"]  # no share of images


def test_mismatch_holds_a_gradient_against_the_loss(net, images):
    x, y = images
    g = attacks.input_gradient(net, x, y)
    assert checklist.mismatch(net, x, y, g, step=1e-4) == 0
    assert checklist.mismatch(net, x, y, 3 * g, step=1e-4) == checklist.mismatch(net, x, y, -g, step=1e-4) == 1
    assert checklist.mismatch(net, x[:0], y[:0], g[:0]) == 0


def test_checklist_leaves_no_trace(digit_nets, digits):
    pytest.importorskip("pyautoattack")
    model, state = digit_nets["swish"].train(), torch.get_rng_state()
    model.zero_grad()
    checklist.checklist(model, digits, eps=0.1, n=10, steps=2, queries=5)
    assert (
        model.training and torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    )


def test_loss_surface_has_the_gradient_as_its_axis(net, images):
    x, y = images
    surface = checklist.loss_surface(net, x[0], int(y[0]), eps=1e-4, size=5)
    grid = surface.pivot(index="gradient", columns="random", values="loss").to_numpy()
    slope = (grid[-1, 2] - grid[0, 2]) / 2e-4
    assert slope == pytest.approx(attacks.input_gradient(net, x[:1], y[:1]).abs().sum().item(), rel=1e-3)
    assert grid[2, 2] == pytest.approx(attacks.cross_entropy(net(x[:1]), y[:1]).item())


# --- the thesis' own ways ----------------------------------------------------------------------------------------


def test_scrambled_kwta_by_hand():
    x = torch.randn(2, 3, 4, 5)
    last = x.permute(0, 2, 3, 1).numpy()  # as the original holds it: (N, H, W, C)
    first = np.transpose(last, (0, 3, 1, 2))
    flat = np.ascontiguousarray(first).reshape(2, -1)
    threshold = np.sort(flat, 1)[:, -18][:, None]  # k = 0.3 * 60
    out = np.where(flat >= threshold, flat, 0).reshape(last.shape)
    assert np.array_equal(errata.ScrambledKWTA(0.3)(x).permute(0, 2, 3, 1).numpy(), out)


def test_float16_kaf_against_numpy():
    layer = kafnb.KAF(1, init="relu")
    x = torch.linspace(-4, 4, 50)[:, None]
    h = np.float16
    points, gamma, alpha = (
        layer.dictionary[0].numpy().astype(h),
        h(layer.bandwidth.item()),
        layer.alpha[0].detach().numpy().astype(h),
    )
    out = np.zeros(50, h)
    for d, a in zip(points, alpha, strict=True):
        z = x[:, 0].numpy().astype(h) - d
        out = (out + a * np.exp(-gamma * z * z)).astype(h)
    assert np.abs(errata.Float16KAF(layer)(x).detach()[:, 0].numpy() - out.astype(np.float32)).max() < 0.05
    assert (errata.Float16KAF(layer)(x) - layer(x)).abs().max() > 0.02  # what it is about


def test_best_restart():
    stands = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 1]], bool)
    assert errata.best_restart(stands).tolist() == [False, True, False, False]


def test_frozen_start_uses_the_same_delta_in_every_batch(images):
    seen = []
    net = small("relu").float()

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x.detach().clone())
            return net(x)

    x, y = torch.full((6, 1, 8, 8), 0.5), torch.zeros(6).long()
    recipe = kafnb.Recipe("standard", batch_size=8, eps=0.1)
    for _ in range(2):
        list(errata.frozen_start(Spy(), x, y, recipe, {}))
    assert torch.equal(seen[0], seen[2]) and (seen[0] - x).abs().max() <= 0.1 + 1e-6 and seen[0].std() > 0.01


def test_gradients_that_round_to_zero_in_float32_still_lead_somewhere():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False), kafnb.KAF(2, init="unit"))
    net[1].weight.data = torch.tensor([[4.0, 4, 4, 4], [3.9, 4, 4, 4]])
    x, y = torch.full((1, 1, 2, 2), 0.75), torch.tensor([0])  # far beyond the dictionary
    assert (attacks.input_gradient(net, x, y) == 0).all()
    _, g = adaptive.in_double(net)(net, x, lambda logits: (logits[:, 1] - logits[:, 0]).sum())
    assert g.abs().max() == 1
    moved = adaptive.double(net, x, y, eps=0.1, steps=4, random_start=False, loss="margin")
    assert (moved - x).abs().max() > 0.05


def test_a_layer_that_stands_twice_is_swapped_twice():
    layer = kafnb.KWTA(0.5)
    net = adaptive.swapped(
        nn.Sequential(layer, nn.Identity(), layer), kafnb.KWTA, lambda m: adaptive.SmoothKWTA(m, 0.2)
    )
    assert [type(m) for m in net] == [adaptive.SmoothKWTA, nn.Identity, adaptive.SmoothKWTA]


@pytest.mark.parametrize("attack", [adaptive.double, adaptive.kaf_tails, adaptive.kaf_annealed, adaptive.neighbours])
def test_a_radius_is_that_of_its_norm(attack, images):
    x, y = images
    size = attacks.balls.size(attack(small("kaf"), x, y, eps=1.5, norm="l2", steps=4) - x, "l2")
    assert 1.4 < size.max() <= 1.5 + 1e-9


def test_the_checklist_takes_a_network_without_parameters(images):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10]

    table = checklist.checklist(Fixed(), images, eps=0.1, queries=5)
    assert table.value.notna().all() and len(checklist.loss_surface(Fixed(), images[0][0], 1, eps=0.1, size=3)) == 9
