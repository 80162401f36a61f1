"""Hooks that come off, and streaming statistics against the plain ones on everything at once."""

import resource

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from kafnb import ACTIVATIONS, models, probes


@pytest.fixture
def batches():
    torch.manual_seed(0)
    return [torch.randn(n, 3, 2, 2, dtype=torch.float64) * s + 0.3 for n, s in ((7, 0.01), (1, 1), (40, 5), (13, 100))]


def test_capture_before_and_after_any_layer(net, images):
    x, _ = images
    names = probes.activation_layers(net, x)
    assert names == ["2", "5", "10", "13", "19"]
    with probes.capture(net, [*names, "0"]) as after, probes.capture(net, names, "before") as before:
        net(x)
    modules = dict(net.named_modules())
    assert torch.equal(after["0"], modules["0"](x))
    assert all(torch.equal(after[n], modules[n](before[n])) for n in names)
    assert torch.equal(before["2"], modules["1"](modules["0"](x)))


def test_hooks_come_off_after_an_error(net, images):
    with pytest.raises(RuntimeError), probes.capture(net, ["0"]):
        net(images[0][:, :, :, :1].expand(-1, 2, -1, -1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_gradients_pass_through_captured_activations(net, images):
    x = images[0].requires_grad_()
    with probes.capture(net, ["5"], "before") as found:
        net(x)
    assert torch.autograd.grad(found["5"].sum(), x)[0].abs().sum() > 0


def test_activation_layers_in_the_order_they_run():
    model = models.resnet(8, "kaf", block="thesis", in_channels=1, image_size=8, width=4)
    names = probes.activation_layers(model, torch.zeros(1, 1, 8, 8))
    assert names[:3] == ["stem.2", "blocks.0.act1", "blocks.0.act2"] and len(names) == 7


def test_a_registered_activation_is_one_of_the_layers(monkeypatch):
    class Cube(nn.Module):
        def forward(self, x):
            return x**3

    model, x = nn.Sequential(nn.Linear(4, 4), Cube(), nn.Sequential(nn.Linear(4, 2), nn.ReLU())), torch.rand(1, 4)
    assert probes.activation_layers(model, x) == ["2.1"]
    monkeypatch.setitem(ACTIVATIONS, "cube", lambda channels: Cube())
    assert probes.activation_layers(model, x) == ["1", "2.1"]
    monkeypatch.setitem(ACTIVATIONS, "broken", lambda channels: 1 / 0)
    assert probes.activation_layers(model, x) == ["1", "2.1"]


def test_a_layer_that_does_not_run_is_named(net, images):
    net.spare = nn.ReLU()
    net.forward = lambda x: nn.Sequential(*list(net)[:-1])(x)
    with pytest.raises(ValueError, match="layer 'spare' does not run"):
        probes.stream(net, [images[0]], {"spare": probes.Moments()})


def test_moments_equal_numpy_on_everything(batches):
    moments, everything = probes.Moments(), torch.cat(batches).numpy()
    for b in batches:
        moments.update(b)
    assert moments.n == len(everything)
    assert np.allclose(moments.mean, everything.mean(0), rtol=1e-12)
    assert np.allclose(moments.std, everything.std(0), rtol=1e-12)
    assert np.array_equal(moments.low, everything.min(0)) and np.array_equal(moments.high, everything.max(0))
    distance = np.square(everything - everything.mean(0)).sum((1, 2, 3)).mean() ** 0.5
    assert moments.scale == pytest.approx(distance)


def test_histogram_does_not_depend_on_the_batches(batches):
    """Ranges that grew step by step count as if the last range had been there from the start."""
    parts, whole = probes.Histogram(64), probes.Histogram(64)
    for b in batches:
        parts.update(b)
    whole.update(torch.cat(batches))
    assert parts.exponent == whole.exponent and torch.equal(parts.counts, whole.counts)
    values = torch.cat(batches).transpose(0, 1).flatten(1)
    for c in range(3):
        assert np.array_equal(whole.counts[c], np.histogram(values[c], whole.edges)[0])


def test_quantiles_within_a_bin(batches):
    histogram = probes.Histogram(256)
    for b in batches:
        histogram.update(b)
    values = torch.cat(batches).transpose(0, 1).flatten(1)
    for q in (0.0, 0.05, 0.5, 0.9, 1.0):
        exact = torch.from_numpy(np.quantile(values, q, axis=1, method="inverted_cdf"))
        assert (histogram.quantile(q) - exact).abs().max() <= histogram.width, q


def test_wasserstein_against_scipy(batches):
    first, second = probes.Histogram(4096), probes.Histogram(4096)
    for b in batches[:3]:
        first.update(b)
    for b in batches[1:]:
        second.update(b + 1)
    a, b = torch.cat(batches[:3]), torch.cat(batches[1:]) + 1
    exact = [stats.wasserstein_distance(a[:, c].flatten(), b[:, c].flatten()) for c in range(3)]
    assert np.abs(probes.wasserstein(first, second).numpy() - exact).max() <= first.width
    same = probes.Histogram(4096)
    same.update(batches[2])
    assert probes.wasserstein(same, same).max() == 0


def test_shift_of_pairs(net, images):
    x, _ = images
    moved = (x + 0.05).clamp(0, 1)
    pairs = list(zip(x.split(4), moved.split(4), strict=True))
    shifts = probes.stream(net, pairs, {n: probes.Shift(4096) for n in ("5", "19")}, "before")
    with probes.capture(net, ["5", "19"], "before") as found, torch.no_grad():
        net(x)
        clean = dict(found)
        net(moved)
    for name, shift in shifts.items():
        a, b = clean[name], found[name]
        raw = (a - b).flatten(1).norm(dim=1)
        spread = (a - a.mean(0)).flatten(1).square().sum(1).mean().sqrt()
        assert torch.allclose(shift.raw, raw) and torch.allclose(shift.normalised, raw / spread)
        a, b = (v.transpose(0, 1).flatten(1) for v in (a, b))
        exact = torch.tensor([stats.wasserstein_distance(p, q) for p, q in zip(a, b, strict=True)])
        error = (shift.wasserstein * a.std(1, correction=0) - exact).abs().max()
        assert error <= shift.histograms[0].width


def test_scale_makes_distances_blind_to_units():
    """A layer multiplied by 7 moves 7 times as far, and just as far in units of its own spread."""
    torch.manual_seed(1)
    clean, attacked = torch.randn(2, 30, 5, 4, 4).double()
    one, seven = probes.Shift(), probes.Shift()
    one.update(clean, attacked)
    seven.update(7 * clean, 7 * attacked)
    assert torch.allclose(seven.raw, 7 * one.raw) and torch.allclose(seven.normalised, one.normalised)
    assert torch.allclose(seven.wasserstein, one.wasserstein, atol=0.01)


def test_a_unit_that_hardly_moves_has_no_distance():
    torch.manual_seed(2)
    clean = torch.randn(300, 3)
    clean[:, 1] = 1e-9 * clean[:, 1]
    shift = probes.Shift()
    shift.update(clean, clean + 0.5)
    assert shift.wasserstein.isnan().tolist() == [False, True, False]
    assert (shift.wasserstein[::2] * clean.std(0)[::2] - 0.5).abs().max() < 0.05


def test_distances_beyond_float16():
    shift = probes.Shift()
    shift.update(torch.full((1, 1), 60_000.0).half(), torch.full((1, 1), -60_000.0).half())
    assert shift.raw.tolist() == [120_000]


def test_hundred_thousand_images_in_bounded_memory():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    peaks, count = [], 0

    def images():
        nonlocal count
        while count < 100_000:
            if count in (20_000, 99_000):
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # MiB
            x = torch.rand(500, 1, 8, 8)
            count += len(x)
            yield x, x * 0.9

    shifts = probes.stream(model, images(), {"1": probes.Shift(), "3": probes.Shift()})
    assert len(shifts["1"].raw) == 100_000 and shifts["3"].clean.n == 100_000
    # what went through since the first reading: 80,000 x 512 float32 twice, 312 MiB; a distance an image is 1.2 MiB
    assert peaks[1] - peaks[0] < 40, peaks


def test_streaming_leaves_the_model_alone(net, images):
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    probes.stream(net, [images[0]], {"0": probes.Moments()})
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training
    assert not any(m._forward_hooks for m in net.modules()) and all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    "call",
    [lambda m: probes.capture(m, ["nope"]).__enter__(), lambda m: probes.capture(m, ["0"], "within").__enter__(),
     lambda m: probes.Histogram(10), lambda m: probes.Histogram().update(torch.full((2, 2), float("nan"))),
     lambda m: probes.wasserstein(probes.Histogram(8), probes.Histogram(16)), lambda m: probes.Histogram(8).quantile(2)],
)  # fmt: skip
def test_bad_calls_get_one_line(net, call):
    with pytest.raises(ValueError) as error:
        call(net)
    assert "\n" not in str(error.value)


def test_what_a_later_layer_overwrites_is_captured_as_it_was():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(5, 4)
    with probes.capture(net, ["0"]) as after, probes.capture(net, ["1"], "before") as before:
        net(x)
    assert torch.equal(after["0"], net[0](x)) and torch.equal(before["1"], net[0](x))
