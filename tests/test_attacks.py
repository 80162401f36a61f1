"""Attacks stay where they may, find what an independent library finds, and leave no trace."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kafnb import attacks, models


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(attacks.NORMS), st.floats(0, 1), st.floats(0, 2), st.integers(1, 4), st.integers(1, 3),
    st.booleans(), st.integers(0, 99), st.integers(1, 7),
)  # fmt: skip
def test_pgd_stays_in_ball_and_box(norm, eps, step_size, steps, restarts, targeted, seed, n):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = models.mlp("swish", hidden=(16,)).eval()
        x, y = torch.rand(n, 1, 8, 8).round(decimals=1), torch.randint(0, 10, (n,))
        adv = attacks.pgd(
            model, x, y, eps=eps, step_size=step_size, steps=steps, restarts=restarts, norm=norm, targeted=targeted
        )
    assert adv.shape == x.shape and adv.min() >= 0 and adv.max() <= 1
    delta = (adv - x).flatten(1)
    size = torch.linalg.vector_norm(delta, {"linf": np.inf, "l2": 2, "l1": 1}[norm], dim=1)
    assert size.max() <= eps + 1e-5


@pytest.mark.parametrize("norm", attacks.NORMS)
def test_random_starts_are_fresh_and_uniform(net, images, norm):
    x, y = images
    first, second = (attacks.pgd(net, x, y, eps=0.1, steps=1, step_size=0.0, norm=norm) for _ in range(2))
    assert not torch.equal(first, second)
    big = torch.full((4000, 1, 2, 2), 0.5)
    delta = attacks.random_delta(big, 0.1, norm).flatten(1)
    if norm == "linf":
        assert abs(delta.mean()) < 0.003 and delta.std() == pytest.approx(0.2 / np.sqrt(12), rel=0.05)
    else:  # in a ball of dimension 4 the share within radius r is r^4
        length = torch.linalg.vector_norm(delta, {"l2": 2, "l1": 1}[norm], dim=1)
        assert (length < 0.05).float().mean() == pytest.approx(0.5**4, abs=0.02) and length.max() <= 0.1 + 1e-6
        assert abs(delta.mean()) < 0.002


def _art(net):
    from art.estimators.classification import PyTorchClassifier

    loss = torch.nn.CrossEntropyLoss()
    return PyTorchClassifier(net, loss, (1, 8, 8), 10, clip_values=(0.0, 1.0), device_type="cpu")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_equal_to_an_independent_library(images, norm):
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = models.light_cnn("swish", in_channels=1, image_size=8).eval()
    x, y = images[0].float(), images[1]
    if norm == "l2":  # away from the box: the libraries differ in whether box or ball comes last
        x = 0.4 + 0.2 * x
    eps = 0.1 if norm == "linf" else 0.3
    size = dict(norm=np.inf if norm == "linf" else 2, eps=eps, batch_size=64)
    onehot = torch.nn.functional.one_hot(y, 10).numpy()
    theirs = FastGradientMethod(_art(net), **size).generate(x.numpy(), onehot)
    net.eval()
    ours = attacks.fgsm(net, x, y, eps=eps, norm=norm)
    assert np.allclose(ours.numpy(), theirs, atol=2e-6)
    pgd = ProjectedGradientDescentPyTorch(
        _art(net), **size, eps_step=eps / 4, max_iter=10, num_random_init=0, verbose=False
    )
    theirs = pgd.generate(x.numpy(), onehot)
    net.eval()
    ours = attacks.pgd(net, x, y, eps=eps, step_size=eps / 4, steps=10, norm=norm, random_start=False, fast=False)
    # rounding may turn the sign of a gradient that is nearly zero: allow that in one pixel of a thousand
    assert (np.abs(ours.numpy() - theirs) > 1e-5).mean() < 1e-3


def test_one_step_is_the_sign_of_the_gradient(net, images):
    x, y = images
    v = x.clone().requires_grad_()
    gradient = torch.autograd.grad(torch.nn.functional.cross_entropy(net(v), y), v)[0]
    assert torch.equal(attacks.fgsm(net, x, y, eps=0.1), (x + 0.1 * gradient.sign()).clamp(0, 1))


def test_targeted_descends_towards_the_target(net, images):
    x, y = images
    target = (net(x).argmax(1) + 1) % 10
    adv = attacks.pgd(net, x, target, eps=0.3, steps=20, targeted=True)
    loss = torch.nn.functional.cross_entropy
    assert loss(net(adv), target) < loss(net(x), target)
    assert loss(net(attacks.pgd(net, x, y, eps=0.3)), y) > loss(net(x), y)


def test_restarts_keep_each_images_worst_case(net, images):
    """Success of several restarts is the union of single ones: no restart can undo another's success."""
    x, _ = images
    y = net(x).argmax(1)
    torch.manual_seed(5)
    eps = 0.02
    single = net(attacks.pgd(net, x, y, eps=eps, steps=2)).argmax(1) == y
    torch.manual_seed(5)
    many = net(attacks.pgd(net, x, y, eps=eps, steps=2, restarts=8)).argmax(1) == y
    assert not (many & ~single).any()


def test_later_restarts_see_survivors_only(images):
    x, y = images
    seen = []

    class Spy(torch.nn.Module):
        """Says y for the first five images of the batch whatever happens, never y for the others."""

        def forward(self, v):
            seen.append(len(v))
            keep = torch.tensor([(v0 - x[:5]).abs().flatten(1).amax(1).min() <= 0.1 + 1e-9 for v0 in v])
            logits = torch.zeros(len(v), 10, dtype=v.dtype) + 0 * v.sum()
            answer = torch.where(keep, 1.0, -1.0)[:, None].to(v.dtype)
            return logits + answer * torch.nn.functional.one_hot(torch.full((len(v),), 7), 10)

    attacks.pgd(Spy(), x, torch.full_like(y, 7), eps=0.1, steps=1, restarts=3)
    assert seen == [13, 13, 5, 5, 5, 5]


def test_no_trace_on_model_or_generator(images):
    model = models.light_cnn("kaf", in_channels=1, image_size=8).double().train()
    model[1].eval()  # mixed modes must come back as they were
    model[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    x, y = images
    copy, state = x.clone(), torch.get_rng_state()
    attacks.fgsm(model, x, y, eps=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    attacks.pgd(model, x, y, eps=0.1, steps=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and torch.equal(x, copy)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())


def test_works_under_no_grad_and_restores_after_an_error(net, images):
    x, y = images
    with torch.no_grad():
        assert not torch.equal(attacks.fgsm(net, x, y, eps=0.1), x)
    net.train()
    with pytest.raises(RuntimeError):
        attacks.fgsm(net, x[:, :, :3, :3], y, eps=0.1)
    assert net.training and all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    "change",
    [dict(eps=-0.1), dict(eps=float("nan")), dict(norm="l0"), dict(steps=0), dict(restarts=0),
     dict(restarts=2, random_start=False)],
)  # fmt: skip
def test_bad_options_get_one_line(net, images, change):
    with pytest.raises(ValueError) as error:
        attacks.pgd(net, *images, **({"eps": 0.1} | change))
    assert "\n" not in str(error.value)


def test_bad_images_and_labels_get_one_line(net, images):
    x, y = images
    for bad in (
        (x * 255, y),
        ((x * 255).byte(), y),
        (x, None),
        (x, y[:3]),
        (x, y.double()),
        (x - 1, y),
        (x * torch.nan, y),
    ):
        with pytest.raises(ValueError) as error:
            attacks.fgsm(net, *bad, eps=0.1)
        assert "\n" not in str(error.value)
