"""Attacks stay where they may, find what an independent library finds, and leave no trace."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kafnb import Evaluation, Recipe, attacks, evaluate, load_data, models, training
from kafnb.attacks import losses


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


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("surrogate", [False, True])
def test_an_image_whose_logits_are_nan_is_broken(images, early_stop, surrogate):
    """The argmax of NaN is 0, which may be the label; evaluation counts it as wrong."""

    class Fragile(torch.nn.Module):
        """Class 0 with certainty, and NaN above a mean of 0.55."""

        def forward(self, v):
            mean = v.flatten(1).mean(1, keepdim=True)
            return torch.cat([5 - mean, mean, -mean], 1).where(mean < 0.55, torch.nan)

    x, y = torch.full_like(images[0], 0.5), torch.zeros_like(images[1])
    model = Fragile()
    leads = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).double() if surrogate else None
    if surrogate:
        leads[1].weight.data[:] = torch.tensor([-1.0, 1, 0]).view(-1, 1)
    options = dict(eps=0.1, steps=4, surrogate=leads, early_stop=early_stop)
    for restarts in (1, 3):
        adv = attacks.pgd(model, x, y, restarts=restarts, **options)
        assert model(adv).isnan().any(1).all()
        assert evaluate.predict(model, adv).eq(-1).all()
    if early_stop:  # it leaves the batch where it broke
        assert (adv - x).mean() < 0.09
    reached = attacks.pgd(model, x, y, targeted=True, restarts=2, **options)  # NaN is no class, so no target
    assert not model(reached).isnan().any()


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
    with pytest.raises(ValueError):
        attacks.fgsm(net, x[:, :, :3, :3], y, eps=0.1)
    assert net.training and all(p.requires_grad for p in net.parameters())


def test_inference_mode_gets_one_line(net, images):
    fit = functools.partial(training.fit, net, load_data("digits"), Recipe(epochs=1))
    for call in (functools.partial(attacks.fgsm, net, *images, eps=0.1), fit):
        with torch.inference_mode(), pytest.raises(ValueError, match=r"^\w+ ?\w* needs gradients: call it outside .*$"):
            call()


@pytest.mark.parametrize(
    "change",
    [dict(eps=-0.1), dict(eps=float("nan")), dict(norm="l0"), dict(steps=0), dict(restarts=0),
     dict(restarts=2, random_start=False), dict(targeted=torch.tensor([True, False]))],
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", attacks.NORMS)
def test_images_in_half_precision_are_refused_in_one_line(images, dtype, norm):
    """Their rounding is of the size of eps: a pixel would leave the ball."""
    net = models.mlp("relu", hidden=(16,)).to(dtype).eval()
    with pytest.raises(ValueError, match=rf"^images must be float32 or float64 .*{dtype}: pass x\.float\(\); .*$"):
        attacks.pgd(net, images[0].to(dtype), images[1], eps=8 / 255, norm=norm)

    class Casts(torch.nn.Module):
        def forward(self, x):
            return net(x.to(dtype))

    x = images[0].float()
    adv = attacks.pgd(Casts(), x, images[1], eps=8 / 255, norm=norm)
    assert adv.dtype == x.dtype and attacks.balls.size(adv - x, norm).max() <= 8 / 255 + 1e-6


# --- losses, targets, schedules, early stop ----------------------------------------------------------------------


def test_losses_by_their_formulas():
    z, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(0, 5, (30,))
    for i in range(30):
        row, own = z[i].tolist(), int(y[i])
        others = [v for j, v in enumerate(row) if j != own]
        a, _, c = sorted(row, reverse=True)[:3]
        expected = {
            "ce": np.log(np.exp(row).sum()) - row[own],
            "margin": max(others) - row[own],
            "dlr": -(row[own] - max(others)) / (a - c),
        }
        for name, value in expected.items():
            assert losses.LOSSES[name](z, y)[i].item() == pytest.approx(value, abs=1e-9)
    wrong = z.argmax(1) != y
    assert torch.equal(losses.margin(z, y) > 0, wrong) and torch.equal(losses.dlr(z, y) > 0, wrong)
    assert torch.allclose(losses.dlr(7 * z, y), losses.dlr(z, y))  # no scale hides it
    with pytest.raises(ValueError, match="at least 3 classes"):
        losses.dlr(z[:, :2], y % 2)


@pytest.mark.parametrize("loss", list(losses.LOSSES))
@pytest.mark.parametrize("norm", attacks.NORMS)
def test_every_loss_and_norm_finds_something(images, loss, norm):
    torch.manual_seed(0)
    net = models.mlp("swish", hidden=(32,)).double().eval()
    x, _ = images
    y = net(x).argmax(1)
    eps = {"linf": 0.3, "l2": 2.0, "l1": 12.0}[norm]
    adv = attacks.pgd(net, x, y, eps=eps, steps=30, norm=norm, loss=loss)
    assert (net(adv).argmax(1) != y).float().mean() > 0.6


def test_early_stop_breaks_what_any_step_breaks(images):
    """The same steps one by one, nobody leaving: broken is who was misclassified at any of them."""
    torch.manual_seed(0)
    net = models.mlp("kwta", hidden=(32,)).double().eval()
    x = images[0].repeat(5, 1, 1, 1)
    x = (x + 0.1 * torch.rand_like(x)).clamp(0, 1)
    y = net(x).argmax(1)
    options = dict(eps=0.04, step_size=0.03, steps=6, fast=False)
    torch.manual_seed(3)
    stopped = attacks.pgd(net, x, y, early_stop=True, **options)
    torch.manual_seed(3)
    v = attacks.project(x, attacks.random_delta(x, 0.04), 0.04)
    ever = torch.zeros(len(x), dtype=torch.bool)
    for _ in range(6):
        ever |= net(v).argmax(1) != y
        v = attacks.project(x, v + 0.03 * attacks.input_gradient(net, v, y).sign() - x, 0.04)
    last = net(v).argmax(1) != y
    ever |= last
    assert torch.equal(net(stopped).argmax(1) != y, ever) and (ever & ~last).any() and not ever.all()


def test_early_stop_shrinks_the_batch_within_the_steps(images):
    x, y = images
    seen = []

    class Spy(torch.nn.Module):
        """Breaks one more image at each pass."""

        def forward(self, v):
            seen.append(len(v))
            logits = torch.zeros(len(v), 10, dtype=v.dtype) + 0 * v.sum()
            logits[1:, 7] = 1.0
            logits[:1, 3] = 1.0
            return logits

    attacks.pgd(Spy(), x, torch.full_like(y, 7), eps=0.1, steps=5, early_stop=True)
    assert seen[:5] == [13, 12, 11, 10, 9]


def test_every_target_finds_what_one_target_finds(net, images):
    x, _ = images
    y = net(x).argmax(1)
    options = dict(eps=0.05, steps=3, random_start=False)
    union = torch.zeros(len(x), dtype=torch.bool)
    for c in range(10):
        target = torch.full_like(y, c)
        adv = attacks.pgd(net, x, target, targeted=True, loss="ce", **options)
        union |= (net(adv).argmax(1) != y) & (target != y)
    every = net(attacks.pgd(net, x, y, targeted="all", **options)).argmax(1) != y
    assert torch.equal(every, union)


@pytest.mark.parametrize("change", [dict(loss="hinge"), dict(targeted="some")])
def test_unknown_names_get_one_line(net, images, change):
    with pytest.raises(ValueError) as error:
        attacks.pgd(net, *images, eps=0.1, **change)
    assert "\n" not in str(error.value)


def test_a_surrogate_leads_and_the_model_judges(images):
    torch.manual_seed(0)
    model, other = (models.mlp("swish", hidden=(32,)).double().eval() for _ in range(2))
    x, _ = images
    y = model(x).argmax(1)
    options = dict(eps=0.2, steps=5, random_start=False)
    adv = attacks.pgd(model, x, y, surrogate=other, **options)
    assert torch.allclose(adv, attacks.pgd(other, x, y, **options))
    stopped = attacks.pgd(model, x, y, surrogate=other, early_stop=True, **options)
    assert ((model(stopped).argmax(1) != y) >= (model(adv).argmax(1) != y)).all()


@pytest.mark.parametrize("scale", [1.0, 1e-13, 1e-20, 1e-37])
def test_an_l2_step_has_length_one_however_small_the_gradient(scale):
    g = scale * torch.randn(3, 1, 8, 8)
    step = attacks.steepest(g, "l2")
    assert torch.allclose(step.flatten(1).norm(dim=1), torch.ones(3), atol=1e-5)
    assert (attacks.steepest(torch.zeros(1, 4), "l2") == 0).all()
    assert attacks.steepest(torch.tensor([[float("nan"), 3.0, 4.0]]), "l2")[0].tolist() == pytest.approx([0, 0.6, 0.8])


def test_an_l1_step_uses_its_length_on_small_images(net, images):
    x, y = images
    for eps in (3.0, 6.0):  # a pixel has about half of 1 to go
        moved = (attacks.fgsm(net, x, y, eps=eps, norm="l1") - x).flatten(1).abs()
        assert (moved.sum(1) <= eps * (1 + 1e-6)).all() and moved.sum(1).mean() > 0.3 * eps


@pytest.mark.parametrize(
    "call",
    [
        lambda net, x, y: attacks.pgd(net, x, y, eps=8),
        lambda net, x, y: attacks.pgd(net, x, y, eps=torch.tensor(8.0)),
        lambda net, x, y: Recipe(eps=8),
        lambda net, x, y: Evaluation("pgd", eps=8),
    ],
)
def test_an_eps_of_8_is_refused(net, images, call):
    with pytest.raises(ValueError, match="did you mean 8 / 255"):
        call(net, *images)
    assert Evaluation("pgd", norm="l2", eps=8).eps == Evaluation("cw", eps=8).eps == 8


def test_labels_of_another_integer_type_are_refused_in_one_line(net, images):
    with pytest.raises(ValueError, match=r"int64.*long\(\)"):
        attacks.pgd(net, images[0], images[1].int(), eps=0.1)


def test_a_number_of_numpy_says_targeted(digits):
    net, (x, y) = models.build("mlp", "relu", digits).eval(), digits.test(6)
    given = [attacks.pgd(net, x, y, eps=0.1, targeted=t, random_start=False) for t in (True, np.True_, False)]
    assert torch.equal(given[0], given[1]) and not torch.equal(given[0], given[2])


def test_the_result_is_no_part_of_the_caller_s_graph(digits):
    net, (x, y) = models.build("mlp", "relu", digits).eval(), digits.test(6)
    assert not attacks.pgd(net, x.requires_grad_(), y, eps=0.1).requires_grad


def test_without_a_gradient_the_start_is_all_there_is(digits):
    class Detached(torch.nn.Module):
        def forward(self, x):
            return x.detach().flatten(1)[:, :10]

    x, y = digits.test(6)
    with pytest.warns(UserWarning, match="no gradient reaches the images"):
        adv = attacks.pgd(Detached(), x, y, eps=0.1, random_start=False)
    assert torch.equal(adv, x)
