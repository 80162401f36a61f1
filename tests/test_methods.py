"""Training methods against their formulas, the early warning, and k-WTA's schedule."""

import copy
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from kafnb import Recipe, collapse, fit, methods, models, training
from kafnb.certify.bounds import interval_bounds
from kafnb.methods import METHODS


@pytest.fixture
def smooth(tiny):
    """A small smooth network in float64 and one batch; gradients in it are exact."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.mlp("kaf_elu", hidden=(16, 12)).double()
    x, y = tiny.test(9)
    return model, x.double(), y


def learned(model, x, y, method, progress=1.0, **fields):
    """(logits, loss, the inputs of every forward pass) of one batch under seed 0."""
    seen = []
    hook = model.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].detach().clone()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ((logits, loss),) = METHODS[method](model, x, y, Recipe(method, **fields), {"progress": progress})
    hook.remove()
    return logits, loss, seen


def test_free_takes_batches_larger_than_the_recipe_says(smooth):
    model, x, y = smooth  # 9 images: streamed data have batches of their own
    state, inputs = {}, []
    hook = model.register_forward_pre_hook(lambda m, inputs_: inputs.append(inputs_[0].detach().clone()))
    for _, loss in METHODS["free"](model, x, y, Recipe("free", batch_size=4, replays=2, eps=0.1), state):
        loss.backward()
    hook.remove()
    assert len(state["delta"]) == 9 and torch.equal(inputs[0], x) and ((inputs[1] - x).abs().amax((1, 2, 3)) > 0).all()


def test_n_fgsm_steps_from_noise_and_does_not_project(smooth):
    model, x, y = smooth
    logits, loss, (noisy, x_adv) = learned(model, x, y, "n_fgsm", eps=0.1)
    free = (noisy > 0) & (noisy < 1) & (x_adv > 0) & (x_adv < 1)
    start = noisy.clone().requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(model(start), y), start)[0]
    assert torch.allclose((x_adv - noisy)[free], 0.1 * gradient.sign()[free])
    assert 0.1 < (noisy - x).abs().max() <= 0.2 and (x_adv - x).abs().max() > 0.15
    assert torch.allclose(loss, F.cross_entropy(logits, y)) and x_adv.min() >= 0 and x_adv.max() <= 1
    weak = learned(model, x, y, "n_fgsm", eps=0.1, strength=0.0)[2]
    assert torch.equal(weak[0], x)  # without noise: FGSM


def test_grad_align_adds_one_minus_the_cosine(smooth):
    model, x, y = smooth
    logits, loss, (at, near, x_adv) = learned(model, x, y, "grad_align", eps=0.1, strength=0.7)
    gradients = []
    for v in (at, near):
        v = v.clone().requires_grad_()
        gradients.append(torch.autograd.grad(F.cross_entropy(model(v), y), v)[0].flatten(1))
    penalty = 1 - F.cosine_similarity(*gradients).mean()
    assert torch.equal(at, x) and 0 < penalty < 1
    assert torch.allclose(loss, F.cross_entropy(logits, y) + 0.7 * penalty)
    assert torch.allclose(x_adv, (x + 0.1 * gradients[0].sign().view_as(x)).clamp(0, 1))
    loss.backward()  # a second derivative, through the KAF: against finite differences in one weight
    weight, h = model[1].weight, 1e-6
    index, exact = (3, 20), float(weight.grad[3, 20])
    sides = []
    for step in (h, -h):
        with torch.no_grad():
            weight[index] += step
        # the attacked image is a constant of the loss: its gradient sign does not move with so small a step
        sides.append(float(learned(model, x, y, "grad_align", eps=0.1, strength=0.7)[1].detach()))
        with torch.no_grad():
            weight[index] -= step
    assert (sides[0] - sides[1]) / (2 * h) == pytest.approx(exact, rel=1e-4, abs=1e-7)


def test_trades_is_clean_loss_and_divergence(smooth):
    model, x, y = smooth
    logits, loss, seen = learned(model, x, y, "trades", eps=0.1, steps=3, strength=2.0)
    x_adv = seen[-1]
    p, q = model(x).softmax(1), model(x_adv).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    assert torch.allclose(loss, F.cross_entropy(model(x), y) + 2 * divergence) and torch.allclose(logits, model(x_adv))
    assert (x_adv - x).abs().max() <= 0.1 + 1e-12 and len(seen) == 1 + 3 + 2
    random = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
    r = model(random).softmax(1)
    assert divergence > 2 * (p * (p / r).log()).sum(1).mean()  # the inner problem is worth its steps
    assert not torch.isnan(loss) and all(p.requires_grad for p in model.parameters())


def test_trades_survives_probabilities_that_underflow(tiny):
    model, (x, y) = models.mlp("relu"), tiny.test(4)
    with torch.no_grad():
        model[-1].weight *= 1000
    ((_, loss),) = METHODS["trades"](model, x, y, Recipe("trades", eps=0.1, steps=2), {})
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_interval_schedule(smooth):
    model, x, y = smooth
    plain = F.cross_entropy(model(x), y)
    assert torch.equal(learned(model, x, y, "interval", progress=0.05, eps=0.1)[1], plain)
    for progress, eps, kappa in ((0.3, 0.05, 0.75), (0.5, 0.1, 0.5), (1.0, 0.1, 0.5)):
        low, high = interval_bounds(model, (x - eps).clamp(0, 1), (x + eps).clamp(0, 1), pieces=8)
        worst = torch.stack([torch.where(torch.arange(10) == c, a, b) for a, b, c in zip(low, high, y, strict=True)])
        expected = kappa * plain + (1 - kappa) * F.cross_entropy(worst, y)
        assert torch.allclose(learned(model, x, y, "interval", progress=progress, eps=0.1)[1], expected)


def test_gaussian_noise_has_its_size(smooth):
    model, x, y = smooth
    (seen,) = learned(model, x, y, "gaussian", strength=0.5)[2]
    assert float((seen - x).std()) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_methods_leave_weights_and_modes_alone(tiny, method):
    model, (x, y) = models.light_cnn("relu", in_channels=1, image_size=8).train(), tiny.test(8)
    before = copy.deepcopy([p.detach() for p in model.parameters()])
    for _, loss in METHODS[method](model, x, y, Recipe(method, eps=0.1, steps=2, replays=2), {"progress": 1.0}):
        loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(m.training for m in model.modules())


def test_cost_of_a_batch(tiny):
    """A PGD batch of 8 steps takes longer than a standard one; nothing of the model or of the generators moves."""
    model, (x, y) = models.mlp("relu", hidden=(256, 256)), tiny.test(60)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    recipes = {"standard": Recipe(), "pgd": Recipe("pgd", steps=8), "free": Recipe("free", replays=3, batch_size=60)}
    cost = methods.cost(model, recipes, x, y, rounds=8)
    assert cost["pgd"][0] > 3 * cost["standard"][0] > 0 and [n for _, n in cost.values()] == [1, 1, 3]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


# --- the early warning ------------------------------------------------------------------------------------------------


def test_rule_of_the_warning():
    def history(fgsm, pgd):
        return pd.DataFrame({"epoch": range(1, len(pgd) + 1), "watch_fgsm": fgsm, "watch_pgd": pgd})

    assert collapse.collapsed(history([0.3, 0.5, 0.6, 0.7], [0.2, 0.4, 0.1, 0.3])) == 3
    assert collapse.collapsed(history([0.3, 0.5, 0.4, 0.6], [0.2, 0.4, 0.1, 0.35])) is None  # both fell
    assert collapse.collapsed(history([0.3, 0.5, 0.6], [0.2, 0.4, 0.31])) is None  # not by a third
    assert collapse.collapsed(history([0.1, 0.2, 0.3], [0.06, 0.01, 0.0])) is None  # not by ten points


def test_fit_warns_once_in_the_epoch_of_the_collapse(tiny, monkeypatch):
    curve = iter([(0.3, 0.2), (0.5, 0.4), (0.6, 0.1), (0.7, 0.1), (0.7, 0.1)])
    monkeypatch.setattr(
        training, "watched", lambda *a: dict(zip(("watch_fgsm", "watch_pgd"), next(curve), strict=True))
    )
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        history = fit(models.mlp(), tiny, Recipe("fgsm", epochs=5, watch=10))
    (warning,) = given
    assert "catastrophic overfitting in epoch 3" in str(warning.message) and "\n" not in str(warning.message)
    assert collapse.collapsed(history) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("method", "epochs"), [("fgsm", 36), ("n_fgsm", 8)])
def test_a_real_collapse_is_seen_and_a_sound_run_is_not(digits, method, epochs):
    """Notebook 11's network: FGSM without a random start becomes robust, then loses half of it; N-FGSM does not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = models.resnet(8, "swish", block="preact", in_channels=1, image_size=8)
    recipe = Recipe(
        method, epochs=epochs, lr=(0, 0.4), momentum=0.9, l2=0.0, batch_size=64, eps=0.25, strength=1.0, watch=200
    )
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        history = fit(net, digits, recipe)
    assert (collapse.collapsed(history) is not None) == bool(given) == (method == "fgsm")


def test_watching_changes_nothing_that_is_learned(tiny):
    runs = []
    for watch in (0, 50):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = models.light_cnn("relu", in_channels=1, image_size=8)
        fit(model, tiny, Recipe("fgsm_rs", epochs=2, batch_size=50, watch=watch))
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*runs)


# --- k-WTA --------------------------------------------------------------------------------------------------------------


def test_kwta_schedule_is_the_thesis(tiny):
    """0.30 for 20 of 50 epochs, then 0.01 less every 2 epochs, down to 0.15."""
    ratios = [training.kwta_ratio(e, 50, 0.30, 0.15) for e in range(50)]
    assert np.allclose(ratios[:20], 0.30) and np.allclose(ratios[20:], np.repeat(np.arange(0.29, 0.145, -0.01), 2))


def test_fit_lowers_the_ratio_and_puts_it_back(tiny):
    model, seen = models.mlp("kwta"), []
    model[2].register_forward_pre_hook(lambda m, inputs: seen.append(round(m.ratio, 4)))
    with torch.random.fork_rng():
        fit(model, tiny, Recipe(epochs=5, kwta_start=0.2, batch_size=200))
    assert seen[1:] == [  # the first is fit's look whether the model takes the images
        0.2,
        0.2,
        round(training.kwta_ratio(2, 5, 0.2, 0.15), 4),
        round(training.kwta_ratio(3, 5, 0.2, 0.15), 4),
        0.15,
    ]
    assert [m.ratio for m in model.modules() if hasattr(m, "ratio")] == [0.15, 0.15]
    with pytest.raises(ValueError, match="kwta_start"):
        Recipe(kwta_start=1.5)


def test_a_batch_of_one_is_refused():
    with pytest.raises(ValueError, match="batch_size must be >= 2"):
        Recipe(batch_size=1)


def test_interval_training_bounds_the_model_that_it_trains(tiny):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.gain = models.mlp("relu", hidden=(8,)), torch.nn.Linear(10, 10)

        def forward(self, x):
            return self.gain(self.model(x))

    net, (x, y) = Scaled(), tiny.test(8)
    logits, loss = next(METHODS["interval"](net, x, y, Recipe("interval", eps=0.0), {"progress": 1.0}))
    assert loss.item() == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-4)
