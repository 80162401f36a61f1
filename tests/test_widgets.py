"""The sliders: what a view redraws, how fast, and what a notebook keeps of it."""

import statistics
import time

import numpy as np
import pytest
import torch

import kafnb
from kafnb import notebooks, views, widgets

# On an idle core of the machine this was written on each takes under 90 ms, and 100 is the aim for a laptop. Measured
# here is the processor's time of this process, and the bound leaves room for a slower machine.
BOUND_MS = 300


@pytest.fixture(scope="module")
def nets():
    kafnb.figures.use_style()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {a: kafnb.models.light_cnn(a, in_channels=1, image_size=8).eval() for a in ("relu", "kaf_elu")}


CASES = {
    "kaf": (lambda nets, data: views.BendKaf(), dict(target="relu", bandwidth=0.5), dict(alpha=(0.0,) * 9 + (0.8,))),
    "attack": (views.AttackImage, dict(model="kaf_elu", steps=15), dict(model="kaf_elu", image=1)),
    "kwta": (lambda nets, data: views.KwtaLine(), dict(width=256), dict(ratio=0.5)),
    "loss": (views.LossSurface, dict(model="kaf_elu"), dict(model="kaf_elu", radius=0.3)),
    "growth": (lambda nets, data: views.GradientGrowth(), dict(depth=110), dict(bandwidth=0.2)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_redraw_answers_in_time_and_changes_the_picture(case, nets, digits, record_property):
    make, *values = CASES[case]
    view = make(nets, digits)
    first = view.png(**values[0])
    times = []
    for i in range(9):
        start = time.process_time()
        last = view.png(**values[(i + 1) % 2])
        times.append(1000 * (time.process_time() - start))
    median = statistics.median(times)
    record_property("median_ms", median)
    print(f"{case}: median {median:.0f} ms")
    assert first.startswith(b"\x89PNG") and first != last
    assert median < BOUND_MS, times
    assert not view.table().empty


def test_bending_a_kaf_moves_it_by_the_kernel():
    view = views.BendKaf()
    view.update(target="random")
    before = view.table()
    view.update(target="random", alpha=(0.0,) * 5 + (0.5,))
    d, gamma = view.kaf.dictionary[0, 5].item(), view.kaf.bandwidth.item()
    assert np.allclose(view.table().kaf - before.kaf, 0.5 * np.exp(-gamma * (before.x - d) ** 2), atol=1e-6)
    assert view.table().slope.abs().max() <= view.steepest
    assert abs(view.chi - kafnb.gradients.chi_of(view.kaf)) < 1e-12


def test_an_attack_stays_in_its_ball_and_is_magnified(nets, digits):
    view = views.AttackImage(nets, digits)
    for norm, power in (("linf", 0), ("l2", 0.5), ("l1", 1)):
        view.update("relu", eps=0.05, norm=norm)
        assert 0 < view.size <= view.radius * (1 + 1e-5) and view.radius == pytest.approx(0.05 * 64**power)
    view.update("relu", eps=0.0)
    assert view.table().change.abs().max() == 0


def test_a_loss_surface_has_the_image_in_its_middle(nets, digits):
    view = views.LossSurface(nets, digits)
    view.update("relu", image=3)
    x, y = (t[3:4] for t in digits.test(4))
    want = torch.nn.functional.cross_entropy(nets["relu"](x), y).item()
    assert view.table().iloc[6, 7] == pytest.approx(want, rel=1e-4)


def test_the_diamond_of_a_loss_surface_is_the_ball(nets, digits):
    view = views.LossSurface(nets, digits, cells=9)
    net, radius = nets["relu"], 0.3
    view.update("relu", image=3, radius=radius, corner=2)
    x, y = (t[3:4] for t in digits.test(4))
    first = kafnb.attacks.input_gradient(net, x, y).sign()
    second = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).sign()
    s = torch.linspace(-radius, radius, 9)
    change = s[:, None, None, None, None] * second + s[:, None, None, None] * first  # (rows, columns, C, H, W)
    inside = change.flatten(2).abs().amax(2) <= radius + 1e-6
    assert torch.equal(view.inside.cpu(), inside) and inside.sum() == 41
    said = net((x + change.flatten(0, 1)).clamp(0, 1)).argmax(1).view(9, 9)
    assert view.wrong_inside == pytest.approx((said != y)[inside].float().mean().item())
    assert view.wrong == pytest.approx((said != y).float().mean().item())
    # each pixel of the picture is centred on its value of s
    left, right, low, high = view.picture.get_extent()
    assert left + (right - left) / 18 == pytest.approx(-radius) and (low, high) == (left, right)


def test_growth_is_that_of_the_closed_form():
    view = views.GradientGrowth()
    view.update()
    assert view.chi == pytest.approx(kafnb.gradients.growth_factor("kaf"), rel=0.02)
    assert view.table().kaf.iloc[1] == pytest.approx(((view.chi + 2 * view.chi**2) / 3) ** 0.5)


class Screen:
    """Stands for the front end: what was displayed, and what replaced it."""

    def __init__(self, monkeypatch):
        self.shown, self.updates = [], []
        monkeypatch.setattr("IPython.display.display", self.display)

    def display(self, what, raw=False, display_id=False):
        self.shown.append(what)
        return type("Handle", (), {"update": lambda _, new: self.updates.append(new)})()


def test_moving_a_slider_replaces_the_picture(monkeypatch):
    screen, boxes = Screen(monkeypatch), []
    import ipywidgets

    monkeypatch.setattr(
        ipywidgets, "Box", lambda rows, **layout: boxes.append(rows) or type("Box", (), {"model_id": "1"})
    )
    view = views.BendKaf()
    widgets.explore(view, target=["elu", "relu"], bandwidth=(0.1, 4.0, 1.0), alpha=widgets.Bank(20, -1.0, 1.0))
    sliders, picture = screen.shown
    assert widgets.VIEW in sliders and "text/plain" in sliders and picture.data.startswith(b"\x89PNG") and picture.alt
    target, bandwidth, alpha = boxes[0]
    for control, value in ((target, "relu"), (bandwidth, 0.5), (alpha.children[4], 0.7)):
        control.value = value
    assert len(screen.updates) == 3 and len({p.data for p in [picture, *screen.updates]}) == 4
    assert "relu" in screen.updates[-1].alt


def test_stored_notebooks_keep_the_picture_and_no_widget():
    import json

    found = 0
    for name in notebooks.available():
        content = json.loads((kafnb.paths.home() / "notebooks" / f"{name}.ipynb").read_text())
        assert "widgets" not in content["metadata"]
        for cell in content["cells"]:
            outputs = [o.get("data", {}) for o in cell.get("outputs", [])]
            assert not any(widgets.VIEW in data for data in outputs)
            if "explore(view" in "".join(cell["source"]):
                found += 1
                assert any("image/png" in data for data in outputs), cell["id"]
                assert any("sliders" in "".join(data.get("text/plain", "")) for data in outputs), cell["id"]
    assert found >= 5
